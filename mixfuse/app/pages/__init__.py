"""Pages that show roles or runs; a new file here is a new page (see `mixfuse.fusion.ui`)."""
