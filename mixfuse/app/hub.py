"""Adapters to the Hugging Face Hub and back, by its own client.

A push is one commit with exactly the files of the manifest, and a tag `rev-<revision>` on it. A pull verifies before it
renames. The token is the client's affair (`HF_TOKEN`, or `hf auth login`): it is neither read nor printed here.

The client's endpoint and its being offline are read from the environment once, when it is imported.
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

import httpx2
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    constants,
    get_token,
    hf_hub_download,
    is_offline_mode,
)
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile

from mixfuse import __version__
from mixfuse.contracts import adapter
from mixfuse.contracts.adapter import Manifest
from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.files import disk_errors
from mixfuse.contracts.model_card import CARD, is_hub_id

_OWN = ".gitattributes"  # which files the Hub holds as large ones; the Hub writes it, and no adapter has it
_ANSWER_S = 10.0
_REVISION = re.compile(r"[0-9a-f]{12}")


@dataclass(frozen=True)
class Pushed:
    """What a push did, or would do.

    Attributes:
        repo: `org/name`.
        branch: The branch committed to.
        tag: The tag of the adapter's revision.
        commit: The commit that holds it; before a push, and in a dry run, the branch's head, if there is one.
        creates: Whether the repository did not exist.
        sends: Files that the branch does not hold as they are here, and their sizes in bytes.
        keeps: Files that it holds already.
        removes: Files that are no part of the adapter.
        outcome: "pushed"; "unchanged" where the branch held it all; "planned" in a dry run.
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
    """What a pull brought.

    Attributes:
        manifest: The adapter's.
        commit: The commit it came from; None where `out` held that revision and the Hub was not asked.
    """

    manifest: Manifest
    commit: str | None


@dataclass(frozen=True)
class _Remote:
    """A branch as it is on the Hub.

    Attributes:
        commit: Its head; None where the repository does not exist.
        branch: Whether the branch exists.
        files: Path → what the Hub says of the file.
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
    """Publishes an adapter directory in one commit; what an earlier push left on the Hub is not sent again.

    Args:
        directory: The adapter directory.
        repo: The repository, `org/name`; made if it does not exist.
        private: Make it a private one.
        branch: The branch to commit to; made from `main` if it does not exist.
        force: Take the place of another adapter, or of something that is none.
        dry_run: Look, but change nothing.

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
    with _hub_errors(repo):
        if not dry_run and not get_token():
            raise _problem(f"no token to push to {repo} with: set HF_TOKEN, or log in with: hf auth login")
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
    """Fetches an adapter directory, verifies it, and only then gives it its name.

    Files that an interrupted pull brought whole are not fetched again.

    Args:
        source: `org/name`, and after `@` a branch, a tag, a whole commit hash or an adapter's revision (12 digits).
        out: The folder to create. Where it holds the adapter already, nothing is done.
        base: The base model it shall be applied to.
        trusted: Public keys, one of which must have signed it.

    Returns:
        What it is and whence it came.

    Raises:
        MixfuseError: There is no such adapter, it holds something else than an adapter directory does, it is not what
            its manifest says, `out` holds something else, or the Hub cannot be reached.
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
    with _hub_errors(source):
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
        listed = set(_files(api, repo, commit))
        # Of the commit, so that an interrupted pull goes on where it was and never mixes two.
        temporary = out.with_name(f".{out.name}.{commit[:12]}.partial")
        with disk_errors(out), _alone(temporary):
            manifest = _download(repo, commit, listed, temporary)
            shutil.rmtree(temporary / ".cache", ignore_errors=True)  # the client's notes on what it has fetched
            try:
                manifest = adapter.verify(temporary, base=known, trusted=trusted)
            except MixfuseError as error:
                shutil.rmtree(temporary)  # or the next pull would take the bad file for a good one
                what = str(error).replace(str(temporary), source)
                raise MixfuseError(f"{what} (commit {commit}); nothing was kept", kind=error.kind) from None
            os.replace(temporary, out)
    return Pulled(manifest, commit)


def newest(source: str, folder: Path, *, base: Path) -> tuple[Path, str]:
    """Fetches what a branch holds now into a folder of its own, unless it is there already.

    Args:
        source: `org/name`, and after `@` a branch.
        folder: The folder to create it in, named after its commit.
        base: The base model it shall be applied to.

    Returns:
        The adapter directory and the commit.

    Raises:
        MixfuseError: As `pull`.
    """
    repo, _, branch = source.partition("@")
    _check_name(repo)
    with _hub_errors(source):
        commit = str(HfApi(library_name="mixfuse").model_info(repo, revision=branch or None, timeout=_ANSWER_S).sha)
    out = folder / commit[:12]
    if not out.exists():
        pull(f"{repo}@{commit}", out, base=base)
    return out, commit


def tag_of(revision: str) -> str:
    """The tag under which an adapter's revision is found on the Hub."""
    return f"rev-{revision}"


