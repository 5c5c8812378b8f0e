"""The loss is on what the assistant must say, whatever the chat template; checked token by token."""

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
# Where mistral-common puts things with the v3 tokenizer: no header before an answer, and the system message in the
# *last* user turn, so that a chat's beginning does not render as the beginning of the chat. The templates that
# Mistral publishes are in test_mistral_recipes.py.
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


@pytest.mark.parametrize("template", [None, MARKED, MISTRAL])
def test_a_turn_that_is_not_to_be_learned_is_masked(template: str | None, tokenizer: Any) -> None:
    """OpenAI's `weight: 0`; the other turns keep the labels that they have without it."""
    tokenizer.chat_template = template or tokenizer.chat_template
    everything = encode(CHAT, tokenizer, "all")
    kept = encode(CHAT, tokenizer, "all", learned=[True, False, True])
    assert kept.input_ids == everything.input_ids
    gone = [token for token, label in zip(everything.labels, kept.labels, strict=True) if token != label]
    assert tokenizer.decode(gone).strip() == f"Green, mostly{tokenizer.eos_token}".replace(
        "mostly<", "mostly\n<" if template != MISTRAL else "mostly<"
    )
    assert encode(CHAT, tokenizer, "last", learned=[True, False, True]) == encode(CHAT, tokenizer, "last")
    assert not encode(CHAT, tokenizer, "last", learned=[True, True, False]).learns


def test_turns_that_follow_one_another_are_told_apart(tokenizer: Any) -> None:
    tokenizer.chat_template = MISTRAL
    chat = [CHAT[1], CHAT[2], {"role": "assistant", "content": "Yes"}]
    learned_ids = encode(chat, tokenizer, "all", learned=[False, True]).labels
    assert tokenizer.decode([label for label in learned_ids if label != IGNORED]).strip().startswith("Yes")


def test_marks_that_do_not_tell_turns_apart_are_refused(tokenizer: Any) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}"
        "{{ eos_token }}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
    )
    with pytest.raises(MixfuseError, match="marks 1 stretches for 2 turns"):
        encode([CHAT[1], CHAT[2], CHAT[2]], tokenizer, "all", learned=[True, False])


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
