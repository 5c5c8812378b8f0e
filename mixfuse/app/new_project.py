"""`mixfuse init`: writes the example configs of one base model as a project of its own.

The examples are the files of `configs/`, which the wheel carries as `mixfuse/configs`. Their paths count from the
checkout; in a new project they count from the project's folder.
"""

from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path

from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.files import disk_errors

_SUFFIXES = (".yaml", ".json", ".md", ".lock")


def write_project(folder: Path, model: str) -> list[Path]:
    """Writes recipes, serve and fusion configs, DeepSpeed configs, a README and, for `tiny`, the lock of its packages.

    Args:
        folder: Where to write. It may exist and hold other files.
        model: Whose examples: a folder of `configs/`.

    Returns:
        The files written.

    Raises:
        MixfuseError: One of the files exists already, in which case nothing is written; or the folder cannot be
            written.
    """
    examples = resources.files("mixfuse") / "configs"
    texts = {folder / name: _relocated(text, model) for name, text in _texts(examples / model, Path()).items()}
    texts |= {folder / name: text for name, text in _texts(examples / "deepspeed", Path("deepspeed")).items()}
    with disk_errors(folder):
        for path in texts:
            if path.exists() or path.is_symlink():
                raise MixfuseError(f"{path} exists already and is not overwritten; choose another folder")
            if blocked := next((parent for parent in path.parents if parent.exists() and not parent.is_dir()), None):
                raise MixfuseError(f"{blocked} is no folder; choose another folder for the project")
        for path, text in texts.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("x", encoding="utf-8") as stream:
                stream.write(text)
    return list(texts)


def _texts(source: Traversable, relative: Path) -> dict[Path, str]:
    """The examples below a folder: relative path → text."""
    texts: dict[Path, str] = {}
    for entry in sorted(source.iterdir(), key=lambda entry: entry.name):
        if entry.is_dir():
            texts |= _texts(entry, relative / entry.name)
        elif entry.name.endswith(_SUFFIXES):
            texts[relative / entry.name] = entry.read_text(encoding="utf-8")
    return texts


def _relocated(text: str, model: str) -> str:
    """An example with the checkout's paths replaced by those of the new project."""
    for checkout, project in (
        (f"configs/{model}/", ""),
        ("configs/deepspeed/", "deepspeed/"),
        (f"runs/{model}/", "runs/"),
        ("runs/demo/", "runs/"),
        ("scripts/launch ", "mixfuse launch "),
        ("scripts/demo", "mixfuse's own demo"),
    ):
        text = text.replace(checkout, project)
    return text
