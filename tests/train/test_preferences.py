"""`mixfuse pairs build`: sources, verifiers, votes, synthetic answers, the data card."""

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import yaml
from pyarrow import parquet
from train_harness import PROJECT, write_jsonl

from mixfuse.app import preferences
from mixfuse.app.pair_sources import read_source
from mixfuse.app.pairs_spec import PairsSpec, Source, read_spec
from mixfuse.app.prompts import read_prompts
from mixfuse.app.verifiers import check_of, program
from mixfuse.cli.entry import main
from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.files import read_json, read_jsonl
from mixfuse.contracts.strict_yaml import validate
from mixfuse.train.data.pairs import Preference, read_pairs

DATA = PROJECT.parent / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the shared data folder is absent (../shared/data)")
MODELS = ("model-a-7b", "model-b-70b")


def pool_row(number: int, *texts: str, **keys: Any) -> dict[str, Any]:
    responses = [{"model": MODELS[place % 2], "text": text} for place, text in enumerate(texts)]
    return {"id": f"{MODELS[0]}-{number}", "prompt": f"What is {number} and {number}?", "responses": responses, **keys}


def read(path: Path, rows: list[dict[str, Any]], **keys: Any) -> tuple[list[Preference], Counter[str]]:
    """What a source gives."""
    source = Source(path=str(write_jsonl(path, rows)), **keys)
    spec = PairsSpec(sources=(source,))
    found = read_source(source, seed=spec.seed, verdicts=path.with_suffix(".sqlite3"), progress=False)
    return found.preferences, found.counts


@pytest.mark.parametrize(
    ("verifier", "reference", "right", "wrong"),
    [
        ("exact", "to be", " to  be\n", "to bee"),
        ("number", "#### 1,200", "So it is 1200.0 dollars", "1200 less 1 is 1199"),
        ("json", '{"a": 1, "b": [2]}', '```json\n{"b": [2], "a": 1}\n```', '{"a": 1}'),
        ("regex", r"\b4[23]\b", "It is 42.", "It is 420."),
    ],
)
def test_answers_are_marked_against_the_reference(
    verifier: str, reference: str, right: str, wrong: str, tmp_path: Path
) -> None:
    rows = [pool_row(1, right, wrong, reference=reference), pool_row(2, wrong, reference=reference)]
    found, counts = read(tmp_path / "pool.jsonl", rows, verifier=verifier)
    assert [(one.better, one.worse, one.models) for one in found] == [(right, wrong, MODELS)]
    assert (counts["rows"], counts["usable rows"]) == (2, 1)


def test_answers_are_marked_by_a_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "checks_of_a_user.py").write_text("def short(prompt, answer, reference):\n    return len(answer) < 4\n")
    monkeypatch.syspath_prepend(tmp_path)
    found, _ = read(
        tmp_path / "pool.jsonl", [pool_row(1, "four", "two")], verifier={"python": "checks_of_a_user:short"}
    )
    assert [(one.better, one.worse) for one in found] == [("two", "four")]
    for name in ("checks_of_a_user:long", "no_such_module:short"):
        with pytest.raises(MixfuseError, match=f"verifier {name}: .*importable"):
            read(tmp_path / "pool.jsonl", [pool_row(1, "a", "b")], verifier={"python": name})


def test_programs_are_marked_by_unit_tests_in_the_sandbox(tmp_path: Path) -> None:
    right = "Like so:\n```python\ndef double(n):\n    return 2 * n\n```\nand done."
    wrong = "```\ndef double(n):\n    return n ** 2\n```"
    leaving = "import sys\nsys.exit(0)"
    tests = "assert double(3) == 6"
    try:
        found, _ = read(
            tmp_path / "pool.jsonl", [pool_row(1, right, wrong, leaving, tests=tests)], verifier={"tests": "python"}
        )
    except MixfuseError as error:
        if error.kind == "sandbox":
            pytest.skip(str(error))
        raise
    assert {(one.better, one.worse) for one in found} == {(right, wrong), (right, leaving)}
    with pytest.raises(MixfuseError, match="the verifier needs 'tests'"):
        read(tmp_path / "pool.jsonl", [pool_row(1, right, wrong)], verifier={"tests": "python"})


