"""One rank among several: joining, checkpoints, signals, dead ranks."""
