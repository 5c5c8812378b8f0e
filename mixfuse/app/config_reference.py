"""Tables of config keys for the docs, made from the pydantic models, so that docs and code always agree.

`python -m mixfuse.app.config_reference docs/training.md` writes the tables between the page's marks
`<!-- keys: MODULE:MODEL -->` and `<!-- end -->`. A test compares the page with the models. For a file in `SCHEMAS` the
command writes the JSON schema of its model.
"""

import importlib
import inspect
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from mixfuse.contracts.files import write_json, write_text
from mixfuse.contracts.strict_yaml import Strict

SCHEMAS = {"docs/adapter-manifest.schema.json": "mixfuse.contracts.adapter:Manifest"}

_TABLE = re.compile(r"(<!-- keys: (\S+):(\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def models_in(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    """Yields the model and the models in its fields, each once and after the model that refers to it."""
    models = [model]
    for current in models:
        yield current
        for field in current.model_fields.values():
            models += [part for part in _models(field.annotation) if part not in models]


def meanings(model: type[BaseModel]) -> dict[str, str]:
    """Returns field → its text under `Attributes:` in the docstring of the class or of a base class."""
    text_of: dict[str, str] = {}
    for base in reversed(model.__mro__):
        if base in (Strict, BaseModel, object) or not issubclass(base, BaseModel):
            continue
        _, _, attributes = inspect.cleandoc(base.__doc__ or "").partition("Attributes:\n")
        name = ""
        for line in attributes.splitlines():
            if entry := re.match(r"    (\w+): (.*)", line):
                name, text_of[entry[1]] = entry[1], entry[2]
            elif line.startswith("        ") and name:
                text_of[name] += " " + line.strip()
            else:
                name = ""
    return {name: text for name, text in text_of.items() if name in model.model_fields}


def table(model: type[BaseModel], *, inherited: bool = True) -> str:
    """Returns a Markdown table of the model's keys: key, type, default, meaning.

    Args:
        model: The model.
        inherited: Whether to list inherited keys, too. A key whose default the model changes is always listed.
    """
    bases = [base for base in model.__mro__[1:] if issubclass(base, Strict) and base is not Strict]
    known = {name: field for base in bases for name, field in base.model_fields.items()}
    meaning_of = meanings(model)
    lines = ["| Key | Type | Default | Meaning |", "| --- | --- | --- | --- |"]
    for name, field in model.model_fields.items():
        if not inherited and name in known and repr(known[name]) == repr(field):
            continue
        meaning = meaning_of.get(name, "").replace("|", "\\|")
        lines.append(f"| `{name}` | {_type(field)} | {_default(field)} | {meaning} |")
    return "\n".join(lines)


def schema(model: type[BaseModel]) -> dict[str, Any]:
    """Returns the model's JSON schema (draft 2020-12), with the descriptions from the classes' docstrings."""
    written = model.model_json_schema()
    for part in models_in(model):
        described = written if part is model else written["$defs"][part.__name__]
        described["description"] = inspect.cleandoc(part.__doc__ or "").partition("\n")[0]
        for name, meaning in meanings(part).items():
            described["properties"][name]["description"] = meaning
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **written}


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models(argument)


def _type(field: FieldInfo) -> str:
    """Returns the type in YAML's terms, with its bounds."""
    bounds = [f"{sign} {value:g}" for sign, value in _bounds(field.metadata)]
    return " ".join([_type_name(field.annotation), *bounds])


def _bounds(metadata: Any) -> Iterator[tuple[str, float]]:
    signs = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}
    for entry in metadata:
        for name, sign in signs.items():
            value = getattr(entry, name, None)
            if isinstance(value, (int, float)):
                yield sign, value


def _type_name(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        bounds = [f"{sign} {value:g}" for sign, value in _bounds(annotation.__metadata__)]
        return " ".join([_type_name(arguments[0]), *bounds])
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(_type_name(argument) for argument in arguments if argument is not type(None))
    if origin in (tuple, list):
        if origin is tuple and Ellipsis not in arguments:
            return "[" + ", ".join(_type_name(argument) for argument in arguments) + "]"
        return f"list of {_type_name(arguments[0])}"
    if origin is dict:
        return f"{{{_type_name(arguments[0])}: {_type_name(arguments[1])}}}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"group `{annotation.__name__}`"
    names = {int: "integer", float: "number", str: "text", bool: "`true`, `false`", Path: "path"}
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is None:
        return "unset"
    if isinstance(value, BaseModel):
        return "its own"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, tuple):
        return f"`{list(value)}`"
    return f"`{value}`"


def rewritten(page: str) -> str:
    """Returns the page with new tables."""

    def fill(match: re.Match[str]) -> str:
        return f"{match[1]}\n{table(_model_named(f'{match[2]}:{match[3]}'), inherited=False)}\n\n{match[4]}"

    return _TABLE.sub(fill, page)


def _model_named(name: str) -> type[BaseModel]:
    module_name, _, model_name = name.partition(":")
    model: type[BaseModel] = getattr(importlib.import_module(module_name), model_name)
    return model


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        if argument in SCHEMAS:
            write_json(Path(argument), schema(_model_named(SCHEMAS[argument])))
        else:
            write_text(Path(argument), rewritten(Path(argument).read_text(encoding="utf-8")))
