"""Contracts: what the rooms agree on. Imports no room."""