def report(pushed: Pushed) -> str:
    """What a push did, or would do, in words."""
    if pushed.outcome == "unchanged":
        return (
            f"{pushed.repo}: {pushed.branch} holds this revision already (commit {pushed.commit}, tag {pushed.tag}); "
            "nothing was sent"
        )
    size = f"{len(pushed.sends)} files, {sum(pushed.sends.values())} bytes"
    if pushed.outcome == "pushed":
        also = f"; {len(pushed.removes)} files of what stood there are removed" if pushed.removes else ""
        return f"{pushed.repo}: pushed to {pushed.branch} as commit {pushed.commit}, tag {pushed.tag} ({size}{also})"
    new = " (which would be made)" if pushed.creates else ""
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
        raise _problem(f"{repo} is public already: make it private in its settings, or push without --private")
    refs = api.list_repo_refs(repo)
    heads = {ref.name: ref.target_commit for ref in refs.branches}
    commit = heads.get(branch, str(info.sha))
    return _Remote(
        commit, branch in heads, _files(api, repo, commit), {ref.name: ref.target_commit for ref in refs.tags}
    )


def _refuse_other(repo: str, remote: _Remote, manifest: Manifest) -> None:
    """Refuses to take the place of what is not an earlier state of this adapter.

    Raises:
        MixfuseError: Another role or base, no adapter of ours, or files beside it.
    """
    remedy = "push to another repository or branch, or take its place with --force"
    if adapter.MANIFEST not in remote.files:
        if foreign := sorted(set(remote.files) - {_OWN, CARD}):
            raise _problem(f"{repo} is no adapter of mixfuse's (it holds {foreign[0]} and no manifest); {remedy}")
        return
    assert remote.commit is not None  # noqa: S101 - it has files
    try:
        there = _fetch_manifest(repo, remote.commit)
    except MixfuseError as error:
        raise _problem(f"{repo} holds a manifest that is not mixfuse's ({error}); {remedy}") from None
    if there.role != manifest.role:
        raise _problem(f"{repo} holds a {there.role} adapter, this is a {manifest.role}; {remedy}")
    if there.base.differences(manifest.base):
        raise _problem(f"{repo} holds an adapter of another base model (revision {there.revision}); {remedy}")
    if foreign := sorted(set(remote.files) - set(there.files) - {adapter.MANIFEST, _OWN}):
        raise _problem(f"{repo} holds {foreign[0]}, which is no part of the adapter; --force removes it")


def _parent(api: HfApi, repo: str, branch: str, remote: _Remote, *, private: bool) -> str:
    """The commit to put ours on; the repository and the branch are made if need be."""
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
        parent_commit=parent,  # or a commit made since would be lost
    )
    # A .gitignore in the repository makes the Hub leave files out without a word.
    held = _files(api, plan.repo, done.oid)
    for name, path in files.items():
        if not _same(held.get(name), path):
            raise _problem(f"{plan.repo}: commit {done.oid} does not hold {name} as it is here; push again")
    return done.oid


def _tag(api: HfApi, plan: Pushed, tagged: str | None, message: str) -> None:
    """Tags the commit; where only the card was renewed, the revision's tag moves on to it."""
    if tagged == plan.commit:
        return
    if tagged:
        api.delete_tag(plan.repo, tag=plan.tag)
    api.create_tag(plan.repo, tag=plan.tag, revision=plan.commit, tag_message=message)


def _same(entry: RepoFile | None, path: Path) -> bool:
    """Whether the Hub holds a file as it is here: by SHA-256 where it is a large one, else by git's own hash."""
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


