"""Objects of a request in another API's form, read key by key: what is not read is refused by name."""

from collections.abc import Iterator
from typing import Any, TypeVar, overload

from mixfuse.fusion.http.statuses import RequestError

Kind = TypeVar("Kind")

_NAMES = {str: "a text", int: "a whole number", bool: "true or false", list: "a list", dict: "an object"}


class Fields:
    """An object of a request body. A key whose value is null counts as absent.

    Args:
        value: The object.
        place: Where it stands in the body, for errors: "input.2.content.0"; empty for the body itself.

    Raises:
        RequestError: It is not an object.
    """

    def __init__(self, value: object, place: str = "") -> None:
        if not isinstance(value, dict):
            what = f"{place!r}" if place else "the request body"
            raise RequestError(f"{what} must be a JSON object", code="invalid_value", param=place or None)
        self.place = place
        self._left: dict[str, Any] = {key: found for key, found in value.items() if found is not None}

    def at(self, key: str) -> str:
        """Returns where a key stands in the body."""
        return f"{self.place}.{key}" if self.place else key

    @overload
    def take(self, key: str, kind: type[Kind]) -> Kind | None: ...
    @overload
    def take(self, key: str) -> Any: ...
    def take(self, key: str, kind: type[Any] | None = None) -> Any:
        """Returns the value of a key, of the kind given; None if it is absent.

        Raises:
            RequestError: It is of another kind.
        """
        value = self._left.pop(key, None)
        if value is not None and kind is not None and not _is(value, kind):
            raise self.wrong(key, f"must be {_NAMES.get(kind, kind.__name__)}")
        return value

    def need(self, key: str, kind: type[Kind]) -> Kind:
        """Returns the value of a key that must be there.

        Raises:
            RequestError: It is absent, or of another kind.
        """
        value = self.take(key, kind)
        if value is None:
            place = self.at(key)
            raise RequestError(f"missing key {place!r}", code="missing_parameter", param=place)
        return value

    def objects(self, key: str) -> Iterator["Fields"]:
        """Yields the objects of a list, one after another; none if the key is absent."""
        for number, item in enumerate(self.take(key, list) or ()):
            yield Fields(item, f"{self.at(key)}.{number}")

    def only(self, key: str, *neutral: object) -> None:
        """Takes a key that is supported with these values alone, with which it changes nothing.

        Raises:
            RequestError: It has another value.
        """
        value = self.take(key)
        if value is not None and value not in neutral:
            raise self.unsupported(key)

    def ignore(self, *keys: str) -> None:
        """Takes keys that concern the request and not its answer, or that are outputs sent back."""
        for key in keys:
            self._left.pop(key, None)

    def end(self) -> None:
        """Refuses what has not been taken.

        Raises:
            RequestError: A key is left.
        """
        for key in self._left:
            raise self.unsupported(key)

    def wrong(self, key: str, fault: str) -> RequestError:
        """Returns the refusal of a key's value."""
        place = self.at(key)
        return RequestError(f"{place!r} {fault}", code="invalid_value", param=place)

    def unsupported(self, key: str) -> RequestError:
        """Returns the refusal of a key, or of its value."""
        place = self.at(key)
        return RequestError(f"{place!r} is not supported here", code="unsupported_parameter", param=place)


def _is(value: object, kind: type[Any]) -> bool:
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
