"""Adapter files: export, layouts, comparison, merge, parity."""
