"""What an adapter directory must be before the engine loads it: verified, of this base, finite, and of a fitting rank.

`serve/probes.py` checks the adapter again once the engine has loaded it.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mixfuse.contracts import adapter, judge_protocol
from mixfuse.contracts.adapter import Fingerprint, Manifest
from mixfuse.contracts.errors import MixfuseError
from mixfuse.serve.slots import Revision

JUDGE = "judge"


@dataclass(frozen=True)
class Admission:
    """The conditions under which an adapter may serve a role.

    Attributes:
        base: Fingerprint of the engine's base model; adapters of another base are refused.
        max_rank: The engine's largest LoRA rank.
        verify: Checks an adapter directory and returns its manifest; `adapter.verify`, in full or in part.
        probe_tolerance: How far log-probabilities may be from those stored with the adapter, in nats. None: the
            tolerance stored with the probes, which holds for a float32 engine.
    """

    base: Fingerprint
    max_rank: int
    verify: Callable[..., Manifest] = adapter.verify
    probe_tolerance: float | None = None

    async def check(self, role: str, directory: Path, *, expected_revision: str | None = None) -> Manifest:
        """Checks an adapter for a role, the finiteness of its weights included.

        Raises:
            MixfuseError: The adapter may not serve the role, or is not of `expected_revision`.
        """
        manifest = await self._check_files(role, directory, expected_revision)
        await asyncio.to_thread(adapter.check_finite, directory)
        return manifest

    async def recheck(self, revision: Revision) -> None:
        """Checks a revision that returns to the engine. Unchanged weights are still finite, so they are not read.

        Raises:
            MixfuseError: Its files have changed.
        """
        assert revision.directory is not None  # noqa: S101 - the base is never loaded
        await self._check_files(revision.model.rpartition("@")[0], revision.directory, revision.revision)

    async def _check_files(self, role: str, directory: Path, expected_revision: str | None) -> Manifest:
        manifest = await asyncio.to_thread(self.verify, directory, base=self.base)
        if expected_revision is not None and manifest.revision != expected_revision:
            raise MixfuseError(
                f"{directory} holds revision {manifest.revision} now, not {expected_revision}", kind="adapter"
            )
        if manifest.rank > self.max_rank:
            raise MixfuseError(
                f"{directory}: rank {manifest.rank} is above the engine's max_lora_rank {self.max_rank}; "
                "raise it in the serve config or train with a smaller rank",
                kind="adapter",
            )
        if role == JUDGE and manifest.judge_protocol != judge_protocol.describe():
            version = (manifest.judge_protocol or {}).get("version", "none")
            raise MixfuseError(
                f"{directory}: its judge protocol (version {version}) is not this runtime's (version "
                f"{judge_protocol.VERSION}); train the judge again with pairs of this version",
                kind="adapter",
            )
        return manifest
