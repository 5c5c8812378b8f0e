"""Parses YAML strictly, by the numbers and booleans of YAML 1.2; PyYAML's own are those of YAML 1.1.

There `010` is 8, `1:30` is 90, `no` is false, `1e-4` is text, and of a key that stands twice the last wins.
"""

import math
import re
from typing import Any

import yaml

from mixfuse.contracts.errors import MixfuseError

_MOST_NODES = 100_000  # what references (`*name`) may expand to; ten lines of them can stand for billions
_MOST_DEPTH = 100
_MOST = 2**63  # what a database column, numpy and torch hold


class _Loader(yaml.SafeLoader):
    """A safe loader with YAML 1.2's core schema, without repeated keys and numbers that are no numbers."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """As the parent's; a key is text or a whole number, and stands once."""
        seen: set[str] = set()
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            if key.tag not in ("tag:yaml.org,2002:str", "tag:yaml.org,2002:int"):
                kind = key.id if not isinstance(key, yaml.ScalarNode) else key.tag.rpartition(":")[2]
                shown = f" {key.value[:80]!r}" if isinstance(key, yaml.ScalarNode) else ""
                raise _wrong(
                    f"the key{shown} is a {kind}, not a name; put a name in quotes, and write decimals with a point",
                    key,
                )
            name = str(self.construct_object(key, deep=True))
            if name in seen:
                raise _wrong(f"the key {name[:80]!r} stands twice", key)
            seen.add(name)
        return super().construct_mapping(node, deep)

    def text(self, node: yaml.ScalarNode) -> str:
        """A text that can be written as UTF-8."""
        value = str(self.construct_scalar(node))
        if any("\ud800" <= letter <= "\udfff" for letter in value):
            raise _wrong("a text holds half a surrogate pair (\\ud800 to \\udfff), which is no character", node)
        return value

    def whole(self, node: yaml.ScalarNode) -> int:
        """A whole number of 64 bits."""
        text = str(self.construct_scalar(node))
        base = {"0o": 8, "0x": 16}.get(text[:2].lower(), 10)
        digits = text if base == 10 else text[2:]
        try:
            value = int(digits, base) if len(digits.lstrip("+-0")) < 40 else _MOST
        except ValueError:  # an explicit tag, such as `!!int x`
            raise _wrong(f"{text[:40]!r} is no whole number", node) from None
        if abs(value) >= _MOST:
            raise _wrong(f"the number {text[:40]} is too large", node)
        return value

    def real(self, node: yaml.ScalarNode) -> float:
        """A finite number."""
        text = str(self.construct_scalar(node))
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise _wrong(f"{text[:40]!r} is no finite number; put a text in quotes", node)
        return value


def _unknown(_loader: _Loader, node: yaml.Node) -> Any:
    raise _wrong(f"the tag {node.tag!r} is none of YAML 1.2", node)


for _name in ("binary", "timestamp", "omap", "pairs", "set"):  # of YAML 1.1
    _Loader.add_constructor(f"tag:yaml.org,2002:{_name}", _unknown)
_Loader.add_constructor("tag:yaml.org,2002:str", _Loader.text)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.whole)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.real)
for _name, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
    ("null", r"~|null|Null|NULL|", "~nN\0"),
    ("merge", r"<<", "<"),
):
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_name}", re.compile(rf"(?:{_pattern})\Z"), ["" if at == "\0" else at for at in _first]
    )


def parse(text: str, source: str) -> Any:
    """Returns the value of one YAML document, which may be JSON.

    Args:
        text: The document.
        source: Its file, for messages.

    Raises:
        MixfuseError: It is malformed, holds several documents, a key twice, a key that is no text or whole number, a
            number that is not finite or larger than 64 bits, or references that expand beyond measure. The message
            names the line.
    """
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _measure(node)
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except RecursionError:
        raise MixfuseError(f"{source}: not valid YAML: it is nested too deep") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{source}:{mark.line + 1}" if mark else source
        problem = error.problem or error.context or "malformed"
        if problem == "but found another document":
            problem = "a second document begins ('---'); write one document a file"
        elif "'\\t'" in problem:
            problem = f"{problem}; indent with spaces, not tabs"
        raise MixfuseError(f"{where}: not valid YAML: {problem[:300]}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise MixfuseError(
            f"{source}:{line}: not valid YAML: it holds the control character U+{ord(text[error.position]):04X}"
        ) from None
    except (
        yaml.YAMLError,
        ValueError,
        TypeError,
        KeyError,
    ) as error:  # an explicit tag with a value that does not fit it
        raise MixfuseError(
            f"{source}: not valid YAML: a tag (!!) and its value do not fit: {str(error)[:300]}"
        ) from None


def _wrong(problem: str, node: yaml.Node) -> yaml.MarkedYAMLError:
    return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


def _measure(root: yaml.Node) -> None:
    """Refuses references to themselves, and what is too deep or too large once references are replaced."""
    sizes: dict[int, int] = {}
    above: set[int] = set()

    def size(node: yaml.Node, depth: int) -> int:
        if id(node) in above:
            raise _wrong("a reference (*) stands inside of what it refers to", node)
        if depth > _MOST_DEPTH:
            raise _wrong("it is nested too deep", node)
        if id(node) not in sizes:
            above.add(id(node))
            parts: list[yaml.Node] = []
            if isinstance(node, yaml.MappingNode):
                parts = [part for pair in node.value for part in pair]
            elif isinstance(node, yaml.SequenceNode):
                parts = node.value
            sizes[id(node)] = 1 + sum(size(part, depth + 1) for part in parts)
            above.discard(id(node))
        return sizes[id(node)]

    if size(root, 0) > _MOST_NODES + len(sizes):
        raise _wrong("its references (*) expand beyond measure", root)
