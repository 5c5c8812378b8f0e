"""Recorded answers and combiners of any shape are read right, or refused in one line; nothing is overwritten."""

import copy
import gzip
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from combiner_pools import pool, row
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mixfuse.cli.entry import main
from mixfuse.contracts.errors import MixfuseError
from mixfuse.fusion.combiner.artefact import Combiner, load, weigh
from mixfuse.fusion.combiner.asking import next_member, policy_for
from mixfuse.fusion.combiner.evidence import Answer
from mixfuse.fusion.measure.combiner_fit import fit_combiner

ROWS = [row(question) for question in pool(40, {"a": 0.7, "b": 0.6}, domains={"x": {}, "y": {}})]
TEXT = "".join(json.dumps(one) + "\n" for one in ROWS)
FITTED = json.loads(
    fit_combiner(pool(60, {"a": 0.7, "b": 0.7, "c": 0.7}, domains={"x": {}}), "choice").model_dump_json()
)
bounded = settings(
    derandomize=True, deadline=None, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def changed(change: Callable[[dict[str, Any]], object]) -> bytes:
    """The rows as a file, each changed."""
    rows = copy.deepcopy(ROWS)
    for one in rows:
        change(one)
    return "".join(json.dumps(one) + "\n" for one in rows).encode()


def marked(value: Any) -> bytes:
    return changed(lambda one: [answer.update(correct=value) for answer in one["responses"]])


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    capsys.readouterr()
    status = main([str(word) for word in words])
    printed = capsys.readouterr()
    return status, printed.out, printed.err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "there are no rows"),
        (b"\n\n", "there are no rows"),
        (b"[]\n", "expected a JSON object"),
        (b"\0" * 50, "malformed JSON"),
        (TEXT.encode("utf-16"), "not UTF-8 text"),
        (TEXT.splitlines()[0].encode(), "at least 30"),
        (marked(None), "0 of 40 questions are marked"),
        (marked("true"), "'correct' of a must be true or false, or absent (got 'true')"),
        (marked(1), "'correct' of a must be true or false, or absent (got '1')"),
        (changed(lambda one: one.update(responses=[])), "'responses'"),
        (changed(lambda one: one.update(domain=3)), "'domain' must be text"),
        (changed(lambda one: one.update(domain=one["id"] * 201)), "cannot be the name of one of the domains"),
        (changed(lambda one: one["responses"][0].update(model="")), "'' cannot be the name of one of the members"),
        (changed(lambda one: one["responses"][0].update(model="\ud800")), "cannot be the name of one of the members"),
        (changed(lambda one: one["responses"][0].update(model="a\n")), "cannot be the name of one of the members"),
        (changed(lambda one: one["responses"][0].update(model="a+b")), "no name may hold one"),
        (changed(lambda one: one["responses"].pop(int(one["id"]) % 2)), "no question has a marked answer of every"),
        (changed(lambda one: one.update(propensities={"a": 0})), "'propensities' must map members to probabilities"),
        (changed(lambda one: one.update(verdicts=[{"first": 0, "second": 2, "score": 1}])), "a verdict needs"),
        (changed(lambda one: one.update(verdicts=[{"first": 0, "second": 1, "score": float("nan")}])), "a verdict"),
        (b'{"id": ' + b"9" * 10**6 + b"}\n", "malformed JSON"),
        (b'{"id": ' + b"[" * 10**5 + b"}\n", "nested too deep"),
        (b'{"id": "x", "id": "y", "responses": []}\n', "the key 'id' stands twice in one object"),
        (changed(lambda one: one.update(id="same")), "the id 'same' is that of"),
    ],
)
def test_odd_rows_are_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, message: str
) -> None:
    data, out = tmp_path / "pool.jsonl", tmp_path / "combiner.json"
    data.write_bytes(content)
    status, _, error = run(capsys, "combiner", "fit", data, "--out", out)
    assert (status, error.count("\n")) == (2, 1), error
    assert message in error
    assert not out.exists()


