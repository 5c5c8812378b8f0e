"""Labelled answers for training: collected, judged and explained."""
