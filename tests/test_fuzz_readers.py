"""Whatever a row or an adapter's config holds, its reader takes it or says in one line what is wrong with it.

`MIXFUSE_FUZZ_TRIES=10000 pytest tests/test_fuzz_readers.py tests/contracts/test_contract_yaml.py` tries more.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mixfuse.app.pair_sources import read_source
from mixfuse.app.pairs_spec import Source
from mixfuse.app.prompts import read_prompts
from mixfuse.contracts.errors import MixfuseError
from mixfuse.fusion.combiner.evidence import read_pool as read_evidence
from mixfuse.fusion.measure.comparisons import load as read_comparisons
from mixfuse.fusion.measure.questions import read_questions
from mixfuse.train.data.chats import chats
from mixfuse.train.data.pairs import read_pairs
from mixfuse.train.recipe import DataSource

TRIES = int(os.environ.get("MIXFUSE_FUZZ_TRIES", "100"))

ROWS: dict[str, list[dict[str, Any]]] = {
    "chat": [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 1}]},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "s"},
        {"instruction": "a", "input": "b", "output": "c"},
        {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]},
                      {"role": "assistant", "content": None, "tool_calls": [
                          {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]},
                      {"role": "tool", "tool_call_id": "1", "content": "1"}, {"role": "assistant", "content": "b"}],
         "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]},
    ],
    "pair": [
        {"id": "1", "prompt": "a", "chosen": "b", "rejected": "c", "margin": 1.0},
        {"chosen": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
         "rejected": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "c"}]},
        {"prompt": "a", "response_a": "b", "response_b": "c", "winner": "model_a"},
        {"instruction": "a", "completions": [{"response": "b", "overall_score": 1}, {"response": "c", "fine": 2}]},
        {"prompt": "a", "response": "b", "helpfulness": 3},
        {"question": "a", "answer1": "b", "answer2": "c", "vote": 1},
    ],
    "pool": [
        {"id": "1", "prompt": "a", "reference": "b", "responses": [
            {"model": "m", "text": "b", "correct": True, "cost": 0.1}, {"model": "n", "text": "c", "correct": False}]},
        {"id": "1", "prompt": "a", "messages": [{"role": "user", "content": "a"}], "responses": [
            {"model": "m", "text": "b", "correct": True, "logprobs": [-0.1]},
            {"model": "n", "text": "c", "correct": False}],
         "verdicts": [{"first": 0, "second": 1, "p": 0.5}]},
    ],
}  # fmt: skip

LONG = "x" * 500
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.floats()
    | st.sampled_from(
        [10**30, -(2**63), "", " ", "1", "1e5", "\ud800", "\0", "tie", "model_b", "{}", "[", "nan", "x" * 500]
    )
    | st.text(max_size=5)
)
KEYS = st.sampled_from(
    sorted(
        {key for rows in ROWS.values() for row in rows for key in (*row, "role", "content", "from", "text", "model")}
    )
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS | st.text(max_size=3), inner, max_size=3)
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value inside a value."""
    found = [path]
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, below in entries:
        found += places(below, (*path, key))
    return found


