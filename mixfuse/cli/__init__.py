"""The `mixfuse` command line."""