def as_files(folder: Path) -> Iterator[tuple[str, list[Path]]]:
    """The same rows, in every shape in which they may come."""
    shapes = {
        "plain.jsonl": TEXT.encode(),
        "packed.jsonl.gz": gzip.compress(TEXT.encode()),
        "mark.jsonl": b"\xef\xbb\xbf" + TEXT.encode(),
        "lines.jsonl": TEXT.replace("\n", "\r\n").encode(),
    }
    for name, content in shapes.items():
        (folder / name).write_bytes(content)
        yield name, [folder / name]
    yield "twice", [folder / "plain.jsonl", folder / "plain.jsonl", folder / "." / "plain.jsonl"]
    yield "the same rows in two files", [folder / "plain.jsonl", folder / "lines.jsonl"]
    inside = folder / "inside"
    inside.mkdir()
    half = len(TEXT.splitlines()) // 2
    (inside / "a.jsonl").write_text("\n".join(TEXT.splitlines()[:half]))
    (inside / "b.jsonl.gz").write_bytes(gzip.compress("\n".join(TEXT.splitlines()[half:]).encode()))
    (inside / "notes.txt").write_text("no rows")
    yield "a folder", [inside]


def test_files_and_folders_in_every_shape_give_the_same_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = {}
    for name, paths in as_files(tmp_path):
        status, printed, _ = run(capsys, "combiner", "report", *paths, "--json")
        assert status == 0, name
        seen[name] = {key: value for key, value in json.loads(printed.splitlines()[-1]).items() if key != "data"}
    assert len(seen) == 7
    assert all(figures == seen["plain.jsonl"] for figures in seen.values())


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        (lambda one: one.update(responses=one["responses"][:1]), "Use a: it is the only member"),
        (lambda one: [answer.update(correct=True) for answer in one["responses"]], "Not enough is known"),
        (lambda one: [answer.update(correct=False) for answer in one["responses"]], "Not enough is known"),
        (lambda one: one["responses"].append(dict(one["responses"][0], text="again")), "weighing the answers"),
        (lambda one: one.update(id=int(one["id"])), "Not enough is known"),
        (lambda one: [answer.update(text="\ud800" + "9" * 10**5) for answer in one["responses"]], "Not enough"),
        (lambda one: one.update(propensities={"a": 1e-320}), "Not enough is known"),
    ],
)
def test_odd_rows_that_have_a_meaning_are_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Callable[[dict[str, Any]], object], verdict: str
) -> None:
    data, out = tmp_path / "pool.jsonl", tmp_path / "combiner.json"
    data.write_bytes(changed(change))
    for words in (("fit", data, "--out", out), ("report", data, "--out", tmp_path / "report")):
        status, printed, error = run(capsys, "combiner", *words, "--json")
        assert (status, error) == (0, "")
        assert verdict in json.loads(printed.splitlines()[-1])["verdict"]
    assert load(out).members


def test_nothing_that_is_read_or_is_no_combiner_is_written_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    data, prices = folder / "report.json", tmp_path / "prices.yaml"
    data.write_text(TEXT)
    prices.write_text("a: 1\nb: 2\n")
    linked = tmp_path / "linked"
    os.link(data, linked)
    notes = tmp_path / "notes.md"
    notes.write_text("mine")
    for words, message in (
        (("fit", data, "--out", data), "would be overwritten"),
        (("fit", data, "--out", linked), "would be overwritten"),
        (("fit", data, "--prices", prices, "--out", prices), "would be overwritten"),
        (("report", data, "--out", folder), "would be overwritten"),
        (("fit", data, "--out", notes), "holds no combiner"),
        (("fit", data, "--out", tmp_path), "cannot write"),
        (("fit", data, "--out", "/dev/null"), "no regular file"),
        (("fit", data, "--out", data / "below"), "cannot write"),
    ):
        status, _, error = run(capsys, "combiner", *words)
        assert (status, error.count("\n")) == (2, 1), (words, error)
        assert message in error
    assert (data.read_text(), notes.read_text()) == (TEXT, "mine")
    assert prices.read_text().startswith("a")
    out = tmp_path / "combiner.json"
    assert run(capsys, "combiner", "fit", data, "--out", out)[0] == 0
    assert run(capsys, "combiner", "fit", data, "--out", out, "--seed", "1")[0] == 0
    assert run(capsys, "eval", "fusion", "--pool", data, "--combiner", out, "--out", folder)[0] == 2
    assert data.read_text() == TEXT


