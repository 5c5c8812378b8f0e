"""A small Hugging Face Hub: repositories in memory, over real HTTP, for the real `huggingface_hub` client.

It speaks what the client asks for when a model repository is made, committed to, tagged, looked at and read: `create`,
`validate-yaml`, `preupload`, Git LFS (one part or several), `commit`, `branch`, `tag`, `refs`, `tree`, `resolve`. Large
files go to and come from a second address, as on the Hub, which must never see a token. Xet, which the Hub prefers, is
not spoken: `HF_HUB_DISABLE_XET=1`.
"""

import asyncio
import base64
import hashlib
import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
import yaml
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from mixfuse.app.workers import tcp_socket

TOKEN = "hf_aSecretThatNobodyMayRead"
READ_ONLY = "hf_aSecretForReadingOnly"
_PARTS_FROM = 30_000  # bytes: longer files are uploaded in parts
_PART = 16_000


@dataclass(frozen=True)
class Blob:
    """A file's content; a large one (`lfs`) is known by its SHA-256, any other by git's hash."""

    content: bytes
    lfs: bool

    @property
    def git(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def oid(self) -> str:
        return self.sha256 if self.lfs else self.git


@dataclass(frozen=True)
class Commit:
    parent: str | None
    files: dict[str, Blob]
    message: str

    @property
    def sha(self) -> str:
        said = [self.parent, self.message, sorted((path, blob.oid) for path, blob in self.files.items())]
        return hashlib.sha1(json.dumps(said).encode()).hexdigest()


@dataclass
class Repo:
    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, Blob], message: str, branch: str = "main") -> str:
        made = Commit(self.branches.get(branch), files, message)
        self.commits[made.sha] = made
        self.branches[branch] = made.sha
        return made.sha

    def find(self, revision: str) -> Commit | None:
        sha = self.branches.get(revision) or self.tags.get(revision) or revision
        return self.commits.get(sha)


@dataclass(frozen=True)
class Seen:
    """A request as it was answered.

    Attributes:
        place: "hub" or "storage".
        received: Bytes of its body.
        sent: Bytes of the answer's body.
    """

    place: str
    method: str
    path: str
    status: int
    authorized: bool
    received: int
    sent: int


@dataclass
class Fault:
    """An answer instead of the right one, to the next `times` requests like this; or something done before it.

    Attributes:
        what: Pattern of "METHOD /path".
        status: Answered with; None to answer rightly.
        before: Called first.
        cut: Send so many bytes of the right answer's body, then drop the connection.
    """

    what: str
    status: int | None = None
    message: str = "so it is"
    headers: dict[str, str] = field(default_factory=dict)
    times: int = 1
    before: Callable[[], object] | None = None
    cut: int | None = None


