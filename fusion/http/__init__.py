"""The gateway's HTTP API and its clients' keys."""
