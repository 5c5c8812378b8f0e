"""Which tokens of a chat carry the loss: those that the assistant must generate, including its end-of-turn token.

A template with `{% generation %}` marks names them itself. Most have no marks (Mixtral's do not), so the turns are
located in the rendered text. The chat is rendered once more with a placeholder for each of the assistant's messages;
the text between the placeholders is what the template adds. This works even if rendering the beginning of a chat does
not give the beginning of the rendered chat, as in templates that put the system message into the last user turn.
"""

import re
from functools import lru_cache
from itertools import pairwise
from typing import Any, Literal, NamedTuple

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
    """

    start: int
    end: int
    following: int


def encode(messages: list[dict[str, str]], tokenizer: Any, loss_on: Literal["all", "last"]) -> Encoded:
    """Tokenises a chat and labels the assistant's tokens.

    Args:
        messages: `{role, content}` each; the last is the assistant's.
        tokenizer: A fast tokenizer with a chat template.
        loss_on: Every assistant turn, or the last one.

    Raises:
        MixfuseError: The template refuses the chat, changes an assistant's content, or closes its turns without a
            special token, so that a model could not learn to stop.
    """
    text = render(messages, tokenizer)
    mask = _marked(messages, tokenizer) if _MARK.search(tokenizer.chat_template) else None
    if not tokenizer.is_fast:
        raise MixfuseError("the base has no fast tokenizer (tokenizer.json), which the loss mask needs")
    tokens = tokenizer(text, add_special_tokens=False, return_offsets_mapping=mask is None)
    ids: list[int] = tokens["input_ids"]
    if mask is None:
        mask = _mask(text, ids, tokens["offset_mapping"], spans(messages, text, tokenizer), tokenizer)
    runs = _runs(mask)
    if loss_on == "last":
        runs = runs[-1:]
    labels = [IGNORED] * len(ids)
    for start, end in runs:
        labels[start:end] = ids[start:end]
    if labels:
        labels[0] = IGNORED
    return Encoded(ids, labels)


def render(messages: list[dict[str, str]], tokenizer: Any, **keys: Any) -> str:
    """The chat as text, by the tokenizer's template.

    Raises:
        MixfuseError: The template refuses the chat.
    """
    from jinja2 import TemplateError

    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **keys))
    except (TemplateError, TypeError) as error:
        raise MixfuseError(f"the base's chat template refuses the chat: {error}") from None


def spans(messages: list[dict[str, str]], text: str, tokenizer: Any) -> list[Span]:
    """The assistant's turns in `text`, the rendered `messages`.

    Raises:
        MixfuseError: An assistant's content is not in the text unchanged.
    """
    contents = [message["content"] for message in messages if message["role"] == "assistant"]
    everything = "".join(message["content"] for message in messages)
    free = (chr(code) for code in _PRIVATE_USE if chr(code) not in everything)
    placeholders = [next(free) for _ in contents]
    filled = iter(placeholders)
    between = render([{**m, "content": next(filled)} if m["role"] == "assistant" else m for m in messages], tokenizer)
    pieces: list[str] = []
    for placeholder in placeholders:
        piece, separator, between = between.partition(placeholder)
        if not separator:
            raise MixfuseError("the base's chat template leaves out an assistant's turn; the loss mask cannot be found")
        pieces.append(piece)
    pieces.append(between)
    header = _header(tokenizer, tokenizer.chat_template)
    content_spans: list[tuple[int, int]] = []
    starts: list[int] = []
    position = 0
    for piece, content, following in zip(pieces, contents, pieces[1:], strict=False):
        position += len(piece)
        candidates = (content, content.strip(), content.lstrip(), content.rstrip())
        fits = (c for c in candidates if text.startswith(c + following, position))
        shown = next(fits, None) if text.startswith(piece, position - len(piece)) else None
        if shown is None:
            raise MixfuseError(
                f"the base's chat template changes the assistant's content ({content[:40]!r}…); the loss mask cannot "
                "be found; mark the turns in the template with {% generation %} … {% endgeneration %}"
            )
        # Text between the end of a generation prompt and the content is generated too: white space that is a token
        # or part of the first word, or an empty thought.
        after = piece.rpartition(header)[2] if header and header in piece else piece[len(piece.rstrip()) :]
        starts.append(position - len(after))
        content_spans.append((position, position + len(shown)))
        position += len(shown)
    followings = [start for start, _ in content_spans[1:]] + [len(text)]
    return [
        Span(start, end, following)
        for start, (_, end), following in zip(starts, content_spans, followings, strict=True)
    ]


@lru_cache(maxsize=4)
def _header(tokenizer: Any, template: str) -> str:
    """The text that a generation prompt adds, e.g. ChatML's `<|im_start|>assistant`; empty in Mistral's templates.

    `template` is the tokenizer's; it is an argument so that the cache's key holds it.
    """
    probe = [{"role": "user", "content": "a"}]
    without, added = render(probe, tokenizer), render(probe, tokenizer, add_generation_prompt=True)
    return added[len(without) :] if added.startswith(without) else ""


def _mask(text: str, ids: list[int], offsets: list[tuple[int, int]], turns: list[Span], tokenizer: Any) -> list[int]:
    """1 for each token of the turns, from the first that reaches into one to the special token that closes it."""
    special = set(tokenizer.all_special_ids)
    mask = [0] * len(ids)
    token = 0
    for turn in turns:
        while token < len(ids) and offsets[token][1] <= turn.start:
            token += 1
        first = token
        while token < len(ids) and offsets[token][0] < turn.end:
            token += 1
        while token < len(ids) and ids[token] not in special and offsets[token][0] < turn.following:
            token += 1
        if token == len(ids) or offsets[token][0] >= turn.following:
            closing = text[turn.end : turn.following][:40]
            raise MixfuseError(
                f"the base's chat template closes an assistant's turn with no special token ({closing!r}): the model "
                "would not learn to stop; add the end-of-sequence token to the template"
            )
        token += 1
        mask[first:token] = [1] * (token - first)
    return mask


def _marked(messages: list[dict[str, str]], tokenizer: Any) -> list[int]:
    done = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    return [int(bit) for bit in done["assistant_masks"]]


def _runs(mask: list[int]) -> list[tuple[int, int]]:
    """The stretches where the mask is 1, each as (first, after the last)."""
    edges = [i for i, (a, b) in enumerate(pairwise([0, *mask, 0])) if a != b]
    return list(zip(edges[::2], edges[1::2], strict=True))
