"""vLLM on four layers of 8x22B with random weights: adapters of experts in its kernels for this device, and swaps.

Two adapters are trained and exported as any others. vLLM's log-probabilities are compared with PEFT's by `mixfuse
adapter verify`, also on the base in FP8. Then a role is swapped between the two while requests run, and the
log-probabilities of each answer must be those of the revision that it names.
"""

import asyncio
import json
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gpu_checks.checking import Report, Skipped
from gpu_checks.small_runs import ROOT, SECONDS, Base, dtype_of, make_base, make_recipe, require_packages, train

CLIENTS = 4
SAME = {"cuda": 0.25, "cpu": 1e-3}
"""Nats between two answers of one revision. In bfloat16 the kernels round otherwise with the size of the batch: a step
of a logit near 8 is 0.06 nats, and a few add up."""
FP8_CAPABILITY = (8, 9)  # Ada and Hopper; older cards compute FP8 weights in 16 bits


def check(report: Report) -> None:
    """Trains two adapters, compares each path of vLLM with PEFT, and swaps them under load."""
    require_packages()
    if find_spec("vllm") is None:
        raise Skipped("vLLM is not installed; run scripts/setup --gpu")
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as name:
        folder = Path(name)
        base = make_base(folder / "base", report)
        steps = {"steps": 4, "batch_size": 1, "micro_batch": 1, "warmup_steps": 0}
        rate = 1e-2 if report.small else 1e-3  # for an effect that stands out of the rounding
        recipe = make_recipe(base, report, optimizer={**steps, "learning_rate": rate})
        adapters = [_adapter(recipe, name, seed) for seed, name in enumerate(("one", "two"), start=1)]
        parity(report, base, adapters)
        fp8(report, base, adapters[0])
        row = asyncio.run(swaps(report, base, adapters, folder))
        report.expect(row["failed"] == 0, f"{row['failed']} of {row['answers']} requests failed during swaps")
        report.expect(row["wrong"] == 0, f"{row['wrong']} of {row['answers']} answers are not of their revision")


def parity(report: Report, base: Base, adapters: list[Path]) -> None:
    """`adapter verify` in the dtype that would serve."""
    for adapter in adapters:
        dtype = str(dtype_of(report)).removeprefix("torch.")
        done = _mixfuse("adapter", "verify", str(adapter), "--base", str(base.folder), "--dtype", dtype)
        _parity_row(report, adapter, done, what="parity", dtype=dtype)
        report.expect(done.returncode == 0, f"vLLM and PEFT differ: {_last(done)}")


def fp8(report: Report, base: Base, adapter: Path) -> None:
    """The same on the base in FP8, which vLLM quantises as it loads. The figure is reported; nothing bounds it."""
    import torch

    if report.device.type != "cuda" or torch.cuda.get_device_capability(report.device) < FP8_CAPABILITY:
        report.skipped["FP8 base"] = f"it needs a GPU of compute capability {'.'.join(map(str, FP8_CAPABILITY))}"
        return
    config = base.folder.parent / "serve.yaml"
    engine = {"base": str(base.folder), "dtype": "bfloat16", "extra_args": ["--quantization=fp8"]}
    config.write_text(json.dumps({"engine": engine, "roles": {"domain": str(adapter)}}))  # JSON is YAML
    done = _mixfuse("adapter", "verify", str(adapter), "--config", str(config))
    _parity_row(report, adapter, done, what="FP8 base", dtype="fp8", within=done.returncode == 0)


