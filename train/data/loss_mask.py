"""Which tokens of a chat carry the loss: those that the assistant must generate, including its end-of-turn token.

A template with `{% generation %}` marks names them itself. Most have no marks (Mixtral's do not), so the turns are
located in the rendered text. The chat is rendered once more with a placeholder for each of the assistant's messages;
the text between the placeholders is what the template adds. This works even if rendering the beginning of a chat does
not give the beginning of the rendered chat, as in templates that put the system message into the last user turn.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any, Literal, NamedTuple

from mixfuse.contracts.chat_template import REASONING, adapted, left_out, render
from mixfuse.contracts.errors import MixfuseError

IGNORED = -100  # torch's cross entropy ignores this label
_PRIVATE_USE = range(0xE000, 0xF8FF)
_MARK = re.compile(r"\{%-?\s*generation\b")


class Encoded(NamedTuple):
    """A chat as tokens.

    Attributes:
        input_ids: (L,) tokens of the whole chat.
        labels: (L,) the token where there is a loss, -100 elsewhere. The first is always -100: nothing predicts it.
    """

    input_ids: list[int]
    labels: list[int]

    @property
    def learns(self) -> bool:
        """Whether any token carries a loss."""
        return any(label != IGNORED for label in self.labels)


class Span(NamedTuple):
    """An assistant's turn in a rendered chat, in characters.

    Attributes:
        start: Start of the generated text: after the header that ends a generation prompt.
        end: End of the assistant's content, where the text that closes the turn begins.
        following: Start of the assistant's next content, or the end of the text.
        calls: Whether the turn has tool calls, among whose marks may be special tokens.
        next_turn: Start of the text of the turn after it, if that is known.
    """

    start: int
    end: int
    following: int
    calls: bool = False
    next_turn: int | None = None


def encode(
    messages: list[dict[str, Any]],
    tokenizer: Any,
    loss_on: Literal["all", "last"],
    *,
    tools: list[dict[str, Any]] | None = None,
    learned: Sequence[bool] | None = None,
) -> Encoded:
    """Tokenises a chat and labels the assistant's tokens.

    Args:
        messages: `{role, content}` each, and what else OpenAI's form has (`tool_calls`, …); the assistant's is last.
        tokenizer: A fast tokenizer with a chat template.
        loss_on: Every assistant turn, or the last one.
        tools: The tools that the template is given, in OpenAI's form.
        learned: For each of the assistant's turns, whether it is learned; by default all are.

    Raises:
        MixfuseError: The template refuses the chat, changes an assistant's content, closes its turns without a special
            token, so that a model could not learn to stop, leaves out a part of the chat, or has marks that do not tell
            the turns apart.
    """
    messages = adapted(messages, tokenizer)
    keys: dict[str, Any] = {"tools": tools} if tools else {}
    text = render(messages, tokenizer, **keys)
    if missing := left_out(messages, tokenizer, tools):
        raise MixfuseError(f"the base's chat template leaves out {missing}")
    marked = _marked(messages, tokenizer, **keys) if _MARK.search(tokenizer.chat_template) else None
    if not tokenizer.is_fast:
        raise MixfuseError("the base has no fast tokenizer (tokenizer.json), which the loss mask needs")
    tokens = tokenizer(text, add_special_tokens=False, return_offsets_mapping=marked is None)
    ids: list[int] = tokens["input_ids"]
    if marked is None:
        runs = _runs_of(text, ids, tokens["offset_mapping"], spans(messages, text, tokenizer, **keys), tokenizer)
    else:
        runs = _runs(marked)
        _check_ends(runs, ids, tokenizer)
        _check_calls(runs, ids, messages, tokenizer)
    if learned is not None and not all(learned):
        if len(runs) != len(learned):
            raise MixfuseError(
                f"the base's chat template marks {len(runs)} stretches for {len(learned)} turns of the assistant, so "
                "that a turn which is not to be learned cannot be told from the others"
            )
        chosen = list(zip(runs, learned, strict=True))
        runs = [run for run, learns in (chosen[-1:] if loss_on == "last" else chosen) if learns]
    elif loss_on == "last":
        runs = runs[-1:]
    labels = [IGNORED] * len(ids)
    for start, end in runs:
        labels[start:end] = ids[start:end]
    if labels:
        labels[0] = IGNORED
    return Encoded(ids, labels)


def spans(messages: list[dict[str, Any]], text: str, tokenizer: Any, **keys: Any) -> list[Span]:
    """The assistant's turns in `text`, the rendered `messages`.

    Raises:
        MixfuseError: An assistant's content is not in the text unchanged.
    """
    said = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    everything = json.dumps(messages, ensure_ascii=False)
    free = (chr(code) for code in _PRIVATE_USE if chr(code) not in everything)
    shown_as = list(messages)
    atoms: dict[str, tuple[int, str]] = {}  # placeholder → number of the message, text
    for number in said:
        shown_as[number] = _with_placeholders(messages[number], number, free, atoms)
    between = render(shown_as, tokenizer, **keys)
    pieces = re.split(f"([{''.join(atoms)}])", between)
    found = [atoms[placeholder] for placeholder in pieces[1::2]]
    if {number for number, _ in found} != set(said):
        raise MixfuseError("the base's chat template leaves out an assistant's turn; the loss mask cannot be found")
    places: list[tuple[int, int, int]] = []  # number of the message, start, end
    position = 0
    for piece, (number, content), following in zip(pieces[::2], found, pieces[2::2], strict=False):
        position += len(piece)
        candidates = (content, content.strip(), content.lstrip(), content.rstrip(), content.strip("\n"))
        fits = (c for c in candidates if text.startswith(c + following, position))
        shown = next(fits, None) if text.startswith(piece, position - len(piece)) else None
        if shown is None:
            raise MixfuseError(
                f"the base's chat template changes the assistant's content ({content[:40]!r}…); the loss mask cannot "
                "be found; mark the turns in the template with {% generation %} … {% endgeneration %}"
            )
        places.append((number, position, position + len(shown)))
        position += len(shown)
    header = _header(tokenizer, tokenizer.chat_template)
    turns: list[Span] = []
    before = 0
    for number in said:
        first = min(start for of, start, _ in places if of == number)
        end = max(end for of, _, end in places if of == number)
        later = [start for of, start, _ in places if of > number]
        following = min(later, default=len(text))
        piece = text[before:first]
        # Text between the end of a generation prompt and the content is generated too: white space that is a token
        # or part of the first word, an empty thought, or the marks of a call.
        if header and header in piece:
            after = piece.rpartition(header)[2]
        elif _is_plain(messages[number]):
            after = piece[len(piece.rstrip()) :]
        else:
            after = piece[_prompt_end(piece, messages[:number], tokenizer, **keys) :]
        follows = messages[number + 1]["content"] if number + 1 < len(messages) else ""
        place = text.find(follows.strip(), end, following) if isinstance(follows, str) and follows.strip() else -1
        next_turn = place if place >= 0 else len(text) if number + 1 == len(messages) else None
        turns.append(Span(first - len(after), end, following, bool(messages[number].get("tool_calls")), next_turn))
        before = end
    return turns


def _is_plain(message: Mapping[str, Any]) -> bool:
    """Whether an assistant's message is a content alone."""
    return not message.get("tool_calls") and not any(message.get(key) for key in REASONING)


