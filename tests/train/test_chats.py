"""Chats as people have them: every public shape and format becomes the same messages, or is refused by name."""

import gzip
import itertools
import json
import re
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import train_harness as harness
import yaml
from train_harness import write_jsonl

from mixfuse.contracts.errors import MixfuseError
from mixfuse.train.data import chats, data_files, sources
from mixfuse.train.data.chats import Chat, Found
from mixfuse.train.recipe import DataSource

ASKED = {"role": "user", "content": "Hi"}
SAID = {"role": "assistant", "content": "Ho"}
BRIEF = {"role": "system", "content": "Be brief."}
CHAT = [ASKED, SAID]
CALL = {"type": "function", "function": {"name": "rate", "arguments": {"pair": "EURUSD"}}}
TOOL = {"type": "function", "function": {"name": "rate", "parameters": {"type": "object"}}}


def read(path: Path, *rows: dict[str, Any], **keys: Any) -> list[Chat]:
    if rows:
        write_jsonl(path, list(rows))
    return list(chats.chats(DataSource(path=path), **keys))


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"instruction": "Add.", "input": "2, 3", "output": "5"}, [("user", "Add.\n\n2, 3"), ("assistant", "5")]),
        ({"instruction": "Hi", "input": "", "output": "Ho", "text": "### …"}, [("user", "Hi"), ("assistant", "Ho")]),
        (
            {"instruction": "c", "output": "d", "history": [["a", "b"]], "system": "s"},
            [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")],
        ),
        (
            {"instruction": "a", "context": "b", "response": "c", "category": "qa"},
            [("user", "a\n\nb"), ("assistant", "c")],
        ),
        (
            {"prompt": [BRIEF, ASKED], "completion": [SAID]},
            [("system", "Be brief."), ("user", "Hi"), ("assistant", "Ho")],
        ),
        ({"prompt": [ASKED], "completion": "Ho"}, [("user", "Hi"), ("assistant", "Ho")]),
        ({"messages": None, "conversations": CHAT}, [("user", "Hi"), ("assistant", "Ho")]),
        ({"conversation": CHAT, "model": "x"}, [("user", "Hi"), ("assistant", "Ho")]),
        ({"messages": json.dumps(CHAT)}, [("user", "Hi"), ("assistant", "Ho")]),
        ({"messages": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]},
         [("user", "Hi"), ("assistant", "Ho")]),
        ({"instruction": "", "input": "Hi", "output": "Ho"}, [("user", "Hi"), ("assistant", "Ho")]),
        ({"system_prompt": "Be brief.", "system": "", "messages": CHAT},
         [("system", "Be brief."), ("user", "Hi"), ("assistant", "Ho")]),
        ({"prompt": json.dumps([BRIEF, ASKED]), "completion": json.dumps([SAID])},
         [("system", "Be brief."), ("user", "Hi"), ("assistant", "Ho")]),
        ({"prompt": "[1, 2]", "completion": '[{"role": []}]'}, [("user", "[1, 2]"), ("assistant", '[{"role": []}]')]),
        ({"messages": [{**BRIEF, "role": "developer"}, *CHAT]},
         [("system", "Be brief."), ("user", "Hi"), ("assistant", "Ho")]),
        ({"system": "Be brief.", "messages": [BRIEF, *CHAT]},
         [("system", "Be brief."), ("user", "Hi"), ("assistant", "Ho")]),
        (
            {"messages": [{**ASKED, "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]}, SAID]},
            [("user", "Hi"), ("assistant", "Ho")],
        ),
    ],
)  # fmt: skip
def test_a_shape_is_read(row: dict[str, Any], messages: list[tuple[str, str]], tmp_path: Path) -> None:
    (chat,) = read(tmp_path / "x.jsonl", row)
    assert [(message["role"], message["content"]) for message in chat.messages] == messages
    assert chat.learned[-1]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"instruction": "Hi", "input": "", "output": ["Ho", "Hm"]}, "'output' holds 2 answers"),
        ({"instruction": "Hi", "output": "Ho", "response": "Hm"}, "'output' and 'response' differ"),
        ({"instruction": "Hi", "input": "a", "context": "b", "output": "Ho"}, "'input' and 'context' differ"),
        ({"messages": CHAT, "system": "a", "system_prompt": "b"}, "'system' and 'system_prompt' differ"),
        ({"messages": CHAT, "label": False}, "a thumb up or down (KTO's 'label')"),
        ({"conversations": CHAT, "kto_tag": False}, "a thumb up or down (KTO's 'kto_tag')"),
        ({"conversations": [ASKED], "chosen": SAID, "rejected": SAID}, "these are preference rows"),
        ({"input": {"messages": [ASKED]}, "preferred_output": [SAID], "non_preferred_output": [SAID]}, "comparisons"),
        ({"orig_instruction": "Hi", "orig_response_A": "a", "orig_response_B": "b"}, "these are comparisons"),
        ({"messages": [ASKED, {**SAID, "weight": "0"}]}, "must be 0 or 1, or false or true, not '0'"),
        ({"messages": [{"role": "user", "content": ["a", "b"]}, SAID]}, "an object with a text, not str"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}, SAID]}, "a text part has no text"),
    ],
)
def test_what_would_be_learned_wrongly_is_refused(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(MixfuseError) as refusal:
        read(tmp_path / "x.jsonl", row)
    assert message in str(refusal.value)


def test_keys_of_openai_in_turns_of_sharegpt_are_read(tmp_path: Path) -> None:
    turns: list[dict[str, Any]] = [
        {"from": "human", "value": "Hi", "name": "Ann"},
        {"from": "gpt", "value": None, "tool_calls": [{**CALL, "id": "c1"}]},
        {"from": "tool", "value": "1.1", "tool_call_id": "c1"},
        {"from": "gpt", "value": "Ho"},
    ]
    (chat,) = read(tmp_path / "x.jsonl", {"conversations": turns})
    assert chat.messages[0]["name"] == "Ann"
    assert chat.messages[1]["tool_calls"] == [{**CALL, "id": "c1"}]
    assert chat.messages[2]["tool_call_id"] == "c1"
    assert chat.learned == [True, True]


def test_tools_their_calls_and_results_are_openais(tmp_path: Path) -> None:
    """OpenAI's form, its older one, and ShareGPT's (LLaMA-Factory) say the same."""
    call = {"name": "rate", "arguments": '{"pair": "EURUSD"}'}
    answer = {"role": "assistant", "content": "It is 1.1."}
    openai = {
        "tools": [TOOL],
        "messages": [
            ASKED,
            {"role": "assistant", "content": None, "tool_calls": [{"id": "c1", "type": "function", "function": call}]},
            {"role": "tool", "tool_call_id": "c1", "content": "1.1"},
            answer,
        ],
    }
    older = {
        "functions": [TOOL["function"]],
        "messages": [
            ASKED,
            {"role": "assistant", "content": None, "function_call": call},
            {"role": "function", "name": "rate", "content": "1.1"},
            answer,
        ],
    }
    sharegpt = {
        "tools": json.dumps([TOOL["function"]]),
        "conversations": [
            {"from": "human", "value": "Hi"},
            {"from": "function_call", "value": json.dumps({"name": "rate", "arguments": {"pair": "EURUSD"}})},
            {"from": "observation", "value": "1.1"},
            {"from": "gpt", "value": "It is 1.1."},
        ],
    }
    for chat in read(tmp_path / "x.jsonl", openai, older, sharegpt):
        assert chat.tools == [TOOL]
        assert chat.learned == [True, True]
        assert [message["role"] for message in chat.messages] == ["user", "assistant", "tool", "assistant"]
        (found,) = chat.messages[1]["tool_calls"]
        assert len(found.pop("id")) in (2, 9)
        assert found == CALL
        assert chat.messages[2]["content"] == "1.1"


@pytest.mark.parametrize("key", ["weight", "train", "training", "loss"])
@pytest.mark.parametrize("no", [0, False, 0.0])
def test_a_turn_that_is_not_to_be_learned_is_noted(key: str, no: Any, tmp_path: Path) -> None:
    turns = [ASKED, {**SAID, key: no}, ASKED, {**SAID, key: 1}]
    shared = [{"from": t["role"], "value": t["content"], **({key: t[key]} if key in t else {})} for t in turns]
    for chat in read(tmp_path / "x.jsonl", {"messages": turns}, {"conversations": shared}):
        assert chat.learned == [False, True]
    (chat,) = read(tmp_path / "y.jsonl", {"prompt": [ASKED, SAID, ASKED], "completion": [SAID]})
    assert chat.learned == [False, True], "TRL learns the completion alone"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [ASKED, {**SAID, "weight": 0.5}]}, r"messages\[1\].weight must be 0 or 1"),
        ({"messages": [{**ASKED, "train": True}, SAID]}, r"messages\[0\].train asks to learn a turn of the user"),
        ({"messages": [ASKED, {**SAID, "weight": 0, "train": True}]}, "weight and train contradict"),
        ({"messages": CHAT, "weight": 2}, "'weight' of a whole row is not read"),
        ({"messages": CHAT, "images": ["cat.png"]}, "'images' is not read, .* text alone"),
        ({"messages": [{**ASKED, "images": ["cat.png"]}, SAID]}, r"messages\[0\].images is not read"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, SAID]},
            "type 'image_url'",
        ),
        ({"messages": [ASKED, {"role": "assistant", "content": None, "refusal": "No."}]}, r"\[1\].refusal is not read"),
        ({"messages": CHAT, "documents": [{"text": "a"}]}, "'documents' is not read"),
        ({"prompt": "a", "completion": "b", "label": False}, "thumb up or down"),
        ({"system": "Be long.", "messages": [BRIEF, *CHAT]}, "'system' and a message of the system differ"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "preference rows; .*pairs build"),
        ({"question": "a", "answer": "b"}, "questions with answers; rename"),
        ({"contents": [{"role": "user", "parts": [{"text": "a"}]}]}, "Gemini's rows"),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "bing", "value": "b"}]}, "is from 'bing'"),
        ({"messages": [ASKED]}, "at least two"),
        ({"messages": [BRIEF, SAID]}, "at least two"),
        ({"messages": [SAID, ASKED]}, "the last message must be the assistant's, not the user's"),
        ({"messages": [ASKED, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "no"}]}]}, "no JSON"),
        ({"messages": CHAT, "tools": "rate"}, "tools is a text, but no JSON"),
        ({"messages": CHAT, "tools": [{"name": 1}]}, "tools must be a list of"),
        ({"messages": [ASKED, {"role": "assistant", "content": "\ud83d"}]}, "half a surrogate pair"),
        ({"id": "\udfff", "messages": CHAT}, "half a surrogate pair"),
        ({"messages": [ASKED, 3]}, r"messages\[1\] is no object"),
    ],
)
def test_what_would_change_what_is_learned_is_refused_by_name(row: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(MixfuseError, match=rf"x\.jsonl:1: .*{message}"):
        read(tmp_path / "x.jsonl", row)


def test_empty_answers_are_counted_and_not_learned_unless_asked_for(tmp_path: Path) -> None:
    rows = [{"messages": [ASKED, {**SAID, "content": " \n"}, *CHAT]}, {"messages": [ASKED, {**SAID, "content": ""}]}]
    found = Found()
    assert [chat.learned for chat in read(tmp_path / "x.jsonl", *rows, found=found)] == [[False, True], [False]]
    assert found.empty == 2
    assert "2 empty answers are not learned" in " ".join(found.lines("x"))
    assert [chat.learned for chat in read(tmp_path / "x.jsonl", empty_answers=True)] == [[True, True], [True]]
    thought = {**SAID, "content": "", "reasoning_content": "Hm."}
    assert read(tmp_path / "y.jsonl", {"messages": [ASKED, thought]})[0].learned == [True]


def test_keys_that_are_not_read_and_shapes_are_said_once(tmp_path: Path) -> None:
    found = Found()
    rows = [{"messages": [ASKED, {**SAID, "time": 3}], "source": "web"}, {"instruction": "a", "output": "b"}]
    read(tmp_path / "x.jsonl", *rows, *rows[:1], found=found)
    assert found.lines("x") == [
        "x: 2 messages rows, 1 alpaca row",
        "x: keys that are not read: 'messages.time', 'source'",
    ]


def test_bad_rows_are_skipped_with_their_places(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(
        b'{"messages": 3}\n{"a\n\xff\n[1]\n{"id": ' + b"9" * 5000 + b"}\n" + b"[" * 99999 + b"\n"
        + json.dumps({"messages": CHAT}).encode()
    )  # fmt: skip
    errors: list[str] = []
    assert len(read(tmp_path / "x.jsonl", bad=lambda error: errors.append(str(error)))) == 1
    patterns = [
        "1: messages must",
        "2: malformed",
        "3: not UTF-8",
        "4: expected",
        "5: .*too many digits",
        "6: .*too deep",
    ]
    assert len(errors) == len(patterns)
    for error, pattern in zip(errors, patterns, strict=True):
        assert re.search(rf"x\.jsonl:{pattern}", error), error


@pytest.mark.parametrize("name", ["x.json", "x.JSONL", "x.json.gz"])
@pytest.mark.parametrize("size", [3, 5000])
def test_an_array_is_read_piece_by_piece(name: str, size: int, tmp_path: Path) -> None:
    rows = [{"id": n, "messages": [ASKED, {**SAID, "content": f"{n} [{{ü\n" * 20}]} for n in range(size)]
    text = "\ufeff" + json.dumps(rows, indent=1, ensure_ascii=False)
    (tmp_path / name).write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    assert [chat.id for chat in read(tmp_path / name)] == [str(n) for n in range(size)]


@pytest.mark.parametrize("gap", [0, 1 << 17], ids=["at once", "piece by piece"])
@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (b'{"a" 2, "b": {"c": "}"}}', "Expecting ':' delimiter"),
        (b'{"messages": 1,\n "messages": 2}', r"the key 'messages' stands twice in one object \(up to line 3\)"),
        (b'{"a": ' + b"9" * 5000 + b"}", "a number has too many digits"),
        (b'{"a": "\\" }, {", "b": tru}', "Expecting value"),
    ],
)
def test_a_malformed_row_of_an_array_can_be_passed_over(bad: bytes, why: str, gap: int, tmp_path: Path) -> None:
    row = json.dumps({"messages": CHAT, "note": "{" * gap}).encode()
    (tmp_path / "x.json").write_bytes(b"[" + row + b",\n" + bad + b",\n" + row + b"]")
    errors: list[str] = []
    assert len(read(tmp_path / "x.json", bad=lambda error: errors.append(str(error)))) == 2
    (error,) = errors
    assert re.search(rf"x\.json: row 1 \(line 2\): malformed JSON: {why}$", error), error
    with pytest.raises(MixfuseError, match=r"row 1 \(line 2\)"):
        read(tmp_path / "x.json")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.json", b'[{"messages": 1},\n {"a" 2}]', r"x.json: row 1 \(line 2\): malformed JSON"),
        ("x.json", b'[{"instruction": "a", "output": "b"},', r"x.json:1: the JSON array has no end"),
        ("x.json", b'{\n"data": []}', "x.json:1: malformed JSON.*holds one array of rows, or one row a line"),
        ("x.jsonl", '{"a": 1}'.encode("utf-16"), "x.jsonl: the text is UTF-16"),
        ("x.jsonl", b'{"messages": 1, "messages": 2}', "the key 'messages' stands twice"),
        ("x.xlsx", b"PK", "files that end in '.xlsx' are not read"),
        ("x.jsonl.zst", b"(", "files that end in '.zst' are not read"),
        ("x.jsonl.gz", b"\x1f\x8b\x08", "x.jsonl.gz: not a whole gzip file"),
        ("x.csv", b"prompt,completion\na,b,c\n", "x.csv:2: 3 cells, but the first line names 2"),
        ("x.csv", b'prompt,completion\n"a,b\n', "x.csv: not a readable CSV"),
        ("x.csv", b"prompt,completion\na,\xff\n", "x.csv:2: the text holds not UTF-8 text"),
        ("x.csv", b"prompt,prompt\na,b\n", "x.csv:1: two columns have the same name"),
        ("x.csv", b"", "x.csv: the data set is empty"),
    ],
)
def test_a_broken_file_is_one_line(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(MixfuseError, match=message):
        read(tmp_path / name, bad=lambda error: None if "messages must be" in str(error) else data_files.stop(error))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("x.csv", "\ufeffprompt,completion,system\r\nHi,Ho,Be brief.\r\n"),
        ("x.CSV", 'prompt;completion;system\n"Hi";"Ho";"Be brief."\n'),
        ("x.tsv", "system\tprompt\tcompletion\nBe brief.\tHi\tHo\n"),
        ("x.csv.GZ", "prompt, completion, system\nHi,Ho,Be brief.\n"),
    ],
)
def test_tables_of_text_are_read(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(gzip.compress(text.encode()) if name.endswith("GZ") else text.encode())
    assert [chat.messages for chat in read(tmp_path / name)] == [[BRIEF, *CHAT]]


def test_only_wanted_columns_of_parquet_are_read(tmp_path: Path) -> None:
    """A date after the year 9999, which Python has not, harms only where its column is wanted."""
    late = pyarrow.array([253402300800000000], pyarrow.timestamp("us"))
    text = pyarrow.array([json.dumps(CHAT)])
    pyarrow.parquet.write_table(pyarrow.table({"messages": text, "created": late}), tmp_path / "X.PARQUET")
    found = Found()
    assert read(tmp_path / "X.PARQUET", found=found)[0].messages == CHAT
    assert found.lines("x")[-1] == "x: keys that are not read: 'created'"
    pyarrow.parquet.write_table(pyarrow.table({"messages": text, "id": late}), tmp_path / "y.parquet")
    with pytest.raises(MixfuseError, match=r"y.parquet: row 0: a value cannot be read"):
        read(tmp_path / "y.parquet")
    broken = pyarrow.array([b"\xff", b"b"]).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"prompt": broken, "completion": ["a", "c"]}), tmp_path / "z.parquet")
    errors: list[str] = []
    (chat,) = read(tmp_path / "z.parquet", bad=lambda error: errors.append(str(error)))
    assert chat.messages[0]["content"] == "b"
    assert "z.parquet: row 0: a value cannot be read: it is not UTF-8 text" in errors[0]


