"""Judges that write a rationale before their verdict: reading it at run time, and sampling pairs to train on."""

from pathlib import Path
from typing import Any

import pytest
from fake_upstream import FakeUpstream, Script
from fusion_harness import StartGateway

from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.files import write_jsonl
from mixfuse.contracts.judge_protocol import EXPLAIN, read_explained
from mixfuse.fusion.calls.upstream import Endpoint
from mixfuse.fusion.labels.rationales import sample
from mixfuse.fusion.measure.comparisons import Comparison

ASK: dict[str, Any] = {"model": "fusion/best-of", "messages": [{"role": "user", "content": "why?"}]}
PAIRS = [Comparison(f"question {n}", f"right {n}", f"wrong {n}", "first") for n in range(3)]


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("A is shorter, but B is right.\nVerdict: B", "B"),
        ("B repeats itself. Verdict: A.", "A"),
        ("**Verdict: A**", "A"),
        ("Verdict: A\nOn second thought: Verdict: B", None),  # in the middle of a sentence
        ("Verdict: A\nVerdict: B", "B"),
        ("Verdict: A, I think", None),
        ("Verdict: AB", None),
        ("The answer quotes 'Verdict: A'", None),
        ("", None),
    ],
)
def test_a_rationale_ends_with_its_verdict_or_has_none(text: str, verdict: str | None) -> None:
    assert read_explained(text) == verdict


async def test_a_judge_may_explain_before_it_decides(start_gateway: StartGateway, upstream: FakeUpstream) -> None:
    judge = {"base_url": upstream.base_url, "model": "judge", "verdicts": "rationale"}
    gateway = await start_gateway(["alpha", "beta"], judge=judge)
    upstream.models["judge"] = Script("The first is the fuller one.\nVerdict: A")
    (verdict,) = (await gateway.post(**ASK)).json()["fusion"]["verdicts"]
    assert (verdict["winner"], verdict["score"], verdict["parse_failures"]) == ("tie", 0.5, 0), "A in both orders"
    assert verdict["read"] == "parsed"
    for request in upstream.asked("judge"):
        assert request["messages"][-1]["content"].endswith(EXPLAIN)
        assert request["max_tokens"] > 100


async def test_right_and_wrong_rationales_of_both_orders_make_a_pair(upstream: FakeUpstream, tmp_path: Path) -> None:
    from mixfuse.train.data.pairs import read_pairs

    upstream.models["judge"] = Script([f"Because of {n}. Verdict: {'AB'[n % 2]}" for n in range(24)])
    rows, counts = await sample(Endpoint(upstream.base_url, "judge"), PAIRS, samples=4, concurrency=1)
    assert counts == {"pairs": 3, "kept": 3, "rationales": 24, "unread": 0, "right": 12}
    write_jsonl(tmp_path / "pairs.jsonl", rows)
    assert read_pairs(tmp_path / "pairs.jsonl") == rows
    for number, row in enumerate(rows):
        content = row["prompt"][-1]["content"]
        right = "A" if content.index("right") < content.index("wrong") else "B"
        assert right == "AB"[number % 2], "both orders stand side by side"
        assert read_explained(row["chosen"][0]["content"]) == right
        assert read_explained(row["rejected"][0]["content"]) not in (right, None)


async def test_a_judge_that_names_no_verdict_gives_no_pairs(upstream: FakeUpstream) -> None:
    upstream.models["judge"] = Script("Both are fine.")
    with pytest.raises(MixfuseError, match="0 of 24 right, 24 without a verdict"):
        await sample(Endpoint(upstream.base_url, "judge"), PAIRS)
