"""The loss is on what the assistant must say, whatever the chat template; checked token by token."""

import copy
from typing import Any

import pytest

from mixfuse.contracts.errors import MixfuseError
from mixfuse.train.data.loss_mask import IGNORED, encode

# The base's own template (ChatML, without marks) as it is, and with the marks a training template has.
MARKED = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{%- generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As Mixtral 8x22B's: no header before an answer, and the system message stands in the *last* user turn, so that a
# chat's beginning does not render as the beginning of the chat.
MISTRAL = (
    "{% set system = messages[0]['content'] if messages[0]['role'] == 'system' else '' %}{{ bos_token }}"
    "{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ '[INST] ' + (system + '\n\n' if system and loop.index0 >= messages | length - 2 else '') + m['content'] "
    "+ ' [/INST]' }}{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] | trim + eos_token }}{% endif %}"
    "{% endfor %}"
)
CHAT = [
    {"role": "system", "content": "Answer in one word."},
    {"role": "user", "content": "Which is the colour of snow?"},
    {"role": "assistant", "content": "White."},
    {"role": "user", "content": "And of grass, assistant? White."},
    {"role": "assistant", "content": "  Green, mostly\n"},
    {"role": "user", "content": "Of coal?"},
    {"role": "assistant", "content": "Black"},
]


@pytest.fixture(scope="module")
def embedded() -> Any:
    from mixfuse.train.model.embedded_base import load_embedded_tokenizer

    return load_embedded_tokenizer()


@pytest.fixture
def tokenizer(embedded: Any) -> Any:
    return copy.deepcopy(embedded)


def learned(chat: list[dict[str, str]], tokenizer: Any, loss_on: Any = "all") -> list[list[str]]:
    """The tokens with a loss, in stretches."""
    ids, labels = encode(chat, tokenizer, loss_on)
    assert len(ids) == len(labels)
    assert ids == tokenizer.apply_chat_template(chat, return_dict=False), "other tokens than the template's own"
    stretches: list[list[str]] = [[]]
    for token, label in zip(ids, labels, strict=True):
        if label == IGNORED:
            stretches.append([])
        else:
            assert label == token
            stretches[-1].append(tokenizer.decode(token))
    return [stretch for stretch in stretches if stretch]


def test_every_turn_and_its_end_token_are_learned_and_nothing_else(tokenizer: Any) -> None:
    assert "generation %}" not in tokenizer.chat_template
    assert learned(CHAT, tokenizer) == [
        ["White", ".", "<|im_end|>"],
        ["\n ", " Green", ",", " mostly", "\n", "<|im_end|>"],  # the first token reaches into the turn
        ["Black", "<|im_end|>"],
    ]


def test_only_the_last_turn_where_asked(tokenizer: Any) -> None:
    assert learned(CHAT, tokenizer, "last") == [["Black", "<|im_end|>"]]


@pytest.mark.parametrize("chat", [CHAT, CHAT[1:], CHAT[1:3], [CHAT[1], {"role": "assistant", "content": ""}]])
@pytest.mark.parametrize("loss_on", ["all", "last"])
def test_a_template_with_marks_gives_the_same_labels(chat: Any, loss_on: Any, tokenizer: Any) -> None:
    unmarked = encode(chat, tokenizer, loss_on)
    assert unmarked.learns
    tokenizer.chat_template = MARKED
    assert encode(chat, tokenizer, loss_on) == unmarked


def test_a_template_without_headers_and_with_the_system_message_last(tokenizer: Any) -> None:
    """The space after [/INST] belongs to the first word, which has to be generated with it."""
    tokenizer.chat_template = MISTRAL
    end = tokenizer.eos_token
    assert learned(CHAT, tokenizer) == [
        [" White", ".", end],
        [" Green", ",", " mostly", end],
        [" Black", end],
    ]


def test_what_an_assistant_says_cannot_move_the_mask(tokenizer: Any) -> None:
    """Content that looks like the template's own text, or holds the first placeholder."""
    tricky = "<|im_start|>assistant\nWhite.\ue000"
    chat = [*CHAT[:2], {"role": "assistant", "content": tricky}, CHAT[3], {"role": "assistant", "content": tricky}]
    first, second = learned(chat, tokenizer)
    assert first == second
    assert "".join(first).startswith("<|im_start|>assistant\nWhite.")
    assert first[-1] == "<|im_end|>"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}", "would not learn to stop"),
        (
            "{% for m in messages %}{{ m['content'] | upper + eos_token }}{% endfor %}",
            r"changes the assistant's content \('White.'…\)",
        ),
        ("{{ messages[1]['content'] }}", "leaves out an assistant's turn"),
        ("{{ raise_exception('roles must alternate') }}", "refuses the chat: roles must alternate"),
    ],
)
def test_a_template_that_cannot_be_masked_is_refused(template: str, message: str, tokenizer: Any) -> None:
    tokenizer.chat_template = template
    with pytest.raises(MixfuseError, match=message):
        encode(CHAT, tokenizer, "all")
