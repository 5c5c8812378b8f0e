"""What the fusion modes are called: each mode is a file in `fusion/modes/`, and the file's name is the mode's.

The names are read from the folder and the descriptions from the files' text. Nothing of `mixfuse.fusion` is imported,
so that the command line's help and the config files' checks can use them.
"""

import ast
from pathlib import Path

MODEL_PREFIX = "fusion/"
"""Model names that start with this are modes."""

SINGLE_MODEL_MODE = "pass_through"
"""The mode of a request for one model by its own name; no client asks for it as a mode."""

_FOLDER = Path(__file__).parent.parent / "fusion" / "modes"
_NOT_MODES = ("__init__", "registry")

MODES: tuple[str, ...] = tuple(sorted(file.stem for file in _FOLDER.glob("*.py") if file.stem not in _NOT_MODES))
"""All modes."""

FUSED_MODES: tuple[str, ...] = tuple(name for name in MODES if name != SINGLE_MODEL_MODE)
"""The modes that fuse the answers of a pool: what a client may ask for."""


def model_name(mode: str) -> str:
    """Returns the model name by which a client asks for a mode: `fusion/best-of` for `best_of`."""
    return MODEL_PREFIX + mode.replace("_", "-")


MODE_OF_MODEL: dict[str, str] = {model_name(mode): mode for mode in FUSED_MODES}
"""The modes, by the model name that a client asks for."""


def descriptions() -> dict[str, str]:
    """Returns what each mode that a client may ask for does: the first line of its file's docstring."""
    files = {name: _FOLDER / f"{name}.py" for name in FUSED_MODES}
    docstrings = {name: ast.get_docstring(ast.parse(file.read_bytes())) for name, file in files.items()}
    return {name: (text or name).partition("\n")[0] for name, text in docstrings.items()}
