"""Runs the checks one after another and prints one line of JSON for each, as soon as it has ended."""

import argparse
import json
import signal
import sys
import time
from importlib import import_module
from typing import Any

import torch

from gpu_checks.checking import Report, Skipped, about, free

CHECKS = {
    "moe-block": "one MoE block of 8x22B: ours, grouped and by expert, beside PEFT's; time, peak beside the plan",
    "packed-attention": "packed chats of 16384 tokens in each attention: parity with the chats alone, time and memory",
    "judge-head": "the judge's few rows of the output layer in bfloat16 and float32; TRL's chunked log-probabilities",
    "four-layers": "four layers of 8x22B under ZeRO-3: training, gradients, peak beside the plan, save and resume",
    "loading": "a synthetic four-layer checkpoint: GB/s, CPU offload, quantised weights",
    "vllm-adapters": "vLLM's LoRA kernels beside PEFT, an FP8 base, and swaps of a role under load",
}


def main(arguments: list[str]) -> int:
    """Runs the checks that are named, or all.

    Returns:
        0, or 1 if a check failed.
    """
    parser = argparse.ArgumentParser(prog="scripts/gpu-check", description=__doc__)
    parser.add_argument("checks", nargs="*", metavar="CHECK", help="the checks to run; by default all")
    parser.add_argument("--list", action="store_true", help="list the checks")
    parser.add_argument("--small", action="store_true", help="small sizes; the choice where there is no GPU")
    parser.add_argument("--minutes", type=float, default=30, help="start no check after this time (default 30)")
    options = parser.parse_args(arguments)
    if options.list:
        print("".join(f"{name:17} {what}\n" for name, what in CHECKS.items()), end="")
        return 0
    if unknown := [name for name in options.checks if name not in CHECKS]:
        parser.error(f"there is no check {unknown[0]!r}; the checks are {', '.join(CHECKS)}")
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    small = options.small or device.type == "cpu"
    began, failed = time.monotonic(), False
    for name in options.checks or CHECKS:
        if time.monotonic() - began > options.minutes * 60:
            line: dict[str, Any] = {"name": name, "result": "skipped", "why": f"{options.minutes:g} minutes are over"}
        else:
            line = run(name, device, small=small)
            free(device)
        failed |= line["result"] == "failed"
        print(json.dumps(line), flush=True)
    return int(failed)


def run(name: str, device: torch.device, *, small: bool) -> dict[str, Any]:
    """Runs one check; what it raises becomes its result."""
    report, began, why = Report(device, small=small), time.monotonic(), None
    result = "ok"
    try:
        import_module(f"gpu_checks.{name.replace('-', '_')}").check(report)
    except (Skipped, ImportError) as error:
        result, why = "skipped", str(error)
    except Exception as error:  # a check that breaks must not end the others
        report.failures.append(f"{type(error).__name__}: {' '.join(str(error).split())[:2000]}")
    if report.failures:
        result, why = "failed", "; ".join(report.failures)
    line = {"name": name, "result": result, "seconds": round(time.monotonic() - began, 1), "small": small}
    line |= {"device": about(device)} | ({"why": why} if why else {})
    return line | ({"not_run": report.skipped} if report.skipped else {}) | {"figures": report.rows}


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        print("scripts/gpu-check: interrupted; the lines above are whole", file=sys.stderr)
        sys.exit(130)
