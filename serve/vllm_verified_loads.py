"""A part of our vLLM plugin: each worker checks a copy of an adapter against its name before it reads it.

The name of a copy is the hash of its bytes (`serve/copies.py`). The check runs in every worker on every node, at the
first load and whenever vLLM reads an adapter again that its cache has dropped. So it also covers folders that another
node sees over a network, and engines that someone else runs with mixfuse installed beside vLLM.
"""

import logging
from pathlib import Path
from typing import Any

from mixfuse.contracts.files import sha256_file
from mixfuse.serve.copies import PREFIX, SERVED_FILES, copy_name

logger = logging.getLogger(__name__)


def register() -> None:
    """Puts the check before vLLM's loading of an adapter; does nothing to adapters in other folders."""
    try:
        from vllm.lora.worker_manager import WorkerLoRAManager

        load = WorkerLoRAManager._load_adapter
    except (ImportError, AttributeError) as error:
        logger.warning("adapters are not verified in vLLM's workers, since this vLLM loads them otherwise: %s", error)
        return
    if getattr(load, "verifies", False):  # vLLM may load a plugin more than once in a process
        return

    def verified(self: Any, lora_request: Any) -> Any:
        check(Path(lora_request.lora_path))
        return load(self, lora_request)

    verified.verifies = True  # type: ignore[attr-defined]
    WorkerLoRAManager._load_adapter = verified


def check(folder: Path) -> None:
    """Raises a ValueError if a folder is named as a copy, and its files are others; missing files are vLLM's matter."""
    if not folder.name.startswith(PREFIX) or not all((folder / name).exists() for name in SERVED_FILES):
        return
    if copy_name({name: sha256_file(folder / name) for name in SERVED_FILES}) != folder.name:
        raise ValueError(f"{folder} is not what was verified: its files do not have the hash that it is named after")
