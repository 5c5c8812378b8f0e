"""`mixfuse eval …`: measurements."""

import argparse
import json
from pathlib import Path

from mixfuse.cli import options


def register(commands: options.Commands) -> None:
    """Adds the parser of `mixfuse eval`."""
    evaluate = options.group(commands, "eval", "measure")
    judge = evaluate.add_parser("judge", help="both-orders-correct and more, beside the simple baselines")
    judge.add_argument(
        "--judge", required=True, metavar="REF", help="an adapter directory, or a role of a running server"
    )
    judge.add_argument(
        "--data", required=True, type=Path, nargs="+", metavar="FILE", help="labelled pairs, of ours or a benchmark's"
    )
    judge.add_argument("--against", action="append", default=[], metavar="REF", help="a judge to compare it with")
    judge.add_argument("--baseline", choices=("untrained",), help="compare it with its base as well")
    judge.add_argument("--out", type=Path, metavar="DIR", help="write the report, with plots, and every verdict here")
    judge.add_argument("--cache", type=Path, metavar="FILE", help="keeps verdicts (default: in --out)")
    judge.add_argument("--base", type=Path, help="the base of an adapter directory (default: the one it was made on)")
    judge.add_argument("--limit", type=int, metavar="N", help="only the first N rows of each file")
    judge.add_argument("--concurrency", type=int, default=8)
    judge.add_argument("--json", action="store_true", help="one JSON object on the last line")
    options.add_url(judge)
    judge.set_defaults(command=_eval_judge)
    fusing = evaluate.add_parser("fusion", help="does fusing help? each mode beside members, majority, equal compute")
    fusing.add_argument("config", type=Path, metavar="CONFIG", help="the fusion config the gateway runs with")
    what = fusing.add_mutually_exclusive_group(required=True)
    what.add_argument("--tasks", type=Path, metavar="FILE", help="a task file (configs/tiny/tasks.yaml)")
    what.add_argument("--data", type=Path, nargs="+", metavar="FILE", help="rows with a prompt and a reference")
    fusing.add_argument(
        "--verifier",
        choices=("exact", "number", "json", "regex", "reasoning-gym"),
        help="who says what is right: the answer and the reference say the same (--data), or reasoning-gym (--tasks)",
    )
    fusing.add_argument("--split", choices=("train", "pool", "heldout"), default="heldout", help="of a task file")
    fusing.add_argument("--count", type=int, default=100, help="how many tasks of a task file (default 100)")
    fusing.add_argument("--limit", type=int, metavar="N", help="only the first N rows of each file of --data")
    fusing.add_argument(
        "--modes", nargs="+", choices=("best_of", "merge", "debate"), default=["best_of", "merge", "debate"]
    )
    fusing.add_argument(
        "--choose-share", type=float, default=0.3, help="of the tasks, to choose the best member on (default 0.3)"
    )
    fusing.add_argument("--temperature", type=float, help="default: each member's own")
    fusing.add_argument("--max-tokens", type=int, help="default: each member's own")
    fusing.add_argument("--seed", type=int, default=0, help="of the tasks and the answers")
    fusing.add_argument("--concurrency", type=int, default=4, help="requests at once; latencies are with so many")
    fusing.add_argument("--out", type=Path, metavar="DIR", help="write the report, with plots, and every answer here")
    fusing.add_argument("--cache", type=Path, metavar="FILE", help="keeps answers (default: in --out)")
    fusing.add_argument("--json", action="store_true", help="one JSON object on the last line")
    options.add_url(fusing)
    fusing.set_defaults(command=_eval_fusion)


def _eval_judge(arguments: argparse.Namespace) -> None:
    from mixfuse.app.evaluate import eval_judge

    report = eval_judge(
        arguments.judge,
        arguments.data,
        base=arguments.base,
        url=arguments.url,
        limit=arguments.limit,
        concurrency=arguments.concurrency,
        against=arguments.against,
        untrained=arguments.baseline == "untrained",
        out=arguments.out,
        cache=arguments.cache,
    )
    if arguments.json:
        print(json.dumps(report.to_json()))


def _eval_fusion(arguments: argparse.Namespace) -> None:
    from mixfuse.app.evaluate import eval_fusion

    report = eval_fusion(
        arguments.config,
        tasks=arguments.tasks,
        data=arguments.data,
        verifier=arguments.verifier,
        split=arguments.split,
        count=arguments.count,
        limit=arguments.limit,
        modes=arguments.modes,
        choose_share=arguments.choose_share,
        temperature=arguments.temperature,
        max_tokens=arguments.max_tokens,
        seed=arguments.seed,
        concurrency=arguments.concurrency,
        url=arguments.url,
        out=arguments.out,
        cache=arguments.cache,
    )
    if arguments.json:
        print(json.dumps(report.to_json()))
