"""How long work shows how far it is: a bar on standard error."""

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


def bar(shown: bool) -> Progress:
    """A bar that counts what is done of how many; a context manager, to which tasks are added.

    Args:
        shown: Whether it is drawn at all.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), disable=not shown)
