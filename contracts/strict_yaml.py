"""The config contract: strict YAML, one file per job, with `key=value` overrides.

Each room defines its own pydantic models on `Strict` (training recipes, the serve config, the fusion config). This
module loads them and turns every mistake into one line that names the key and the nearest known key.
"""

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from mixfuse.contracts.errors import MixfuseError


class Strict(BaseModel):
    """A frozen model that refuses unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


Model = TypeVar("Model", bound=BaseModel)


def load(path: Path, model: type[Model], overrides: Iterable[str] = ()) -> Model:
    """Loads a YAML file into `model`.

    Args:
        path: The YAML file.
        model: The model to validate against.
        overrides: `dotted.key=value` strings; the value is parsed as YAML. (YAML 1.1 parses 1e-4 as a string; pydantic
            converts it where `model` has a number.)

    Raises:
        MixfuseError: The file is missing or not a YAML mapping, a key is unknown or missing, or a value does not fit.
    """
    data = read_mapping(path)
    return validate(override(data, overrides), model, source=str(path))


def read_mapping(path: Path) -> dict[str, Any]:
    """Reads a YAML (or JSON) file that holds one mapping; an empty file is an empty mapping.

    Raises:
        MixfuseError: The file is missing, or holds something else.
    """
    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MixfuseError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise MixfuseError(f"{path} is a folder; name a .yaml file") from None
    except OSError as error:
        raise MixfuseError(f"{path}: cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise MixfuseError(f"{path}: not valid YAML: {error}") from None
    data = {} if data is None else data
    if not isinstance(data, dict):
        raise MixfuseError(f"{path}: expected a mapping of keys, found {type(data).__name__}")
    return data


def override(data: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Sets `dotted.key=value` strings in parsed data, which is changed and returned.

    Raises:
        MixfuseError: An override does not have this form.
    """
    for assignment in overrides:
        _override(data, assignment)
    return data


def validate(data: Any, model: type[Model], *, source: str) -> Model:
    """Validates parsed data; the error line begins with `source`.

    Raises:
        MixfuseError: As in `load`.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise MixfuseError(f"{source}: {describe(error, model)}") from None


def describe(error: ValidationError, model: type[BaseModel]) -> str:
    """Describes the first mistake in one line; for an unknown key it names the nearest known one."""
    errors = error.errors()
    # A mistyped key is reported twice, as unknown and as missing; the unknown one is what the user wrote.
    first = next((entry for entry in errors if entry["type"] == "extra_forbidden"), errors[0])
    location = [part for part in first["loc"] if not (isinstance(part, str) and part.startswith("function-"))]
    dotted = ".".join(str(part) for part in location)
    if first["type"] == "extra_forbidden":
        known = _fields_at(model, location[:-1])
        near = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.4)
        prefix = "".join(f"{part}." for part in location[:-1])
        hint = f"did you mean {prefix + near[0]!r}?" if near else f"known keys: {', '.join(sorted(known))}"
        return f"unknown key {dotted!r}; {hint}"
    if first["type"] == "missing":
        return f"missing key {dotted!r}"
    message = first["msg"].removeprefix("Value error, ")
    return f"{dotted!r}: {message} (got {first['input']!r})" if dotted else message


def _override(data: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    parts = key.split(".")
    if not separator or not all(parts):
        raise MixfuseError(f"override {override!r} is not of the form key=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise MixfuseError(f"override {override!r}: the value is not valid YAML") from None
    node = data
    for part in parts[:-1]:
        child = node.setdefault(part, {})
        if not isinstance(child, dict):
            raise MixfuseError(f"override {override!r}: {part!r} is not a group of keys")
        node = child
    node[parts[-1]] = value


def _fields_at(model: type[BaseModel], location: Sequence[int | str]) -> list[str]:
    """The field names of the model at the location of a validation error."""
    current: type[BaseModel] | None = model
    for part in location:
        if current is None or isinstance(part, int):
            continue
        field = current.model_fields.get(part)
        current = _model_in(field.annotation) if field else current
    return list(current.model_fields) if current else []


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in get_args(annotation):
        if model := _model_in(argument):
            return model
    return None
