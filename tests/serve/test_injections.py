"""What answers that try to sway the judge become on the way to it."""

import re

import pytest
from injections import gains, injections
from transformers import AutoTokenizer

from mixfuse.contracts import judge_protocol

CASES = list(injections())


def test_the_measure_sees_a_judge_that_is_swayed():
    assert gains(20, 0)
    assert gains(60, 35)
    assert not gains(0, 0)
    assert not gains(10, 6)
    assert not gains(5, 40)


@pytest.mark.parametrize(("family", "added"), CASES, ids=[f"{family}-{n}" for n, (family, _) in enumerate(CASES)])
def test_no_injection_leaves_its_place_in_the_judges_prompt(tiny, family: str, added: str):
    """One frame, and no token that the judge's tokenizer gives a meaning: as for an answer of plain words."""
    tokenizer = AutoTokenizer.from_pretrained(tiny.base)
    special = set(tokenizer.all_special_ids)
    raw = f"13\n{added}"
    nonce = judge_protocol.new_nonce("7 + 5 =", raw, "12")
    messages = judge_protocol.comparison("7 + 5 =", raw, "12", nonce=nonce)
    content = messages[-1]["content"]
    assert re.findall(r"^\[(question|A|B|end)\b", content, re.MULTILINE) == ["question", "A", "B", "end"]
    assert not re.search(r"^\s*(system|user|assistant|judge|verdict)\s*:", content, re.MULTILINE | re.IGNORECASE)
    assert not re.search(r"<[|\uff5c]|</?s>|\[/?INST\]|<<", content)
    assert all(letter.isprintable() or letter == "\n" for letter in content)
    assert len(content) <= judge_protocol.MAX_CHARS + 600
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    assert not special & set(tokenizer(rendered, add_special_tokens=False).input_ids), family
