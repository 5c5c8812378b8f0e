"""The fusion config: what is refused, and in which words."""

from pathlib import Path

import pytest

from mixfuse.contracts import strict_yaml
from mixfuse.contracts.errors import MixfuseError
from mixfuse.fusion.config import FusionConfig, Price

GOOD = """
members:
  - {name: base, role: base, temperature: 0.5, samples: 2}
  - {name: remote, base_url: "https://api.example.org/v1", model: large, api_key_env: FUSION_TEST_KEY,
     price: {prompt: 2, completion: 6}}
judge: {role: judge}
synthesizer: {role: base}
modes: {min_responses: 2, grace_ms: 50, deadline_ms: 1000, agreement: never, debate_ending: merge}
trace_db: traces.sqlite3
"""


def load(tmp_path: Path, text: str) -> FusionConfig:
    path = tmp_path / "fusion.yaml"
    path.write_text(text)
    return strict_yaml.load(path, FusionConfig)


def test_a_whole_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSION_TEST_KEY", "hush")
    config = load(tmp_path, GOOD)
    assert [member.name for member in config.members] == ["base", "remote"]
    assert config.members[1].api_key == "hush"
    assert "hush" not in repr(config)
    assert "hush" not in config.model_dump_json()
    assert config.modes.agreement == "never"
    assert config.modes.debate_ending == "merge"
    assert config.members[1].price.cost(1_000_000, 500_000) == 5.0
    assert Price().cost(10, 10) == 0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("members: []", "members"),
        ("members: [{name: a}]", "exactly one of 'role' and 'base_url'"),
        ("members: [{name: a, role: r, base_url: 'http://h/v1', model: m}]", "exactly one of"),
        ("members: [{name: a, role: r, model: m}]", "go with 'base_url'"),
        ("members: [{name: a, base_url: 'http://h/v1'}]", "needs 'model'"),
        ("members: [{name: a, base_url: 'h:8000', model: m}]", "is not an http(s) URL"),
        ("members: [{name: a, role: x}, {name: a, role: y}]", "two members are called 'a'"),
        ("members: [{name: fusion/merge, role: x}]", "are modes"),
        ("members: [{name: a, role: x}]\nmodes: {min_responses: 2}", "the members give only 1"),
        ("members: [{name: a, role: x}]\nmodes: {grace: 2}", "did you mean 'modes.grace_ms'"),
        ("members: [{name: a, role: x}]\njudges: {role: y}", "did you mean 'judge'"),
        (
            "members: [{name: a, base_url: 'http://h/v1', model: m, api_key_env: FUSION_TEST_UNSET}]",
            "FUSION_TEST_UNSET",
        ),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(MixfuseError) as caught:
        load(tmp_path, text)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
