"""What every page has on which people vote on pairs: what a vote means, and what was skipped."""

from collections.abc import Mapping, Sequence

from mixfuse.fusion.http.statuses import RequestError
from mixfuse.fusion.ui.frame import Visit
from mixfuse.fusion.ui.votes import VOTES

_CHOICES = ("left", "right", "tie", "bad")
# In the address of the page; what was skipped before these comes again at the end.
_MOST_SKIPPED = 60


def choice_of(form: Mapping[str, str], *, swapped: bool) -> str:
    """Returns a vote from its form, one of `VOTES`.

    Args:
        form: Its fields.
        swapped: The pair's second answer stood on the left.

    Raises:
        RequestError: It is none.
    """
    choice = form.get("choice")
    if choice not in _CHOICES:
        raise RequestError(f"'choice' must be one of {', '.join(_CHOICES)}", code="invalid_value", param="choice")
    return VOTES[(choice == "right") != swapped] if choice in ("left", "right") else choice


def skipped_by(visit: Visit) -> list[str]:
    """Returns what the visitor skipped; nothing where that was too long ago."""
    found = visit.unseal(visit.request.query_params.get("skip", ""))
    return found[1:] if isinstance(found, list) and found[:1] == ["skipped"] else []


def skipping(visit: Visit, skipped: Sequence[str], one: str) -> str:
    """Returns the field `skip` of a page's address after one more was skipped; it names nothing to its reader."""
    return visit.seal(["skipped", *[*skipped, one][-_MOST_SKIPPED:]])