class Hub:
    """The repositories, what was asked, and what shall go wrong.

    Attributes:
        url: For `HF_ENDPOINT`.
        repos: By name.
        objects: Large files by their SHA-256.
        seen: Every request.
        faults: Taken in order.
        ignored: Paths that the repositories' .gitignore leaves out.
    """

    def __init__(self) -> None:
        self.url = self.storage = ""
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.seen: list[Seen] = []
        self.faults: list[Fault] = []
        self.ignored: set[str] = set()
        self._parts: dict[str, dict[int, bytes]] = {}
        model = "/api/models/{org}/{name}"
        routes = [
            Route("/api/agent-harnesses", lambda *_: JSONResponse({"standardEnvVars": [], "harnesses": {}})),
            Route("/api/repos/create", self._create, methods=["POST"]),
            Route("/api/validate-yaml", self._validate, methods=["POST"]),
            Route(model, self._info),
            Route(model + "/revision/{revision:path}", self._info),
            Route(model + "/refs", self._refs),
            Route(model + "/tree/{revision:path}", self._tree),
            Route(model + "/preupload/{revision:path}", self._preupload, methods=["POST"]),
            Route(model + "/commit/{revision:path}", self._commit, methods=["POST"]),
            Route(model + "/branch/{revision:path}", self._branch, methods=["POST"]),
            Route(model + "/tag/{revision:path}", self._tag, methods=["POST", "DELETE"]),
            Route("/{org}/{name}.git/info/lfs/objects/batch", self._batch, methods=["POST"]),
            Route("/{org}/{name}.git/info/lfs/objects/verify", self._verify, methods=["POST"]),
            Route("/complete/{oid}", self._complete, methods=["POST"]),
            Route("/{org}/{name}/resolve/{revision}/{path:path}", self._resolve),
            Route("/upload/{oid}", self._upload, methods=["PUT"]),
            Route("/upload/{oid}/{part:int}", self._upload, methods=["PUT"]),
            Route("/object/{oid}", self._object),
        ]
        self.app = Starlette(routes=[Route(r.path, self._watched(r.endpoint), methods=r.methods) for r in routes])

    def add(self, name: str, files: dict[str, bytes], *, private: bool = False) -> Repo:
        """A repository that somebody else made."""
        repo = self.repos[name] = Repo(private)
        repo.commit({".gitattributes": Blob(b"*.safetensors filter=lfs\n", False)}, "initial commit")
        if files:
            repo.commit(self.blobs(files), "files")
        return repo

    def blobs(self, files: dict[str, bytes]) -> dict[str, Blob]:
        made = {path: Blob(content, _is_large(path)) for path, content in files.items()}
        self.objects |= {blob.sha256: blob.content for blob in made.values() if blob.lfs}
        return made

    def asked(self, what: str) -> list[Seen]:
        """The requests like this pattern of "METHOD /path"."""
        return [seen for seen in self.seen if re.search(what, f"{seen.method} {seen.path}")]

    def uploaded(self) -> int:
        """Bytes of large files that came in, repetitions too."""
        return sum(seen.received for seen in self.asked("^PUT /upload"))

    def _watched(self, endpoint: Callable[[Request, bytes], Response]) -> Callable[[Request], Any]:
        async def handler(request: Request) -> Response:
            body = await request.body()
            line = f"{request.method} {request.url.path}"
            fault = next((f for f in self.faults if f.times > 0 and re.search(f.what, line)), None)
            cut = None
            if fault:
                fault.times -= 1
                cut = fault.cut
                if fault.before:
                    await asyncio.to_thread(fault.before)
            if fault and fault.status:
                response: Response = _error(fault.status, fault.message, **fault.headers)
            else:
                response = endpoint(request, body)
            sent = b"" if request.method == "HEAD" else bytes(response.body)
            place = "storage" if self.storage.endswith(f":{request.url.port}") else "hub"
            self.seen.append(
                Seen(
                    place,
                    request.method,
                    request.url.path,
                    response.status_code,
                    "authorization" in request.headers,
                    len(body),
                    len(sent) if cut is None else cut,
                )
            )
            if cut is not None:

                async def torn() -> Any:
                    yield sent[:cut]
                    raise ConnectionAbortedError

                return StreamingResponse(torn(), response.status_code, dict(response.headers))
            return response

        return handler

    def _repo(self, request: Request) -> tuple[str, Repo] | Response:
        """The repository that a request names, or why whoever asks may not know of it."""
        name = f"{request.path_params['org']}/{request.path_params['name']}"
        token = _token(request)
        if token not in (None, TOKEN, READ_ONLY):
            return _error(401, "Invalid credentials in Authorization header")
        repo = self.repos.get(name)
        if repo is None or (repo.private and token is None):
            return _error(401 if token is None else 404, "Repository not found", **{"X-Error-Code": "RepoNotFound"})
        if request.method not in ("GET", "HEAD") and token != TOKEN:
            return _error(403, "You don't have write access")
        return name, repo

    def _at(self, request: Request) -> tuple[str, Repo, Commit] | Response:
        found = self._repo(request)
        if isinstance(found, Response):
            return found
        commit = found[1].find(request.path_params.get("revision", "main"))
        if commit is None:
            return _error(404, "Invalid rev id", **{"X-Error-Code": "RevisionNotFound"})
        return *found, commit

    def _create(self, request: Request, body: bytes) -> Response:
        if _token(request) != TOKEN:
            return _error(403 if _token(request) == READ_ONLY else 401, "Invalid credentials in Authorization header")
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        if asked["organization"] == "others":
            return _error(403, 'You don\'t have the rights to create a model under the namespace "others"')
        if name in self.repos:
            return _error(409, "You already created this model repo")
        self.add(name, {}, private=asked.get("visibility") == "private")
        return JSONResponse({"url": f"{self.url}/{name}", "name": name})

    def _validate(self, request: Request, body: bytes) -> Response:
        content = json.loads(body)["content"]
        found = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
        metadata = yaml.safe_load(found[1]) if found else {}
        base = metadata.get("base_model")
        if base is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", base):
            message = f'"base_model" with value "{base}" is not valid. Use a model id from https://hf.co/models.'
            return JSONResponse({"errors": [{"message": message}], "warnings": [], "error": message}, 400)
        return JSONResponse({"errors": [], "warnings": []})

    def _info(self, request: Request, body: bytes) -> Response:
        found = self._at(request)
        if isinstance(found, Response):
            return found
        name, repo, commit = found
        siblings = [{"rfilename": path} for path in commit.files]
        return JSONResponse({"id": name, "sha": commit.sha, "private": repo.private, "siblings": siblings})

    def _refs(self, request: Request, body: bytes) -> Response:
        found = self._repo(request)
        if isinstance(found, Response):
            return found
        heads, tags = (
            [{"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": sha} for name, sha in there.items()]
            for kind, there in (("heads", found[1].branches), ("tags", found[1].tags))
        )
        return JSONResponse({"branches": heads, "tags": tags, "converts": []})

    def _tree(self, request: Request, body: bytes) -> Response:
        found = self._at(request)
        if isinstance(found, Response):
            return found
        entries: list[dict[str, Any]] = []
        for path, blob in found[2].files.items():
            entry = {"type": "file", "path": path, "size": len(blob.content), "oid": blob.git}
            if blob.lfs:
                entry["lfs"] = {"oid": blob.sha256, "size": len(blob.content), "pointerSize": 130}
            entries.append(entry)
        folders = {path.rsplit("/", 1)[0] for path in found[2].files if "/" in path}
        entries += [{"type": "directory", "path": folder, "oid": "0" * 40} for folder in folders]
        return JSONResponse(entries)

    def _preupload(self, request: Request, body: bytes) -> Response:
        found = self._at(request)
        if isinstance(found, Response):
            return found
        answers = []
        for file in json.loads(body)["files"]:
            there = found[2].files.get(file["path"])
            mode = "lfs" if _is_large(file["path"]) else "regular"
            ignored = file["path"] in self.ignored
            oid = {"oid": there.oid} if there else {}
            answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": ignored, **oid})
        return JSONResponse({"files": answers})

    def _batch(self, request: Request, body: bytes) -> Response:
        found = self._repo(request)
        if isinstance(found, Response):
            return found
        answers = []
        for wanted in json.loads(body)["objects"]:
            answer: dict[str, Any] = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.objects:
                href = f"{self.storage}/upload/{wanted['oid']}?signature=forThisUploadOnly"
                upload: dict[str, Any] = {"href": href}
                if wanted["size"] > _PARTS_FROM:
                    parts = range(1, -(-wanted["size"] // _PART) + 1)
                    urls = {str(part): href.replace("?", f"/{part}?") for part in parts}
                    upload = {
                        "href": f"{self.url}/complete/{wanted['oid']}",
                        "header": {"chunk_size": str(_PART), **urls},
                    }
                verify = {"href": f"{self.url}/{found[0]}.git/info/lfs/objects/verify"}
                answer["actions"] = {"upload": upload, "verify": verify}
            answers.append(answer)
        return JSONResponse({"transfer": "basic", "objects": answers})

    def _upload(self, request: Request, body: bytes) -> Response:
        oid, part = request.path_params["oid"], request.path_params.get("part")
        if part is None:
            return self._store(oid, body)
        self._parts.setdefault(oid, {})[part] = body
        return Response(headers={"ETag": hashlib.md5(body).hexdigest()})

    def _complete(self, request: Request, body: bytes) -> Response:
        oid = request.path_params["oid"]
        parts = self._parts.pop(oid, {})
        return self._store(oid, b"".join(parts[part["partNumber"]] for part in json.loads(body)["parts"]))

    def _store(self, oid: str, content: bytes) -> Response:
        if hashlib.sha256(content).hexdigest() != oid:
            return _error(400, "the content does not match its SHA-256")
        self.objects[oid] = content
        return Response()

    def _verify(self, request: Request, body: bytes) -> Response:
        wanted = json.loads(body)
        there = self.objects.get(wanted["oid"])
        return Response() if there and len(there) == wanted["size"] else _error(404, "no such object")

    def _commit(self, request: Request, body: bytes) -> Response:
        found = self._at(request)
        if isinstance(found, Response):
            return found
        name, repo, head = found
        lines = [json.loads(line) for line in body.splitlines()]
        header = lines[0]["value"]
        if header.get("parentCommit") not in (None, head.sha):
            return _error(412, "A commit has happened since. Please refresh and try again.")
        files = dict(head.files)
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]), False)
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.objects:
                    return _error(400, f"LFS object {value['oid']} was not uploaded")
                files[value["path"]] = Blob(self.objects[value["oid"]], True)
            elif files.pop(value["path"], None) is None:
                return _error(404, "A file with this name doesn't exist", **{"X-Error-Code": "EntryNotFound"})
        sha = repo.commit(files, header["summary"], request.path_params["revision"])
        return JSONResponse({"commitUrl": f"{self.url}/{name}/commit/{sha}", "commitOid": sha})

    def _branch(self, request: Request, body: bytes) -> Response:
        found = self._repo(request)
        if isinstance(found, Response):
            return found
        branch = request.path_params["revision"]
        if branch in found[1].branches:
            return _error(409, "Reference already exists")
        start = found[1].find(json.loads(body).get("startingPoint", "main"))
        assert start
        found[1].branches[branch] = start.sha
        return Response()

    def _tag(self, request: Request, body: bytes) -> Response:
        found = self._repo(request)
        if isinstance(found, Response):
            return found
        tags = found[1].tags
        if request.method == "DELETE":
            gone = tags.pop(request.path_params["revision"], None)
            return Response() if gone else _error(404, "Tag not found")
        commit = found[1].find(request.path_params["revision"])
        tag = json.loads(body)["tag"]
        if commit is None or tag in tags:
            return _error(409 if commit else 404, "Tag reference exists already")
        tags[tag] = commit.sha
        return Response()

    def _resolve(self, request: Request, body: bytes) -> Response:
        found = self._at(request)
        if isinstance(found, Response):
            return found
        _, _, commit = found
        blob = commit.files.get(request.path_params["path"])
        about = {"X-Repo-Commit": commit.sha}
        if blob is None:
            return _error(404, "Entry not found", **about, **{"X-Error-Code": "EntryNotFound"})
        if not blob.lfs:
            return Response(blob.content, headers={**about, "ETag": f'"{blob.git}"'})
        about |= {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(len(blob.content))}
        about["Location"] = f"{self.storage}/object/{blob.sha256}?signature=forThisDownloadOnly"
        return Response(status_code=302, headers=about)

    def _object(self, request: Request, body: bytes) -> Response:
        return Response(self.objects[request.path_params["oid"]])


def _is_large(path: str) -> bool:
    return path.endswith(".safetensors")


def _token(request: Request) -> str | None:
    return request.headers.get("authorization", "").removeprefix("Bearer ") or None


def _error(status: int, message: str, **headers: str) -> Response:
    return JSONResponse({"error": message}, status, headers={"X-Error-Message": message, **headers})


def _listener() -> socket.socket:
    listener = tcp_socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    return listener


@contextmanager
def serving() -> Iterator[Hub]:
    """Runs a Hub on two loopback ports, in a thread."""
    hub = Hub()
    config = uvicorn.Config(hub.app, log_level="critical", ws="none", lifespan="off", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    with _listener() as front, _listener() as storage:
        hub.url, hub.storage = (f"http://127.0.0.1:{one.getsockname()[1]}" for one in (front, storage))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [front, storage]})
        thread.start()
        try:
            yield hub
        finally:
            server.should_exit = True
            thread.join()
