"""Adapters to the Hub and back, by the real client, over a Hub that runs here and fails as the real one may."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
from hub_harness import Run, make, one_line
from hub_server import READ_ONLY, TOKEN, Blob, Fault, Hub
from safetensors.numpy import save_file

from mixfuse.contracts import adapter
from mixfuse.contracts.adapter import CONFIG, MANIFEST, WEIGHTS

FUSED = f"peft/{WEIGHTS}"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def a_base(folder: Path) -> Path:
    folder.mkdir()
    save_file({"w": numpy.ones(8)}, folder / "model.safetensors")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text("{}")
    return folder


def revision(folder: Path) -> str:
    return adapter.read_manifest(folder).revision


def test_an_adapter_goes_to_the_hub_in_one_commit_and_comes_back(
    mixfuse: Run, hub: Hub, judge: Path, tmp_path: Path
) -> None:
    done = mixfuse("push", judge, "org/judge", "--private")
    assert done.returncode == 0, done.stderr
    repo = hub.repos["org/judge"]
    head = repo.branches["main"]
    assert head in done.stdout
    assert repo.private
    assert len(repo.commits) == 2  # the Hub's own first one, and ours
    assert repo.tags == {f"rev-{revision(judge)}": head}
    held = {path: blob.content for path, blob in repo.commits[head].files.items()}
    assert held.pop(".gitattributes")
    assert held == contents(judge)
    assert hub.asked("POST /complete/")  # the larger file went in parts

    pulled = mixfuse("pull", "org/judge", tmp_path / "back")
    assert pulled.returncode == 0, pulled.stderr
    assert f"at commit {head}" in pulled.stdout
    assert contents(tmp_path / "back") == contents(judge)
    assert not list(tmp_path.glob(".back*"))

    assert [seen for seen in hub.seen if seen.place == "storage"]
    assert not [seen for seen in hub.seen if seen.place == "storage" and seen.authorized]


def test_the_same_revision_again_is_nothing_new(mixfuse: Run, hub: Hub, judge: Path) -> None:
    mixfuse("push", judge, "org/judge")
    before, seen = dict(hub.repos["org/judge"].commits), len(hub.seen)
    hub.repos["org/judge"].tags.clear()  # as if the first push had been cut off before its tag
    again = mixfuse("push", judge, "org/judge")
    assert "nothing was sent" in again.stdout
    assert hub.repos["org/judge"].commits == before
    assert hub.repos["org/judge"].tags == {f"rev-{revision(judge)}": hub.repos["org/judge"].branches["main"]}
    writes = [one.path for one in hub.seen[seen:] if one.method not in ("GET", "HEAD")]
    assert writes == [f"/api/models/org/judge/tag/{hub.repos['org/judge'].branches['main']}"]


def test_a_renewed_card_is_sent_alone_and_the_tag_moves_on(mixfuse: Run, hub: Hub, judge: Path) -> None:
    mixfuse("push", judge, "org/judge")
    sent = hub.uploaded()
    assert mixfuse("card", judge, "--base-model", "org/base", "--licence", "apache-2.0").returncode == 0
    done = mixfuse("push", judge, "org/judge")
    assert "2 files" in done.stdout
    assert "note:" not in done.stderr
    assert hub.uploaded() == sent
    repo = hub.repos["org/judge"]
    assert repo.tags == {f"rev-{revision(judge)}": repo.branches["main"]}


def test_every_revision_has_its_tag_and_files_of_the_last_do_not_stay(
    mixfuse: Run, hub: Hub, judge: Path, tmp_path: Path
) -> None:
    later = make(tmp_path / "later", seed=1, fused=False)
    for directory in (judge, later):
        assert mixfuse("push", directory, "org/judge").returncode == 0
    repo = hub.repos["org/judge"]
    assert set(repo.tags) == {f"rev-{revision(judge)}", f"rev-{revision(later)}"}
    assert FUSED not in repo.commits[repo.branches["main"]].files
    done = mixfuse("pull", f"org/judge@{revision(judge)}", tmp_path / "old")
    assert contents(tmp_path / "old") == contents(judge), done.stderr
    again = mixfuse("pull", f"org/judge@rev-{revision(judge)}", tmp_path / "old", HF_HUB_OFFLINE="1")
    assert "was here already" in again.stdout
    moved = mixfuse("pull", "org/judge", tmp_path / "old")
    assert f"holds revision {revision(judge)}, org/judge is {revision(later)}" in one_line(moved)


def test_a_dry_run_says_what_would_be_sent_and_sends_nothing(
    mixfuse: Run, hub: Hub, judge: Path, tmp_path: Path
) -> None:
    done = mixfuse("push", judge, "org/judge", "--dry-run", HF_TOKEN=None)
    assert done.returncode == 0, done.stderr
    assert "would be created" in done.stdout
    assert f"send    {WEIGHTS}  {(judge / WEIGHTS).stat().st_size}" in done.stdout
    assert not hub.repos
    mixfuse("push", judge, "org/judge")
    seen = len(hub.seen)
    done = mixfuse("push", make(tmp_path / "later", seed=1, fused=False), "org/judge", "--dry-run")
    assert f"remove  {FUSED}" in done.stdout
    assert f"keep    {CONFIG}" in done.stdout
    assert len(hub.repos["org/judge"].commits) == 2
    assert {one.method for one in hub.seen[seen:]} == {"GET", "HEAD"}


def test_a_branch_is_made_and_main_stays(mixfuse: Run, hub: Hub, judge: Path, tmp_path: Path) -> None:
    mixfuse("push", judge, "org/judge")
    later = make(tmp_path / "later", seed=1)
    assert mixfuse("push", later, "org/judge", "--revision", "next").returncode == 0
    repo = hub.repos["org/judge"]
    assert repo.branches["main"] == repo.tags[f"rev-{revision(judge)}"]
    assert repo.branches["next"] == repo.tags[f"rev-{revision(later)}"]
    assert mixfuse("pull", "org/judge@next", tmp_path / "next").returncode == 0
    assert contents(tmp_path / "next") == contents(later)


def _other_role(hub: Hub, folder: Path) -> dict[str, bytes]:
    return contents(make(folder, role="domain"))


def _other_base(hub: Hub, folder: Path) -> dict[str, bytes]:
    return contents(make(folder, base=dict.fromkeys(("config", "tokenizer", "chat_template", "weights"), "0" * 64)))


def _beside(hub: Hub, folder: Path) -> dict[str, bytes]:
    return contents(make(folder, seed=1)) | {"plot.png": b"png"}


OTHERS = {
    "another role": (_other_role, "holds a domain adapter, this is a judge"),
    "another base": (_other_base, "an adapter of another base model"),
    "no adapter": (lambda *_: {"pytorch_model.bin": b"pickle"}, "is not an adapter of mixfuse (it holds pytorch_"),
    "another's manifest": (lambda *_: {MANIFEST: b'{"name": "an app"}'}, "holds a manifest that is not mixfuse's"),
    "a file beside it": (_beside, "holds plot.png, which is no part of the adapter"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_another_adapter_is_overwritten_only_by_force(
    case: str, mixfuse: Run, hub: Hub, judge: Path, tmp_path: Path
) -> None:
    files, message = OTHERS[case]
    repo = hub.add("org/taken", files(hub, tmp_path / "other"))
    before = dict(repo.branches)
    refused = one_line(mixfuse("push", judge, "org/taken"))
    assert message in refused
    assert "--force" in refused
    assert repo.branches == before
    assert not hub.asked("^PUT|commit/")
    assert mixfuse("push", judge, "org/taken", "--force").returncode == 0
    held = repo.commits[repo.branches["main"]].files
    assert {path: blob.content for path, blob in held.items() if path != ".gitattributes"} == contents(judge)


def test_a_repository_with_nothing_but_a_page_is_free(mixfuse: Run, hub: Hub, judge: Path) -> None:
    hub.add("org/new", {"README.md": b"---\nlicense: mit\n---\n"})
    assert mixfuse("push", judge, "org/new").returncode == 0


def test_private_never_becomes_public_unseen(mixfuse: Run, hub: Hub, judge: Path) -> None:
    hub.add("org/open", {})
    assert "is public already" in one_line(mixfuse("push", judge, "org/open", "--private"))


def test_what_verify_refuses_is_not_pushed(mixfuse: Run, hub: Hub, judge: Path) -> None:
    (judge / "notes.txt").write_text("secret")
    assert "notes.txt is not in the manifest" in one_line(mixfuse("push", judge, "org/judge"))
    (judge / "notes.txt").unlink()
    (judge / CONFIG).write_text("{}")
    assert "was changed after export" in one_line(mixfuse("push", judge, "org/judge"))
    assert not hub.seen


def test_what_the_hub_leaves_out_of_the_commit_is_noticed(mixfuse: Run, hub: Hub, judge: Path) -> None:
    hub.ignored = {CONFIG}
    assert f"does not hold {CONFIG}" in one_line(mixfuse("push", judge, "org/judge"))
    assert not hub.repos["org/judge"].tags


def test_an_upload_that_failed_goes_on_where_it_was(mixfuse: Run, hub: Hub, judge: Path) -> None:
    sizes = {name: (judge / name).stat().st_size for name in (WEIGHTS, FUSED)}
    fused = adapter.read_manifest(judge).files[FUSED]
    hub.faults = [Fault(f"PUT /upload/{fused}", 403, "Request has expired")]
    done = mixfuse("push", judge, "org/judge")
    assert "403" in one_line(done)
    assert "forThisUploadOnly" not in done.stderr
    assert hub.repos["org/judge"].branches["main"] in hub.repos["org/judge"].commits
    assert len(hub.repos["org/judge"].commits) == 1  # no commit with half of the files
    whole = [seen for seen in hub.asked("^PUT") if seen.status == 200]
    assert sum(seen.received for seen in whole) == sizes[WEIGHTS]
    before = hub.uploaded()
    assert mixfuse("push", judge, "org/judge").returncode == 0
    assert hub.uploaded() - before == sizes[FUSED]


def test_a_push_that_was_killed_goes_on_where_it_was(hub: Hub, judge: Path, environment: dict[str, str]) -> None:
    command = [sys.executable, "-m", "mixfuse", "adapter", "push", str(judge), "org/judge"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    hub.faults = [Fault("POST /api/models/org/judge/commit", 503, before=process.kill)]
    assert process.wait(timeout=60) == -signal.SIGKILL
    before = hub.uploaded()
    assert before
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=60)
    assert hub.uploaded() == before
    assert len(hub.repos["org/judge"].commits) == 2


REFUSED = {
    "no token": ({"HF_TOKEN": None}, None, "no token to push to org/judge with: set HF_TOKEN, or log in"),
    "a wrong token": ({"HF_TOKEN": "hf_wrong"}, None, "does not accept your token for org/judge (401"),
    "a token to read": ({"HF_TOKEN": READ_ONLY}, None, "use a token with write access"),
    "a quoted token": ({}, Fault("preupload", 403, f"refused: Bearer {TOKEN}"), "your token may not do this"),
    "a commit meanwhile": ({}, Fault("/commit/", 409, "conflict"), "somebody else changed org/judge meanwhile (409"),
    "a limit": ({}, Fault("/commit/", 429, "slow down", {"Retry-After": "7"}), "run the same command again in 7 s"),
    "a broken Hub": ({}, Fault("/commit/", 500, "internal"), "the Hub refused org/judge (500: internal)"),
    "no Hub": ({"HF_ENDPOINT": "http://127.0.0.1:9"}, None, "http://127.0.0.1:9 cannot be reached for org/judge"),
    "offline": ({"HF_HUB_OFFLINE": "1"}, None, "HF_HUB_OFFLINE is set"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_hub_refuses_is_one_line_that_says_what_to_do(case: str, mixfuse: Run, hub: Hub, judge: Path) -> None:
    changes, fault, message = REFUSED[case]
    hub.faults = [fault] if fault else []
    assert message in one_line(mixfuse("push", judge, "org/judge", **changes))
    assert [tag for repo in hub.repos.values() for tag in repo.tags] == []


def test_a_commit_made_in_between_is_not_lost(mixfuse: Run, hub: Hub, judge: Path, tmp_path: Path) -> None:
    mixfuse("push", judge, "org/judge")
    repo = hub.repos["org/judge"]
    theirs = {**repo.commits[repo.branches["main"]].files, "NOTES.md": Blob(b"mine", False)}
    hub.faults = [Fault("/commit/", before=lambda: repo.commit(theirs, "somebody's"))]
    done = mixfuse("push", make(tmp_path / "later", seed=1), "org/judge")
    assert "somebody else changed org/judge meanwhile (412" in one_line(done)
    assert "NOTES.md" in repo.commits[repo.branches["main"]].files


def test_the_client_waits_as_long_as_the_hub_says(mixfuse: Run, hub: Hub, judge: Path) -> None:
    hub.faults = [Fault("preupload", 429, "slow down", {"Retry-After": "0"}), Fault("^PUT", 503, "busy")]
    done = mixfuse("push", judge, "org/judge")
    assert done.returncode == 0, done.stderr
    assert "Rate limited. Waiting 1.0s" in done.stderr
    assert "/upload/" in done.stderr
    assert "forThisUploadOnly" not in done.stderr


def test_the_token_is_not_in_what_the_client_says_for_debugging(mixfuse: Run, judge: Path) -> None:
    done = mixfuse("push", judge, "org/judge", HF_DEBUG="1")
    assert "authenticated: True" in done.stderr
    assert "forThisUploadOnly" not in done.stderr


@pytest.fixture
def published(hub: Hub, judge: Path) -> str:
    hub.add("org/judge", contents(judge))
    return "org/judge"


def test_a_file_that_was_tampered_with_on_the_hub_is_refused(
    mixfuse: Run, hub: Hub, judge: Path, published: str, tmp_path: Path
) -> None:
    digest = adapter.read_manifest(judge).files[WEIGHTS]
    good = hub.objects[digest]
    hub.objects[digest] = good[:-1] + bytes([good[-1] ^ 1])
    refused = one_line(mixfuse("pull", published, tmp_path / "back"))
    assert f"org/judge: {WEIGHTS} was changed after export" in refused
    assert hub.repos[published].branches["main"] in refused
    assert not [path for path in tmp_path.iterdir() if "back" in path.name]
    hub.objects[digest] = good
    assert mixfuse("pull", published, tmp_path / "back").returncode == 0


def test_a_pull_that_was_cut_off_fetches_only_what_is_missing(
    mixfuse: Run, hub: Hub, judge: Path, published: str, tmp_path: Path
) -> None:
    fused = adapter.read_manifest(judge).files[FUSED]
    hub.faults = [Fault(f"GET /object/{fused}", 403, "Request has expired")]
    assert "403" in one_line(mixfuse("pull", published, tmp_path / "back"))
    assert not (tmp_path / "back").exists()
    before = sum(seen.sent for seen in hub.asked("GET /object"))
    assert mixfuse("pull", published, tmp_path / "back").returncode == 0
    assert sum(seen.sent for seen in hub.asked("GET /object")) - before == (judge / FUSED).stat().st_size
    assert contents(tmp_path / "back") == contents(judge)


def test_a_connection_that_breaks_in_a_file_is_made_again(
    mixfuse: Run, hub: Hub, judge: Path, published: str, tmp_path: Path
) -> None:
    digest = adapter.read_manifest(judge).files[WEIGHTS]
    hub.faults = [Fault(f"GET /object/{digest}", cut=5000)]
    done = mixfuse("pull", published, tmp_path / "back")
    assert done.returncode == 0, done.stderr
    assert len(hub.asked(f"GET /object/{digest}")) == 2
    assert contents(tmp_path / "back") == contents(judge)


def test_only_what_belongs_in_an_adapter_is_fetched(
    mixfuse: Run, hub: Hub, judge: Path, published: str, tmp_path: Path
) -> None:
    files = contents(judge)
    manifest = json.loads(files[MANIFEST])
    pickled = {**manifest, "files": {**manifest["files"], "adapter_model.bin": "0" * 64}}
    outside = {**manifest, "files": {**manifest["files"], "../evil.json": "0" * 64}}
    cases = {
        "holds model.bin, which its manifest does not list": files | {"model.bin": b"pickle"},
        "adapter_model.bin: only safetensors": files
        | {"adapter_model.bin": b"", MANIFEST: json.dumps(pickled).encode()},
        "'../evil.json', which lies outside": files | {"../evil.json": b"{}", MANIFEST: json.dumps(outside).encode()},
        f"lacks {CONFIG}": {name: content for name, content in files.items() if name != CONFIG},
        "not an adapter of mixfuse": {"model.safetensors": b""},
        "not valid JSON": files | {MANIFEST: b"{"},
    }
    for message, held in cases.items():
        hub.add(published, held)
        assert message in one_line(mixfuse("pull", published, tmp_path / "back"))
        assert not hub.asked("GET /object")
        assert not (tmp_path / "evil.json").exists()


def test_a_base_it_does_not_fit_is_named(mixfuse: Run, published: str, tmp_path: Path) -> None:
    done = mixfuse("pull", published, tmp_path / "back", "--base", a_base(tmp_path / "base"))
    assert "made on another base model" in one_line(done)
    assert not (tmp_path / "back").exists()


def test_what_is_not_there_is_named(mixfuse: Run, hub: Hub, published: str, tmp_path: Path) -> None:
    missing = one_line(mixfuse("pull", "org/nothing", tmp_path / "back"))
    assert "org/nothing is not on the Hub, or is private" in missing
    revision = one_line(mixfuse("pull", f"{published}@v9", tmp_path / "back"))
    assert f"{published}@v9: no such branch, tag or commit" in revision
    offline = one_line(mixfuse("pull", published, tmp_path / "back", HF_HUB_OFFLINE="1"))
    assert "HF_HUB_OFFLINE is set" in offline
    name = one_line(mixfuse("pull", "judge", tmp_path / "back"))
    assert "'judge' is not a repository's name on the Hub; write it as org/name" in name
    (tmp_path / "back").mkdir()
    taken = one_line(mixfuse("pull", published, tmp_path / "back"))
    assert "exists already and is no adapter directory" in taken


def test_a_private_adapter_is_for_who_may_read_it(mixfuse: Run, hub: Hub, judge: Path, tmp_path: Path) -> None:
    hub.add("org/secret", contents(judge), private=True)
    assert "is private" in one_line(mixfuse("pull", "org/secret", tmp_path / "back", HF_TOKEN=None))
    assert mixfuse("pull", "org/secret", tmp_path / "back", HF_TOKEN=READ_ONLY).returncode == 0


def test_a_login_counts_as_well_as_a_variable(mixfuse: Run, hub: Hub, judge: Path, environment: dict[str, str]) -> None:
    Path(environment["HF_HOME"]).mkdir()
    (Path(environment["HF_HOME"]) / "token").write_text(TOKEN)
    assert mixfuse("push", judge, "org/judge", HF_TOKEN=None).returncode == 0


def test_a_second_pull_into_the_same_place_is_refused(mixfuse: Run, hub: Hub, published: str, tmp_path: Path) -> None:
    out = tmp_path / "back"
    told: list[str] = []
    hub.faults = [Fault("GET /object", before=lambda: told.append(one_line(mixfuse("pull", published, out))))]
    assert mixfuse("pull", published, out).returncode == 0
    assert "another pull writes to" in told[0]
    assert not list(tmp_path.glob(".back*"))


WATCH = """
import asyncio, sys
from pathlib import Path
from mixfuse.app.roles_store import StoredRoles
from mixfuse.app.server import HubSource
from mixfuse.contracts.database import opened

