"""`scripts/launch`: what it prints is what it runs, and each launcher trains the tiny base as one machine does."""

import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import train_harness as harness
from train_harness import SFT_STEPS, Run

from mixfuse.cli.launch import LAUNCHERS as LAUNCHER_FLAGS
from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.files import read_jsonl
from mixfuse.train.launching.launchers import LAUNCHERS, slurm
from mixfuse.train.launching.launchers.deepspeed import read_hostfile
from mixfuse.train.processes.checkpoint import last_checkpoint

SCRIPT = harness.PROJECT / "scripts" / "launch"
PYTHON = [sys.executable, "-m"]


def launch(*arguments: str | Path) -> "subprocess.CompletedProcess[str]":
    command = [*PYTHON, "mixfuse", "launch", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=harness.ENVIRONMENT, check=False)


def printed(*arguments: str | Path) -> list[str]:
    """The command of a dry run, taken apart as a shell would."""
    done = launch("--dry-run", *arguments)
    assert done.returncode == 0, done.stderr
    return shlex.split(done.stdout.splitlines()[-1])


def test_local_is_torchrun_on_this_machine(sft_recipe: Path) -> None:
    train = ["train", "sft", str(sft_recipe), "out=a b"]
    process = ["--no-python", *PYTHON, "mixfuse", *train]
    assert printed("--local", "4", *train) == [
        *PYTHON, "mixfuse.train.processes.graceful_torchrun", "--nproc-per-node=4", "--standalone",
        "--local-addr=127.0.0.1", *process,
    ]  # fmt: skip
    assert "--nproc-per-node=3" in printed("--local", *train, "processes=3")


def test_torchrun_meets_at_the_first_host() -> None:
    by_hosts = launch("--torchrun", "--hosts", "one,two", "--dry-run", "doctor")
    assert by_hosts.stdout.splitlines()[0] == "# on each of one, two:"
    assert "--nnodes=2 --rdzv-backend=c10d --rdzv-endpoint=one:29500" in by_hosts.stdout
    by_name = printed("--torchrun", "--nodes", "3", "--rdzv", "meet:123", "--processes", "8", "doctor")
    assert {"--nnodes=3", "--rdzv-endpoint=meet:123", "--nproc-per-node=8"} <= set(by_name)
    assert not [argument for argument in by_name if argument.startswith("--local-addr")]
    refused = launch("--torchrun", "--dry-run", "doctor")
    assert (refused.returncode, "meeting point" in refused.stderr) == (2, True)


def test_each_host_publishes_the_name_that_the_others_know(sft_recipe: Path) -> None:
    """Torch would publish the host's full name, which may be none that other machines know (torch #150532)."""
    assert "--local-addr=127.0.0.1" in printed("--torchrun", "--hosts", "nowhere.invalid,127.0.0.1", "doctor")
    assert "--local-addr=10.0.0.7" in printed(
        "--torchrun", "--hosts", "a,127.0.0.1", "--local-addr", "10.0.0.7", "doctor"
    )
    assert '--local-addr="$SLURMD_NODENAME"' in launch("--slurm", "--dry-run", "doctor").stdout


