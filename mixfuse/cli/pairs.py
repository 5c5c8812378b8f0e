"""`mixfuse pairs …`: preference pairs."""

import argparse
import json
import os
from pathlib import Path

from mixfuse.cli import options


def register(commands: options.Commands) -> None:
    """Adds the parser of `mixfuse pairs`."""
    pairs = options.group(commands, "pairs", "preference pairs")
    pairs_build = pairs.add_parser("build", help="both orders of every usable pair of answers, and a data card")
    pairs_build.add_argument("pool", type=Path, metavar="POOL_FILE|SPEC.yaml", help="pool rows, or several sources")
    pairs_build.add_argument("overrides", nargs="*", metavar="key=value", help="of the spec")
    pairs_build.add_argument("--out", type=Path, required=True, metavar="FILE")
    pairs_build.add_argument("--per-prompt", type=int, help="pairs of answers a prompt at most (default 2)")
    pairs_build.add_argument("--dev-share", type=float, help="share of the prompts for dev (default 0.1)")
    pairs_build.add_argument("--balance", metavar="TRAITS", help="length,style,model (default for a pool file: none)")
    pairs_build.add_argument("--near", type=float, help="prompts this alike are near duplicates (pool file: 1.0)")
    pairs_build.add_argument(
        "--against", type=Path, action="append", default=[], metavar="FILE", help="an evaluation set: kept apart"
    )
    pairs_build.add_argument("--seed", type=int)
    pairs_build.add_argument("--json", action="store_true", help="the data card as one JSON object on the last line")
    pairs_build.set_defaults(command=_pairs_build)
    rationales = pairs.add_parser("rationales", help="a judge's own rationales, kept by whether their verdict is right")
    rationales.add_argument("data", type=Path, metavar="FILE", help="labelled pairs or pool answers, as for eval judge")
    rationales.add_argument("--judge", required=True, metavar="MODEL", help="the model or role that writes them")
    rationales.add_argument("--out", type=Path, required=True, metavar="FILE")
    rationales.add_argument("--samples", type=int, default=4, help="of each order of each pair (default 4)")
    rationales.add_argument("--limit", type=int, help="only the first so many rows")
    rationales.add_argument("--api-key-env", metavar="NAME", help="the environment variable that holds the key")
    options.add_url(rationales)
    rationales.set_defaults(command=_pairs_rationales)


def _pairs_build(arguments: argparse.Namespace) -> None:
    from mixfuse.app import preferences
    from mixfuse.train.data import data_card

    names = ("per_prompt", "dev_share", "near", "seed")
    given = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    if arguments.balance is not None:
        given["balance"] = [trait for trait in arguments.balance.split(",") if trait and trait != "none"]
    if arguments.against:
        given["against"] = [str(path) for path in arguments.against]
    spec = preferences.read_spec(arguments.pool, given, arguments.overrides)
    card = preferences.build(spec, arguments.out)
    for line in data_card.lines(card):
        print(line)
    prompts = card["prompts"]
    print(
        f"{arguments.out}: train pairs {card['train_pairs']}, dev pairs {card['dev_pairs']} (two rows a pair), of "
        f"{prompts['train']} and {prompts['dev']} prompts; {arguments.out.stem}.card.md says more"
    )
    if arguments.json:
        print(json.dumps(card))


def _pairs_rationales(arguments: argparse.Namespace) -> None:
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
