"""Starting processes on one machine or many, and checking the machines first."""
