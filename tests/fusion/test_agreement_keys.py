"""What agreement reads in a text, as exact keys, and how a tool call is shown to the judge."""

import pytest

from mixfuse.fusion.answering.agreement import text_key, tool_call_text


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("-0", "number 0"),
        ("-0.00", "number 0"),
        ("it is 41.50", "number 41.5"),
        ("1e2", "number 100"),
        ("1e-3", "number 0.001"),
        ("1e100", f"number 1{'0' * 100}"),
        ("1e101", "number 1E+101"),
        ("1e-100", f"number 0.{'0' * 99}1"),
        ("1e-101", "number 1E-101"),
        ("none  here", "text none here"),
    ],
)
def test_a_number_is_read_as_a_plain_decimal_up_to_a_hundred_digits(text: str, key: str) -> None:
    assert text_key(text, "number") == key


@pytest.mark.parametrize(("text", "key"), [("YES", "choice yes"), ("(b)", "text (b)"), ("option: c", "choice C")])
def test_a_choice_is_one_letter_or_a_word(text: str, key: str) -> None:
    assert text_key(text, "choice") == key


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ('{"town": "Zürich", "days": 2}', 'weather({"days": 2, "town": "Zürich"})'),
        ("{broken", "weather({broken)"),
        ("", "weather()"),
    ],
)
def test_a_tool_call_is_shown_in_readable_form_and_a_malformed_one_as_it_came(arguments: str, text: str) -> None:
    assert tool_call_text({"function": {"name": "weather", "arguments": arguments}}) == text


@pytest.mark.parametrize("text", ["1e999999999", "1e1000000", "3e1000001%", "1e99999999999999999999", "-1E-999999"])
def test_a_number_beyond_all_bounds_is_a_key(text: str) -> None:
    assert text_key(f"It is {text}", "number").startswith("number ")