@st.composite
def changed(draw: st.DrawFn, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A good row with some of its values replaced, removed, doubled or added to."""
    row = json.loads(json.dumps(draw(st.sampled_from(rows))))
    for _ in range(draw(st.integers(0, 3))):
        path = draw(st.sampled_from(places(row)))
        if not path:
            row[draw(KEYS)] = draw(VALUES)
            continue
        at = row
        for key in path[:-1]:
            at = at[key]
        what = draw(st.sampled_from(["replace", "remove", "double"]))
        if what == "replace":
            at[path[-1]] = draw(VALUES)
        elif what == "remove":
            del at[path[-1]]
        elif isinstance(at, list):
            at.append(at[path[-1]])
    return row


READERS: dict[str, list[Callable[[Path], object]]] = {
    "chat": [lambda path: list(chats(DataSource(path=path))), read_prompts],
    "pair": [read_pairs, read_comparisons, read_prompts]
    + [
        lambda path, kind=kind: read_source(  # type: ignore[misc]
            Source(kind=kind, path=str(path)), seed=0, verdicts=path.with_name("v.sqlite3"), progress=False
        )
        for kind in ("labels",)
    ],
    "pool": [
        lambda path: read_evidence([path]),
        lambda path: read_questions([path]),
        read_comparisons,
        read_prompts,
    ]
    + [
        lambda path, kind=kind, verifier=verifier: read_source(  # type: ignore[misc]
            Source(kind=kind, path=str(path), verifier=verifier),
            seed=0,
            verdicts=path.with_name("v.sqlite3"),
            progress=False,
        )
        for kind, verifier in (("pool", "marked"), ("references", "number"), ("synthetic", "marked"), ("pool", "json"))
    ],
}


@pytest.mark.parametrize("kind", ROWS)
def test_no_row_ends_in_a_traceback(kind: str, tmp_path_factory: pytest.TempPathFactory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"

    @settings(max_examples=TRIES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(changed(ROWS[kind]), min_size=1, max_size=2))
    def tried(rows: list[dict[str, Any]]) -> None:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        for reader in READERS[kind]:
            try:
                reader(path)
            except MixfuseError as error:
                assert "\n" not in str(error)

    tried()


CONFIG: dict[str, Any] = {
    "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "base", "r": 2, "lora_alpha": 4,
    "lora_dropout": 0.0, "bias": "none", "target_modules": ["q_proj"], "target_parameters": None,
    "modules_to_save": None, "rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False, "use_dora": False,
    "init_lora_weights": True, "fan_in_fan_out": False, "layers_to_transform": None, "layers_pattern": None,
    "lora_bias": False, "trainable_token_indices": None, "exclude_modules": None, "inference_mode": True,
    "auto_mapping": {"base_model_class": "X"}, "megatron_config": None, "loftq_config": {}, "eva_config": None,
    "corda_config": None, "alora_invocation_tokens": None,
}  # fmt: skip
NAME = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"


def test_no_adapter_config_ends_in_a_traceback(tmp_path: Path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    from mixfuse.train.adapters.inspect_adapter import inspect

    folder = tmp_path / "adapter"
    folder.mkdir()
    tensors = {NAME.format("A"): torch.ones(2, 8), NAME.format("B"): torch.ones(8, 2)}
    save_file(tensors, folder / "adapter_model.safetensors")
    config = folder / "adapter_config.json"
    config.write_text(json.dumps(CONFIG))
    assert inspect(folder).mixfuse == "after export"

    @settings(max_examples=TRIES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(changed([CONFIG]), st.sampled_from(sorted(CONFIG)), VALUES)
    def tried(row: dict[str, Any], key: str, value: Any) -> None:
        config.write_text(json.dumps({**row, key: value}))
        try:
            assert str(inspect(folder))
        except MixfuseError as error:
            assert "\n" not in str(error)

    tried()


def test_no_manifest_ends_in_a_traceback(tmp_path: Path):
    from mixfuse.contracts.adapter import MANIFEST, read_manifest

    file = tmp_path / MANIFEST
    good = {
        "role": "domain", "rank": 2, "alpha": 4, "base": {"architecture": "x"}, "files": {"a": "0" * 64},
        "revision": "a", "signature": None, "training": {}, "parity": None,
    }  # fmt: skip

    @settings(max_examples=TRIES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(changed([good]) | VALUES)
    def tried(value: Any) -> None:
        file.write_text(json.dumps(value))
        with pytest.raises(MixfuseError) as refused:
            read_manifest(tmp_path)
        assert "\n" not in str(refused.value)

    tried()


def test_no_combiner_ends_in_a_traceback(tmp_path: Path):
    from combiner_pools import pool

    from mixfuse.fusion.combiner.artefact import load, save, weigh
    from mixfuse.fusion.combiner.asking import next_member, policy_for
    from mixfuse.fusion.measure.combiner_fit import fit_combiner

    questions = pool(200, {"a": 0.7, "b": 0.7, "c": 0.6})
    file = tmp_path / "combiner.json"
    save(fit_combiner(questions, "choice"), file)
    good = json.loads(file.read_text())

    @settings(max_examples=TRIES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(changed([good]) | VALUES)
    def tried(value: Any) -> None:
        file.write_text(json.dumps(value))
        try:
            combiner = load(file)
        except MixfuseError as error:
            assert "\n" not in str(error)
            return
        # What is read must weigh every answer, and say whom to ask.
        weighing = weigh(combiner, questions[0].answers, comparisons=questions[0].comparisons, domain="law")
        assert 0 <= weighing.confidence <= 1
        policy = policy_for(combiner, 0.9)
        asked: list[str] = []
        while policy is not None and (member := next_member(combiner, policy, asked, 0.3, "law")) is not None:
            assert member not in asked
            asked.append(member)

    tried()


TRACE: dict[str, Any] = {
    "id": "trace-1", "created_at": 1.0, "model": "fusion/auto", "mode": "auto", "key": "k",
    "messages": [{"role": "user", "content": "a"}], "candidates": ["m", "n"],
    "calls": [
        {"stage": "answer", "member": "m", "model": "m", "candidate": 0, "text": "b", "cost": 0.1},
        {"stage": "answer", "member": "n", "model": "n", "candidate": 1, "text": "c", "outcome": "timeout"},
        {"stage": "verdict", "member": "judge", "model": "j", "text": "A"},
    ],
    "verdicts": [{"first": 0, "second": 1, "winner": "first", "score": 0.9, "consistent": True, "orders": [0.9, 0.8]}],
    "debate": {"rounds": [[{"candidate": 0, "text": "b"}]], "stopped": "agreement"},
    "analysis": {"consensus": ["x"], "contradictions": [], "partial_coverage": [], "unique_insights": [],
                 "blind_spots": []},
    "citations": [{"paragraph": 0, "candidates": [1]}],
    "weighing": {"confidence": 0.5, "stopped": "target", "asked": ["m"], "propensities": {"n": 0.5},
                 "classes": [{"candidates": [0], "score": 1.0, "probability": 0.5}]},
    "winner": 0, "reason": "weighed", "answer": "b", "duration_ms": 5.0,
    "feedback": [{"correct": [0], "wrong": [1], "score": 1, "user": "u", "metadata": {"arena": {
        "first": 0, "second": 1, "vote": "first"}}}],
}  # fmt: skip


def test_no_trace_ends_in_a_traceback(tmp_path: Path):
    """What a trace's record may hold by its schema, the lists, the page, the sums and the export take."""
    from mixfuse.contracts.database import opened
    from mixfuse.contracts.trace import Trace
    from mixfuse.fusion.config import FusionConfig
    from mixfuse.fusion.store import export_traces
    from mixfuse.fusion.store.traces import insert, row_of
    from mixfuse.fusion.ui import texts
    from mixfuse.fusion.ui.marking import row_of as sheet_row
    from mixfuse.fusion.ui.trace_view import prompts, view
    from mixfuse.fusion.ui.votes import answers, hardest, judged, votes_of

    config = FusionConfig.model_validate({"members": [{"name": "m", "base_url": "http://127.0.0.1:9", "model": "m"}]})
    folder = Path(str(texts.__file__)).parent / "pages"
    template = texts.environment([folder]).get_template("trace.html.jinja")
    frame: dict[str, Any] = {
        "root": "", "assets": "", "pages": {}, "here": "", "token": "", "csrf": str, "named": False, "keyed": False,
        "is_admin": False, "query": str, "reads": True,
    }  # fmt: skip

    with opened(tmp_path / "traces.sqlite3") as database:

        @settings(max_examples=TRIES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(changed([TRACE]))
        def tried(value: Any) -> None:
            try:
                trace = Trace.model_validate_json(json.dumps(value))
            except ValueError:
                return
            assert template.render(**frame, trace=trace, view=view(trace, config), prompts=prompts(trace, config))
            assert sheet_row(trace, config)
            for pair in [hardest(trace)]:
                assert answers(trace) is not None
                assert pair is None or judged(trace, pair) in (None, "first", "second", "tie")
            assert votes_of(trace.id, trace.feedback) is not None

            def write(connection: Any) -> None:
                for table in ("traces", "trace_facts"):
                    connection.exec_driver_sql(f"DELETE FROM {table}")
                insert(connection, [row_of(trace, trace.model_dump_json())])

            database.run_now(write)
            try:
                export_traces.export(database, tmp_path / "out.jsonl")
            except MixfuseError as error:
                assert "\n" not in str(error)

        tried()


@pytest.mark.parametrize("key", ["messages", "responses"])
@pytest.mark.parametrize("value", [True, 3, "x", {"a": 1}, [1], [None]])
def test_a_pool_row_whose_lists_are_none_is_refused_or_passed_over(key: str, value: object, tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({**ROWS["pool"][1], key: value}) + "\n")
    with pytest.raises(MixfuseError, match=key):
        read_source(Source(path=str(path)), seed=0, verdicts=tmp_path / "v", progress=False)
    for reader in READERS["pool"]:
        try:
            reader(path)
        except MixfuseError as error:
            assert "rows.jsonl" in str(error)