def _with_placeholders(
    message: dict[str, Any], number: int, free: Iterator[str], atoms: dict[str, tuple[int, str]]
) -> dict[str, Any]:
    """An assistant's message with a placeholder for its content, its reasoning and the name of each function called."""

    def placeholder(text: str) -> str:
        character = next(free, None)
        if character is None:
            raise MixfuseError("the chat has too many turns for the loss mask to be found")
        atoms[character] = (number, text)
        return character

    shown = dict(message)
    if message["content"] or _is_plain(message):
        shown["content"] = placeholder(message["content"])
    for key in REASONING:
        if message.get(key):
            shown[key] = placeholder(message[key])
    if message.get("tool_calls"):
        shown["tool_calls"] = [
            {**call, "function": {**call["function"], "name": placeholder(call["function"]["name"])}}
            for call in message["tool_calls"]
        ]
    return shown


def _prompt_end(piece: str, before: list[dict[str, Any]], tokenizer: Any, **keys: Any) -> int:
    """Where in the text before an assistant's turn the prompt for it ends: where it agrees most with the prompt's end.

    The prompt need not be the beginning of the whole chat, as where the system text is in the last user turn.
    """
    prompt = render(before, tokenizer, add_generation_prompt=True, **keys)
    best, most = 0, 0
    for end in range(1, len(piece) + 1):
        equal = 0
        while equal < min(end, len(prompt)) and piece[end - 1 - equal] == prompt[-1 - equal]:
            equal += 1
        if equal >= most and equal:
            best, most = end, equal
    return best