async def main(database):
    store = StoredRoles(database, "here")
    source = HubSource({"judge": "org/judge"}, Path(sys.argv[1]), store, Path(sys.argv[2]))
    for _ in range(2):
        found = await source.newest("judge")
        print(found.directory, found.state)
    if sys.argv[3] == "served":
        version = (await store.read())["judge"].version if "judge" in await store.read() else 0
        await store.change("judge", version, found.state[:12], found.directory, "watch")

with opened(str(Path(sys.argv[2]).parent / "traces.sqlite3")) as database:
    asyncio.run(main(database))
"""


def test_a_watched_branch_is_fetched_once_a_commit(hub: Hub, tmp_path: Path, environment: dict[str, str]) -> None:
    base = a_base(tmp_path / "base")
    fingerprint = adapter.fingerprint(base).model_dump()
    seen = []
    for seed in (0, 1):
        directory = make(tmp_path / str(seed), seed=seed, base=fingerprint)
        hub.add("org/judge", contents(directory))
        first, again = watched(base, tmp_path / "fetched", environment, served=True)
        assert first == again
        assert contents(Path(first.split()[0])) == contents(directory)
        seen.append(first)
    assert seen[0] != seen[1]
    assert len(hub.asked("GET /object")) == 4


def watched(base: Path, folder: Path, environment: dict[str, str], *, served: bool) -> list[str]:
    command = [sys.executable, "-c", WATCH, str(base), str(folder), "served" if served else "refused"]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=120)
    return done.stdout.splitlines()


def test_fetched_commits_that_no_rollback_needs_are_removed(
    hub: Hub, tmp_path: Path, environment: dict[str, str]
) -> None:
    base, folder = a_base(tmp_path / "base"), tmp_path / "fetched"
    fingerprint = adapter.fingerprint(base).model_dump()
    fetched = []
    for seed in range(6):
        hub.add("org/judge", contents(make(tmp_path / str(seed), seed=seed, base=fingerprint)))
        line, _ = watched(base, folder, environment, served=seed != 4)
        fetched.append(Path(line.split()[0]).name)
    left = {path.name for path in (folder / "judge").iterdir() if path.is_dir()}
    assert left == {fetched[1], fetched[2], fetched[3], fetched[5]}  # the three that served last, and the newest


def test_a_watched_role_that_nobody_serves_is_named(tmp_path: Path, environment: dict[str, str]) -> None:
    config = {
        "engine": {"base": "base"},
        "fusion": {"members": [{"name": "quick", "role": "base"}], "trace_db": str(tmp_path / "traces.sqlite3")},
        "watch": {"judge": "org/judge"},
    }
    (tmp_path / "serve.yaml").write_text(json.dumps(config))
    command = [sys.executable, "-m", "mixfuse", "serve", "serve.yaml"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert "`watch` names the role 'judge'; add it to `roles`" in one_line(done)


def test_any_tools_adapter_on_the_hub_is_inspected_where_it_lies(mixfuse: Run, hub: Hub, judge: Path) -> None:
    files = contents(judge)
    theirs = {name: files[name] for name in (CONFIG, WEIGHTS)} | {"training_args.bin": b"pickle", "x/y.json": b"{}"}
    hub.add("org/theirs", theirs | {"README.md": b"---\ntags:\n- axolotl\n---\n"})
    done = mixfuse("inspect", "org/theirs", "--json")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("org/theirs\n")
    assert json.loads(done.stdout.splitlines()[-1])["maker"] == "axolotl (PEFT)"
    hub.add("org/pickled", {CONFIG: files[CONFIG], "adapter_model.bin": b"pickle"})
    assert "pickled .bin files are refused" in one_line(mixfuse("inspect", "org/pickled"))
    hub.add("org/none", {"README.md": b"x"})
    assert "org/none at commit" in one_line(mixfuse("inspect", "org/none"))
    assert "no such run or adapter folder" in one_line(mixfuse("inspect", "nowhere"))


def test_a_signature_travels_and_can_be_demanded(mixfuse: Run, judge: Path, tmp_path: Path) -> None:
    for name in ("ours", "theirs"):
        mixfuse("keygen", tmp_path / name)
    mixfuse("sign", judge, "--key", tmp_path / "ours")
    mixfuse("push", judge, "org/judge")
    out = tmp_path / "back"
    refused = mixfuse("pull", "org/judge", out, "--public-key", tmp_path / "theirs.pub")
    assert "which is not a trusted one" in one_line(refused)
    assert not out.exists()
    assert mixfuse("pull", "org/judge", out, "--public-key", tmp_path / "ours.pub").returncode == 0
    renewed = mixfuse("card", judge, "--licence", "mit")
    assert "the new card made the signature invalid" in renewed.stderr
