"""Publishes adapter directories on the Hugging Face Hub and downloads them, with the Hub's own client.

A push is one commit with exactly the files of the manifest, and a tag `rev-<revision>` on it. A pull verifies the files
before it renames their folder. The client reads the token itself (`HF_TOKEN`, or `hf auth login`); it is never printed.

The client reads its endpoint and its offline mode from the environment once, when it is imported.
"""

import fcntl
import hashlib
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Literal

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    get_token,
    hf_hub_download,
)
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile

from mixfuse import __version__
from mixfuse.app.hub_errors import hub_error, hub_errors
from mixfuse.contracts import adapter
from mixfuse.contracts.adapter import Manifest
from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.files import disk_errors
from mixfuse.contracts.model_card import CARD, is_hub_id

logger = logging.getLogger(__name__)

_OWN = ".gitattributes"  # written by the Hub to list its large files; no adapter holds it
_ANSWER_S = 10.0
_FETCHED = re.compile(r"[0-9a-f]{12}|\.[0-9a-f]{12}\.[0-9a-f]{12}\.partial")  # folders that `newest` makes
_REVISION = re.compile(r"[0-9a-f]{12}")


@dataclass(frozen=True)
class Pushed:
    """The result of a push, or of its dry run.

    Attributes:
        repo: `org/name`.
        branch: The branch committed to.
        tag: The tag of the adapter's revision.
        commit: The commit that holds the adapter; in a dry run the branch's head, None if there is none.
        creates: Whether the repository did not exist.
        sends: Files that the branch lacks or holds in another state, and their sizes in bytes.
        keeps: Files that the branch holds already.
        removes: Files of the branch that do not belong to the adapter.
        outcome: "pushed"; "unchanged" if the branch held everything; "planned" in a dry run.
    """

    repo: str
    branch: str
    tag: str
    commit: str | None
    creates: bool
    sends: dict[str, int]
    keeps: list[str]
    removes: list[str]
    outcome: Literal["pushed", "unchanged", "planned"]


@dataclass(frozen=True)
class Pulled:
    """The result of a pull.

    Attributes:
        manifest: The adapter's manifest.
        commit: The commit it came from; None if `out` held that revision already and nothing was requested.
    """

    manifest: Manifest
    commit: str | None


@dataclass(frozen=True)
class _Remote:
    """The state of a branch on the Hub.

    Attributes:
        commit: Its head; None if the repository does not exist.
        branch: Whether the branch exists.
        files: Path → the Hub's record of the file.
        tags: Name → commit.
    """

    commit: str | None
    branch: bool
    files: dict[str, RepoFile]
    tags: dict[str, str]


def push(
    directory: Path,
    repo: str,
    *,
    private: bool = False,
    branch: str = "main",
    force: bool = False,
    dry_run: bool = False,
) -> Pushed:
    """Publishes an adapter directory in one commit; files that the Hub holds already are not sent again.

    Args:
        directory: The adapter directory.
        repo: The repository, `org/name`; it is created if it does not exist.
        private: Create a private repository.
        branch: The branch to commit to; it is created from `main` if it does not exist.
        force: Replace another adapter, or anything else.
        dry_run: Only report what would change.

    Returns:
        What was done.

    Raises:
        MixfuseError: The directory is refused by `adapter.verify`, another adapter stands there, the Hub refuses or
            cannot be reached, or somebody committed in between (`kind` "adapter" or "hub").
    """
    _check_name(repo)
    manifest = adapter.verify(directory)
    files = {name: directory / name for name in (*manifest.files, adapter.MANIFEST)}
    tag = tag_of(manifest.revision)
    with hub_errors(repo):
        if not dry_run and not get_token():
            raise hub_error(f"no token to push to {repo} with: set HF_TOKEN, or log in with: hf auth login")
        api = HfApi(library_name="mixfuse", library_version=__version__)
        remote = _look(api, repo, branch, private=private)
        removes = sorted(set(remote.files) - set(files) - {_OWN})
        if remote.files and remote.branch and not force:
            _refuse_other(repo, remote, manifest)
        keeps = [name for name, path in files.items() if _same(remote.files.get(name), path)]
        sends = {name: path.stat().st_size for name, path in files.items() if name not in keeps}
        plan = Pushed(repo, branch, tag, remote.commit, remote.commit is None, sends, keeps, removes, "unchanged")
        if sends or removes or not remote.branch:
            plan = replace(plan, outcome="planned" if dry_run else "pushed")
        if dry_run:
            return plan
        message = f"{manifest.role} adapter, revision {manifest.revision}"
        if plan.outcome == "pushed":
            parent = _parent(api, repo, branch, remote, private=private)
            plan = replace(plan, commit=_commit(api, plan, files, parent, message) if sends or removes else parent)
        _tag(api, plan, remote.tags.get(tag), message)
    return plan


