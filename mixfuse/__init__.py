"""The contracts the three rooms meet at, and the command line.

Rooms (`train`, `serve`, `fusion`) import from here, never from one another, except where the command line composes
them. Nothing in this package imports torch, transformers or vllm.
"""

__version__ = "0.1.0"
