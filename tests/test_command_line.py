"""The command line: it explains itself, every command and argument has help, and a shell completes them."""

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mixfuse.cli.entry import JOBS, build_parser, main

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
        for word in arguments:
            assert not word.endswith((".yaml", ".json")) or Path(word).is_file(), line


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
