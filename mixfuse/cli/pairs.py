"""`mixfuse pairs …`: preference pairs."""

import argparse
import json
import os
from pathlib import Path

from mixfuse.cli import options


def register(commands: options.Commands) -> None:
    """Adds the parsers."""
    pairs = options.add_group(commands, "pairs", "build preference pairs for the judge")
    build = options.add_command(
        pairs,
        "build",
        _build,
        "build preference pairs in both orders, with a dev split and a data card",
        "Reads one file of pool rows or of public preference data, or a spec (YAML) with several sources and filters.",
    )
    build.add_argument("pool", type=Path, metavar="FILE|SPEC.yaml", help="rows, or a spec of several sources")
    options.add_overrides(build, "the spec")
    build.add_argument("--out", type=options.out_file, required=True, metavar="FILE", help="the JSONL file to write")
    build.add_argument("--per-prompt", type=options.whole(1), metavar="N", help="most pairs per prompt (default: 2)")
    build.add_argument(
        "--dev-share",
        type=options.real(least=0, most=1),
        metavar="SHARE",
        help="share of the prompts held out for dev (default: 0.1)",
    )
    build.add_argument(
        "--balance", metavar="TRAITS", help="balance length,style,model (default for a pool file: none of them)"
    )
    build.add_argument(
        "--near",
        type=options.real(least=0, most=1),
        metavar="SIMILARITY",
        help="similarity from which prompts count as duplicates (default for a pool file: 1.0, equal ones only)",
    )
    build.add_argument(
        "--against",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="an evaluation set whose prompts are left out of the pairs; repeatable",
    )
    build.add_argument("--seed", type=options.whole(0), help="seed of every random choice (default: 0)")
    options.add_json(build, "the data card")
    rationales = options.add_command(
        pairs,
        "rationales",
        _rationales,
        "let a judge write rationales, and keep those whose verdict is right",
    )
    rationales.add_argument(
        "data", type=Path, metavar="FILE", help="labelled pairs or pool answers, as for `mixfuse eval judge`"
    )
    rationales.add_argument("--judge", required=True, metavar="MODEL", help="the model or role that writes them")
    rationales.add_argument(
        "--out", type=options.out_file, required=True, metavar="FILE", help="the JSONL file to write"
    )
    rationales.add_argument(
        "--samples", type=options.whole(1), default=4, help="rationales per order of each pair (default: 4)"
    )
    rationales.add_argument("--limit", type=options.whole(1), metavar="N", help="read only the first N rows")
    rationales.add_argument("--api-key-env", metavar="NAME", help="environment variable that holds the API key")
    options.add_url(rationales)


def _build(arguments: argparse.Namespace) -> None:
    from mixfuse.app.pairs_spec import read_spec
    from mixfuse.app.preferences import build
    from mixfuse.train.data import data_card

    names = ("per_prompt", "dev_share", "near", "seed")
    settings: dict[str, object] = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    if arguments.balance is not None:
        settings["balance"] = [trait for trait in arguments.balance.split(",") if trait and trait != "none"]
    if arguments.against:
        settings["against"] = [str(path) for path in arguments.against]
    spec = read_spec(arguments.pool, settings, arguments.overrides)
    card = build(spec, arguments.out, inputs=[arguments.pool])
    for line in data_card.lines(card):
        print(line)
    prompts = card["prompts"]
    print(
        f"{arguments.out}: {card['train_pairs']} training rows, {card['dev_pairs']} dev rows (a pair is two rows), "
        f"from {prompts['train']} and {prompts['dev']} prompts; {arguments.out.stem}.card.md has the details"
    )
    if arguments.json:
        print(json.dumps(card))


def _rationales(arguments: argparse.Namespace) -> None:
    import asyncio

    from mixfuse.contracts.files import write_jsonl
    from mixfuse.fusion.calls.upstream import Endpoint
    from mixfuse.fusion.labels.rationales import sample
    from mixfuse.fusion.measure.comparisons import load

    key = os.environ.get(arguments.api_key_env) if arguments.api_key_env else None
    endpoint = Endpoint(f"{arguments.url.rstrip('/')}/v1", arguments.judge, key)
    rows, counts = asyncio.run(sample(endpoint, load(arguments.data, limit=arguments.limit), samples=arguments.samples))
    write_jsonl(arguments.out, rows)
    print(f"{arguments.out}: " + ", ".join(f"{name} {count}" for name, count in counts.items()))
