"""The gateway: its HTTP API, API keys, metrics and spans, and `mixfuse ask`, its client."""
