"""`response_format`: the form that an answer must have, and the check that it has it.

The gateway checks the answer that it returns against the schema, whatever the endpoints do with it. The schema is the
client's and the answer a member's: patterns are searched in linear time, and a check has an end.
"""

import json
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import jsonschema
import orjson
from jsonschema.protocols import Validator
from referencing import Registry
from referencing.exceptions import Unresolvable

from mixfuse.contracts.linear_patterns import Pattern

MAX_SCHEMA_DEPTH = 64
MAX_SCHEMA_BYTES = 128 << 10
"""OpenAI takes 120 000 characters. To check the schema itself takes 4 s a megabyte."""
CHECK_S = 1.0
"""The longest that one answer is compared with its schema, in seconds: a `$ref` can double the work with each level."""

_until: ContextVar[float] = ContextVar("until")
_compiled = lru_cache(maxsize=256)(Pattern)


@dataclass(frozen=True)
class OutputFormat:
    """A request's `response_format`, other than plain text.

    Attributes:
        sent: The parameter that members and synthesizer get.
        validator: Checks its JSON schema; None if any JSON object is allowed.
    """

    sent: dict[str, Any]
    validator: Validator | None = field(default=None, repr=False)

    def fault(self, text: str) -> str | None:
        """Returns what is wrong with an answer, in one line; None if nothing is. May take `CHECK_S`."""
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            return f"the answer is not JSON: {error}"
        if self.validator is None:
            return None if isinstance(value, dict) else "the answer is not a JSON object"
        _until.set(time.monotonic() + CHECK_S)
        try:
            misfit = next(self.validator.iter_errors(value), None)
        except TimeoutError:
            return f"the answer cannot be compared with its schema within {CHECK_S:g} s"
        except (Unresolvable, RecursionError) as broken:
            return f"the schema cannot be applied: {broken}"
        if misfit is None:
            return None
        return f"the answer does not fit the schema at {misfit.json_path}: {misfit.message[:300]}"


def read(response_format: object) -> OutputFormat | None:
    """Reads `response_format`.

    Returns:
        None for plain text.

    Raises:
        ValueError: It has no known type, or its schema is not a JSON schema.
    """
    if not isinstance(response_format, dict):
        raise ValueError("'response_format' must be an object")
    match response_format.get("type"):
        case "text":
            return None
        case "json_object":
            return OutputFormat(response_format)
        case "json_schema":
            return OutputFormat(response_format, _validator(response_format.get("json_schema")))
    raise ValueError("'response_format.type' must be 'text', 'json_object' or 'json_schema'")


def _validator(named: object) -> Validator:
    if (
        not isinstance(named, dict)
        or not isinstance(named.get("name"), str)
        or not isinstance(named.get("schema"), dict)
    ):
        raise ValueError("'response_format.json_schema' needs a 'name' and a 'schema'")
    schema = named["schema"]
    if len(orjson.dumps(schema)) > MAX_SCHEMA_BYTES:
        raise ValueError(f"'response_format.json_schema.schema' is longer than {MAX_SCHEMA_BYTES >> 10} KiB")
    _check_references(schema, 0)
    kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    try:
        kind.check_schema(schema)
    except jsonschema.SchemaError as error:
        raise ValueError(f"'response_format.json_schema.schema' is not a JSON schema: {error.message}") from None
    # An empty registry: jsonschema's own would fetch the URL of a `$ref`, which the client chooses.
    validator: Validator = _bounded(kind)(schema, registry=Registry())
    return validator


@lru_cache
def _bounded(kind: Any) -> Any:
    """Returns a kind of validator that searches patterns in linear time and stops at the time in `_until`."""
    own = {
        "pattern": _pattern,
        "patternProperties": _pattern_properties,
        "additionalProperties": _additional_properties,
        "uniqueItems": _unique_items,
    }
    return jsonschema.validators.extend(
        kind, {name: _timed(own.get(name, keyword)) for name, keyword in kind.VALIDATORS.items()}
    )


def _timed(keyword: Callable[..., Any]) -> Callable[..., Any]:
    def check(*arguments: Any) -> Any:
        if time.monotonic() > _until.get():
            raise TimeoutError
        return keyword(*arguments)

    return check


def _pattern(validator: Any, pattern: str, instance: Any, _schema: Any) -> Iterator[jsonschema.ValidationError]:
    if validator.is_type(instance, "string") and not _compiled(pattern).found_in(instance):
        yield jsonschema.ValidationError(f"{instance!r} does not match {pattern!r}")


def _pattern_properties(
    validator: Any, patterns: dict[str, Any], instance: Any, _schema: Any
) -> Iterator[jsonschema.ValidationError]:
    if validator.is_type(instance, "object"):
        for pattern, part in patterns.items():
            for key, value in instance.items():
                if _compiled(pattern).found_in(key):
                    yield from validator.descend(value, part, path=key, schema_path=pattern)


def _additional_properties(
    validator: Any, rule: Any, instance: Any, schema: dict[str, Any]
) -> Iterator[jsonschema.ValidationError]:
    if not validator.is_type(instance, "object"):
        return
    patterns = [_compiled(pattern) for pattern in schema.get("patternProperties", ())]
    named = schema.get("properties", {})
    extra = [key for key in instance if key not in named and not any(pattern.found_in(key) for pattern in patterns)]
    if validator.is_type(rule, "object"):
        for key in extra:
            yield from validator.descend(instance[key], rule, path=key)
    elif not rule and extra:
        yield jsonschema.ValidationError(f"unexpected properties: {', '.join(map(repr, extra))}")


def _unique_items(validator: Any, unique: Any, instance: Any, _schema: Any) -> Iterator[jsonschema.ValidationError]:
    """As jsonschema's, which compares every item with every other one."""
    if unique and validator.is_type(instance, "array"):
        seen = {json.dumps(_canonical(item), sort_keys=True) for item in instance}
        if len(seen) < len(instance):
            yield jsonschema.ValidationError(f"{instance!r} has non-unique elements")


def _canonical(value: Any) -> Any:
    """Returns a JSON value in which equal numbers are written alike: 1.0 is 1."""
    if isinstance(value, dict):
        return {key: _canonical(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_canonical(part) for part in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _check_references(schema: object, depth: int) -> None:
    """Refuses a `$ref` to outside the schema, a pattern that may take for ever, and a schema too deep to walk."""
    if depth > MAX_SCHEMA_DEPTH:
        raise ValueError(f"'response_format.json_schema.schema' is nested more than {MAX_SCHEMA_DEPTH} levels deep")
    if isinstance(schema, dict):
        reference = schema.get("$ref")
        if isinstance(reference, str) and not reference.startswith("#"):
            raise ValueError(f"'response_format.json_schema.schema': $ref {reference!r} points outside the schema")
        if "unevaluatedProperties" in schema:
            raise ValueError("'unevaluatedProperties' is not supported here; 'additionalProperties' is")
        patterns = schema.get("patternProperties")
        for pattern in (schema.get("pattern"), *(patterns if isinstance(patterns, dict) else ())):
            if isinstance(pattern, str):
                try:
                    _compiled(pattern)
                except ValueError as error:
                    raise ValueError(f"'response_format.json_schema.schema': {error}") from None
    for part in schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ():
        _check_references(part, depth + 1)
