"""The trace record: what a client is billed is the sum of the calls, and a record reads back as it was written."""

import pytest

from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.strict_yaml import validate
from mixfuse.contracts.trace import Call, Trace, Usage


def trace() -> Trace:
    calls = [
        Call(stage="answer", member="a", model="m", usage=Usage(prompt_tokens=5, completion_tokens=3), text="hi"),
        Call(
            stage="answer", member="b", model="m", outcome="timeout", usage=Usage(prompt_tokens=5, completion_tokens=1)
        ),
        Call(stage="verdict", member="judge", model="j@1", revision="1", usage=Usage(prompt_tokens=20)),
    ]
    return Trace(model="fusion/best-of", mode="best_of", messages=[{"role": "user", "content": "Q"}], calls=calls)


def test_usage_is_the_sum_over_all_calls_failed_ones_too() -> None:
    assert trace().usage == Usage(prompt_tokens=30, completion_tokens=4)
    assert trace().usage.total_tokens == 34
    assert Trace(model="m", mode="best_of", messages=[]).usage == Usage()


def test_a_record_reads_back_as_it_was_written() -> None:
    record = trace()
    assert Trace.model_validate_json(record.model_dump_json()) == record


def test_every_record_has_an_id_of_its_own() -> None:
    assert trace().id != trace().id


def test_an_unknown_key_is_refused() -> None:
    with pytest.raises(MixfuseError, match="unknown key 'winer'; did you mean 'winner'"):
        validate({**trace().model_dump(), "winer": 1}, Trace, source="trace")