def test_the_program_of_an_answer() -> None:
    assert program("x = 1") == "x = 1"
    assert program("First\n```py\na = 1\n```\nthen\n```\nb = 2\n```\n") == "a = 1\n\n\nb = 2\n"


def test_answers_are_marked_by_the_tasks_they_answer(tmp_path: Path) -> None:
    from mixfuse.contracts.tasks import make

    tasks = PROJECT / "configs" / "tiny" / "tasks.yaml"
    task = make(tasks, "pool", 4)[0]
    rows = [{**pool_row(1, task.reference, "nonsense"), "prompt": task.prompt}, pool_row(2, "4", "5")]
    found, counts = read(tmp_path / "pool.jsonl", rows, verifier={"tasks": str(tasks), "count": 4})
    assert [(one.better, one.worse) for one in found] == [(task.reference, "nonsense")]
    assert counts["answers without a mark"] == 2


def test_a_reference_beats_wrong_answers(tmp_path: Path) -> None:
    rows = [
        pool_row(1, "2", "3", "4", reference="It is 2"),
        pool_row(2, "4", reference="It is 4"),
        pool_row(3, "7", reference=""),
    ]
    for row in rows[2:]:
        row["responses"][0]["correct"] = False
    found, _ = read(tmp_path / "pool.jsonl", rows[:2], kind="references", verifier="number")
    assert [(one.better, one.worse) for one in found] == [("It is 2", "3"), ("It is 2", "4")]
    _, counts = read(tmp_path / "pool.jsonl", rows[2:], kind="references")
    assert counts["rows without a reference"] == 1


def label(prompt: str, label: str, votes: Any = None) -> dict[str, Any]:
    a, b = ({"model": model, "text": f"{prompt} by {side}"} for side, model in zip("ab", MODELS, strict=True))
    return {"id": "1", "prompt": prompt, "response_a": a, "response_b": b, "label": label, "votes": votes}


@pytest.mark.parametrize(
    ("votes", "margin"),
    [
        (None, 1.0),
        ([2, 2, 2], 1.0),
        ([2, 2, 1], 1 / 3),
        ([0, 2, 2], 2 / 3),
        (["B", "B", "A", "tie"], 0.25),
        ({"A": 1, "B": 4}, 0.6),
    ],
)
def test_a_vote_sets_the_margin(votes: Any, margin: float, tmp_path: Path) -> None:
    (one,), _ = read(tmp_path / "labels.jsonl", [label("Why?", "B", votes)], kind="labels")
    assert (one.better, one.worse, one.models) == ("Why? by b", "Why? by a", MODELS[::-1])
    assert one.margin == pytest.approx(margin)


