"""The judge protocol: how a comparison is written and how its verdict is read.

Training builds preference pairs with this module, and the gateway judges with it. The protocol's digest is in a judge
adapter's manifest. An adapter with another digest is refused when it is loaded, so training and judging always agree.

A conversation is shown in its own roles: tool results stay the tools' (or, for a judge that knows no tools, stand
between marks), and the answers stand in the last turn. No message is the system's, because some templates, Mixtral's
among them, refuse one or leave it out: the judge's instruction and the conversation's own begin the first user turn.

A comparison shows the judge two anonymous answers, each between fences that carry a nonce of the request. The judge
replies with one verdict token. Answers are untrusted text: without the nonce they cannot close their fence. Each pair
is judged in both orders, because judges favour a position (arXiv 2306.05685, section 3.3). A verdict that flips with
the order counts as a tie.

An answer is neutralized before it is shown, in training and in judging: special tokens of chat templates, lines that
imitate a fence or another speaker, and invisible characters. A long answer loses its middle, and a mark stands in its
place. The answer that is returned to a user is never changed.
"""

import functools
import itertools
import json
import math
import re
import secrets
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import Field

from mixfuse.contracts.bounded_json import open_regular, shortened
from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.files import sha256_json
from mixfuse.contracts.strict_yaml import Strict

VERSION = "4"
# Short, because a judge reads these words twice for every pair of candidates.
SYSTEM = "Pick the better answer."
TEMPLATE = (
    "[question {nonce}]\n{question}\n"
    "[A {nonce}]\n{first}\n"
    "[B {nonce}]\n{second}\n"
    "[end {nonce}]\n"
    "Which answer is right or better, A or B?"
)
# A conversation of several messages keeps its roles, and its last question takes the question's place.
GIVEN = "The answers had to follow these instructions:"
AFTER_TOOLS = TEMPLATE.partition("{question}\n")[2]
TOOL_RESULT = "[tool result {nonce}]\n{text}\n[/tool result {nonce}]"
VERDICTS = ("A", "B")
ORDERS = "both"
EXPLAIN = "First say why in one or two sentences, then end with the line 'Verdict: A' or 'Verdict: B'."
"""Added to a comparison for a judge that writes a rationale before its verdict; not part of the protocol's digest."""
MAX_CHARS = 12_000
"""The most characters of one answer that a judge is shown: about 3000 tokens of English."""