def pull(source: str, out: Path, *, base: Path | None = None, trusted: Sequence[Path] = ()) -> Pulled:
    """Downloads an adapter directory, verifies it, and only then renames it to `out`.

    Files that an interrupted pull completed are not downloaded again.

    Args:
        source: `org/name`, and after `@` a branch, a tag, a whole commit hash or an adapter's revision (12 digits).
        out: The folder to create. If it holds the adapter already, nothing is downloaded.
        base: The base model that the adapter must fit.
        trusted: Public keys, one of which must have signed the adapter.

    Raises:
        MixfuseError: There is no such adapter, the repository holds other files, a file does not match the manifest,
            `out` holds something else, or the Hub cannot be reached.
    """
    repo, _, revision = source.partition("@")
    _check_name(repo)
    known = adapter.fingerprint(base) if base else None
    if _REVISION.fullmatch(revision):
        revision = tag_of(revision)
    there = adapter.verify(out, base=known, trusted=trusted) if (out / adapter.MANIFEST).is_file() else None
    if there and revision == tag_of(there.revision):
        return Pulled(there, None)
    if there is None and out.exists():
        raise MixfuseError(f"{out} exists already and is no adapter directory; choose another place or remove it first")
    with hub_errors(source):
        api = HfApi(library_name="mixfuse", library_version=__version__)
        commit = str(api.model_info(repo, revision=revision or None).sha)
        if there:
            offered = _fetch_manifest(repo, commit)
            if offered.revision == there.revision:
                return Pulled(there, commit)
            raise MixfuseError(
                f"{out} holds revision {there.revision}, {source} is {offered.revision}; choose another place, so that "
                "a role can go back to the old one"
            )
        listed = {name: entry.size for name, entry in _files(api, repo, commit).items()}
        # The name holds the commit: an interrupted pull continues there and never mixes two commits.
        temporary = out.with_name(f".{out.name}.{commit[:12]}.partial")
        with disk_errors(out), _locked(temporary):
            manifest = _download(repo, commit, listed, temporary)
            shutil.rmtree(temporary / ".cache", ignore_errors=True)  # the client's own records of its downloads
            try:
                manifest = adapter.verify(temporary, base=known, trusted=trusted)
            except MixfuseError as error:
                shutil.rmtree(temporary)  # otherwise the next pull would reuse the bad file
                problem = str(error).replace(str(temporary), source)
                raise MixfuseError(f"{problem} (commit {commit}); the download was deleted", kind=error.kind) from None
            os.replace(temporary, out)
    return Pulled(manifest, commit)


def fetch(source: str, folder: Path) -> str:
    """Downloads the adapter files of any tool from a repository: its configs, its card and its safetensors.

    Args:
        source: `org/name`, and after `@` a branch, a tag or a whole commit hash.
        folder: An existing folder.

    Returns:
        The commit.

    Raises:
        MixfuseError: There is no such repository, it holds no adapter in safetensors, or the Hub cannot be reached.
    """
    repo, _, revision = source.partition("@")
    _check_name(repo)
    with hub_errors(source):
        api = HfApi(library_name="mixfuse", library_version=__version__)
        commit = str(api.model_info(repo, revision=revision or None).sha)
        files = _files(api, repo, commit)
        if adapter.CONFIG not in files:
            raise hub_error(f"{repo} at commit {commit} holds no adapter: it has no {adapter.CONFIG}")
        own = adapter.MANIFEST in files
        for name, entry in files.items():
            path = PurePosixPath(name)
            small = entry.size <= adapter.MOST_TEXT_BYTES
            is_text = path.suffix in (".json", ".md") or name == "llamaboard_config.yaml"
            is_weights = path.suffix == ".safetensors" and (own or path.name.startswith("adapter_model"))
            if (own or len(path.parts) == 1) and ".." not in path.parts and ((is_text and small) or is_weights):
                hf_hub_download(repo, name, revision=commit, local_dir=folder)
    shutil.rmtree(folder / ".cache", ignore_errors=True)  # the client's own records of its downloads
    return commit


