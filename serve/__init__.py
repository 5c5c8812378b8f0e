"""Serving: adapter directories → a running vLLM with one adapter revision per role. Knows nothing of training."""
