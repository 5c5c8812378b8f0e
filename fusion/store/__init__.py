"""What outlives a request: traces, their spool, their export as training data, and cached answers."""
