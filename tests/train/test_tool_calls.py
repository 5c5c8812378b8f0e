"""Tool calls in chats: written as the template wants them, learned where the assistant wrote them, and never lost.

The tokenizer is Mixtral 8x22B Instruct's own, from the package mistral-common, and so is what its token ids must be.
"""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from mistral_v3 import PUBLISHED

from mixfuse.contracts.chat_template import prepare
from mixfuse.contracts.errors import MixfuseError
from mixfuse.train.data.loss_mask import IGNORED, encode

mistral_common = pytest.importorskip("mistral_common")
V3 = Path(mistral_common.__file__).parent / "data" / "mistral_instruct_tokenizer_240323.model.v3"
HERMES = (
    "{% if tools %}{{ '<|im_start|>system\nTools: ' + tools | tojson + '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.reasoning_content %}{{ '<think>\n' + m.reasoning_content + '\n</think>\n' }}{% endif %}{{ m.content }}"
    '{% for call in m.tool_calls or [] %}{{ \'\n<tool_call>\n{"name": "\' + call.function.name + \'", "arguments": \' '
    "+ (call.function.arguments if call.function.arguments is string else call.function.arguments | tojson) "
    "+ '}\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_rate",
            "description": "The rate of a pair",
            "parameters": {"type": "object", "properties": {"pair": {"type": "string"}}},
        },
    }
]


def call(name: str, pair: str) -> dict[str, Any]:
    return {
        "id": name,
        "type": "function",
        "function": {"name": "get_rate", "arguments": json.dumps({"pair": pair})},
    }


ASKED = {"role": "user", "content": "What is the euro worth in dollars?"}
CHAT = [
    {"role": "system", "content": "Use the tools."},
    ASKED,
    {"role": "assistant", "content": None, "tool_calls": [call("call_0000000001", "EURUSD")]},
    {"role": "tool", "tool_call_id": "call_0000000001", "content": 'It is "1.08".'},
    {"role": "assistant", "content": "1.08 dollars."},
    {"role": "user", "content": "And in pounds and yen?"},
    {"role": "assistant", "content": "", "tool_calls": [call("call_2", "EURGBP"), call("call_3", "EURJPY")]},
]