def test_ties_and_labels_without_a_majority_are_counted_not_used(tmp_path: Path) -> None:
    rows = [label("1?", "tie"), label("2?", "A", [1, 2]), label("3?", "A", [1, 2, 2]), label("4?", "A", [1])]
    found, counts = read(tmp_path / "labels.jsonl", rows, kind="labels")
    assert [one.prompt for one in found] == ["4?"]
    assert (counts["rows"], counts["ties"], counts["labels without a majority of the votes"]) == (4, 1, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": "C"}, r"labels.jsonl:1: .*write A, B or tie"),
        ({"response_a": 1}, r"labels.jsonl:1: expected text"),
        ({"votes": "many"}, r"labels.jsonl:1: votes must be"),
    ],
)
def test_a_label_of_another_shape_is_named(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(MixfuseError, match=message):
        read(tmp_path / "labels.jsonl", [{**label("1?", "A"), **change}], kind="labels")


PUBLIC = [
    {"prompt": f"Name sea {n}.", "prompt_id": f"p{n}", "chosen": f"sea {n}", "rejected": f"town {n}"} for n in range(6)
]


def test_public_preferences_are_built_into_pairs_without_a_spec(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "list.json").write_text(json.dumps(PUBLIC))
    for data in (write_jsonl(tmp_path / "d.jsonl", PUBLIC), tmp_path / "list.json"):
        out = tmp_path / "built" / f"{data.stem}.jsonl"
        assert main(["pairs", "build", str(data), "--out", str(out), "--dev-share", "0"]) == 0
        assert "12 training rows" in capsys.readouterr().out
        pairs = read_pairs(out)
        assert len({row["id"] for row in pairs}) == 6
        (source,) = read_json(out.with_name(f"{data.stem}.card.json"))["sources"]
        assert source["read"]["rows of chosen and rejected answers"] == 6


def test_public_preferences_are_read_from_shards_and_tables(tmp_path: Path) -> None:
    table = ["prompt,chosen,rejected", *(f"{row['prompt']},{row['chosen']},{row['rejected']}" for row in PUBLIC)]
    (tmp_path / "d.csv").write_text("\n".join(table))
    for number in (0, 1):
        write_jsonl(tmp_path / f"shard-{number}.jsonl", PUBLIC[number::2])
    for path in (tmp_path / "d.csv", tmp_path / "shard-*.jsonl"):
        card = preferences.build(read_spec(path, {"dev_share": 0.0}), tmp_path / "out.jsonl", progress=False)
        assert card["train_pairs"] == 12
    with pytest.raises(MixfuseError, match="would be overwritten"):
        preferences.build(read_spec(tmp_path / "shard-*.jsonl", {}), tmp_path / "shard-0.jsonl", progress=False)


def test_a_column_that_is_not_read_spoils_no_table(tmp_path: Path) -> None:
    columns = {key: pyarrow.array([row[key] for row in PUBLIC]) for key in ("prompt", "chosen", "rejected")}
    columns["note"] = pyarrow.array([b"\xff"] * len(PUBLIC)).view(pyarrow.string())
    columns["when"] = pyarrow.array([253402300800000000] * len(PUBLIC), pyarrow.timestamp("us"))
    parquet.write_table(pyarrow.table(columns), tmp_path / "d.parquet")
    card = preferences.build(
        read_spec(tmp_path / "d.parquet", {"dev_share": 0.0}), tmp_path / "o.jsonl", progress=False
    )
    assert card["train_pairs"] == 12
    assert len(read_pairs(tmp_path / "d.parquet")) == 12
    columns["chosen"] = columns["note"]
    parquet.write_table(pyarrow.table(columns), tmp_path / "d.parquet")
    with pytest.raises(MixfuseError, match="row 0: a value cannot be read: it is not UTF-8 text"):
        read_pairs(tmp_path / "d.parquet")


def test_the_judge_trains_on_public_preferences_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tie = {**PUBLIC[0], "score_chosen": 1, "score_rejected": 1}
    rows = read_pairs(write_jsonl(tmp_path / "d.jsonl", [*PUBLIC, tie, {**PUBLIC[0], "chosen": " "}]))
    assert len(rows) == 12
    assert {row["id"] for row in rows[::2]} == {row["id"] for row in rows[1::2]}
    assert "sea 0" in rows[0]["prompt"][-1]["content"]
    said = capsys.readouterr().out
    assert "8 rows of chosen and rejected answers; left out: ties 1, empty answers 1; 6 pairs in both orders" in said
    with pytest.raises(MixfuseError, match="no pair is left to train on"):
        read_pairs(write_jsonl(tmp_path / "ties.jsonl", [tie]))


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"messages": [{"role": "user", "content": "x"}]}, "a chat to train on"),
        ({"prompt": "p", "responses": []}, "mixfuse pairs build"),
        ({"prompt": "p", "completion": "x", "label": False}, "KTO"),
    ],
)
def test_a_file_that_holds_no_pairs_is_named_for_the_judge(row: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(MixfuseError, match=rf"d\.jsonl:1: .*{words}"):
        read_pairs(write_jsonl(tmp_path / "d.jsonl", [row]))


def test_a_pool_source_names_what_another_file_is(tmp_path: Path) -> None:
    with pytest.raises(MixfuseError, match=r"d.jsonl:1: no pool row, 'responses' is missing: .*kind: labels"):
        read(tmp_path / "d.jsonl", PUBLIC, kind="pool")
    with pytest.raises(MixfuseError, match="'verifier' marks nothing"):
        read(tmp_path / "d.jsonl", PUBLIC, verifier="exact", kind="labels")
    row = pool_row(1, "two", "three")
    del row["id"]
    for response in row["responses"]:
        response["correct"] = response["text"] == "two"
    found, _ = read(tmp_path / "d.jsonl", [row])
    assert [one.better for one in found] == ["two"]


@pytest.mark.parametrize("kind", ["pool", "synthetic", "references"])
def test_half_a_character_is_one_line_with_its_place(kind: str, tmp_path: Path) -> None:
    row = pool_row(1, "two", "three", reference="two")
    for response in row["responses"]:
        response["correct"] = response["text"] == "two"
    with pytest.raises(MixfuseError, match=r"d.jsonl:2: a text holds half a character"):
        read(tmp_path / "d.jsonl", [row, {**row, "prompt": "What is it \ud83d?"}], kind=kind)


def test_nothing_to_prefer_says_what_was_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ties = [{"prompt": "p", "response_a": "x", "response_b": "y", "winner": "tie (bothbad)"}]
    data = write_jsonl(tmp_path / "d.jsonl", ties)
    assert main(["pairs", "build", str(data), "--out", str(tmp_path / "out.jsonl")]) == 2
    said = capsys.readouterr().err
    assert "rows of two answers with a winner 1, ties 1" in said
    assert "nothing to prefer" in said


@pytest.mark.parametrize("name", ["d.jsonl", "d.dev.jsonl", "link.jsonl"])
def test_pairs_are_never_written_over_what_they_are_built_from(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_jsonl(tmp_path / ("d.jsonl" if name == "link.jsonl" else name), PUBLIC)
    (tmp_path / "link.jsonl").symlink_to(data)
    before = data.read_bytes()
    out = tmp_path / ("link.jsonl" if name == "link.jsonl" else "d.jsonl")
    assert main(["pairs", "build", str(data), "--out", str(out)]) == 2
    assert "would be overwritten" in capsys.readouterr().err
    assert data.read_bytes() == before


def test_tasks_are_never_written_over_their_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tasks = tmp_path / "tasks.yaml"
    tasks.write_bytes((PROJECT / "configs" / "tiny" / "tasks.yaml").read_bytes())
    assert main(["tasks", "make", str(tasks), "--out", str(tasks), "--count", "1"]) == 2
    assert "would be overwritten" in capsys.readouterr().err
    assert tasks.read_bytes() == (PROJECT / "configs" / "tiny" / "tasks.yaml").read_bytes()


def test_prompts_of_public_comparisons_are_kept_from_training(tmp_path: Path) -> None:
    text = "\n\nHuman: Name a sea.\n\nAssistant:"
    shapes = [{"chosen": f"{text} North", "rejected": f"{text} Bonn"}, {"prompt": "p", "chosen": "x", "rejected": "x"}]
    assert read_prompts(write_jsonl(tmp_path / "rows.jsonl", shapes)) == ["Name a sea.", "p"]


def test_synthetic_answers_are_worse_and_say_what_was_done_to_them(tmp_path: Path) -> None:
    rows = [
        pool_row(number, reference=f"First there are {number} red ones, then {number} blue ones, so {2 * number}.")
        for number in range(10, 30)
    ]
    found, _ = read(tmp_path / "pool.jsonl", rows, kind="synthetic")
    assert Counter(one.source for one in found) == dict.fromkeys(
        ("synthetic:truncate", "synthetic:repeat", "synthetic:number", "synthetic:wrong_question"), 20
    )
    references = {row["prompt"]: row["reference"] for row in rows}
    for one in found:
        assert one.better == references[one.prompt]
        if one.source.endswith("truncate"):
            assert one.better.startswith(one.worse)
            assert 0.3 < len(one.worse) / len(one.better) < 1
        elif one.source.endswith("repeat"):
            assert one.worse.startswith(one.better)
            assert one.better.endswith(one.worse.removeprefix(one.better).strip())
        elif one.source.endswith("number"):
            assert len(one.worse) == len(one.better)
            assert sum(a != b for a, b in zip(one.worse, one.better, strict=True)) == 1
        else:
            assert one.worse in references.values()
            assert one.worse != one.better
    chats = [{"messages": [{"role": "user", "content": "Six?"}, {"role": "assistant", "content": "6"}]}]
    (one,), counts = read(tmp_path / "chats.jsonl", chats, kind="synthetic", damage=["number", "truncate"])
    assert (one.prompt, one.better) == ("Six?", "6")
    assert counts["not made: truncate"] == 1


def test_questions_are_read_from_every_shape(tmp_path: Path) -> None:
    shapes = [
        {"prompt": "one?"},
        {"question": "two?"},
        {"input": "three?", "output_1": "x"},
        {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "four?"}]},
    ]
    assert read_prompts(write_jsonl(tmp_path / "rows.jsonl", shapes)) == ["one?", "two?", "three?", "four?"]
    (tmp_path / "list.json").write_text(json.dumps(shapes[:2]))
    assert read_prompts(tmp_path / "list.json") == ["one?", "two?"]
    with pytest.raises(MixfuseError, match=r"none.jsonl:1: the row has no prompt"):
        read_prompts(write_jsonl(tmp_path / "none.jsonl", [{"text": "x"}]))


