"""Evaluations of judges and of fusion, with their statistics and reports."""