def _download(repo: str, commit: str, listed: set[str], folder: Path) -> Manifest:
    """Brings the manifest and what it lists; refuses a repository that holds anything else."""
    if adapter.MANIFEST not in listed:
        raise _problem(f"{repo} at commit {commit} is no adapter of mixfuse's: it has no {adapter.MANIFEST}")
    hf_hub_download(repo, adapter.MANIFEST, revision=commit, local_dir=folder)
    manifest = adapter.read_manifest(folder)
    for name in manifest.files:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise _problem(f"{repo}: its manifest names {name!r}, which is outside of the folder")
        if not name.endswith(adapter.ALLOWED_SUFFIXES):
            raise _problem(f"{repo}: {name}: only safetensors, JSON and Markdown files belong in an adapter directory")
        if name not in listed:
            raise _problem(f"{repo} at commit {commit} lacks {name}, which its manifest lists")
    if extra := sorted(listed - set(manifest.files) - {adapter.MANIFEST, _OWN}):
        raise _problem(f"{repo} holds {extra[0]}, which its manifest does not list; it is not fetched, nor the rest")
    for name in manifest.files:
        hf_hub_download(repo, name, revision=commit, local_dir=folder)
    return manifest


def _files(api: HfApi, repo: str, commit: str) -> dict[str, RepoFile]:
    tree = api.list_repo_tree(repo, recursive=True, revision=commit)
    return {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}


def _check_name(repo: str) -> None:
    if not is_hub_id(repo):
        raise MixfuseError(f"{repo!r} is not a repository's name on the Hub; write it as org/name")


def _problem(message: str) -> MixfuseError:
    return MixfuseError(message, kind="hub")


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Makes the folder if need be, and sees to it that no second pull fills or renames it meanwhile."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise MixfuseError(f"another pull is filling {folder}; wait for it, or end it first") from None
    finally:
        os.close(handle)


@contextmanager
def _hub_errors(what: str) -> Iterator[None]:
    """Turns whatever the Hub, the network or the client complains of into one line without a traceback.

    Raises:
        MixfuseError: With `kind` "hub".
    """
    if is_offline_mode():
        raise _problem(f"HF_HUB_OFFLINE is set, so the Hub is not asked for {what}; unset it and run again")
    _hide_signed_urls()
    try:
        yield
    except MixfuseError:
        raise
    except (HfHubHTTPError, HFValidationError, httpx2.HTTPError, OSError, RuntimeError, ValueError) as error:
        text = _explain(error, what)
        if token := get_token():
            text = text.replace(token, "…")  # a proxy may quote the request it refused
        raise _problem(text) from None


def _explain(error: BaseException, what: str) -> str:
    """One line on the first cause that says something: the client wraps an upload's failure once or twice."""
    causes = [error]
    while following := causes[-1].__cause__ or causes[-1].__context__:
        causes.append(following)
    again = "the same command goes on where it was"
    for cause in causes:
        if isinstance(cause, HfHubHTTPError):
            return _refusal(cause, what)
        if isinstance(cause, httpx2.HTTPError | OfflineModeIsEnabled | ConnectionError):
            return f"{constants.ENDPOINT} cannot be reached for {what} ({cause}); {again}"
    message = " ".join(str(error).split())[:300]
    return f"{what}: {message}; {again}"


def _refusal(error: HfHubHTTPError, what: str) -> str:
    status = error.response.status_code
    said = " ".join((error.server_message or "").split())[:200]
    said = f" ({status}{': ' + said if said else ''})"
    if isinstance(error, GatedRepoError):
        return f"{what} is gated{said}: ask its owner for access on its page"
    if isinstance(error, RevisionNotFoundError):
        return f"{what}: no such branch, tag or commit on the Hub{said}"
    if isinstance(error, RepositoryNotFoundError):
        return f"{what} is not on the Hub, or is private and your token may not see it{said}"
    if status == 401:
        return f"the Hub does not accept your token for {what}{said}: set HF_TOKEN, or log in with: hf auth login"
    if status == 403:
        return f"your token may not do this to {what}{said}: it takes one with write access"
    if status in (409, 412):
        return f"somebody else changed {what} meanwhile{said}: look at what is there now, then push again"
    if status == 429:
        wait = error.response.headers.get("retry-after")
        when = f"in {wait} s" if wait else "later"
        return f"too many requests to the Hub for {what}{said}: run the same command again {when}"
    return f"the Hub refused {what}{said}; run the same command again: what it has is not sent again"


def _hide_signed_urls() -> None:
    """Takes the query off addresses in the client's warnings: an upload's holds its signature."""
    for handler in logging.getLogger("huggingface_hub").handlers:
        handler.addFilter(_without_query)


def _without_query(record: logging.LogRecord) -> bool:
    record.msg, record.args = re.sub(r"(https?://[^\s?]+)\?\S+", r"\1?…", record.getMessage()), ()
    return True