def newest(source: str, folder: Path, *, base: Path) -> tuple[Path, str]:
    """Downloads the head of a branch into a folder named after its commit, unless that exists already.

    Args:
        source: `org/name`, and after `@` a branch.
        folder: The parent of the new folder.
        base: The base model that the adapter must fit.

    Returns:
        The adapter directory and the commit.

    Raises:
        MixfuseError: As `pull`.
    """
    repo, _, branch = source.partition("@")
    _check_name(repo)
    with hub_errors(source):
        commit = str(HfApi(library_name="mixfuse").model_info(repo, revision=branch or None, timeout=_ANSWER_S).sha)
    out = folder / commit[:12]
    if not out.exists():
        pull(f"{repo}@{commit}", out, base=base)
    return out, commit


def prune(folder: Path, newest: Path, keep: Sequence[Path]) -> None:
    """Removes what `newest` has fetched before, and what was left of interrupted fetches.

    Args:
        folder: As for `newest`.
        newest: The newest of the fetched adapters. What is younger is left: another gateway may be fetching it.
        keep: Adapter directories that are needed.
    """
    kept = {path.resolve() for path in (newest, *keep)}
    try:
        before = newest.stat().st_mtime_ns
        for path in folder.iterdir():
            ours = _FETCHED.fullmatch(path.name) and path.is_dir() and not path.is_symlink()
            if ours and path.resolve() not in kept and path.stat().st_mtime_ns < before:
                shutil.rmtree(path)
    except OSError as error:
        logger.warning("%s: old adapters cannot be removed: %s", folder, error)


def tag_of(revision: str) -> str:
    """The tag of an adapter's revision on the Hub."""
    return f"rev-{revision}"


def report(pushed: Pushed) -> str:
    """Lines about a push, or about its dry run."""
    if pushed.outcome == "unchanged":
        return (
            f"{pushed.repo}: {pushed.branch} holds this revision already (commit {pushed.commit}, tag {pushed.tag}); "
            "nothing was sent"
        )
    size = f"{len(pushed.sends)} files, {sum(pushed.sends.values())} bytes"
    if pushed.outcome == "pushed":
        also = f"; {len(pushed.removes)} files of the old state are removed" if pushed.removes else ""
        return f"{pushed.repo}: pushed to {pushed.branch} as commit {pushed.commit}, tag {pushed.tag} ({size}{also})"
    new = " (would be created)" if pushed.creates else ""
    return "\n".join(
        [
            f"{pushed.repo}{new}: a commit on {pushed.branch} would send {size}",
            *(f"  send    {name}  {length}" for name, length in pushed.sends.items()),
            *(f"  keep    {name}" for name in pushed.keeps),
            *(f"  remove  {name}" for name in pushed.removes),
            f"  tag     {pushed.tag}",
        ]
    )


def _look(api: HfApi, repo: str, branch: str, *, private: bool) -> _Remote:
    try:
        info = api.model_info(repo)
    except GatedRepoError:
        raise
    except RepositoryNotFoundError:
        return _Remote(None, branch == "main", {}, {})
    if private and not info.private:
        raise hub_error(f"{repo} is public already: make it private in its settings, or push without --private")
    refs = api.list_repo_refs(repo)
    heads = {ref.name: ref.target_commit for ref in refs.branches}
    commit = heads.get(branch, str(info.sha))
    return _Remote(
        commit, branch in heads, _files(api, repo, commit), {ref.name: ref.target_commit for ref in refs.tags}
    )


def _refuse_other(repo: str, remote: _Remote, manifest: Manifest) -> None:
    """Refuses to replace anything but an earlier state of this adapter.

    Raises:
        MixfuseError: The repository holds an adapter for another role or base, no adapter of mixfuse, or further files.
    """
    remedy = "push to another repository or branch, or replace it with --force"
    if adapter.MANIFEST not in remote.files:
        if foreign := sorted(set(remote.files) - {_OWN, CARD}):
            raise hub_error(f"{repo} is not an adapter of mixfuse (it holds {foreign[0]} and no manifest); {remedy}")
        return
    assert remote.commit is not None  # noqa: S101 - it has files
    try:
        there = _fetch_manifest(repo, remote.commit)
    except MixfuseError as error:
        raise hub_error(f"{repo} holds a manifest that is not mixfuse's ({error}); {remedy}") from None
    if there.role != manifest.role:
        raise hub_error(f"{repo} holds a {there.role} adapter, this is a {manifest.role}; {remedy}")
    if there.base.differences(manifest.base):
        raise hub_error(f"{repo} holds an adapter of another base model (revision {there.revision}); {remedy}")
    if foreign := sorted(set(remote.files) - set(there.files) - {adapter.MANIFEST, _OWN}):
        raise hub_error(f"{repo} holds {foreign[0]}, which is no part of the adapter; --force removes it")


