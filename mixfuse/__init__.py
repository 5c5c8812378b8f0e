"""The roof: the command line and the programs in which the rooms work together.

`mixfuse.contracts`, `mixfuse.train`, `mixfuse.serve` and `mixfuse.fusion` are links to the top-level folders
(docs/architecture.md).
"""

__version__ = "0.1.0"