async def swaps(report: Report, base: Base, adapters: list[Path], folder: Path) -> dict[str, Any]:
    """Swaps a role to and fro while clients ask it for log-probabilities.

    Returns:
        The row: swaps, answers, failed requests, answers of another revision, and times of answers in seconds.
    """
    from mixfuse.contracts.adapter import fingerprint
    from mixfuse.serve.admission import Admission
    from mixfuse.serve.copies import AdapterCopies
    from mixfuse.serve.engine import EngineConfig
    from mixfuse.serve.engine_group import EngineGroup
    from mixfuse.serve.roles import RoleTable
    from mixfuse.serve.swap import Swapper

    dtype = str(dtype_of(report)).removeprefix("torch.")
    keys = {"threads": 1} if report.device.type == "cpu" else {}
    config = EngineConfig(
        base=base.folder, dtype=dtype, max_loras=2, max_num_seqs=8, start_timeout_s=600, **keys
    ).for_roles(1)
    tokens = [3 + number * 7 % 200 for number in range(48)]
    async with EngineGroup(config, logs=folder) as group:
        admission = Admission(fingerprint(base.folder), max_rank=16, copies=AdapterCopies(folder / "copies"))
        swapper = Swapper(RoleTable(group, ["domain"], admission))
        known: dict[str, list[float]] = {}
        asked: list[tuple[str, list[float] | Exception, float]] = []
        clock = asyncio.get_running_loop().time

        async def ask() -> tuple[str, list[float] | Exception, float]:
            async with swapper.table.lease("domain") as leased:
                began = clock()
                try:
                    return leased.model, await group.prompt_logprobs(leased.model, tokens), clock() - began
                except Exception as failure:  # counted, and named below
                    return leased.model, failure, clock() - began

        for adapter in adapters:
            await swapper.swap("domain", adapter)
            model, answer, _ = await ask()
            if isinstance(answer, Exception):
                raise answer
            known[model] = answer
        quiet = sorted([(await ask())[2] for _ in range(9)])[4]
        done = asyncio.Event()

        async def client() -> None:
            while not done.is_set():
                asked.append(await ask())

        clients = [asyncio.create_task(client()) for _ in range(CLIENTS)]
        count = 4 if report.small else 20
        for number in range(count):
            await swapper.swap("domain", adapters[number % 2])
        done.set()
        await asyncio.gather(*clients)
    return _swaps_row(report, asked, known, swaps=count, quiet_s=quiet)


def _swaps_row(
    report: Report,
    asked: list[tuple[str, "list[float] | Exception", float]],
    known: dict[str, list[float]],
    **figures: Any,
) -> dict[str, Any]:
    failed = [answer for _, answer, _ in asked if isinstance(answer, Exception)]
    answers = [(known.get(model), answer) for model, answer, _ in asked if not isinstance(answer, Exception)]
    wrong = [1 for right, answer in answers if right is None or _distance(right, answer) > SAME[report.device.type]]
    times = sorted(seconds for _, answer, seconds in asked if not isinstance(answer, Exception))
    one, two = known.values()
    apart = _distance(one, two)
    report.expect(
        apart > 2 * SAME[report.device.type], f"the adapters differ by {apart:.3g} nats: nothing is told apart"
    )
    return report.row(
        what="swaps under load", answers=len(asked), failed=len(failed), wrong=len(wrong), adapters_differ_nats=apart,
        p50_s=times[len(times) // 2] if times else None, p95_s=times[len(times) * 95 // 100] if times else None,
        first_failure=str(failed[0])[:300] if failed else None, **figures,
    )  # fmt: skip


def _distance(one: list[float], other: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def _adapter(recipe: Path, name: str, seed: int) -> Path:
    run, out = train(recipe, f"run-{name}", f"seed={seed}").out, recipe.parent / f"adapter-{name}"
    done = _mixfuse("adapter", "export", str(run), str(out))
    if done.returncode:
        raise RuntimeError(f"the export failed: {_last(done)}")
    return out


def _parity_row(report: Report, adapter: Path, done: "subprocess.CompletedProcess[str]", **figures: Any) -> None:
    measured = json.loads((adapter / "manifest.json").read_text()).get("parity") if done.returncode == 0 else None
    report.row(**figures, adapter=adapter.name, said=_last(done), parity=measured)


def _mixfuse(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "mixfuse", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, cwd=ROOT, check=False)


def _last(done: "subprocess.CompletedProcess[str]") -> str:
    lines = [line for line in (done.stdout if done.returncode == 0 else done.stderr).splitlines() if line.strip()]
    return lines[-1][:500] if lines else ""
