"""Data: from files on disk to the batches that a stage trains on."""
