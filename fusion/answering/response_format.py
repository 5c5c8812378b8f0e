"""`response_format`: the form that an answer must have, and the check that it has it.

The gateway checks the answer that it returns against the schema, whatever the endpoints do with it.
"""

import json
from dataclasses import dataclass, field
from typing import Any

import jsonschema
from jsonschema.protocols import Validator
from referencing import Registry
from referencing.exceptions import Unresolvable

MAX_SCHEMA_DEPTH = 64


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
        """Returns what is wrong with an answer, in one line; None if nothing is."""
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            return f"the answer is not JSON: {error}"
        if self.validator is None:
            return None if isinstance(value, dict) else "the answer is not a JSON object"
        try:
            misfit = next(self.validator.iter_errors(value), None)
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
    _check_references(schema, 0)
    kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    try:
        kind.check_schema(schema)
    except jsonschema.SchemaError as error:
        raise ValueError(f"'response_format.json_schema.schema' is not a JSON schema: {error.message}") from None
    # An empty registry: jsonschema's own would fetch the URL of a `$ref`, which the client chooses.
    validator: Validator = kind(schema, registry=Registry())
    return validator


def _check_references(schema: object, depth: int) -> None:
    """Refuses a `$ref` to outside the schema, and a schema so deep that walking it would overflow the stack."""
    if depth > MAX_SCHEMA_DEPTH:
        raise ValueError(f"'response_format.json_schema.schema' is nested more than {MAX_SCHEMA_DEPTH} levels deep")
    if isinstance(schema, dict):
        reference = schema.get("$ref")
        if isinstance(reference, str) and not reference.startswith("#"):
            raise ValueError(f"'response_format.json_schema.schema': $ref {reference!r} points outside the schema")
    for part in schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ():
        _check_references(part, depth + 1)
