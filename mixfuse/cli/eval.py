"""`mixfuse eval …`: how good a judge is, and whether fusion helps."""

import argparse
import json
from pathlib import Path

from mixfuse.cli import combiner, options
from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.mode_names import FUSED_MODES


def register(commands: options.Commands) -> None:
    """Adds the parsers."""
    evaluate = options.add_group(commands, "eval", "measure a judge, or the gain of fusion")
    _register_judge(evaluate)
    _register_fusion(evaluate)


def _register_judge(evaluate: options.Commands) -> None:
    judge = options.add_command(
        evaluate, "judge", _judge, "measure how often a judge is right in both orders, beside simple baselines"
    )
    judge.add_argument(
        "--judge", required=True, metavar="REF", help="an adapter directory, or a role of the running server"
    )
    judge.add_argument(
        "--data",
        required=True,
        type=Path,
        nargs="+",
        metavar="FILE",
        help="labelled pairs, of mixfuse or of a public benchmark",
    )
    judge.add_argument(
        "--against", action="append", default=[], metavar="REF", help="compare with this judge; repeatable"
    )
    judge.add_argument("--baseline", choices=("untrained",), help="compare with the judge's base model as well")
    judge.add_argument("--out", type=Path, metavar="DIR", help="write a report with plots, and every verdict, here")
    judge.add_argument("--cache", type=Path, metavar="FILE", help="store verdicts for the next run (default: in --out)")
    judge.add_argument(
        "--base", type=Path, metavar="DIR", help="base model of an adapter directory (default: as in its manifest)"
    )
    judge.add_argument("--limit", type=int, metavar="N", help="read only the first N rows of each file")
    judge.add_argument("--concurrency", type=int, default=8, help="requests at once (default: 8)")
    options.add_json(judge, "the report")
    options.add_url(judge)


def _register_fusion(evaluate: options.Commands) -> None:
    fusion = options.add_command(
        evaluate,
        "fusion",
        _fusion,
        "measure whether fusion helps",
        "Compares each mode with the members, with a majority vote and with equal compute.",
    )
    fusion.add_argument(
        "config", type=Path, nargs="?", metavar="CONFIG", help="the fusion config that the gateway runs with"
    )
    questions = fusion.add_mutually_exclusive_group(required=True)
    questions.add_argument("--tasks", type=Path, metavar="FILE", help="a task file (YAML)")
    questions.add_argument("--data", type=Path, nargs="+", metavar="FILE", help="rows with a prompt and a reference")
    questions.add_argument(
        "--pool",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="recorded, marked answers: replayed, so that no model is asked",
    )
    fusion.add_argument(
        "--combiner",
        type=Path,
        metavar="FILE",
        help="with --pool: the combiner to replay (default: one cross-validated on the same answers)",
    )
    combiner.add_prices(fusion)
    fusion.add_argument(
        "--verifier",
        choices=("exact", "number", "json", "regex", "reasoning-gym"),
        help="how an answer is checked: against the reference (with --data), or by reasoning-gym (with --tasks)",
    )
    options.add_tasks_options(fusion, split="heldout")
    fusion.add_argument("--limit", type=int, metavar="N", help="with --data: read only the first N rows of each file")
    fusion.add_argument(
        "--modes",
        nargs="+",
        choices=FUSED_MODES,
        default=list(FUSED_MODES),
        help="the modes to measure (default: all)",
    )
    fusion.add_argument(
        "--choose-share",
        type=float,
        default=0.3,
        metavar="SHARE",
        help="share of the tasks on which the best member is chosen (default: 0.3)",
    )
    fusion.add_argument("--temperature", type=float, help="sampling temperature (default: each member's own)")
    fusion.add_argument("--max-tokens", type=int, help="most tokens of an answer (default: each member's own)")
    fusion.add_argument(
        "--concurrency", type=int, default=4, help="requests at once, which affects the latencies (default: 4)"
    )
    fusion.add_argument("--out", type=Path, metavar="DIR", help="write a report with plots, and every answer, here")
    fusion.add_argument("--cache", type=Path, metavar="FILE", help="store answers for the next run (default: in --out)")
    options.add_json(fusion, "the report")
    options.add_url(fusion)


def _judge(arguments: argparse.Namespace) -> None:
    from mixfuse.app.evaluate import Judges, eval_judge, server_at
    from mixfuse.fusion.batch import Results

    report = eval_judge(
        Judges(arguments.judge, arguments.against, arguments.baseline == "untrained", arguments.base),
        arguments.data,
        server_at(arguments.url),
        Results(arguments.out, arguments.cache),
        limit=arguments.limit,
        concurrency=arguments.concurrency,
    )
    if arguments.json:
        print(json.dumps(report.to_json()))


def _fusion(arguments: argparse.Namespace) -> None:
    if arguments.pool:
        if arguments.config is not None:
            raise MixfuseError(f"{arguments.config}: --pool asks no model and needs no config")
        _replay(arguments)
        return
    if arguments.combiner or arguments.price or arguments.prices:
        raise MixfuseError("--combiner, --price and --prices go with --pool, which replays recorded answers")
    if arguments.config is None:
        raise MixfuseError("name the fusion config that the gateway runs with, or recorded answers with --pool")
    from mixfuse.app.evaluate import TaskSource, eval_fusion, server_at
    from mixfuse.fusion.batch import Results, Sampling
    from mixfuse.fusion.measure.eval_fusion import Design

    report = eval_fusion(
        arguments.config,
        TaskSource(
            tasks=arguments.tasks,
            split=arguments.split,
            count=arguments.count,
            data=arguments.data or (),
            limit=arguments.limit,
            verifier=arguments.verifier,
        ),
        server_at(arguments.url),
        Design(
            modes=arguments.modes,
            choose_share=arguments.choose_share,
            sampling=Sampling(arguments.temperature, arguments.max_tokens, arguments.seed),
            concurrency=arguments.concurrency,
        ),
        Results(arguments.out, arguments.cache),
    )
    if arguments.json:
        print(json.dumps(report.to_json()))


def _replay(arguments: argparse.Namespace) -> None:
    from mixfuse.app.combine import PoolSource, print_figures, print_json, read_prices, replay_pool

    source = PoolSource(arguments.pool, None, read_prices(arguments.price, arguments.prices))
    figures = replay_pool(source, arguments.combiner)
    print_figures(figures)
    if arguments.json:
        print_json(figures)
