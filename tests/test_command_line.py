"""The command line: it explains itself, every command and argument has help, and a shell completes them."""

import argparse
import asyncio
import json
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mixfuse.app.server import GatewayConfig, listen
from mixfuse.app.workers import listeners
from mixfuse.cli.entry import JOBS, build_parser, main
from mixfuse.contracts.errors import MixfuseError
from mixfuse.fusion.config import FusionConfig

ROOT = Path(__file__).parent.parent


def commands(parser: argparse.ArgumentParser, words: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every command with its words; those that only hold sub-commands too."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, subparser in action.choices.items():
                yield (*words, name)
                yield from commands(subparser, (*words, name))


def parser_of(words: tuple[str, ...]) -> argparse.ArgumentParser:
    parser = build_parser()
    for word in words:
        (subparsers,) = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
        parser = subparsers.choices[word]
    return parser


ALL = sorted(commands(build_parser()))


def test_without_arguments_it_lists_every_command_by_job_and_the_first_steps(capsys: pytest.CaptureFixture[str]):
    assert main([]) == 0
    overview = capsys.readouterr().out
    top = [words[0] for words in ALL if len(words) == 1]
    assert sorted(module.__name__.rpartition(".")[2] for modules in JOBS.values() for module in modules) == top
    for job in JOBS:
        assert f"\n{job}:\n" in overview
    for name in top:
        assert overview.count(f"\n  {name} ") == 1, name
    (first_step,) = [line for line in overview.splitlines() if line.startswith("  mixfuse init ")]
    build_parser().parse_args(shlex.split(first_step.split("   ")[0])[1:])


def test_help_is_the_overview(capsys: pytest.CaptureFixture[str]):
    main([])
    overview = capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == overview


def test_a_group_without_a_command_prints_its_help(capsys: pytest.CaptureFixture[str]):
    assert main(["adapter"]) == 2
    assert "verify" in capsys.readouterr().err


@pytest.mark.parametrize("words", ALL, ids=" ".join)
def test_every_command_has_help(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        main([*words, "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: mixfuse {' '.join(words)}")
    parser = parser_of(words)
    assert parser.description
    assert parser.description[0].isupper()
    for action in parser._actions:
        assert action.help or isinstance(action, argparse._SubParsersAction), f"{words}: {action.dest} has no help"


def test_the_process_prints_the_overview_and_exits_with_0():
    done = subprocess.run([sys.executable, "-m", "mixfuse"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: mixfuse")


@pytest.fixture(scope="module")
def bash_script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    script = tmp_path_factory.mktemp("completion") / "mixfuse"
    done = subprocess.run(
        [sys.executable, "-m", "mixfuse", "completion", "bash"], capture_output=True, text=True, check=True
    )
    script.write_text(done.stdout)
    return script


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("mixfuse adapter pu", {"push", "pull"}),
        ("mixfuse roles swap --sh", {"--shadow"}),
        ("mixfuse init project --for mixtral-8x2", {"mixtral-8x22b"}),
        ("mixfuse plan pyproj", {"pyproject.toml"}),
        ("mixfuse adapter verify conf", {"configs"}),
    ],
)
def test_bash_completes(bash_script: Path, line: str, offered: set[str]):
    words = line.split(" ")
    script = f"""
source {bash_script}
COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}
function=$(complete -p mixfuse | sed 's/.*-F \\([^ ]*\\) .*/\\1/')
$function mixfuse {words[-1]} {words[-2]}
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=ROOT, check=False)
    assert (set(done.stdout.split()), done.stderr) == (offered, "")


@pytest.mark.parametrize("shell", ["zsh", "tcsh"])
def test_other_shells_get_a_script(shell: str, capsys: pytest.CaptureFixture[str]):
    assert main(["completion", shell]) == 0
    assert "mixfuse" in capsys.readouterr().out


@pytest.mark.parametrize("model", ["tiny", "mixtral-8x7b", "mixtral-8x22b"])
def test_init_writes_a_project_whose_commands_and_paths_fit(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    from mixfuse.app.pairs_spec import PairsSpec
    from mixfuse.app.server import ServeConfig
    from mixfuse.contracts.strict_yaml import load
    from mixfuse.contracts.tasks import TaskFile
    from mixfuse.fusion.config import FusionConfig
    from mixfuse.train.recipe import JudgeRecipe, SftRecipe

    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").write_text("user = True\n")
    assert main(["init", ".", "--for", model]) == 0
    assert "README.md" in capsys.readouterr().out
    examples = {path.relative_to(ROOT / "configs" / model) for path in (ROOT / "configs" / model).rglob("*.*")}
    examples |= {path.relative_to(ROOT / "configs") for path in (ROOT / "configs" / "deepspeed").iterdir()}
    written = {path.relative_to(tmp_path) for path in tmp_path.rglob("*.*")} - {Path("train.py")}
    assert written == examples

    for recipe in (load(Path("domain_sft.yaml"), SftRecipe), load(Path("judge_dpo.yaml"), JudgeRecipe)):
        assert json.loads(recipe.deepspeed.read_text())["zero_optimization"]["stage"] == 3
    for path in Path().glob("serve*.yaml"):
        fusion = load(path, ServeConfig).fusion
        assert isinstance(fusion, Path)
        load(fusion, FusionConfig)
    for path in Path().glob("tasks.yaml"):
        load(path, TaskFile)
    for path in Path().glob("pairs.yaml"):
        load(path, PairsSpec)

    text = "".join(path.read_text() for path in written_texts(tmp_path))
    assert "configs/" not in text
    lines = [line.strip() for line in Path("README.md").read_text().splitlines()]
    typed = [line for line in lines if line.startswith("mixfuse ")]
    typed += [line.partition("Launch: ")[2].strip() for line in text.splitlines() if line.startswith("# Launch: ")]
    assert len(typed) > 10
    for line in typed:
        if line.startswith("ray start "):  # the line below it is mixfuse's
            continue
        arguments = shlex.split(line.partition(", which")[0])[1:]
        build_parser().parse_args(arguments)
        read = [word for before, word in zip(["", *arguments], arguments, strict=False) if before != "--out"]
        for word in read:
            # What earlier commands of the page make lies under runs/.
            assert not word.endswith((".yaml", ".json")) or word.startswith("runs/") or Path(word).is_file(), line


def written_texts(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.suffix in (".yaml", ".json", ".md")]


def test_init_overwrites_nothing_and_then_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    mine = tmp_path / "serve.yaml"
    mine.write_text("mine: true\n")
    assert main(["init", str(tmp_path), "--for", "tiny"]) == 2
    assert "serve.yaml exists already" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [mine]
    assert mine.read_text() == "mine: true\n"


def test_init_does_not_write_through_a_dangling_link(tmp_path: Path):
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "README.md").symlink_to(tmp_path / "elsewhere.md")
    assert main(["init", str(tmp_path / "project"), "--for", "tiny"]) == 2
    assert not (tmp_path / "elsewhere.md").exists()


@pytest.mark.parametrize("folder", ["a" * 400, "a/" * 2500, "\u00fc" * 200])
def test_a_path_that_no_file_can_have_is_one_line(folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = str(tmp_path / folder)
    for words in (
        ["init", path, "--for", "tiny"],
        ["gateway", path],
        ["plan", path],
        ["traces", "export", "--db", path, "--out", str(tmp_path / "out.jsonl")],
        ["tasks", "make", "configs/tiny/tasks.yaml", "--out", path],
        ["combiner", "fit", path, "--out", str(tmp_path / "out.json")],
    ):
        assert main(words) == 2, words
        told = capsys.readouterr().err
        assert told.startswith("mixfuse: error: "), words
        assert told.count("\n") == 1, words
    assert list(tmp_path.iterdir()) == []


def test_init_where_nothing_can_be_made_is_one_line(capsys: pytest.CaptureFixture[str]):
    assert main(["init", "/proc/x", "--for", "tiny"]) == 2
    assert "cannot write /proc/x" in capsys.readouterr().err


CONFIGS = ROOT / "configs" / "tiny"


@pytest.mark.parametrize(
    ("words", "given", "wanted"),
    [
        (["gateway", "serve.yaml"], "serve config", "fusion config"),
        (["serve", "fusion.yaml"], "fusion config", "serve config"),
        (["gateway", "domain_sft.yaml"], "training recipe", "fusion config"),
        (["plan", "fusion.yaml"], "fusion config", "training recipe"),
        (["loop", "fusion.yaml"], "fusion config", "loop config"),
        (["serve", "pairs.yaml"], "spec of pairs", "serve config"),
        (["train", "judge", "tasks.yaml"], "task file", "training recipe"),
        (["tasks", "make", "pairs.yaml", "--out", "x.jsonl"], "spec of pairs", "task file"),
    ],
)
def test_a_config_of_the_wrong_kind_is_called_by_its_kind(
    words: list[str], given: str, wanted: str, capsys: pytest.CaptureFixture[str]
):
    assert main([str(CONFIGS / word) if word.endswith(".yaml") else word for word in words]) == 2
    told = capsys.readouterr().err
    assert f"this is a {given} (" in told
    assert f"a {wanted} is wanted here" in told


def test_overrides_may_stand_behind_options(capsys: pytest.CaptureFixture[str]):
    arguments = ["gateway", str(CONFIGS / "fusion.yaml"), "--port", "0", "modes.deadline_ms=-5", "--drain-s", "1"]
    assert main(arguments) == 2
    assert "'modes.deadline_ms'" in capsys.readouterr().err
    for further in (["modes"], ["--surprise"]):
        with pytest.raises(SystemExit):
            main([*arguments[:4], *further])
        assert f"unrecognized arguments: {further[0]}" in capsys.readouterr().err
    with pytest.raises(SystemExit):  # a command without overrides
        main(["adapter", "inspect", "x", "--json", "key=value"])
    assert "unrecognized arguments: key=value" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("stage", "recipe", "other"), [("sft", "judge_dpo.yaml", "judge"), ("judge", "domain_sft.yaml", "sft")]
)
def test_the_recipe_of_the_other_stage_is_called_by_its_command(
    stage: str, recipe: str, other: str, capsys: pytest.CaptureFixture[str]
):
    assert main(["train", stage, str(CONFIGS / recipe)]) == 2
    assert f"`mixfuse train {other}` reads this recipe (it has '" in capsys.readouterr().err


def test_a_typo_in_a_config_of_the_right_kind_is_a_typo(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "fusion.yaml"
    path.write_text("members: [{name: a, base_url: 'http://127.0.0.1:9/v1', model: a}]\nengine: {}\n")
    assert main(["gateway", str(path)]) == 2
    assert "unknown key 'engine'" in capsys.readouterr().err


@pytest.mark.parametrize("workers", [None, 1])
async def test_a_small_answer_is_sent_at_once(workers: int | None):
    """On asyncio's own event loop, too, as the viewer's: with Nagle's algorithm it would wait 40 ms for the client."""
    config = FusionConfig(members=[{"name": "a", "base_url": "http://127.0.0.1:9/v1", "model": "a"}])
    listener = listen(GatewayConfig(port=0), config, host="--host", port="--port")
    if workers:
        (listener,) = listeners(listener, workers)
    accepted: asyncio.Future[asyncio.StreamWriter] = asyncio.get_running_loop().create_future()
    server = await asyncio.start_server(lambda _, writer: accepted.set_result(writer), sock=listener)
    async with server:
        _, client = await asyncio.open_connection(*listener.getsockname())
        connection = await accepted
        assert connection.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        for writer in (client, connection):
            writer.close()
            await writer.wait_closed()


@pytest.mark.parametrize(
    ("option", "value", "named"),
    [("--host", "no.such.host.invalid", "--host"), ("--host", "192.0.2.1", "--host"), ("--port", None, "--port")],
)
def test_the_error_of_an_address_names_the_option_at_fault(
    option: str, value: str | None, named: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("MIXFUSE_ADMIN_KEY", "key")
    config = FusionConfig(members=[{"name": "a", "base_url": "http://127.0.0.1:9/v1", "model": "a"}], api_keys="off")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        chosen = value or str(taken.getsockname()[1])
        address = GatewayConfig(**({"host": chosen} if option == "--host" else {"port": int(chosen)}))
        with pytest.raises(MixfuseError, match=f"cannot listen on .*choose another {named}$"):
            listen(address, config, host="--host", port="--port")
