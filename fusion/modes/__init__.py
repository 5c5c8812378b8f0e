"""The modes: each file but `registry` is one way to answer a request, and the file's name is the mode's.

A new mode is one new file here with a `MODE`; see `mixfuse.fusion.modes.registry.Mode`.
"""
