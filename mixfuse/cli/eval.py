"""`mixfuse eval …`: how good a judge is, and whether fusion helps."""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

from mixfuse.cli import combiner, options
from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.mode_names import FUSED_MODES

_DEFAULTS = {
    "modes": list(FUSED_MODES), "choose_share": 0.3, "concurrency": 4, "split": "heldout", "count": 100, "seed": 0,
}  # fmt: skip
_LIVE = (
    "verifier", "split", "count", "modes", "choose_share", "temperature", "max_tokens", "concurrency",
)  # fmt: skip
"""Options of `eval fusion` that mean nothing where no model is asked."""


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
        "--judge",
        type=options.reference,
        required=True,
        metavar="REF",
        help="an adapter directory, a role of the running server, or a judge's config (YAML)",
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
        "--against",
        type=options.reference,
        action="append",
        default=[],
        metavar="REF",
        help="compare with this judge; repeatable",
    )
    judge.add_argument("--baseline", choices=("untrained",), help="compare with the judge's base model as well")
    judge.add_argument(
        "--out", type=options.out_folder, metavar="DIR", help="write a report with plots, and every verdict, here"
    )
    judge.add_argument(
        "--cache", type=options.out_file, metavar="FILE", help="store verdicts for the next run (default: in --out)"
    )
    judge.add_argument(
        "--base", type=Path, metavar="DIR", help="base model of an adapter directory (default: as in its manifest)"
    )
    judge.add_argument("--limit", type=options.whole(), metavar="N", help="read only the first N rows of each file")
    judge.add_argument("--concurrency", type=options.whole(), default=8, help="requests at once (default: 8)")
    options.add_engine(judge)
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
    fusion.add_argument(
        "--judge",
        metavar="NAME",
        help="with --pool: ask this role or member of the server at --url for the verdicts of best_of",
    )
    combiner.add_prices(fusion)
    fusion.add_argument(
        "--verifier",
        choices=("exact", "number", "json", "regex", "reasoning-gym"),
        help="how an answer is checked: against the reference (with --data), or by reasoning-gym (with --tasks)",
    )
    options.add_tasks_options(fusion, split="heldout")
    fusion.add_argument(
        "--limit",
        type=options.whole(),
        metavar="N",
        help="with --data or --pool: read only the first N rows of each file",
    )
    fusion.add_argument(
        "--modes",
        nargs="+",
        choices=FUSED_MODES,
        help="the modes to measure (default: all)",
    )
    fusion.add_argument(
        "--choose-share",
        type=options.real(least=0, most=1),
        metavar="SHARE",
        help="share of the tasks on which the best member is chosen (default: 0.3)",
    )
    fusion.add_argument(
        "--temperature", type=options.real(least=0), help="sampling temperature (default: each member's own)"
    )
    fusion.add_argument(
        "--max-tokens", type=options.whole(), help="most tokens of an answer (default: each member's own)"
    )
    fusion.add_argument(
        "--concurrency",
        type=options.whole(),
        help="requests at once, which affects the latencies (default: 4)",
    )
    fusion.add_argument(
        "--out", type=options.out_folder, metavar="DIR", help="write a report with plots, and every answer, here"
    )
    fusion.add_argument(
        "--cache", type=options.out_file, metavar="FILE", help="store answers for the next run (default: in --out)"
    )
    options.add_json(fusion, "the report")
    options.add_url(fusion)
    # None tells an option that was not given from one that repeats the default; `_fusion` fills the defaults in.
    fusion.set_defaults(defaults={**_DEFAULTS, "url": fusion.get_default("url")}, **dict.fromkeys((*_DEFAULTS, "url")))


def _judge(arguments: argparse.Namespace) -> None:
    from mixfuse.app.evaluate import Judges, eval_judge, server_at
    from mixfuse.app.trial_engine import EngineChoice
    from mixfuse.fusion.batch import Results

    report = eval_judge(
        Judges(arguments.judge, arguments.against, arguments.baseline == "untrained", arguments.base),
        arguments.data,
        server_at(arguments.url),
        Results(arguments.out, arguments.cache),
        limit=arguments.limit,
        concurrency=arguments.concurrency,
        choice=EngineChoice(arguments.config, arguments.dtype, arguments.tensor_parallel_size, arguments.engine_url),
    )
    if arguments.json:
        print(json.dumps(report.to_json()))


def _refuse(arguments: argparse.Namespace, names: Iterable[str], why: str) -> None:
    """Refuses options that would not be heeded.

    Raises:
        MixfuseError: One of them was given.
    """
    for name in names:
        if getattr(arguments, name) not in (None, []):
            raise MixfuseError(f"--{name.replace('_', '-')} {why}")


def _fusion(arguments: argparse.Namespace) -> None:
    if arguments.pool:
        if arguments.config is not None:
            raise MixfuseError(f"{arguments.config}: --pool asks no model and needs no config")
        _replay(arguments)
        return
    _refuse(arguments, ("combiner", "judge", "price", "prices"), "goes with --pool, which replays recorded answers")
    if arguments.tasks:
        _refuse(arguments, ("limit",), "goes with --data or --pool; with --tasks it is --count")
    else:
        _refuse(arguments, ("split", "count"), "goes with --tasks; with --data it is --limit")
    for name, value in arguments.defaults.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
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

    _refuse(arguments, _LIVE, "asks models; --pool replays recorded answers and asks none")
    if arguments.combiner:
        _refuse(arguments, ("seed",), "is of the cross-validation; with --combiner there is none")
    prices = read_prices(arguments.price, arguments.prices)
    source = PoolSource(arguments.pool, prices=prices, limit=arguments.limit, price_file=arguments.prices)
    judge = None
    if arguments.judge is None:
        _refuse(arguments, ("cache", "url"), "goes with --judge; --pool alone asks no model")
    else:
        from mixfuse.app.evaluate import judge_at, server_at

        judge = judge_at(arguments.judge, server_at(arguments.url or arguments.defaults["url"]))
    figures = replay_pool(
        source, arguments.combiner, arguments.out, seed=arguments.seed or 0, judge=judge, cache=arguments.cache
    )
    print_figures(figures)
    if arguments.json:
        print_json(figures)
