"""`mixfuse ui`: the page alone, over what a gateway and training left, of which it changes nothing."""

import hashlib
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from browsing import Watched, served
from fake_upstream import Script
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from mixfuse.cli.entry import main
from mixfuse.contracts.database import Database, opened


@contextmanager
def viewing(*arguments: str) -> Iterator[str]:
    """Runs the command; yields the page's address."""
    command = [sys.executable, "-m", "mixfuse", "ui", "--port", "0", *arguments]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr
            line = process.stderr.readline()
            assert line.startswith("page: http://127.0.0.1:"), line + process.stderr.read()
            yield line.split()[1]
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(30)


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the database of a gateway that has answered, and a run."""
    folder = tmp_path_factory.mktemp("left")
    with served(folder, {"alpha": Script("<b>an old answer</b>")}, members=["alpha"]) as running:
        body = {"model": "alpha", "messages": [{"role": "user", "content": "an old question"}]}
        assert httpx.post(f"{running.url}/v1/chat/completions", json=body).status_code == 200
    (folder / "runs" / "sft").mkdir(parents=True)
    (folder / "runs" / "sft" / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n{"step": 2, "loss": 1.5}\n')
    return folder


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_it_shows_traces_and_runs_and_changes_nothing(left: Path, tab: Callable[..., Watched]) -> None:
    database = left / "traces.sqlite3"
    before = digest(database), sorted(path.name for path in left.iterdir() if "-" not in path.name)
    with viewing("--traces", str(database), "--runs", str(left / "runs")) as url:
        page = tab().page
        page.goto(url)
        assert page.locator("nav").inner_text().split() == ["Traces", "Roles", "Runs", "Spend"]
        page.get_by_text("an old question").first.wait_for()
        page.locator("a.open").first.click()
        page.get_by_text("<b>an old answer</b>").first.wait_for()
        posting = page.locator('main form[method="post"]')
        assert not any(form.is_visible() for form in posting.all())
        page.get_by_role("link", name="Runs").click()
        page.get_by_role("link", name="sft").click()
        page.get_by_role("img", name="Loss over steps 1 to 2").wait_for()
        root = url.removesuffix("/ui")
        token = httpx.get(f"{url}/traces").text.partition('name="csrf" content="')[2].partition('"')[0]
        for path in ("/traces/x/feedback", "/roles/domain/swap"):
            assert httpx.post(url + path, data={"csrf": token}).status_code in (404, 405)
        assert httpx.get(f"{root}/v1/models").status_code == 404, "there is no API"
        assert httpx.get(f"{url}/traces", headers={"host": "evil.example"}).status_code == 403
        page.close()  # it asks for news, and would complain of a server that has ended
    assert (digest(database), sorted(path.name for path in left.iterdir() if "-" not in path.name)) == before


def test_it_shows_runs_alone(left: Path) -> None:
    with viewing("--runs", str(left / "runs")) as url:
        assert "sft" in httpx.get(f"{url}/runs").text
        assert httpx.get(f"{url}/traces").status_code == 404


def test_it_asks_for_the_admin_key_where_one_is_set(left: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIXFUSE_ADMIN_KEY", "an admin key")
    with (
        viewing("--traces", str(left / "traces.sqlite3"), "--runs", str(left / "runs")) as url,
        httpx.Client() as client,
    ):
        for page in ("traces", "runs"):
            assert client.get(f"{url}/{page}").status_code == 303
        token = client.get(f"{url}/login").text.partition('name="csrf" content="')[2].partition('"')[0]
        assert client.post(f"{url}/login", data={"csrf": token, "key": "an admin key"}).status_code == 303
        for page in ("traces", "runs"):
            assert client.get(f"{url}/{page}").status_code == 200


def test_a_person_logs_in_with_the_admin_key(
    left: Path, tab: Callable[..., Watched], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MIXFUSE_ADMIN_KEY", "an admin key")
    with viewing("--traces", str(left / "traces.sqlite3")) as url:
        page = tab().page
        page.goto(url)
        page.get_by_label("Key").fill("an admin key")
        page.keyboard.press("Enter")
        page.get_by_text("an old question").first.wait_for()
        page.close()


def test_a_database_that_is_opened_for_reading_cannot_be_written(left: Path) -> None:
    with opened(left / "traces.sqlite3", create=False, reads=True) as database:
        with pytest.raises(SQLAlchemyError, match="readonly"):
            database.run_now(lambda connection: connection.execute(text("DELETE FROM traces")))
        assert (
            database.run_now(lambda connection: connection.execute(text("SELECT COUNT(*) FROM traces")).scalar()) == 1
        )


def test_what_cannot_be_shown_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.txt").write_text("no database at all, but some text that is long enough\n" * 20)
    with opened(tmp_path / "old.sqlite3") as database:
        database.run_now(lambda connection: connection.execute(text("UPDATE schema_version SET version = 1")))
    Path("empty.sqlite3").touch()
    for arguments, said in (
        ([], "name what the page shows"),
        (["--runs", "nothing"], "there is no such folder"),
        (["--traces", "nothing.sqlite3"], "there is no database nothing.sqlite3"),
        (["--traces", "other.txt"], "cannot open the trace database other.txt"),
        (["--traces", "old.sqlite3"], "was written by an older mixfuse"),
        (["--traces", "empty.sqlite3"], "is no database of mixfuse"),
    ):
        assert main(["ui", "--port", "0", *arguments]) == 2
        printed = capsys.readouterr().err
        assert said in printed
        assert len(printed.splitlines()) == 1
    assert Path("empty.sqlite3").stat().st_size == 0
    assert not Path("nothing.sqlite3").exists()
    with pytest.raises(Exception, match="older"):
        Database("old.sqlite3", reads=True)
