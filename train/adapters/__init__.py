"""Adapter files: saving, export, layouts, comparison, merging, parity."""
