"""What outlives a request: traces, their spool, exports and cached answers."""