@lru_cache(maxsize=4)
def _header(tokenizer: Any, template: str) -> str:
    """The text that a generation prompt adds, e.g. ChatML's `<|im_start|>assistant`; empty in Mistral's templates.

    `template` is the tokenizer's; it is an argument so that the cache's key holds it.
    """
    probe = [{"role": "user", "content": "a"}]
    without, added = render(probe, tokenizer), render(probe, tokenizer, add_generation_prompt=True)
    return added[len(without) :] if added.startswith(without) else ""


def _runs_of(
    text: str, ids: list[int], offsets: list[tuple[int, int]], turns: list[Span], tokenizer: Any
) -> list[tuple[int, int]]:
    """Each turn's tokens as (first, after the last): from its first to the special one at its end."""
    special = set(tokenizer.all_special_ids)
    last = _closing(tokenizer, tokenizer.chat_template) if any(turn.calls for turn in turns) else None
    runs: list[tuple[int, int]] = []
    token = 0
    for turn in turns:
        while token < len(ids) and offsets[token][1] <= turn.start:
            token += 1
        first = token
        while token < len(ids) and offsets[token][0] < turn.end:
            token += 1
        if turn.calls and turn.next_turn is not None:
            # Calls have special tokens of their own; the turn ends where the template ends a plain one, if it does.
            places = range(token, len(ids))
            own = (t for t in places if offsets[t][0] < turn.next_turn and ids[t] == last)
            token = next(own, token)
        while token < len(ids) and ids[token] not in special and offsets[token][0] < turn.following:
            token += 1
        if token == len(ids) or offsets[token][0] >= turn.following:
            closing = text[turn.end : turn.following][:40]
            raise MixfuseError(
                f"the base's chat template closes an assistant's turn with no special token ({closing!r}): the model "
                "would not learn to stop; add the end-of-sequence token to the template"
            )
        token += 1
        runs.append((first, token))
    return runs


@lru_cache(maxsize=4)
def _closing(tokenizer: Any, template: str) -> int | None:
    """The special token with which the template closes an assistant's turn that is text alone."""
    text = render([{"role": "user", "content": "qxa"}, {"role": "assistant", "content": "qxb"}], tokenizer)
    special = set(tokenizer.all_special_ids)
    ids = tokenizer(text.rpartition("qxb")[2], add_special_tokens=False)["input_ids"]
    return next((token for token in ids if token in special), None)


def _check_calls(runs: list[tuple[int, int]], ids: list[int], messages: list[dict[str, Any]], tokenizer: Any) -> None:
    """Checks that a template's marks enclose the tool calls."""
    if not any(message.get("tool_calls") for message in messages):
        return
    marked = "".join(tokenizer.decode(ids[start:end]) for start, end in runs)
    for message in messages:
        for call in message.get("tool_calls") or ():
            if call["function"]["name"] not in marked:
                raise MixfuseError(
                    f"the base's chat template marks no call of {call['function']['name'][:40]!r} as generated, so it "
                    "would not be learned; put the calls between its {% generation %} and {% endgeneration %}"
                )


def _check_ends(runs: list[tuple[int, int]], ids: list[int], tokenizer: Any) -> None:
    """Checks that what a template marks as generated ends with a special token, or with white space after one."""
    special = set(tokenizer.all_special_ids)
    for start, end in runs:
        last = end - 1
        while last > start and ids[last] not in special and not tokenizer.decode([ids[last]]).strip():
            last -= 1
        if ids[last] not in special:
            said = tokenizer.decode(ids[start:end])[:40]
            raise MixfuseError(
                f"the base's chat template marks an assistant's turn ({said!r}) without "
                "a special token at its end: the model would not learn to stop; write that token before the "
                "template's {% endgeneration %}"
            )


def _marked(messages: list[dict[str, Any]], tokenizer: Any, **keys: Any) -> list[int]:
    done = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True, **keys)
    return [int(bit) for bit in done["assistant_masks"]]


def _runs(mask: list[int]) -> list[tuple[int, int]]:
    """The stretches where the mask is 1, each as (first, after the last)."""
    edges = [i for i, (a, b) in enumerate(pairwise([0, *mask, 0])) if a != b]
    return list(zip(edges[::2], edges[1::2], strict=True))
