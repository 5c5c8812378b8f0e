"""One call to one model: limits, budgets, failures, and the pool of models."""