@pytest.mark.parametrize("launcher", [["--local", "2"], ["--torchrun", "--hosts", "a,b"], ["--deepspeed", "HOSTS"]])
def test_the_ports_reach_every_process(launcher: list[str], tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("one slots=8\n")
    launcher = [str(tmp_path / "hosts") if word == "HOSTS" else word for word in launcher]
    command = printed(*launcher, "--ports", "29501", "doctor")
    assert command[-6:] == ["env", "MIXFUSE_PORTS=29501", *PYTHON, "mixfuse", "doctor"]


@pytest.mark.zero3
@pytest.mark.parametrize("taken", [0, 1])
@pytest.mark.slow
def test_the_store_and_the_heartbeat_listen_at_the_chosen_ports(taken: int, sft_recipe: Path, tmp_path: Path) -> None:
    """Each is noticed where another program has it."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        done = launch("--local", "2", "--ports", str(port - taken), "train", "sft", sft_recipe, f"out={tmp_path}/run")
    assert done.returncode == 2
    assert f"port {port}, which MIXFUSE_PORTS names, cannot be used on 127.0.0.1" in done.stderr


@pytest.mark.zero3
@pytest.mark.slow
def test_a_run_trains_over_chosen_ports(sft_recipe: Path, tmp_path: Path) -> None:
    port = str(harness.free_port())
    done = launch(
        "--local", "2", "--ports", port, "train", "sft", sft_recipe, f"out={tmp_path}/run", "optimizer.steps=1"
    )
    assert done.returncode == 0, done.stderr[-4000:]


def test_a_host_file_of_other_machines_is_deepspeeds_own_affair(tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("one slots=8\ntwo slots=8\n")
    command = printed("--deepspeed", hosts, "doctor")
    assert "--master_addr=one" in command
    assert "--no_ssh_check" not in command


def test_the_sbatch_file_asks_for_a_requeue_and_time_to_save(sft_recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "a run"
    done = launch(
        "--slurm", "--nodes", "2", "--processes", "8", "--grace", "600", "--sbatch", "partition=gpu", "--sbatch",
        "exclusive", "--dry-run", "train", "sft", sft_recipe, f"out={out}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    directives = {line.removeprefix("#SBATCH --") for line in done.stdout.splitlines() if line.startswith("#SBATCH")}
    assert {
        "nodes=2", "ntasks-per-node=1", "gpus-per-node=8", "signal=TERM@600", "requeue", "partition=gpu", "exclusive",
        "open-mode=append", "mem=0", "cpus-per-task=8", f'output="{out}-%j.log"',
    } <= directives  # fmt: skip
    assert not out.with_name("a run.sbatch").exists(), "a dry run wrote a file"
    assert (
        subprocess.run(["bash", "-n"], input=done.stdout.rpartition("sbatch ")[0], text=True, check=False).returncode
        == 0
    )
    assert shlex.split(done.stdout.splitlines()[-1]) == ["sbatch", str(out.with_name("a run.sbatch"))]


def directives(done: "subprocess.CompletedProcess[str]") -> set[str]:
    assert done.returncode == 0, done.stderr
    return {line.removeprefix("#SBATCH --") for line in done.stdout.splitlines() if line.startswith("#SBATCH")}


def test_a_job_has_the_cores_and_the_memory_that_its_ranks_need(sft_recipe: Path) -> None:
    job = ["--slurm", "--processes", "8", "--dry-run"]
    train = ["train", "sft", sft_recipe]
    text = launch(*job, *train).stdout
    assert 'srun --kill-on-bad-exit=1 --cpus-per-task="$cpus" --mem=0 ' in text, "srun does not take them over"
    by_core = launch(*job, "--sbatch", "mem-per-cpu=4G", *train)
    assert "mem-per-cpu=4G" in directives(by_core)
    assert "--mem=" not in by_core.stdout, "Slurm refuses both"
    assert {"cpus-per-task=8", "mem=0", "exclusive"} <= directives(launch(*job, *train)), "the recipe has threads: 1"
    whole = directives(launch(*job, *train, "threads=null"))
    assert "exclusive" in whole
    assert not {line for line in whole if line.startswith("cpus-per-task")}, "all of the node's"
    shared = directives(launch(*job, "--sbatch", "no-exclusive", "--sbatch", "mem=64G", *train))
    assert {"mem=64G", "cpus-per-task=8"} <= shared
    assert "exclusive" not in shared
    refused = launch(*job, "--sbatch", "no-exclusive", *train, "threads=null")
    assert (refused.returncode, "--sbatch cpus-per-task=N" in refused.stderr) == (2, True)


def test_a_path_stays_one_word_in_an_sbatch_file(sft_recipe: Path, tmp_path: Path) -> None:
    """Bash reads the command as it was given; sbatch reads a directive up to a space, and replaces %j."""
    out = tmp_path / 'it\'s "$HOME" 100%'
    given = str(out).replace("$", "$$")  # in a recipe `$HOME` is the variable, `$$` a dollar sign
    text = launch("--slurm", "--dry-run", "train", "sft", sft_recipe, f"out={given}").stdout
    line = next(line for line in text.splitlines() if "--no-python" in line)
    echoed = subprocess.run(["bash", "-c", f"printf '%s\\n' {line}"], capture_output=True, text=True, check=True).stdout
    assert echoed.splitlines()[-1] == f"out={given}"
    escaped = str(out).replace('"', '\\"').replace("%", "%%")
    assert f'#SBATCH --output="{escaped}-%j.log"' in text
    with pytest.raises(MixfuseError, match="line break"):
        slurm._quoted("a\nb")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names no host"),
        ("# nothing\n", "names no host"),
        ("here slots=2\nthere\n", "hosts:2: expected `HOST slots=N`, found 'there'"),
        ("here slots=2\nhere slots=1\n", "hosts:2: here is named twice"),
    ],
)
def test_a_bad_host_file_is_one_line(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text(text)
    with pytest.raises(MixfuseError, match=message):
        read_hostfile(tmp_path / "hosts")


def test_the_flags_of_launch_are_the_launchers() -> None:
    assert set(LAUNCHER_FLAGS) == set(LAUNCHERS)


def test_only_what_runs_in_several_processes_is_launched(sft_recipe: Path) -> None:
    done = launch("--local", "2", "serve", "x.yaml")
    assert done.returncode == 2
    assert "not 'serve x.yaml'" in done.stderr
    done = launch("--local", "train", "sft", sft_recipe, "optimizer.momentum=1")
    assert done.returncode == 2
    assert "unknown key 'optimizer.momentum'" in done.stderr


@pytest.mark.zero3
def test_torchrun_over_two_hosts_trains_as_one_host_does(sft_recipe: Path, runs: Path, sft_by_two: Run) -> None:
    """Two agents with a process each, as on two machines; both are this one."""
    out = runs / "by_torchrun"
    meet = f"127.0.0.1:{harness.free_port()}"
    command = [*PYTHON, "mixfuse", "launch", "--torchrun", "--nodes", "2", "--rdzv", meet, "--processes", "1"]
    hosts = [
        subprocess.Popen(
            [*command, "train", "sft", str(sft_recipe), f"out={out}"],
            env=harness.ENVIRONMENT,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    said = [host.communicate(timeout=300)[1] for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], said
    run = Run(out)
    assert run.record["metrics"]["processes"] == 2
    assert run.series("loss") == pytest.approx(sft_by_two.series("loss"), rel=1e-5)


@pytest.mark.zero3
@pytest.mark.slow
def test_deepspeeds_launcher_trains_stops_and_goes_on(sft_recipe: Path, runs: Path, sft_by_two: Run) -> None:
    """Its host file names this machine alone: no ssh, no pdsh. SIGTERM goes to the ranks, which save."""
    hosts, out = runs / "hosts", runs / "by_deepspeed"
    hosts.write_text("localhost slots=2\n")
    meet = f"127.0.0.1:{harness.free_port()}"
    arguments = ["--deepspeed", str(hosts), "--rdzv", meet, "train", "sft", str(sft_recipe), f"out={out}"]
    with (runs / "by_deepspeed.log").open("w") as log:
        first = subprocess.Popen(
            [*PYTHON, "mixfuse", "launch", *arguments], env=harness.ENVIRONMENT, stdout=log, stderr=subprocess.STDOUT
        )
    deadline, metrics = time.monotonic() + 200, out / "metrics.jsonl"
    # The file is there, empty, before the first step: SIGTERM then finds nothing to save.
    while not (metrics.is_file() and metrics.stat().st_size) and first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    family = psutil.Process(first.pid).children(recursive=True)
    first.send_signal(signal.SIGTERM)
    code = first.wait(timeout=100)
    text = (runs / "by_deepspeed.log").read_text(errors="replace")
    assert code == 75, text[-4000:]
    assert not psutil.wait_procs(family, timeout=60)[1], "DeepSpeed's launcher left processes behind"
    assert last_checkpoint(out) is not None, text[-4000:]
    done = launch(*arguments)
    assert done.returncode == 0, done.stderr[-4000:]
    run = Run(out)
    assert [row["step"] for row in run.steps] == list(range(1, SFT_STEPS + 1))
    assert run.series("loss") == pytest.approx(sft_by_two.series("loss"), rel=1e-5)


@pytest.mark.zero3
@pytest.mark.slow
def test_four_local_processes_train_as_two_do(sft_recipe: Path, runs: Path) -> None:
    batch = "optimizer.batch_size=8"
    by = {}
    for count in (2, 4):
        out = runs / f"by_{count}_local"
        command = [str(SCRIPT), "--local", str(count), "train", "sft", str(sft_recipe), f"out={out}", batch]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=300, env=harness.ENVIRONMENT, check=False
        )
        assert done.returncode == 0, done.stderr[-4000:]
        by[count] = Run(out)
        assert by[count].record["metrics"]["processes"] == count
    assert by[4].series("loss") == pytest.approx(by[2].series("loss"), rel=1e-3)


def needs_slurm() -> None:
    if shutil.which("sinfo") is None:
        pytest.skip("no Slurm here: apt-get install -y slurm-wlm munge; scripts/slurm-local start")
    if subprocess.run(["sinfo", "--noheader"], capture_output=True, check=False).returncode:
        pytest.skip("no Slurm is running: scripts/slurm-local start, and set SLURM_CONF as it says")


@pytest.mark.slurm
def test_a_slurm_job_has_its_cores_and_its_log_where_it_was_asked(sft_recipe: Path, tmp_path: Path) -> None:
    """`scripts/slurm-local` binds a task to the cores that it asked for, as clusters do."""
    needs_slurm()
    out = tmp_path / "it's $HOME 100%"
    number = launch("--slurm", "--processes", "2", "--gpus-per-node", "0", "train", "sft", sft_recipe, f"out={out}",
                    "threads=null", "optimizer.steps=1").stdout.split()[-1]  # fmt: skip
    log = out.with_name(f"{out.name}-{number}.log")
    script = out.with_name(f"{out.name}.sbatch").read_text()
    assert "#SBATCH --exclusive" in script
    try:
        seen: set[int] = set()
        deadline = time.monotonic() + 200
        while not (out / "run.json").is_file() and time.monotonic() < deadline:
            for process in psutil.process_iter(["cmdline", "environ"]):
                environment = process.info["environ"] or {}
                if environment.get("SLURM_JOB_ID") == number and "RANK" in environment:
                    with suppress(psutil.Error):
                        seen.add(len(process.cpu_affinity() or []))
            time.sleep(0.2)
        assert (out / "run.json").is_file(), log.read_text(errors="replace")[-4000:]
    finally:
        subprocess.run(["scancel", number], capture_output=True, check=False)
    assert seen == {os.cpu_count()}


@pytest.mark.slurm
@pytest.mark.zero3
def test_slurm_stops_requeues_and_finishes(sft_recipe: Path, runs: Path, sft_by_two: Run) -> None:
    """A real Slurm of one machine: `scripts/slurm-local start`, and SLURM_CONF set."""
    needs_slurm()
    out = runs / "by_slurm"
    done = launch(
        "--slurm", "--processes", "2", "--gpus-per-node", "0", "train", "sft", sft_recipe, f"out={out}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    number = done.stdout.split()[-1]
    log = out.with_name(f"by_slurm-{number}.log")

    def state() -> str:
        shown = subprocess.run(["scontrol", "show", "job", number], capture_output=True, text=True, check=False).stdout
        return shown.partition("JobState=")[2].partition(" ")[0]

    def wait_for(happened: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 400
        while not happened() and time.monotonic() < deadline:
            time.sleep(0.1)
        assert happened(), log.read_text(errors="replace")[-4000:]

    try:
        wait_for((out / "metrics.jsonl").is_file)
        subprocess.run(["scancel", "--signal=TERM", number], check=True)
        wait_for(lambda: state() == "PENDING")
        stopped_at = last_checkpoint(out)
        assert stopped_at is not None
        wait_for((out / "run.json").is_file)  # a requeued job waits two minutes, or what scripts/slurm-local sets
        wait_for(lambda: state() == "COMPLETED")
    finally:
        subprocess.run(["scancel", number], capture_output=True, check=False)
    text = log.read_text(errors="replace")
    assert f"requeue: job {number} resumes from its last checkpoint" in text
    assert [row["step"] for row in read_jsonl(out / "metrics.jsonl") if "loss" in row] == list(range(1, SFT_STEPS + 1))
    assert Run(out).series("loss") == pytest.approx(sft_by_two.series("loss"), rel=1e-5)
