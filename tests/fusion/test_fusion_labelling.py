"""A stronger judge says which answers are better: both orders, kept, only where consistent."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from fake_upstream import FakeUpstream, Script
from fusion_harness import prefers

from mixfuse.app import preferences
from mixfuse.app.pairs_spec import PairsSpec
from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.files import read_json, read_jsonl, write_jsonl
from mixfuse.contracts.strict_yaml import validate
from mixfuse.fusion.config import ModelConfig
from mixfuse.fusion.labels.labelling import AnswerPair, Labels, label

ANSWERS = [AnswerPair("1?", "good", "bad"), AnswerPair("2?", "bad", "good"), AnswerPair("3?", "bad", "worse")]


def strong(upstream: FakeUpstream) -> ModelConfig:
    return ModelConfig(base_url=upstream.base_url, model="judge", price={"prompt": 1.0, "completion": 1.0})


async def said(upstream: FakeUpstream, cache: Path) -> Labels:
    return await label(strong(upstream), ANSWERS, cache=cache, progress=False)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "verdicts.sqlite3"


async def test_each_pair_is_asked_in_both_orders(upstream: FakeUpstream, cache: Path) -> None:
    upstream.models["judge"].verdict = prefers("good")
    labels = await said(upstream, cache)
    assert [outcome and outcome.winner for outcome in labels.outcomes] == ["first", "second", "tie"]
    assert labels.outcomes[0] is not None
    assert labels.outcomes[0].score == pytest.approx(0.9)
    assert (labels.asked, len(upstream.asked("judge")), labels.failed) == (6, 6, {})
    assert labels.cost == pytest.approx(6 * 15 / 1e6)


async def test_what_was_said_is_not_asked_again(upstream: FakeUpstream, cache: Path) -> None:
    upstream.models["judge"].verdict = prefers("good")
    first = await said(upstream, cache)
    again = await said(upstream, cache)
    assert (again.outcomes, again.asked) == (first.outcomes, 0)
    # Another judge's verdicts are its own.
    upstream.models["other"] = Script(verdict=prefers("bad"))
    other = ModelConfig(base_url=upstream.base_url, model="other")
    assert (await label(other, ANSWERS, cache=cache, progress=False)).asked == 6


async def test_failed_calls_are_counted_and_made_again(upstream: FakeUpstream, cache: Path) -> None:
    upstream.models["judge"].verdict = prefers("good")
    upstream.models["judge"].faults = [Script(status=500)]
    labels = await said(upstream, cache)
    assert labels.outcomes.count(None) == 1
    assert labels.failed == {"upstream_error": 1}
    assert (await said(upstream, cache)).asked == 1
    upstream.models["judge"].status = 500
    with pytest.raises(MixfuseError, match="every call to judge failed"):
        await said(upstream, cache.with_name("others.sqlite3"))
    nobody = ModelConfig(base_url="http://127.0.0.1:1/v1", model="judge")
    with pytest.raises(MixfuseError, match=r"127\.0\.0\.1"):
        await label(nobody, ANSWERS, cache=cache.with_name("nobody.sqlite3"), progress=False)


async def test_an_endpoint_without_log_probabilities_writes_its_verdict(upstream: FakeUpstream, cache: Path) -> None:
    upstream.models["judge"].verdict = prefers("good")
    upstream.models["judge"].no_logprobs = True
    labels = await said(upstream, cache)
    assert [outcome and outcome.winner for outcome in labels.outcomes[:2]] == ["first", "second"]


async def test_pairs_are_made_where_both_orders_agree(upstream: FakeUpstream, tmp_path: Path) -> None:
    def verdict(first: str, second: str) -> float:
        return 0.9 if "torn" in first + second else prefers("good")(first, second)  # torn: always the first

    upstream.models["judge"].verdict = verdict
    texts = {"1?": ("good", "bad"), "2?": ("bad", "good"), "3?": ("torn", "bad"), "4?": ("same", "same")}
    rows: list[dict[str, Any]] = [
        {
            "id": prompt,
            "prompt": prompt,
            "responses": [{"model": f"m-{n}", "text": text} for n, text in enumerate(both)],
        }
        for prompt, both in texts.items()
    ]
    write_jsonl(tmp_path / "pool.jsonl", rows)
    endpoint = {"base_url": upstream.base_url, "model": "judge"}
    source = {"kind": "judge", "path": str(tmp_path / "pool.jsonl"), "judge": endpoint}
    spec = validate({"sources": [source], "dev_share": 0, "balance": []}, PairsSpec, source="spec")
    out = tmp_path / "pairs.jsonl"
    await asyncio.to_thread(preferences.build, spec, out, progress=False)
    made = read_jsonl(out)
    assert len(made) == 4
    for row in made:
        letters = dict(zip("AB", ("good", "bad"), strict=True))
        content = row["prompt"][-1]["content"]
        better = (
            letters if content.index("good") < content.index("bad") else dict(zip("BA", letters.values(), strict=True))
        )
        assert better[row["chosen"][0]["content"]] == "good"
        assert row["margin"] == pytest.approx(0.8)
    read = read_json(tmp_path / "pairs.card.json")["sources"][0]["read"]
    assert read == {"rows": 4, "pairs": 3, "calls made": 6, "orders disagree": 1}
    assert not [name for name in ("m-0", "m-1") if name in json.dumps(made)]


async def test_a_further_round_trains_on_what_the_judge_gets_wrong_or_flips(
    upstream: FakeUpstream, tmp_path: Path
) -> None:
    def verdict(first: str, second: str) -> float:
        return 0.9 if "torn" in first + second else prefers("good")(first, second)  # torn: always the first

    upstream.models["judge"].verdict = verdict
    texts = {"known?": ("good", "bad"), "wrong?": ("fine", "good"), "flipped?": ("torn", "bad")}
    rows = [
        {
            "id": prompt,
            "prompt": prompt,
            "responses": [
                {"model": "m", "text": right, "correct": True},
                {"model": "n", "text": bad, "correct": False},
            ],
        }
        for prompt, (right, bad) in texts.items()
    ]
    write_jsonl(tmp_path / "pool.jsonl", rows)
    hard = {"judge": {"base_url": upstream.base_url, "model": "judge"}, "keep": 0}
    plain = {"sources": [{"path": str(tmp_path / "pool.jsonl")}], "dev_share": 0, "balance": [], "near": None}

    async def left(**keys: Any) -> tuple[set[str], dict[str, Any]]:
        spec = validate({**plain, **keys}, PairsSpec, source="spec")
        card = await asyncio.to_thread(preferences.build, spec, tmp_path / "pairs.jsonl", progress=False)
        shown = [row["prompt"][-1]["content"] for row in read_jsonl(tmp_path / "pairs.jsonl")]
        return {prompt for prompt in texts if any(prompt in comparison_shown for comparison_shown in shown)}, card

    prompts, card = await left(hard=hard)
    assert prompts == {"wrong?", "flipped?"}
    assert card["left_out"]["known to the judge"] == 1
    assert (await left(hard={**hard, "keep": 1}))[0] == set(texts)
    assert (await left())[0] == set(texts)
    assert len(upstream.asked("judge")) == 6  # the second time nothing was asked
