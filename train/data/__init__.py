"""Rows on disk become what a stage trains on."""
