"""The modes: each file but the registry is one way to make an answer, and is called as the mode is."""
