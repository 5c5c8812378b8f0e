"""A file for each page of the gateway; a new file here is a new page (see `mixfuse.fusion.ui`)."""