def test_more_names_than_a_combiner_has_weights_for_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = tmp_path / "pool.jsonl", tmp_path / "combiner.json"
    data.write_bytes(changed(lambda one: one.update(responses=[{"model": f"m{n}", "text": "A"} for n in range(65)])))
    assert "65 members, and a combiner weighs at most 64" in run(capsys, "combiner", "fit", data, "--out", out)[2]
    many = [dict(ROWS[0], id=str(n), prompt=str(n), domain=f"domain {n}") for n in range(201)]
    data.write_text("".join(json.dumps(one) + "\n" for one in many))
    assert "201 domains, and a combiner weighs at most 200" in run(capsys, "combiner", "fit", data, "--out", out)[2]


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**320), 10**320)
    | st.floats()
    | st.sampled_from(["", "a", "b", "a+b", "b+a", "1.5", "\ud800", "choice", "x" * 300, "\n"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abz\ud800"), inner, max_size=3),
    max_leaves=5,
)


@st.composite
def mutated(draw: st.DrawFn, whole: Any) -> Any:
    """A JSON document in which one to three places were replaced, removed, repeated or added to."""
    document = copy.deepcopy(whole)
    for _ in range(draw(st.integers(1, 3))):
        node: Any = document
        for _ in range(draw(st.integers(0, 5))):
            inner = list(node.values()) if isinstance(node, dict) else node
            inner = [part for part in inner if isinstance(part, dict | list) and part]
            if not inner:
                break
            node = draw(st.sampled_from(inner))
        if not node:
            continue
        place = draw(st.sampled_from(list(node) if isinstance(node, dict) else range(len(node))))
        match draw(st.sampled_from(["replace", "remove", "add"])):
            case "replace":
                node[place] = draw(values)
            case "remove":
                del node[place]
            case "add" if isinstance(node, dict):
                node[draw(st.sampled_from(["a", "b", "a+b", "new", "", "correct", "price"]))] = draw(values)
            case _:
                node.append(copy.deepcopy(node[place]))
    return document


@bounded
@given(mutated(FITTED))
def test_any_change_to_a_combiner_is_refused_by_name_or_weighs(tmp_path: Path, document: Any) -> None:
    file = tmp_path / "combiner.json"
    file.write_text(json.dumps(document))
    try:
        combiner = load(file)
    except MixfuseError as error:
        assert str(error).startswith(str(file))
        assert "\n" not in str(error)
        assert len(str(error)) < 2000
        return
    usable(combiner)


@bounded
@given(st.integers(0, 10**6), st.binary(max_size=3))
def test_any_broken_bytes_of_a_combiner_are_refused(tmp_path: Path, place: int, put: bytes) -> None:
    content = json.dumps(FITTED).encode()
    place %= len(content)
    file = tmp_path / "combiner.json"
    file.write_bytes(content[:place] + put + content[place + 1 :])
    try:
        usable(load(file))
    except MixfuseError as error:
        assert "\n" not in str(error)


def usable(combiner: Combiner) -> None:
    """What a gateway does with a combiner works."""
    assert len(combiner.revision) == 12
    answers = [Answer("a", "choice A", True, 5.0), Answer("unknown", "choice B", length=1e6), Answer("b", "", length=0)]
    for domain in (None, "x", "elsewhere"):
        weighed = weigh(combiner, answers, domain=domain)
        assert 0 <= weighed.confidence <= 1
        assert sum(row.probability for row in weighed.classes) + weighed.none == pytest.approx(1)
    if (policy := policy_for(combiner, 0.8)) is not None:
        asked: list[str] = []
        while (name := next_member(combiner, policy, asked, 0.5)) is not None:
            assert name in combiner.members
            asked.append(name)


@settings(bounded, max_examples=40)
@given(mutated(ROWS), st.sampled_from(["fit", "report"]))
def test_any_change_to_rows_is_refused_or_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], rows: list[Any], command: str
) -> None:
    data, out = tmp_path / "pool.jsonl", tmp_path / command
    data.write_text("".join(json.dumps(one) + "\n" for one in rows))
    out_words = ("--out", out) if command == "fit" else ()
    status, printed, error = run(capsys, "combiner", command, data, *out_words, "--json")
    assert (status, error.count("\n")) in ((0, 0), (2, 1)), error
    if status == 0:
        json.loads(printed.splitlines()[-1], parse_constant=pytest.fail)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"version": 1, "version": 1}', "the key 'version' stands twice"),
        ('{"version": true}', "version True of the combiner's format"),
        ('{"version": "1"}', "version 1 of the combiner's format"),
        ('{"members": {}}', "missing key 'version'"),
        ('{"version": 1, "figures": ' + '{"a":' * 120 + "1" + "}" * 121, "nested more than 100 levels deep"),
        ("[" * 10**5, "nested too deep"),
        ('{"version": ' + "9" * 5000 + "}", "not valid JSON"),
        (" " * (16 << 20) + "{}", "larger than 16 MiB"),
    ],
)
def test_a_file_that_cannot_be_a_combiner_is_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "combiner.json"
    file.write_text(text)
    with pytest.raises(MixfuseError) as error:
        load(file)
    assert message in str(error.value)
