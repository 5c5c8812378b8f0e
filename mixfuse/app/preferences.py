"""`mixfuse pairs build`: builds preference pairs from several sources, filtered, with a data card.

Composes `train` (pairs and filters) with what the training room must not import: verifiers, the trace database, a
stronger judge behind HTTP.
"""

import asyncio
import itertools
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mixfuse.app.pair_sources import SourcePairs, read_source
from mixfuse.app.pairs_spec import Hard, PairsSpec, refuse_password
from mixfuse.app.prompts import read_prompts
from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.paths import keep_apart
from mixfuse.train.data import data_card, pairs
from mixfuse.train.data.data_files import files_of
from mixfuse.train.data.pair_filters import Selection, select
from mixfuse.train.data.sources import digest
from mixfuse.train.recipe import DataSource


def build(spec: PairsSpec, out: Path, *, progress: bool = True, inputs: Sequence[Path] = ()) -> dict[str, Any]:
    """Writes training pairs, dev pairs and a data card.

    Args:
        spec: The sources and filters.
        out: The file of the training pairs, `NAME.jsonl`. Beside it are written `NAME.dev.jsonl`, `NAME.card.md`,
            `NAME.card.json` and, with matplotlib, `NAME.card.png`. `NAME.verdicts.sqlite3` stores a stronger judge's
            verdicts for the next call.
        progress: Whether to show bars on stderr.
        inputs: Other files that are read, such as the spec's; nothing is written over them or the sources.

    Returns:
        The data card's JSON.

    Raises:
        MixfuseError: A source is missing or has another shape, a verifier fails, or no pair is left to train on (kind
            "no_pairs").
    """
    for source in spec.sources:
        if source.kind == "traces":
            refuse_password(source.path)
    verdicts = out.with_name(f"{out.stem}.verdicts.sqlite3")
    files = (files_of(Path(source.path)) for source in spec.sources if source.kind != "traces")
    read = [*inputs, *spec.against, *itertools.chain.from_iterable(files)]
    read += [Path(source.path) for source in spec.sources if source.kind == "traces" and "://" not in source.path]
    cards = [out.with_name(f"{out.stem}.card.{ending}") for ending in ("json", "md", "png")]
    keep_apart([out, pairs.dev_path(out), *cards, verdicts], read)
    by_source = [read_source(source, seed=spec.seed, verdicts=verdicts, progress=progress) for source in spec.sources]
    preferences = [preference for source_pairs in by_source for preference in source_pairs.preferences]
    if not preferences:
        where = ", ".join(
            f"{source.path} ({', '.join(f'{name} {count}' for name, count in read_pairs.counts.items() if count)})"
            for source, read_pairs in zip(spec.sources, by_source, strict=True)
        )
        raise MixfuseError(
            f"{where}: no prompt has both a right and a wrong answer, so there is nothing to prefer", kind="no_pairs"
        )
    against = [prompt for path in spec.against for prompt in read_prompts(path)]
    weights = {source.label: source.weight for source in spec.sources if source.weight is not None}
    selection = select(preferences, spec, against=against, weights=weights, seed=spec.seed)
    if spec.hard is not None and selection.train:
        selection = _select_hard(spec.hard, selection, spec.seed, verdicts, progress)
    if not selection.train:
        left_out = ", ".join(f"{reason} {count}" for reason, count in selection.left_out.items() if count)
        raise MixfuseError(f"{out}: of {len(preferences)} pairs none is left to train on ({left_out})", kind="no_pairs")
    counts = pairs.write(out, selection.train, selection.dev, seed=spec.seed)
    return data_card.write(out, selection, sources=_source_facts(spec, by_source), filters=spec, counts=counts)


def _source_facts(spec: PairsSpec, by_source: list[SourcePairs]) -> list[dict[str, Any]]:
    """What the data card says of each source."""
    return [
        {
            "name": source.label,
            "kind": source.kind,
            "path": source.path,
            "sha256": digest(DataSource(path=Path(source.path))) if source.kind != "traces" else None,
            "licence": source.licence,
            "weight": source.weight,
            "read": dict(source_pairs.counts),
        }
        for source, source_pairs in zip(spec.sources, by_source, strict=True)
    ]


def _select_hard(hard: Hard, selection: Selection, seed: int, cache: Path, progress: bool) -> Selection:
    """Keeps the training pairs that the judge gets wrong or flips, and a share of the others.

    A pair whose calls failed stays. The result may be unbalanced: a judge that goes by length, for example, gets those
    pairs wrong in which the shorter answer is better.
    """
    from mixfuse.fusion.labels.labelling import AnswerPair, label

    questions = [AnswerPair(pair.prompt, pair.better, pair.worse) for pair in selection.train]
    labels = asyncio.run(label(hard.judge, questions, cache=cache, progress=progress))
    rng = random.Random(seed)  # noqa: S311 - a reproducible choice, not a secret
    hard_pairs = [
        preference
        for preference, outcome in zip(selection.train, labels.outcomes, strict=True)
        if outcome is None or outcome.winner != "first" or rng.random() < hard.keep
    ]
    return selection.with_train(hard_pairs, "known to the judge")