def test_nulls_of_a_table_are_absent_keys(tmp_path: Path) -> None:
    rows = [
        {
            "messages": [
                {**ASKED, "weight": None, "tool_calls": None},
                {**SAID, "weight": 0, "tool_calls": None},
                *CHAT,
            ],
            "tools": None,
        },
        {"messages": CHAT, "tools": [TOOL]},
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet")
    first, second = read(tmp_path / "x.parquet")
    assert (first.learned, first.tools, second.tools) == ([False, True], [], [TOOL])
    assert first.messages == [ASKED, SAID, *CHAT]


def test_folders_and_patterns_of_shards(tmp_path: Path) -> None:
    (tmp_path / "data" / "x").mkdir(parents=True)
    for name in ("train-00001.jsonl", "train-00000.jsonl"):
        write_jsonl(tmp_path / "data" / "x" / name, [{"id": name, "messages": CHAT}])
    (tmp_path / "data" / "README.md").write_text("a card")
    names = ["train-00000.jsonl", "train-00001.jsonl"]
    for path in ("data", "data/x", "data/x/train-*.jsonl", "data/**/*.jsonl"):
        assert [chat.id for chat in read(tmp_path / path)] == names
    write_jsonl(tmp_path / "data" / "x" / "test-00000.jsonl", [{"messages": CHAT}])
    with pytest.raises(MixfuseError, match=r"several splits \(test, train\); name one by a pattern"):
        read(tmp_path / "data")
    (tmp_path / "data" / "more.csv").write_text("prompt,completion\na,b\n")
    with pytest.raises(MixfuseError, match=r"holds .csv and .jsonl; name one kind"):
        read(tmp_path / "data")
    with pytest.raises(MixfuseError, match="no file fits the pattern"):
        read(tmp_path / "*.parquet")
    (tmp_path / "none").mkdir()
    with pytest.raises(MixfuseError, match="holds no file that ends in"):
        read(tmp_path / "none")


def test_a_folder_of_several_splits_or_kinds_names_a_pattern_that_fits(tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / "data" / split).mkdir(parents=True)
        write_jsonl(tmp_path / "data" / split / "0.jsonl", [{"messages": CHAT, "id": split}])
    with pytest.raises(MixfuseError, match=r"several splits \(test, train\)") as refusal:
        read(tmp_path / "data")
    assert [chat.id for chat in read(Path(str(refusal.value).rpartition(": ")[2]))] == ["train"]
    (tmp_path / "data" / "test" / "0.jsonl").rename(tmp_path / "data" / "train" / "1.jsonl")
    (tmp_path / "data" / "facts.json").write_text("{}")
    with pytest.raises(MixfuseError, match=r"holds .json and .jsonl; name one kind") as refusal:
        read(tmp_path / "data")
    assert len(read(Path(str(refusal.value).rpartition(": ")[2]))) == 2


def test_a_shard_that_links_to_nothing_is_missed(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    write_jsonl(tmp_path / "data" / "0.jsonl", [{"messages": CHAT}])
    (tmp_path / "data" / "1.jsonl").symlink_to(tmp_path / "gone")
    with pytest.raises(MixfuseError, match=r"1\.jsonl: no such file"):
        read(tmp_path / "data")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (gzip.compress(b"{}", mtime=0), r"x: this is a packed file \(\.gz\)"),
        (b"PAR1\0\0", r"x: this is a Parquet file"),
        (json.dumps({"messages": CHAT}).encode("utf-16-le"), "x: the text holds NUL bytes, as UTF-16 does"),
        (
            f"[{json.dumps({'messages': CHAT})}]\n[{{}}]\n".encode(),
            "x:1: there is more text after the end of the JSON array",
        ),
        (f"[{json.dumps({'messages': CHAT})}]".encode() + b" " * (1 << 21) + b"{}", "more text after the end"),
        (b'{"prompt": "Hi", "completion": null}', "x:1: 'prompt' stands without 'completion'"),
    ],
)
def test_a_file_that_is_something_else_is_named(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(MixfuseError, match=message):
        read(tmp_path / "x")


def test_dates_that_python_cannot_hold_are_not_read(tmp_path: Path) -> None:
    when = pyarrow.array([2 * 10**15], pyarrow.timestamp("ms"))
    pyarrow.parquet.write_table(pyarrow.table({"when": when, "chosen": ["x"]}), tmp_path / "x.parquet")
    assert list(data_files.read(tmp_path / "x.parquet")) == [(f"{tmp_path}/x.parquet: row 0", {"chosen": "x"})]


def test_a_digest_is_of_every_shard_also_of_equal_names(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write_jsonl(tmp_path / folder / "0.jsonl", [{"messages": CHAT}])
    before = sources.digest(DataSource(path=tmp_path))
    write_jsonl(tmp_path / "a" / "0.jsonl", [{"messages": [*CHAT, *CHAT]}])
    assert sources.digest(DataSource(path=tmp_path)) != before


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    columns = [pyarrow.array([text]) for text in ("a", "b", "c")]
    table = pyarrow.table(columns, names=["prompt", "completion", "prompt"])
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(MixfuseError, match="two columns have the same name"):
        read(tmp_path / "x.parquet")


def test_the_examples_of_the_page_are_read_by_the_line_below_them(tmp_path: Path) -> None:
    """docs/data.md: each shape is followed by the line of a recipe; the rows are put where that line looks for them."""
    page = (harness.PROJECT / "docs" / "data.md").read_text(encoding="utf-8")
    section = page.partition("\n## Chats\n")[2].partition("\n### ")[0]
    blocks = re.findall(r"^```(\w+)\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    found = 0
    for (kind, rows), (_, line) in itertools.pairwise(blocks):
        if kind == "yaml":
            continue
        entry = yaml.safe_load(line)["data"]
        entry = entry if isinstance(entry, dict) else {"path": entry}
        file = tmp_path / entry["path"].replace("*", "00000")
        file.parent.mkdir(exist_ok=True)
        if file.suffix == ".parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist([json.loads(rows)]), file)
        else:
            file.write_bytes(gzip.compress(rows.encode()) if file.suffix == ".gz" else rows.encode())
        (chat,) = chats.chats(DataSource(**{**entry, "path": tmp_path / entry["path"]}))
        assert chat.learned[-1]
        found += 1
    assert found == 6


@pytest.fixture
def recipe(tmp_path: Path, tiny_base: Path) -> Path:
    return harness.sft_recipe(tmp_path, tiny_base)


def test_the_preview_shows_what_is_learned_and_counts(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from mixfuse.cli.entry import main

    rows = [
        {"messages": [ASKED, {**SAID, "content": "No\x1b[2J", "weight": 0}, ASKED, SAID], "source": "a"},
        {"messages": [ASKED, {**SAID, "content": ""}]},
        {"messages": [ASKED, {**SAID, "content": "go " * 300}]},
        {"messages": [ASKED]},
        {"messages": [ASKED, {**SAID, "reasoning_content": "Hm."}]},
    ]
    path = write_jsonl(tmp_path / "x.jsonl", rows)
    command = ["data", "preview", "-n", "1", "--json", str(recipe), f"data={path}"]
    assert main(command) == 2
    assert "x.jsonl:4: messages must be a list of at least two" in capsys.readouterr().err
    assert main([*command, "on_bad_row=skip"]) == 0
    printed = capsys.readouterr().out
    *text, last = printed.splitlines()
    (found,) = json.loads(last)["data"]
    assert "⟦Ho<|im_end|>⟧" in printed
    assert "\x1b" not in printed
    assert "No\\x1b[2J<|im_end|>" in printed
    assert (found["rows"], found["chats"], found["empty_answers"]) == (5, 1, 1)
    assert sum(found["left_out"].values()) == 4
    assert any("left out 2 of 5 chats that cannot be read or rendered: " in line for line in text)
    assert "leaves out the reasoning in message 2" in printed
    assert any("left out 1 of 5 chats longer than 256 tokens" in line for line in text)
    (shown,) = found["shown"]
    assert sum(part["learned"] for part in shown["parts"]) == 1
    assert main([*command, "on_bad_row=skip", "truncation=right"]) == 0
    (found,) = json.loads(capsys.readouterr().out.splitlines()[-1])["data"]
    assert (found["chats"], found["cut"]) == (2, 1)
    assert found["cut_tokens"] > 0


def test_training_data_is_counted_as_the_preview_counts_it(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from mixfuse.contracts.strict_yaml import load
    from mixfuse.train.data.chat_data import chat_data
    from mixfuse.train.model.tokenizer import load_tokenizer
    from mixfuse.train.recipe import SftRecipe
    from mixfuse.train.stages.data_preview import preview

    rows = [{"messages": CHAT}, {"messages": 3}, {"messages": [ASKED, {**SAID, "weight": 0}]}, {"messages": [SAID]}]
    path = write_jsonl(tmp_path / "x.jsonl", rows)
    overrides = [f"data={path}", "on_bad_row=skip", "data_processes=2"]
    made = load(recipe, SftRecipe, overrides)
    assert chat_data(made, load_tokenizer(made.base)).chats == 1
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith(str(path))]
    assert printed == preview(recipe, overrides)["data"][0]["lines"]
    write_jsonl(path, rows[1:])
    with pytest.raises(MixfuseError, match=r"no chat is left to train on .*x.jsonl:1: messages must be a list"):
        chat_data(load(recipe, SftRecipe, overrides), load_tokenizer(made.base))
