"""The processes of a run: joining, checkpoints, signals, dead ranks."""