def _parent(api: HfApi, repo: str, branch: str, remote: _Remote, *, private: bool) -> str:
    """The commit to build on; creates the repository and the branch if they do not exist."""
    parent = remote.commit
    if parent is None:
        api.create_repo(repo, private=True if private else None, exist_ok=True)
        parent = str(api.model_info(repo).sha)
    if not remote.branch:
        api.create_branch(repo, branch=branch, revision=parent, exist_ok=True)
    return parent


def _commit(api: HfApi, plan: Pushed, files: dict[str, Path], parent: str, message: str) -> str:
    done = api.create_commit(
        plan.repo,
        [
            *(CommitOperationAdd(name, files[name]) for name in plan.sends),
            *(CommitOperationDelete(name, is_folder=False) for name in plan.removes),
        ],
        commit_message=message,
        revision=plan.branch,
        parent_commit=parent,  # otherwise a commit made since then would be lost
    )
    # The Hub silently leaves out files that a .gitignore in the repository names.
    committed = _files(api, plan.repo, done.oid)
    for name, path in files.items():
        if not _same(committed.get(name), path):
            raise hub_error(f"{plan.repo}: commit {done.oid} does not hold {name} as it is here; push again")
    return done.oid


def _tag(api: HfApi, plan: Pushed, tagged: str | None, message: str) -> None:
    """Tags the commit. After a change of the card alone, the revision's tag moves to the new commit."""
    if tagged == plan.commit:
        return
    if tagged:
        api.delete_tag(plan.repo, tag=plan.tag)
    api.create_tag(plan.repo, tag=plan.tag, revision=plan.commit, tag_message=message)


def _same(entry: RepoFile | None, path: Path) -> bool:
    """Whether the Hub holds the same file: compares SHA-256 for large files, git's own hash for the others."""
    if entry is None or entry.size != path.stat().st_size:
        return False
    if entry.lfs:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest() == entry.lfs.sha256
    content = path.read_bytes()
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False)
    return blob.hexdigest() == entry.blob_id


def _fetch_manifest(repo: str, commit: str) -> Manifest:
    with tempfile.TemporaryDirectory() as folder:
        hf_hub_download(repo, adapter.MANIFEST, revision=commit, local_dir=folder)
        return adapter.read_manifest(Path(folder))


def _download(repo: str, commit: str, listed: dict[str, int], folder: Path) -> Manifest:
    """Downloads the manifest and the files it lists; refuses a repository that holds any other file."""
    if adapter.MANIFEST not in listed:
        raise hub_error(f"{repo} at commit {commit} is not an adapter of mixfuse: it has no {adapter.MANIFEST}")
    if large := next(
        (n for n, size in listed.items() if n.endswith((".json", ".md")) and size > adapter.MOST_TEXT_BYTES), None
    ):
        raise hub_error(
            f"{repo}: its {large} is larger than {adapter.MOST_TEXT_BYTES >> 20} MiB, which no such file is"
        )
    hf_hub_download(repo, adapter.MANIFEST, revision=commit, local_dir=folder)
    manifest = adapter.read_manifest(folder)
    for name in manifest.files:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise hub_error(f"{repo}: its manifest names {name!r}, which lies outside the folder")
        if not name.endswith(adapter.ALLOWED_SUFFIXES):
            raise hub_error(f"{repo}: {name}: only safetensors, JSON and Markdown files belong in an adapter directory")
        if name not in listed:
            raise hub_error(f"{repo} at commit {commit} lacks {name}, which its manifest lists")
    if extra := sorted(set(listed) - set(manifest.files) - {adapter.MANIFEST, _OWN}):
        raise hub_error(f"{repo} holds {extra[0]}, which its manifest does not list; nothing is downloaded")
    for name in manifest.files:
        hf_hub_download(repo, name, revision=commit, local_dir=folder)
    return manifest


def _files(api: HfApi, repo: str, commit: str) -> dict[str, RepoFile]:
    tree = api.list_repo_tree(repo, recursive=True, revision=commit)
    return {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}


def _check_name(repo: str) -> None:
    if not is_hub_id(repo):
        raise MixfuseError(f"{repo!r} is not a repository's name on the Hub; write it as org/name")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Creates the folder if it does not exist, and locks it against a second pull."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise MixfuseError(f"another pull writes to {folder}; wait for it or end it") from None
    finally:
        os.close(handle)