@pytest.fixture(scope="module")
def v3(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The real tokenizer, as a base's folder would hold it."""
    from transformers import LlamaTokenizer

    folder = tmp_path_factory.mktemp("v3")
    shutil.copy(V3, folder / "tokenizer.model")
    return LlamaTokenizer.from_pretrained(folder)


@pytest.fixture
def mistral(v3: Any) -> Any:
    tokenizer = copy.deepcopy(v3)
    tokenizer.chat_template = PUBLISHED
    prepare(tokenizer, Path("base"))
    return tokenizer


def generated() -> str:
    """The template that mistral-common writes for the v3 tokenizer."""
    from mistral_common.integrations.chat_templates.chat_templates import generate_chat_template
    from mistral_common.tokens.tokenizers.base import TokenizerVersion

    return generate_chat_template(True, TokenizerVersion.v3, False, False, False, None, False, True, None, None, None)


@pytest.fixture(params=["published", "generated"])
def either(request: pytest.FixtureRequest, v3: Any) -> Any:
    """The tokenizer with each of the two templates."""
    tokenizer = copy.deepcopy(v3)
    tokenizer.chat_template = PUBLISHED if request.param == "published" else generated()
    prepare(tokenizer, Path("base"))
    return tokenizer


def learned(chat: list[dict[str, Any]], tokenizer: Any, tools: Any = None, **keys: Any) -> list[str]:
    """The learned stretches, as text."""
    ids, labels = encode(chat, tokenizer, "all", tools=tools, **keys)
    stretches: list[list[int]] = [[]]
    for token, label in zip(ids, labels, strict=True):
        if label == IGNORED:
            stretches.append([])
        else:
            assert label == token
            stretches[-1].append(token)
    return [tokenizer.decode(stretch) for stretch in stretches if stretch]


def by_mistral(chat: list[dict[str, Any]], tools: Any = None) -> list[int]:
    """The token ids of a chat by Mistral's own code; a call's id has 9 characters there."""
    from mistral_common.protocol.instruct import messages as made
    from mistral_common.protocol.instruct.request import ChatCompletionRequest
    from mistral_common.protocol.instruct.tool_calls import FunctionCall, Tool, ToolCall
    from mistral_common.protocol.instruct.validator import ValidationMode
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    def message(m: dict[str, Any]) -> Any:
        if m["role"] == "user":
            return made.UserMessage(content=m["content"])
        if m["role"] == "tool":
            return made.ToolMessage(content=m["content"], tool_call_id=m["tool_call_id"])
        calls = [ToolCall(id=c["id"], function=FunctionCall(**c["function"])) for c in m.get("tool_calls") or ()]
        return made.AssistantMessage(content=m["content"] or None, tool_calls=calls or None)

    tokenizer = MistralTokenizer.from_file(str(V3), mode=ValidationMode.test)
    request = ChatCompletionRequest(
        messages=[message(m) for m in chat], tools=[Tool.model_validate(tool) for tool in tools or ()] or None
    )
    return list(tokenizer.encode_chat_completion(request).tokens)


def short(chat: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The chat with ids of 9 characters."""
    text = json.dumps(chat).replace("call_0000000001", "call00001").replace("call_2", "call00002")
    return list(json.loads(text.replace("call_3", "call00003")))


def test_token_ids_are_mistrals_own(either: Any) -> None:
    plain = [ASKED, CHAT[4], {"role": "user", "content": "Thanks"}]
    assert either.apply_chat_template(plain, return_dict=False) == by_mistral(plain)
    whole = [*plain, {"role": "assistant", "content": "Welcome."}]
    ids, labels = encode(whole, either, "all")
    assert ids[: len(by_mistral(plain))] == by_mistral(plain)
    assert [label for label in labels if label != IGNORED][-1] == either.eos_token_id


def test_calls_are_learned_and_results_are_not(either: Any) -> None:
    said = learned(CHAT, either, TOOLS)
    assert len(said) == 3
    assert said[0].startswith("[TOOL_CALLS]")
    assert '"arguments": {"pair": "EURUSD"}' in said[0]
    assert said[0].endswith("]</s>")
    assert said[1].strip() == "1.08 dollars.</s>"
    assert said[2].startswith("[TOOL_CALLS]")
    assert said[2].count('"id"') == 2
    assert all("1.08\\" not in text and "TOOL_RESULTS" not in text and "INST" not in text for text in said)
    ids = encode(CHAT, either, "all", tools=TOOLS).input_ids
    text = either.decode(ids)
    assert "Use the tools." in text
    assert "[AVAILABLE_TOOLS]" in text
    assert learned(CHAT, either, TOOLS, learned=[True, False, True]) == [said[0], said[2]]


def test_a_call_has_the_ids_of_mistrals_own_code(v3: Any) -> None:
    tokenizer = copy.deepcopy(v3)
    tokenizer.chat_template = generated()
    chat = short(CHAT[1:4])
    assert encode([*chat, CHAT[4]], tokenizer, "all", tools=TOOLS).input_ids[: len(by_mistral(chat, TOOLS))] == (
        by_mistral(chat, TOOLS)
    )


def test_ids_of_another_length_keep_calls_and_results_together(mistral: Any) -> None:
    text = mistral.decode(encode(CHAT, mistral, "all", tools=TOOLS).input_ids)
    calls = text.split('"id": "')[1:]
    assert len({part[:9] for part in calls}) == 3
    assert all(part[9] == '"' and part[:9].isalnum() for part in calls)
    assert f'"call_id": "{calls[0][:9]}"' in text


@pytest.mark.parametrize("arguments", ['{"pair":"EURUSD"}', {"pair": "EURUSD"}])
@pytest.mark.parametrize(
    "form",
    [
        "call.function.arguments | tojson",  # an object
        "(call.function.arguments if call.function.arguments is string else call.function.arguments | tojson)",
        "call.function.arguments",  # text, added to text
    ],
)
def test_arguments_are_handed_over_as_the_template_wants_them(form: str, arguments: Any, embedded: Any) -> None:
    tokenizer = copy.deepcopy(embedded)
    old = "(call.function.arguments if call.function.arguments is string else call.function.arguments | tojson)"
    assert old in HERMES
    tokenizer.chat_template = HERMES.replace(old, form)
    row = {**call("c1", ""), "function": {"name": "get_rate", "arguments": arguments}}
    (said,) = learned([ASKED, {"role": "assistant", "content": "", "tool_calls": [row]}], tokenizer, TOOLS)
    body = said.split("<tool_call>")[1].split("</tool_call>")[0]
    assert json.loads(body) == {"name": "get_rate", "arguments": {"pair": "EURUSD"}}
    assert said.endswith("<|im_end|>")


def test_reasoning_is_learned_where_the_template_writes_it(embedded: Any) -> None:
    tokenizer = copy.deepcopy(embedded)
    tokenizer.chat_template = HERMES
    chat = [ASKED, {"role": "assistant", "content": "4", "reasoning_content": "Two and two are four."}]
    assert learned(chat, tokenizer) == ["<think>\nTwo and two are four.\n</think>\n4<|im_end|>"]


@pytest.mark.parametrize(
    ("chat", "tools", "lost"),
    [
        (CHAT[1:3], None, "leaves out a tool call in message 2"),
        ([ASKED, CHAT[4]], TOOLS, "leaves out the tools"),
        ([ASKED, {"role": "assistant", "content": "4", "reasoning_content": "Two."}], None,
         "leaves out the reasoning in message 2"),
        ([ASKED, CHAT[2], CHAT[3], CHAT[4]], None, "leaves out "),
    ],
)  # fmt: skip
def test_what_a_template_does_not_write_is_refused_by_name(chat: Any, tools: Any, lost: str, embedded: Any) -> None:
    with pytest.raises(MixfuseError, match=lost):
        encode(chat, embedded, "all", tools=tools)


def test_a_template_that_drops_tool_results_or_system_text_is_refused(embedded: Any) -> None:
    tokenizer = copy.deepcopy(embedded)
    for role, lost in (("tool", "the tool result in message 4"), ("system", "the system text")):
        tokenizer.chat_template = HERMES.replace("in messages %}", f"in messages if m.role != '{role}' %}}")
        with pytest.raises(MixfuseError, match=f"leaves out {lost}"):
            encode(CHAT[:5], tokenizer, "all", tools=TOOLS)


def test_marks_around_the_text_alone_do_not_lose_the_calls(embedded: Any) -> None:
    tokenizer = copy.deepcopy(embedded)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% for c in m.tool_calls or [] %}{{ c.function.name + "
        "c.function.arguments | tojson }}{% endfor %}{% generation %}{{ m.content + eos_token }}{% endgeneration %}"
        "{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
    )
    with pytest.raises(MixfuseError, match="marks no call of 'get_rate' as generated"):
        encode(CHAT[1:3], tokenizer, "all")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"function": {"name": "get_rate", "arguments": "EURUSD"}}, "'get_rate' are not a JSON object"),
        ({"function": {"name": "get_rate", "arguments": '["EURUSD"]'}}, "'get_rate' are not a JSON object"),
        ({"function": {"arguments": "{}"}}, "no function with a name"),
        ({"function": None}, "no function with a name"),
    ],
)
def test_a_malformed_call_is_one_line(changed: dict[str, Any], message: str, mistral: Any) -> None:
    row = {**call("call_1", "EURUSD"), **changed}
    with pytest.raises(MixfuseError, match=message):
        encode([ASKED, {"role": "assistant", "content": "", "tool_calls": [row]}], mistral, "all", tools=TOOLS)