# Control strings of chat templates, by kind rather than by model. In the middle of a text, a tokenizer would read one
# as the end of the user's turn or as the start of another speaker's. A space after the first character makes it plain
# text. Wide forms of brackets and bars are included, since some tokenizers normalize them (NFKC).
_ANGLES = r"<>\uff1c\uff1e\ufe64\ufe65"
_LT, _GT, _LB, _RB, _BAR = r"[<\uff1c\ufe64]", r"[>\uff1e\ufe65]", r"[\[\uff3b]", r"[\]\uff3d]", r"[|\uff5c]"
_TOKENS = re.compile(
    rf"{_LT}{_BAR}[^{_ANGLES}\n]{{1,64}}{_BAR}{_GT}"  # <|…|>: ChatML, Llama 3, Phi, GLM, Granite; DeepSeek
    rf"|{_LT}/?{_BAR}[^\s{_ANGLES}]{{1,64}}{_GT}|{_LT}[^\s{_ANGLES}|]{{1,64}}{_BAR}{_GT}"  # <|turn>, <turn|>: Gemma 4
    rf"|{_LB}{_BAR}/?[^\W\d][\w .-]{{0,40}}{_BAR}{_RB}"  # [|user|]: Exaone, BlueLM
    rf"|{_LT}/?(?:start|end|begin|bos|eos|eo|im)[_\u2581-]\w{{1,40}}{_GT}"  # <start_of_turn>: Gemma
    rf"|{_LT}/?\w{{1,20}}_(?:of_\w{{1,20}}|start|end|begin|token|pad){_GT}"  # <ovis_image_start>, <MASK_TOKEN>
    rf"|{_LT}/?(?:seed|minimax|mm|mask|tool|think|vision|audio|image|ifm)[:\uff1a|][\w-]{{1,40}}{_GT}"  # <seed:bos>
    rf"|{_LT}/?\w{{1,20}}[:|](?:think\w{{0,20}}|tool_calls?|function_calls?|arg_\w{{1,10}}|invoke|parameter){_GT}"
    rf"|{_LT}/?(?:\w{{1,20}}_)?(?:tool|function)_?(?:calls?|responses?|results?|outputs?|declarations?){_GT}"
    rf"|{_LT}(?:function|parameter)=[^<>\n]{{1,80}}{_GT}"  # Llama, Qwen Coder
    # Numbered: Nemotron, T5, Gemma, Baichuan, InternLM, Llama; bytes of SentencePiece
    rf"|{_LT}/?(?:special|extra|unused|reserved|tokens_unused|dummy|placeholder|added|token|control)"
    rf"(?:_id|_token|_special_token)?_?\d{{1,6}}{_GT}|{_LT}0x[0-9a-f]{{2}}{_GT}"
    rf"|{_LT}/?(?:s|bos|eos|pad|unk|mask|sep|cls|sop|eop|eot|eom|eod|eoh|eoa|bom|think|thinking|thought|reasoning|"
    rf"tools?|available_tools|arg_key|arg_value|observation|response|invoke|function|parameter|sos|eoss|mask_\d|"
    rf"role|image|img_context|fim_\w{{1,20}}|(?:repo|reponame|gh|issue|jupyter|commit)_\w{{1,20}}|c_[qa]|"
    rf"_(?:user|bot|end|start|system|pad)|human|bot|assistant|user|system){_GT}"
    rf"|{_LT}{{2}}/?SYS{_GT}{{2}}|(?<!< ){_LT}/?SYS{_GT}"  # Llama 2
    rf"|{_GT}{{2}}(?:QUESTION|ANSWER|TITLE|ABSTRACT|INTRODUCTION|SUFFIX|MIDDLE|PREFIX){_LT}{{2}}"  # Falcon
    # Mistral, GLM, BERT, Pangu
    rf"|{_LB}/?(?:INST|SYS|SYSTEM|ARGS|THINK|IMG|AUDIO|TRANSCRIBE|PREFIX|MIDDLE|SUFFIX|CLS|SEP|PAD|UNK|MASK|gMASK|"
    rf"sMASK|BOS|EOS|EOT|BOT|EOD|SYSTEM_PROMPT|MODEL_SETTINGS|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS|TOOL_CONTENT|"
    rf"CALL_ID|IMG_BREAK|IMG_END|BEGIN_AUDIO|(?:control|unused|special|extra)_?\d{{1,6}}){_RB}"
    rf"|(?<!\w){_LB}/?(?-i:[A-Z]{{2,16}}_(?:TOOLS|CALLS?|RESULTS?|CONTENT|PROMPT|SETTINGS|BREAK|AUDIO|IMAGE|PAD|TEXT|TOKEN))"
    rf"{_RB}|{_LB}/(?-i:[A-Z]{{3,20}}){_RB}"
    r"|\]~!?b[\[\]]|\[e~\[|\]<\][\w-]{1,20}\[>\[",  # MiniMax
    re.IGNORECASE,
)
_OPENERS = re.compile(r"[<>\[\]\uff1c\ufe64\uff1e\ufe65\uff3b]")
_VERDICT_LINE = re.compile(r"(?:^|\n|[.!?] )[*_ ]*Verdict[*_ ]*:[*_ ]*([AB])[*_.]*\s*\Z")
# White space at the start of a line: every kind that Unicode knows, the ideographic one included.
_INDENT = r"^[^\S\n]*"
# Lines that imitate a fence: the judge's, or those of `mixfuse.fusion.answering.fence`.
_FENCES = re.compile(
    rf"({_INDENT})({_LB}/?(?:question|A|B|end|tool result)\b[^\]\n]{{0,80}}{_RB}|"
    rf"{_LT}/?(?:answer|analysis)\b[^>\n]{{0,80}}{_GT})",
    re.MULTILINE | re.IGNORECASE,
)
_COLON = r"[:\uff1a\ufe55\ufe13\ufe30\ua789\u02d0\u02f8\u0589\u05c3\u2236\u205a\ua4fd]"
# Lines that imitate another speaker.
_ROLES = re.compile(
    rf"{_INDENT}(?:\#{{1,6}}[^\S\n]*|[*_]{{1,3}}|[\u300a\u3010\uff3b\[(])?(?:gpt4[ ]correct[ ])?"
    r"(?:system|user|assistant|human|ai|developer|tool|instruction|response|input|judge|verdict|bot|chatbot|observation|ipython"
    r"|\u7cfb\u7edf|\u7528\u6237|\u52a9\u624b|\u4eba\u7c7b|\u95ee|\u7b54|\u95ee\u9898\u8005|\u8bc4\u5224)"
    rf"(?:[ ]?(?:message|prompt|turn))?[\])\u300b\u3011\uff3d]?[*_]{{0,3}}[^\S\n]*{_COLON}",
    re.MULTILINE | re.IGNORECASE,
)
# Control characters; Unicode's format characters (category Cf) except the few with a shape; fillers and blanks that
# are letters by category; variation selectors; tags; half surrogate pairs.
_INVISIBLE = re.compile(
    r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f"
    r"\u202a-\u202e\u2060-\u206f\u2800\u3164\ud800-\udfff\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb\U00013430-\U0001343f"
    r"\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)
_LINE_ENDS = re.compile(r"\r\n?|[\x0b\x0c\x1c-\x1e\x85\u2028\u2029]")
# Of the invisible ones those that scripts and emoji are written with: joiners, marks of direction, variation selectors.
_SHAPING = "\u200c\u200d\u200e\u200f\u061c\ufe0e\ufe0f\xad"
# Where a line needs a closer look: shaping characters, and letters that NFKC makes plain ones.
_DISGUISED = re.compile(
    rf"[{_SHAPING}\u02b0-\u02b8\u1d2c-\u1d6a\u2070-\u209c\u2100-\u214f\u2460-\u24ff\uff21-\uff3a\uff41-\uff5a"
    r"\U0001d400-\U0001d7ff\U0001f110-\U0001f16f]"
)
_NO_SHAPING = str.maketrans("", "", _SHAPING)
_SPACES = re.compile(r"[\xa0\u1680\u2000-\u200a\u202f\u205f\u3000]")
_LONGEST_MARK = 100
_UNSHAPED_INVISIBLE = re.compile(rf"(?![{_SHAPING}]){_INVISIBLE.pattern}")
# The text after the cut continues on the line of the mark, so that a cut moves nothing to the beginning of a line.
_CUT = "\n[… the middle of this text was left out …] "


class Calibration(Strict):
    """How a judge's probabilities are corrected; fitted on a dev split and stored in the judge's manifest.

    Attributes:
        temperature: The log-odds of a verdict are divided by it (Guo et al. 2017, arXiv 1706.04599); 1 changes nothing.
        tie_margin: A pair is a tie if its order-averaged score is within this distance of 1/2; 0 changes nothing.
    """

    temperature: float = Field(default=1.0, gt=0)
    tie_margin: float = Field(default=0.0, ge=0, lt=0.5)


def describe() -> dict[str, object]:
    """Returns everything that defines the protocol, as it is stored in a judge's manifest."""
    return {
        "version": VERSION,
        "system": SYSTEM,
        "system_in": "first user turn",
        "template": TEMPLATE,
        "conversation": [GIVEN, AFTER_TOOLS, TOOL_RESULT],
        "verdicts": list(VERDICTS),
        "orders": ORDERS,
        "max_chars": MAX_CHARS,
        "made_harmless": sha256_json(
            [regex.pattern for regex in (_TOKENS, _FENCES, _ROLES, _INVISIBLE, _LINE_ENDS, _SPACES)] + [_CUT, _SHAPING]
        ),
    }


def digest() -> str:
    """Returns the hex SHA-256 of `describe()`; equal digests mean equal protocols."""
    return sha256_json(describe())


def neutral(text: str, *, speakers: bool = True, own: re.Pattern[str] | None = None) -> str:
    """Neutralizes special tokens, forged fences and forged speakers in a text; every line end becomes a newline.

    The text stays readable: a token or fence gets a space after its first character, and a speaker's line becomes a
    quotation. Invisible characters that scripts and emoji need stay, except in lines where they hide such a thing. A
    second call changes nothing more.

    Args:
        text: Text of any origin.
        speakers: Whether to quote lines that imitate another speaker. False for a person's own words.
        own: The reader's own special tokens, from `special_tokens`, beside those known here.
    """
    text = _UNSHAPED_INVISIBLE.sub("", _LINE_ENDS.sub("\n", text))
    if text.isascii() or not _DISGUISED.search(text):
        return _neutral(text, speakers, own)
    return "\n".join(_neutral_line(line, speakers, own) for line in text.split("\n"))


def _neutral(text: str, speakers: bool, own: re.Pattern[str] | None) -> str:
    text = _without_tokens(text)
    if own is not None:
        text = own.sub(lambda match: f"{match[0][0]} {match[0][1:]}", text)
    text = _FENCES.sub(lambda match: f"{match[1]}{match[2][0]} {match[2][1:]}", text)
    return _ROLES.sub(lambda match: f"> {match[0]}", text) if speakers else text


def _without_tokens(text: str) -> str:
    """Puts a space into each special token: looked for only where one can begin, which is 20 times as fast."""
    parts, end = [], 0
    for opener in _OPENERS.finditer(text):
        start = opener.start()
        if start >= end and (token := _TOKENS.match(text, start)):
            parts += [text[end : start + 1], " ", text[start + 1 : token.end()]]
            end = token.end()
    return "".join([*parts, text[end:]]) if parts else text


def _neutral_line(line: str, speakers: bool, own: re.Pattern[str] | None) -> str:
    """Neutralizes one line that may hold characters other than ASCII."""
    if line.isascii():
        return _neutral(line, speakers, own)
    plain = line.translate(_NO_SHAPING)
    if plain != line and _neutral(plain, speakers, own) != plain:
        line = plain
    line = _neutral(line, speakers, own)
    # In wide or styled letters, which NFKC makes plain ones.
    start = unicodedata.normalize("NFKC", line[:_LONGEST_MARK])
    if start != line[:_LONGEST_MARK] and ((speakers and _ROLES.match(start)) or _FENCES.match(start)):
        return f"> {line}"
    return line


MOST_TOKENIZER_BYTES = 1 << 28
_MOST_SPECIAL, _LONGEST_SPECIAL = 20_000, 1000  # Gemma's tokenizer has 6,000, and the longest of any is of some dozen


def special_tokens(tokenizer: Path) -> re.Pattern[str] | None:
    """Returns a pattern of the control tokens that a model's `tokenizer.json` names; None if it names none.

    Tokens without a bracket or a bar, such as runs of spaces, are words of any text and left alone.

    Raises:
        MixfuseError: The file cannot be read.
    """
    try:
        with open_regular(tokenizer) as stream:
            content = stream.read(MOST_TOKENIZER_BYTES + 1)
        if len(content) > MOST_TOKENIZER_BYTES:
            raise ValueError(f"it is larger than {MOST_TOKENIZER_BYTES >> 20} MiB")
        added = json.loads(content).get("added_tokens", [])
        found = {str(token["content"]) for token in added if token.get("special")}
        if len(found) > _MOST_SPECIAL or max(map(len, found), default=0) > _LONGEST_SPECIAL:
            raise ValueError(f"it has more than {_MOST_SPECIAL} control tokens, or one of more than {_LONGEST_SPECIAL}")
    except (MixfuseError, ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
        why = str(error).removeprefix(f"{tokenizer}: ")
        raise MixfuseError(f"tokenizer {tokenizer}: {shortened(why, 200)}; name a tokenizer.json") from None
    marked = sorted(
        (token for token in found if len(token) > 1 and re.search(r"[^\w\s]", token)), key=len, reverse=True
    )
    return re.compile("|".join(map(re.escape, marked))) if marked else None


def visible(text: str) -> str:
    """Removes invisible characters (zero-width, bidirectional, tags, controls); makes line ends and spaces plain ones.

    It also removes joiners, which splits composed emoji and changes some scripts, so only a judge is shown this text.
    """
    return _SPACES.sub(" ", _LINE_ENDS.sub("\n", _INVISIBLE.sub("", text)))


def capped(text: str, max_chars: int = MAX_CHARS) -> str:
    """Returns the text, or, if it is longer than `max_chars`, its beginning and its end around a mark.

    Args:
        text: Any text.
        max_chars: The most characters to return, including the mark; at least 100.
    """
    if len(text) <= max_chars:
        return text
    keep = max_chars - len(_CUT)
    head = keep * 2 // 3  # a third for the end, where an answer states its result
    return text[:head] + _CUT + text[len(text) - (keep - head) :]


def shown(text: str, max_chars: int = MAX_CHARS, own: re.Pattern[str] | None = None) -> str:
    """Returns an answer as a judge is shown it: without invisible characters, neutralized, and capped.

    A second call changes nothing more. An answer of many times `max_chars` is cut first, so that nobody can make the
    gateway process megabytes.
    """
    return _shown(capped(text, 16 * max_chars), max_chars, own)


@functools.lru_cache(maxsize=64)  # a candidate is shown once for every verdict that it takes part in
def _shown(text: str, max_chars: int, own: re.Pattern[str] | None) -> str:
    return capped(neutral(visible(text), own=own), max_chars)


def new_nonce(*texts: str, draw: Callable[[int], bytes] = secrets.token_bytes) -> str:
    """Returns a fresh fence nonce (4 hex digits) that occurs in none of `texts`.

    The texts are written before the nonce is drawn, so their authors cannot guess it, and it may be short. It becomes
    longer only for a text that consists almost only of nonces: 64 KiB can hold every nonce of 4 digits.

    Args:
        texts: Everything that will be between the fences, before or after `shown`.
        draw: Returns the requested number of random bytes; training passes a seeded function.
    """
    nonces = (draw(2 + tries // 64).hex() for tries in itertools.count())
    # Removing invisible characters can join the parts of a nonce.
    written = {variant for text in texts for variant in (text, visible(text))}
    return next(nonce for nonce in nonces if not any(nonce in text for text in written))


Message = dict[str, Any]
"""A chat message in OpenAI's form."""


def text_of(content: Any) -> str:
    """Returns a message's content as text: its text parts, and `[image]` for each image."""
    if isinstance(content, str):
        return content
    return "".join(part["text"] if part["type"] == "text" else "[image]" for part in content or ())


def as_question(messages: Sequence[Mapping[str, Any]]) -> str:
    """Returns the conversation as one text, for exports and reports: a lone message's text, several as a transcript."""
    if len(messages) == 1:
        return text_of(messages[0]["content"])
    return "\n\n".join(f"{message['role']}: {_text_and_calls(message)}" for message in messages)


def _text_and_calls(message: Mapping[str, Any]) -> str:
    calls = [
        f"calls {call['function']['name']}({call['function']['arguments']})" for call in message.get("tool_calls", ())
    ]
    return "\n".join(filter(None, [text_of(message.get("content")), *calls]))


def turns(
    messages: Sequence[Mapping[str, Any]],
    *,
    fold: str | None = None,
    pictures: bool = False,
    own: re.Pattern[str] | None = None,
) -> tuple[str, list[Message]]:
    """Returns a conversation as another model is shown it: in its own roles, with its control strings neutralized.

    Args:
        messages: The conversation, in OpenAI's form.
        fold: A nonce, for a model whose template knows no tools: tool calls become text, and tool results become parts
            of the user's turn between marks with the nonce. None keeps them as they are.
        pictures: Whether images stay; otherwise the text `[image]` stands for each.
        own: See `neutral`.

    Returns:
        (the text of its system messages, its other messages); two messages of one role in a row are one where `fold`
        is set.
    """
    system: list[str] = []
    found: list[Message] = []
    for message in messages:
        role = message["role"]
        content = message.get("content")
        if pictures and isinstance(content, list):
            cleaned: Any = [
                {**part, "text": neutral(part["text"], speakers=False, own=own)} if part["type"] == "text" else part
                for part in content
            ]
        else:
            # A tool's words are nobody's here, so they may not pose as a speaker.
            cleaned = neutral(text_of(content), speakers=role == "tool", own=own)
        if role in ("system", "developer"):
            system.append(text_of(cleaned))
            continue
        turn: Message = {"role": role, "content": cleaned}
        calls = [
            {
                **call,
                "function": {key: neutral(text, speakers=False, own=own) for key, text in call["function"].items()},
            }
            for call in message.get("tool_calls") or ()
        ]
        if fold is None:
            turn |= {"tool_calls": calls} if calls else {}
            turn |= {"tool_call_id": message["tool_call_id"]} if message.get("tool_call_id") is not None else {}
            found.append(turn)
            continue
        if role == "tool":
            turn = {"role": "user", "content": TOOL_RESULT.format(text=cleaned, nonce=fold)}
        elif calls:
            names = [f"calls {call['function']['name']}({call['function']['arguments']})" for call in calls]
            turn["content"] = "\n".join(filter(None, [text_of(cleaned), *names]))
        before = found[-1] if found and found[-1]["role"] == turn["role"] else None
        if before is not None and isinstance(before["content"], str) and isinstance(turn["content"], str):
            before["content"] += f"\n\n{turn['content']}"
        else:
            found.append(turn)
    return "\n\n".join(filter(None, system)), found


def has_tools(messages: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a conversation holds tool calls or results, which not every model's template knows."""
    return any(message["role"] == "tool" or message.get("tool_calls") for message in messages)


class Asked(NamedTuple):
    """What the answers answer, as it is shown.

    Attributes:
        given: The instructions of the conversation's system messages.
        before: The turns before the last one.
        last: The question of the last turn; None where the conversation ends otherwise.
    """

    given: str
    before: list[Message]
    last: str | None


def asked(
    question: str | Sequence[Mapping[str, Any]], *, fold: str | None = None, own: re.Pattern[str] | None = None
) -> Asked:
    """Prepares a question, or a conversation in its roles; see `turns` for the arguments."""
    if isinstance(question, str):
        return Asked("", [], neutral(question, speakers=False, own=own))
    given, before = turns(question, fold=fold, own=own)
    last = before.pop()["content"] if before and before[-1]["role"] == "user" else None
    return Asked(given, before, last)


def comparison(
    question: str | Sequence[Mapping[str, Any]] | Asked,
    first: str,
    second: str,
    *,
    nonce: str,
    max_chars: int = MAX_CHARS,
    own: re.Pattern[str] | None = None,
) -> list[Message]:
    """Writes one comparison as chat messages; the judge's next token is its verdict.

    Args:
        question: The question, or the conversation whose next message both answers are; it is shown in full, in its
            own roles, with its special tokens neutralized. The answers stand in the turn of its last question. Tool
            calls and results become text, as in training, unless it comes prepared by `asked`.
        first: The answer shown as A; see `shown`.
        second: The answer shown as B.
        nonce: From `new_nonce`, of the question and both answers; must occur in neither answer.
        max_chars: The most characters of each answer to show; lower for a judge with a short context.
        own: See `neutral`.

    Raises:
        ValueError: An answer contains the nonce, so it could close its fence.
    """
    first, second = shown(first, max_chars, own), shown(second, max_chars, own)
    if nonce in first or nonce in second:
        raise ValueError("an answer contains the fence nonce")
    given, before, last = question if isinstance(question, Asked) else asked(question, fold=nonce, own=own)
    template = AFTER_TOOLS if last is None else TEMPLATE
    content = template.format(question=last, first=first, second=second, nonce=nonce)
    instruction = f"{SYSTEM}\n\n{GIVEN}\n{given}" if given else SYSTEM
    return _begun_with(instruction, [*before, {"role": "user", "content": content}])


def _begun_with(text: str, messages: list[Message]) -> list[Message]:
    """The messages with `text` before the first user turn's own; a turn of its own where another's turn comes first."""
    first = messages[0]
    if first["role"] != "user":
        return [{"role": "user", "content": text}, *messages]
    content = first["content"]
    if isinstance(content, str):
        joined: Any = f"{text}\n\n{content}"
    else:
        joined = [{"type": "text", "text": f"{text}\n\n"}, *content]
    return [{**first, "content": joined}, *messages[1:]]


def read_verdict(logprobs: Mapping[str, float]) -> float | None:
    """Reads a verdict from the log-probabilities of the judge's first token.

    Args:
        logprobs: Token text → log-probability in nats, typically of the top 20 tokens. The probabilities of tokens that
            differ from a verdict only in white space around it are added.

    Returns:
        P(A) / (P(A) + P(B)), in [0, 1]; None if neither verdict is among the tokens (a parse failure).
    """
    mass = dict.fromkeys(VERDICTS, 0.0)
    for token, logprob in logprobs.items():
        if token.strip() in mass:
            # No log-probability is above 0; an endpoint that sends one must not overflow the exponential.
            mass[token.strip()] += math.exp(min(logprob, 0.0))
    total = sum(mass.values())
    return mass[VERDICTS[0]] / total if total > 0 else None


def explained(comparison: list[Message]) -> list[Message]:
    """Returns the comparison with the request to write a rationale before the verdict."""
    return [*comparison[:-1], {**comparison[-1], "content": f"{comparison[-1]['content']}\n{EXPLAIN}"}]


def read_explained(text: str) -> str | None:
    """Returns the verdict, A or B, at the end of a rationale; None if its last line names none."""
    verdict = _VERDICT_LINE.search(text)
    return verdict[1] if verdict else None


class Outcome(NamedTuple):
    """The result of both orders of one pair.

    Attributes:
        winner: "first", "second", or "tie" if the orders disagree, a verdict could not be read, or the score is within
            the calibration's margin of ½.
        score: The probability that the first answer is better, averaged over the orders that could be read; ½ if none
            could.
        consistent: Whether both orders were read and name the same answer.
        parse_failures: The number of verdicts, of the two, that could not be read.
    """

    winner: Literal["first", "second", "tie"]
    score: float
    consistent: bool
    parse_failures: int


def probability(log_odds: float) -> float:
    """Returns the probability with these log-odds."""
    if log_odds >= 0:
        return 1.0 / (1.0 + math.exp(-log_odds))
    return math.exp(log_odds) / (1.0 + math.exp(log_odds))


def combine(forward: float | None, backward: float | None, calibration: Calibration | None = None) -> Outcome:
    """Combines the two orders of one pair.

    Args:
        forward: P(A) with the first answer shown as A; None if it could not be read.
        backward: P(A) with the *second* answer shown as A; None if it could not be read.
        calibration: The judge's calibration. The temperature applies to the log-odds of each order, the margin to the
            mean probability. It cannot reverse a verdict, but it can make a verdict a tie.
    """
    calibration = calibration or Calibration()
    read = (forward, None if backward is None else 1.0 - backward)
    views = [_tempered(view, calibration.temperature) for view in read if view is not None]
    score = sum(views) / len(views) if views else 0.5
    tied = calibration.tie_margin > 0 and abs(score - 0.5) <= calibration.tie_margin
    consistent = len(views) == 2 and (all(view > 0.5 for view in views) or all(view < 0.5 for view in views))
    winner: Literal["first", "second", "tie"] = "tie"
    if consistent and not tied:
        winner = "first" if score > 0.5 else "second"
    return Outcome(winner, score, consistent, 2 - len(views))


def _tempered(view: float, temperature: float) -> float:
    if temperature == 1.0 or view in {0.0, 1.0}:  # 0 and 1 do not change at any temperature
        return view
    return probability((math.log(view) - math.log1p(-view)) / temperature)
