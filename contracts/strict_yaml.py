"""The config contract: strict YAML, one file per job, with `key=value` overrides.

Each room defines its own pydantic models on `Strict` (training recipes, the serve config, the fusion config). This
module loads them and turns every mistake into one line that names the key and the nearest known key.
"""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.files import shown
from mixfuse.contracts.yaml_text import parse


class Strict(BaseModel):
    """A frozen model that refuses unknown keys, and numbers that are no numbers: a limit of `.inf` limits nothing."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


_DASHES = "\u2010\u2011\u2012\u2013\u2014\u2015\u2212\ufe58\ufe63\uff0d"


def odd_dash(text: str) -> str | None:
    """Names the first dash in a text that looks like `-` and is another character; None if there is none."""
    found = next((letter for letter in text if letter in _DASHES), None)
    return None if found is None else f"{found!r} (U+{ord(found):04X}) in {text[:80]!r} is not the '-' of the keyboard"


Model = TypeVar("Model", bound=BaseModel)

_MOST_BYTES = 16 << 20
_MOST_KEYS = 1000

_KINDS: Mapping[str, tuple[frozenset[str], str]] = {
    "serve config": (frozenset({"engine"}), "mixfuse serve"),
    "fusion config": (frozenset({"members"}), "mixfuse gateway"),
    "loop config": (frozenset({"rounds", "traces"}), "mixfuse loop"),
    "training recipe": (frozenset({"base", "optimizer"}), "mixfuse train"),
    "spec of pairs": (frozenset({"sources"}), "mixfuse pairs build"),
    "task file": (frozenset({"tasks"}), "mixfuse tasks make"),
}
"""Each kind of config: the keys that tell it from the others, and a command that reads it."""


def load(path: Path, model: type[Model], overrides: Iterable[str] = ()) -> Model:
    """Loads a YAML file into `model`.

    Args:
        path: The YAML file.
        model: The model to validate against.
        overrides: `dotted.key=value` strings; the value is parsed as YAML.

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
        with Path(path).open("rb") as stream:
            content = stream.read(_MOST_BYTES + 1)
    except FileNotFoundError:
        raise MixfuseError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise MixfuseError(f"{path} is a folder; name a .yaml file") from None
    except OSError as error:
        raise MixfuseError(f"{path}: cannot be read: {error.strerror}") from None
    if len(content) > _MOST_BYTES:
        raise MixfuseError(f"{path}: larger than {_MOST_BYTES >> 20} MiB, which no such file is")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise MixfuseError(f"{path}:{line}: not valid YAML: it is not UTF-8 text") from None
    data = parse(text, str(path))
    data = {} if data is None else data
    if not isinstance(data, dict):
        raise MixfuseError(f"{path}: expected a mapping of keys, found {type(data).__name__}")
    return data


def override(data: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Sets `dotted.key=value` strings in parsed data, which is changed and returned.

    Raises:
        MixfuseError: An override does not have this form, or sets what another one sets.
    """
    given: set[str] = set()
    for assignment in overrides:
        key = assignment.partition("=")[0]
        for other in given:
            if f"{key}.".startswith(f"{other}.") or f"{other}.".startswith(f"{key}."):
                raise MixfuseError(f"override {assignment[:200]!r}: {other!r} was given before; give a key once")
        given.add(key)
        _override(data, assignment)
    return data


def validate(data: Any, model: type[Model], *, source: str) -> Model:
    """Validates parsed data; the error line begins with `source`.

    Raises:
        MixfuseError: As in `load`.
    """
    if isinstance(data, dict) and len(data) > _MOST_KEYS:
        data = _without_all_unknown_but_one(data, model)
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise MixfuseError(f"{source}: {_other_kind(data, model) or describe(error, model)}") from None


def _without_all_unknown_but_one(data: dict[Any, Any], model: type[BaseModel]) -> dict[Any, Any]:
    """The data with the first unknown key alone, which is refused: pydantic would describe each of a million."""
    known = {name for name in (*model.model_fields, *(field.alias for field in model.model_fields.values())) if name}
    first = next((key for key in data if key not in known), None)
    return {key: value for key, value in data.items() if key in known or key == first}


def _other_kind(data: Any, model: type[BaseModel]) -> str | None:
    """Says that a config is of another kind than the one wanted, where its keys show that; None otherwise."""
    if not isinstance(data, dict):
        return None
    keys, fields = data.keys(), model.model_fields.keys()
    wanted = next((kind for kind, (own, _) in _KINDS.items() if own <= fields), None)
    if wanted is None or _KINDS[wanted][0] <= keys:
        return None
    found = next((kind for kind, (own, _) in _KINDS.items() if own <= keys and not own <= fields), None)
    if found is None:
        return None
    own, command = _KINDS[found]
    named = " and ".join(repr(key) for key in sorted(own))
    return f"this is a {found} (it has {named}), and a {wanted} is wanted here; `{command}` reads it"


def describe(error: ValidationError, model: type[BaseModel]) -> str:
    """Describes the first mistake in one line; for an unknown key it names the nearest known one."""
    errors = error.errors()
    # A mistyped key is reported twice, as unknown and as missing; the unknown one is what the user wrote.
    first = next((entry for entry in errors if entry["type"] == "extra_forbidden"), errors[0])
    wrong = first["loc"][-1] if first["type"] == "extra_forbidden" and first["loc"] else first["input"]
    dash = odd_dash(wrong) if isinstance(wrong, str) else None
    return _described(first, model) + (f"; {dash}" if dash else "")


def _described(first: ErrorDetails, model: type[BaseModel]) -> str:
    location = [part for part in first["loc"] if not (isinstance(part, str) and part.startswith("function-"))]
    dotted = shown(".".join(str(part) for part in location))
    if first["type"] == "extra_forbidden":
        known = _fields_at(model, location[:-1])
        near = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.4)
        prefix = "".join(f"{part}." for part in location[:-1])
        hint = f"did you mean {prefix + near[0]!r}?" if near else f"known keys: {', '.join(sorted(known))}"
        return f"unknown key {dotted!r}; {hint}"
    if first["type"] == "missing":
        return f"missing key {dotted!r}"
    if first["type"] == "invalid_key":
        return f"unknown key {dotted!r}; a key is a name here"
    message = first["msg"].removeprefix("Value error, ")
    return f"{dotted!r}: {message} (got {repr(first['input'])[:500]})" if dotted else message


def _override(data: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    parts = key.split(".")
    if not separator or not all(parts):
        raise MixfuseError(f"override {override!r} is not of the form key=value")
    try:
        value = parse(text, "value")
    except MixfuseError as error:
        problem = str(error).partition("not valid YAML: ")[2]
        raise MixfuseError(f"override {override[:200]!r}: the value is not valid YAML: {problem}") from None
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