def marked_rows(count: int) -> list[dict[str, Any]]:
    rows = [
        pool_row(number, f"the right {'x' * (number % 9)}", f"a wrong {'y' * (number % 7)}") for number in range(count)
    ]
    for row in rows:
        for response in row["responses"]:
            response["correct"] = "right" in response["text"]
    return rows


def spec_of(tmp_path: Path, **keys: Any) -> Path:
    write_jsonl(tmp_path / "pool.jsonl", marked_rows(60))
    rows = [label(f"Which of {number} then?", "AB"[number % 2], [number % 2 + 1]) for number in range(40)]
    write_jsonl(tmp_path / "labels.jsonl", rows)
    sources = [
        {"path": str(tmp_path / "pool.jsonl"), "licence": "MIT"},
        {"path": str(tmp_path / "labels.jsonl"), "kind": "labels", "name": "people"},
        {"path": str(tmp_path / "pool.jsonl"), "kind": "synthetic", "damage": ["wrong_question"]},
    ]
    path = tmp_path / "spec.yaml"
    path.write_text(yaml.safe_dump({"sources": sources, "dev_share": 0.2, "near": None, **keys}))
    return path


def test_a_spec_gives_pairs_dev_pairs_and_a_data_card(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out" / "pairs.jsonl"
    held_out = write_jsonl(tmp_path / "eval.jsonl", [{"prompt": "What is 7 and 7?"}])
    arguments = [
        "pairs",
        "build",
        str(spec_of(tmp_path)),
        "seed=3",
        "--out",
        str(out),
        "--against",
        str(held_out),
        "--json",
    ]
    assert main(arguments) == 0
    printed = capsys.readouterr().out.splitlines()
    card = json.loads(printed[-1])
    assert card == read_json(out.with_name("pairs.card.json"))
    train, dev = read_pairs(out), read_pairs(out.with_name("pairs.dev.jsonl"))
    assert (len(train), len(dev)) == (card["train_pairs"], card["dev_pairs"])
    assert Counter(row["source"] for row in [*train, *dev]) == {name: 2 * n for name, n in card["by_source"].items()}
    assert set(card["by_source"]) == {"pool", "people", "synthetic:wrong_question"}
    assert card["left_out"]["in an evaluation set"] == 2
    assert not [row for row in [*train, *dev] if "What is 7 and 7?" in row["prompt"][-1]["content"]]
    assert abs(card["auc"]["after"]["length"] - 0.5) < 0.02
    assert not {row["id"] for row in train} & {row["id"] for row in dev}
    assert [source["licence"] for source in card["sources"]] == ["MIT", None, None]
    assert f"length {card['auc']['before']['length']:.3f}" in "\n".join(printed)
    markdown = out.with_name("pairs.card.md").read_text()
    assert "| in an evaluation set | 2 |" in markdown
    assert out.with_name("pairs.card.png").read_bytes().startswith(b"\x89PNG")


def test_no_name_of_a_member_is_anywhere_in_what_a_judge_is_trained_on(tmp_path: Path) -> None:
    """Ids of rows hold them in one of the public sets, and an answer may."""
    rows = marked_rows(30)
    rows[3]["responses"][0]["text"] = f"I am {MODELS[0]}, and I am right"
    write_jsonl(tmp_path / "pool.jsonl", rows)
    spec = read_spec(tmp_path / "pool.jsonl", {"dev_share": 0.3})
    card = preferences.build(spec, tmp_path / "pairs.jsonl", progress=False)
    assert card["left_out"]["an answer names its model"] == 1
    for name in ("pairs.jsonl", "pairs.dev.jsonl"):
        text = (tmp_path / name).read_text()
        assert text
        assert not [model for model in MODELS if model in text]


@needs_data
def test_no_model_of_the_real_sets_is_named(tmp_path: Path) -> None:
    sources = [
        {"path": str(DATA / "pandalm" / "dev.jsonl"), "kind": "labels", "name": "pandalm"},
        {"path": str(DATA / "gsm8k_pool" / "dev.jsonl"), "name": "gsm8k"},
        {"path": str(DATA / "llmbar" / "natural.jsonl"), "kind": "labels", "name": "llmbar"},
    ]
    spec = validate({"sources": sources, "dev_share": 0.2}, PairsSpec, source="spec")
    card = preferences.build(spec, tmp_path / "pairs.jsonl", progress=False)
    names = {
        answer["model"]
        for source in sources
        for row in read_jsonl(Path(str(source["path"])))
        for answer in row.get("responses") or (row["response_a"], row["response_b"])
        if "model" in answer
    }
    assert len(names) > 8
    text = (tmp_path / "pairs.jsonl").read_text() + (tmp_path / "pairs.dev.jsonl").read_text()
    assert not [name for name in names if name in text]
    assert abs(card["auc"]["after"]["length"] - 0.5) < 0.02
    assert {source["name"]: source["read"].get("ties", 0) for source in card["sources"]}["pandalm"] > 0


def test_the_strength_of_a_vote_is_written(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "labels.jsonl", [label("1?", "A", [1, 1, 2]), label("2?", "B", [2, 2, 2])])
    source = {"path": str(tmp_path / "labels.jsonl"), "kind": "labels"}
    spec = validate({"sources": [source], "dev_share": 0, "balance": []}, PairsSpec, source="spec")
    preferences.build(spec, tmp_path / "pairs.jsonl", progress=False)
    assert sorted({row["margin"] for row in read_pairs(tmp_path / "pairs.jsonl")}) == [0.3333, 1.0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("sources=[]", "'sources'"),
        ("balanse=[length]", "unknown key 'balanse'; did you mean 'balance'"),
        ("sources=[{path: a.jsonl}, {path: b/a.jsonl}]", "several sources have the name 'a'"),
        ("sources=[{path: a.jsonl, kind: judge}]", "'judge' (the endpoint) and kind: judge need each other"),
        ("sources=[{path: a.jsonl, verifier: {python: 'no function'}}]", "verifier"),
    ],
)
def test_a_mistake_in_a_spec_is_one_line(
    change: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["pairs", "build", str(spec_of(tmp_path)), change, "--out", str(tmp_path / "pairs.jsonl")]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error


def test_nothing_left_says_what_took_it(tmp_path: Path) -> None:
    rows = marked_rows(5)
    write_jsonl(tmp_path / "pool.jsonl", rows)
    against = write_jsonl(tmp_path / "eval.jsonl", [{"prompt": row["prompt"]} for row in rows])
    spec = read_spec(tmp_path / "pool.jsonl", {"against": [str(against)]})
    with pytest.raises(MixfuseError, match=r"of 5 pairs none is left to train on \(in an evaluation set 5\)"):
        preferences.build(spec, tmp_path / "pairs.jsonl", progress=False)


def test_overrides_go_with_a_spec(tmp_path: Path) -> None:
    with pytest.raises(MixfuseError, match="is not a spec"):
        read_spec(tmp_path / "pool.jsonl", {}, ["seed=1"])
    assert read_spec(spec_of(tmp_path), {"per_prompt": 5}, ["seed=1"]).per_prompt == 5


def test_marks_that_contradict_are_no_mark() -> None:
    row = {
        "responses": [{"text": "a", "correct": True}, {"text": "a", "correct": False}, {"text": "b", "correct": True}]
    }
    check = check_of("marked")
    assert (check(row, "a"), check(row, "b"), check(row, "c")) == (None, True, None)


def test_pairs_are_built_without_the_ml_stack(tmp_path: Path) -> None:
    import subprocess

    write_jsonl(tmp_path / "pool.jsonl", marked_rows(20))
    arguments = ["pairs", "build", str(tmp_path / "pool.jsonl"), "--out", str(tmp_path / "pairs.jsonl")]
    code = (
        f"import sys; from mixfuse.cli.entry import main; assert main({arguments!r}) == 0; "
        "assert not {'torch', 'transformers', 'trl', 'vllm'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
