"""What an adapter directory must be before the engine loads it: verified, of this base, finite, and of a fitting rank.

`serve/probes.py` checks the adapter again once the engine has loaded it.
"""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from mixfuse.contracts import adapter, judge_protocol
from mixfuse.contracts.adapter import Fingerprint, Manifest
from mixfuse.contracts.adapter_weights import check_directory
from mixfuse.contracts.bounded_json import shortened
from mixfuse.contracts.errors import MixfuseError
from mixfuse.serve.copies import AdapterCopies
from mixfuse.serve.probes import Terms
from mixfuse.serve.slots import Revision

JUDGE = "judge"
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Admission:
    """The conditions under which an adapter may serve a role.

    Attributes:
        base: Fingerprint of the engine's base model; adapters of another base are refused.
        max_rank: The engine's largest LoRA rank.
        verify: Checks an adapter directory and returns its manifest; `adapter.verify`, in full or in part.
        terms: By what an adapter's answers to its probes are judged.
        unprobed: Whether an adapter without probes may serve.
        copies: The copies that the engine reads.
        base_folder: The base model's folder, to compare the norms of an adapter's changes with; None if it is not here.
        dtype: The engine's number format, in which no weight may overflow; None if it is not known.
        chat_template: Digest of the template that the engine writes chats with; None if it is not known.
        owner: What the names of adapters end with in engines that several gateways use; empty: they have one gateway.
    """

    base: Fingerprint
    max_rank: int
    verify: Callable[..., Manifest] = adapter.verify
    terms: Terms = field(default_factory=Terms)
    unprobed: bool = True
    copies: AdapterCopies = field(default_factory=AdapterCopies)
    base_folder: Path | None = None
    dtype: str | None = None
    chat_template: str | None = None
    owner: str = ""

    async def admit(self, role: str, directory: Path, *, expected_revision: str | None = None) -> Revision:
        """Checks an adapter for a role, and copies what the engine will read of it. `forget` removes the copy.

        Raises:
            MixfuseError: As for `check`; the files changed after the check, or the copy cannot be written.
        """
        manifest = await self.check(role, directory, expected_revision=expected_revision)
        copying = asyncio.ensure_future(asyncio.to_thread(self.copies.keep, directory, manifest.files))
        try:
            copy = await asyncio.shield(copying)
        except asyncio.CancelledError:  # the thread cannot be stopped
            copying.add_done_callback(self._release)
            raise
        return Revision.of(role, manifest, directory, copy, owner=self.owner)

    def forget(self, revision: Revision) -> None:
        """Gives a revision's copy up; the engine must not have the revision any more."""
        copy, revision.copy = revision.copy, None
        if copy is not None:
            self.copies.release(copy)

    async def check(self, role: str, directory: Path, *, expected_revision: str | None = None) -> Manifest:
        """Checks an adapter for a role, that all of it would be applied, and that it cannot disturb an engine.

        Raises:
            MixfuseError: The adapter may not serve the role, or is not of `expected_revision`.
        """
        manifest = await self._check_files(role, directory, expected_revision)
        if not self.unprobed and adapter.PROBES not in manifest.files:
            raise MixfuseError(
                f"{directory}: it has no {adapter.PROBES}, and the serve config refuses such adapters "
                "(adapters_without_probes: refuse); make them with: mixfuse adapter verify DIR --base BASE",
                kind="adapter",
            )
        await asyncio.to_thread(adapter.check_applied, directory)
        await asyncio.to_thread(check_directory, directory, base=self.base_folder, dtype=self.dtype)
        return manifest

    def _release(self, copying: "asyncio.Future[Path]") -> None:
        if copying.exception() is None:
            self.copies.release(copying.result())

    async def recheck(self, revision: Revision) -> None:
        """Checks a revision that returns to the engine, by its copy. Whatever became of its directory does not matter.

        Raises:
            MixfuseError: The copy has changed.
        """
        assert revision.copy is not None  # noqa: S101 - the base is never loaded
        await asyncio.to_thread(self.copies.check, revision.copy, revision.files)

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
        check_template(directory, manifest, self.chat_template)
        if role == JUDGE and manifest.judge_protocol != judge_protocol.describe():
            version = (manifest.judge_protocol or {}).get("version", "none")
            raise MixfuseError(
                f"{directory}: its judge protocol (version {version}) is not this runtime's (version "
                f"{judge_protocol.VERSION}); train the judge again with pairs of this version",
                kind="adapter",
            )
        return manifest


def check_template(directory: Path, manifest: Manifest, served: str | None) -> None:
    """Refuses an adapter of another chat template than the engine's: it answers chats wrongly, and no error says so.

    Args:
        directory: The adapter directory.
        manifest: Its manifest.
        served: Digest of the template that the engine writes chats with; None if it is not known.

    Raises:
        MixfuseError: The adapter was trained with another (kind "adapter").
    """
    named = manifest.recipe.get("chat_template")
    if served is None:
        if named is not None:
            logger.warning(
                "%s was trained with chat_template %s; whether the engine writes chats with it is not known",
                directory,
                shortened(str(named), 200),
            )
        return
    if manifest.chat_template in (None, served):
        return
    mended = "leave engine.chat_template out" if named is None else "name that one as engine.chat_template"
    trained = "the base's own chat template" if named is None else f"chat_template {shortened(str(named), 200)}"
    raise MixfuseError(
        f"{directory}: it was trained with {trained}, and the engine writes chats with another text, which "
        f"it would answer wrongly; {mended} in the serve config, or train it with the engine's",
        kind="adapter",
    )
