"""Calls to models: one call, its failures, its limits and budgets, and the pool that makes several at once."""
