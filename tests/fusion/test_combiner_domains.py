"""Domains read from the words of a question, for requests that name none."""

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from combiner_pools import pool

from mixfuse.contracts.errors import MixfuseError
from mixfuse.fusion.combiner.artefact import LONGEST_TEXT, Combiner, load, save
from mixfuse.fusion.combiner.evidence import Question
from mixfuse.fusion.measure.combiner_fit import cross_validate, fit_combiner
from mixfuse.fusion.measure.combiner_replay import replay

SPECIALISTS = {"law": {"a": 0.9, "b": 0.3}, "maths": {"a": 0.3, "b": 0.9}}
WORDS = {"law": ["court", "plaintiff", "contract", "Gericht"], "maths": ["integral", "matrix", "prime", "Wurzel"]}
COMMON = ["the", "which", "of", "following", "is", "12", "x2", "true", "best", "says"]


def worded(questions: Sequence[Question], seed: int = 0) -> list[Question]:
    """The questions with a prompt each, in which two words are its domain's own."""
    generator = np.random.default_rng(seed)
    result = []
    for question in questions:
        words = [*generator.choice(COMMON, 6), *generator.choice(WORDS[question.domain or "law"], 2)]
        result.append(replace(question, prompt=f"{' '.join(generator.permutation(words))}? ({question.id})"))
    return result


def unnamed(questions: Sequence[Question]) -> list[Question]:
    return [replace(question, domain=None) for question in questions]


@pytest.fixture(scope="module")
def fitted() -> Combiner:
    return fit_combiner(worded(pool(600, {"a": 0.5, "b": 0.5}, domains=SPECIALISTS)), "choice")


def test_a_domain_is_read_from_words_and_not_from_numbers(fitted: Combiner) -> None:
    assert fitted.domain_of("Is the PLAINTIFF bound by this contract?") == "law"
    assert fitted.domain_of("the following integral of a matrix") == "maths"
    assert fitted.domain_of("") is None
    assert fitted.domain_of("12 345") is None
    assert fitted.domain_of("zzz " * 10**6) is None
    assert fitted.domain_of("court contract integral matrix") is None  # in doubt


def test_what_is_read_serves_as_well_as_what_is_named(fitted: Combiner) -> None:
    test = worded(pool(800, {"a": 0.5, "b": 0.5}, domains=SPECIALISTS, seed=1), seed=1)
    named, read = replay(fitted, test), replay(fitted, unnamed(test))
    blind = replay(fitted.model_copy(update={"reader": None}), unnamed(test))
    assert read.weighed > named.weighed - 0.01
    assert read.weighed > blind.weighed + 0.1


def test_its_figures_are_cross_validated(fitted: Combiner) -> None:
    read = fitted.figures["domain_reader"]
    assert read["accuracy"] > 0.98
    assert read["named"] > 0.9
    assert read["weighed"] > read["weighed_without"] + 0.1
    assert fitted.reader is not None
    assert fitted.reader.accuracy == read["accuracy"]


def test_where_words_say_nothing_of_the_domain_no_reader_is_kept() -> None:
    questions = pool(300, {"a": 0.5, "b": 0.5}, domains=SPECIALISTS)
    validated = cross_validate([replace(q, prompt=f"question {q.id}") for q in questions], "choice")
    assert validated.combiner.reader is None
    assert validated.to_json()["domain_reader"]["weighed"] == pytest.approx(
        validated.to_json()["domain_reader"]["weighed_without"], abs=0.05
    )


@pytest.mark.parametrize("change", [{"domain": None}, {"domain": "law"}, {"prompt": ""}])
def test_without_two_domains_or_without_prompts_nothing_is_read(change: dict[str, Any]) -> None:
    questions = worded(pool(100, {"a": 0.6, "b": 0.6}, domains=SPECIALISTS))
    combiner = fit_combiner([replace(question, **change) for question in questions], "choice")
    assert combiner.reader is None
    assert combiner.figures["domain_reader"] is None
    assert combiner.domain_of("court") is None


def test_a_kept_reader_is_read_again_alike_and_small(fitted: Combiner, tmp_path: Path) -> None:
    save(fitted, tmp_path / "combiner.json")
    again = load(tmp_path / "combiner.json")
    assert again.reader == fitted.reader
    assert (tmp_path / "combiner.json").stat().st_size < 300_000


def test_a_long_text_is_read_in_milliseconds(fitted: Combiner) -> None:
    text = "court " + "w" * 20 + " the of " * 200_000
    start = time.perf_counter()
    assert fitted.domain_of(text) == "law"
    assert time.perf_counter() - start < 0.5
    assert fitted.domain_of("the " * LONGEST_TEXT + "court") == fitted.domain_of("the")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"domains": ["law", "law"]}, "not all different"),
        ({"bias": [0.0]}, "one bias for each"),
        ({"words": {"court": [1.0]}}, "the word 'court' has not one weight for each of 2 domains"),
        ({"words": {"court": [float("nan"), 0.0]}}, "finite number"),
        ({"sure": 2.0}, "sure"),
        ({"pickle": "x"}, "pickle"),
    ],
)
def test_a_reader_that_does_not_fit_is_refused(
    fitted: Combiner, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    data = json.loads(fitted.model_dump_json())
    data["reader"] |= change
    file = tmp_path / "combiner.json"
    file.write_text(json.dumps(data))
    with pytest.raises(MixfuseError) as error:
        load(file)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
