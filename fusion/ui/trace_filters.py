"""The filters of a list of traces: their form, what its fields mean, and places in the list."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from sqlalchemy import Connection, text

from mixfuse.fusion.config import FusionConfig
from mixfuse.fusion.http.statuses import RequestError
from mixfuse.fusion.store.trace_facts import Filters, Place, storable, values_of
from mixfuse.fusion.ui.frame import number_of

MARKS = (
    ("failed", "something failed"),
    ("disagreement", "disagreement"),
    ("flipped", "the judge flipped"),
    ("unsure", "low confidence"),
    ("feedback", "has feedback"),
    ("no_feedback", "no feedback yet"),
)
_FILTERS = ("words", "mode", "member", "key", "reason", "outcome", "min_cost", "min_s", "since", "until")


@dataclass(frozen=True)
class FilterForm:
    """What `trace_filters.html.jinja` shows.

    Attributes:
        menus: (field, label, [(value, title)]).
        marks: (field, label) of those that are ticked.
        given: Field → what was asked for.
        filtered: Whether anything was.
    """

    menus: list[tuple[str, str, list[tuple[str, str]]]]
    marks: tuple[tuple[str, str], ...]
    given: dict[str, str | None]
    filtered: bool


def filter_form(
    connection: Connection, given: Mapping[str, str], owner: str | None, config: FusionConfig
) -> FilterForm:
    """Returns the form, filled in with a query; its menus have what there is among the newest traces.

    Args:
        connection: The database.
        given: The query of the page.
        owner: The API key whose traces are shown; None for all.
        config: Names the members.
    """
    values = values_of(connection, owner)
    menus = [("mode", "Mode", _options(values["mode"]))]
    menus.append(("member", "Member", _options([member.name for member in config.members])))
    if owner is None:
        keys = [(key, name) for key, name in connection.execute(text("SELECT id, name FROM api_keys ORDER BY name"))]
        menus += [("key", "Key", keys)] if keys else []
    menus += [(name, name.capitalize(), _options(values[name])) for name in ("reason", "outcome")]
    asked = {name: given.get(name) for name in (*_FILTERS, *(name for name, _ in MARKS))}
    return FilterForm(menus, MARKS, asked, any(asked.values()))


def filters_of(given: Mapping[str, str], owner: str | None) -> Filters:
    """Reads the filters; with an API key only its own traces are looked through.

    Raises:
        RequestError: A number or a time is none.
    """
    said = {name: given.get(name) or None for name in _FILTERS}
    seconds = _number(said["min_s"], "min_s")
    return Filters(
        mode=said["mode"],
        member=said["member"],
        key_id=said["key"] if owner is None else owner,
        reason=said["reason"],
        outcome=said["outcome"],
        min_cost=_number(said["min_cost"], "min_cost"),
        min_ms=None if seconds is None else 1000 * seconds,
        since=_time(said["since"], "since"),
        until=_time(said["until"], "until"),
        words=said["words"],
        **{name: given.get(name) == "1" for name, _ in MARKS},
    )


def _number(value: str | None, name: str) -> float | None:
    return None if value is None else number_of(value, name)


def _time(value: str | None, name: str) -> float | None:
    if value is None:
        return None
    try:
        return datetime.fromisoformat(value).replace(tzinfo=UTC).timestamp()
    except ValueError:
        message = f"{name!r} must be a day and a time such as 2026-05-01T12:00, not {value[:100]!r}"
        raise RequestError(message, code="invalid_value", param=name) from None


def place_of(value: str | None) -> Place | None:
    """Returns the place in a list that `written` wrote; None for the newest.

    Raises:
        RequestError: It is none.
    """
    if value is None:
        return None
    at, _, trace_id = value.partition("~")
    return Place(number_of(at, "after"), storable(trace_id))


def written(place: Place | None) -> str | None:
    """Returns a place in a list as the query of a page has it."""
    return None if place is None else f"{place.at!r}~{place.id}"


def _options(values: list[str]) -> list[tuple[str, str]]:
    return [(value, value) for value in values]
