"""The main job, end to end, through the `mixfuse` command: see scripts/demo."""
