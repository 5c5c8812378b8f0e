"""One reader of the shapes that people keep chats in; a row's keys tell its shape (docs/data.md lists them).

Every shape becomes messages in OpenAI's form, the form that a chat template takes. A key that would change what is
learned, and that is not honoured, is refused by its name; keys that say something about a row only are counted.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from mixfuse.contracts.chat_template import REASONING
from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.files import parse_json
from mixfuse.train.data.data_files import OnBad, stop, without_nulls
from mixfuse.train.data.sources import rows
from mixfuse.train.recipe import DataSource

ROLES = {
    "system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool",
    "function": "tool",
}  # fmt: skip
SHAREGPT_ROLES = {
    **ROLES, "human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "observation": "tool",
    "tool_response": "tool", "function_response": "tool", "function_call": "function_call",
    "tool_call": "function_call",
}  # fmt: skip

_LEARN = ("weight", "train", "training", "loss")
_TURN_KEYS = {
    "role", "content", "from", "value", "tool_calls", "tool_call_id", "function_call", "name", *REASONING,
    *_LEARN,
}  # fmt: skip
_REFUSED_IN_TURNS = (
    "images", "image", "videos", "video", "audios", "audio", "refusal", "train_detail", "loss_scale", "loss_mask",
    "mask", "prefix",
)  # fmt: skip
_MESSAGES = ("messages", "conversations", "conversation")
_EXTRA = ("system", "system_prompt", "tools", "functions")
_SHAPES = {
    "alpaca": ("instruction", "input", "context", "output", "response", "history"),
    "prompt/completion": ("prompt", "completion"),
}
_REFUSED = (
    "images", "image", "videos", "video", "audios", "audio", "documents", "chat_template_kwargs", "loss_mask", "mask",
    "loss_scale", "sample_weight",
)  # fmt: skip
_THUMBS = ("label", "kto_tag")
_FORMATS = {"prompt_completion": "prompt/completion"}
# Shapes that other tools read: what they are, and what to do.
_OTHERS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("chosen", "rejected"), "preference rows; make pairs of them for the judge with `mixfuse pairs build`"),
    *(
        (keys, "comparisons; make pairs of them for the judge with `mixfuse pairs build`")
        for keys in (
            ("preferred_output", "non_preferred_output"),
            ("chosen_response", "rejected_response"),
            ("conversation_a", "conversation_b"),
            ("response_a", "response_b"),
            ("response_A", "response_B"),
            ("orig_response_A", "orig_response_B"),
            ("response_1", "response_2"),
            ("response1", "response2"),
            ("output_1", "output_2"),
        )
    ),
    (("prompt", "responses"), "pool rows; make pairs of them for the judge with `mixfuse pairs build`"),
    (("contents",), "Gemini's rows; write them as messages with role and content"),
    (("question", "response"), "questions with responses; rename the columns to prompt and completion"),
    (("input_ids",), "tokens; name the texts that they were made of"),
    (("question", "answer"), "questions with answers; rename the columns to prompt and completion"),
    (("query", "response"), "queries with responses; rename the columns to prompt and completion"),
    (("input", "output"), "inputs with outputs; rename the columns to prompt and completion"),
    (("text",), "plain texts without turns; SFT reads chats, so write them as prompt and completion"),
)

WANTED = frozenset(
    {"id", "weight", *_THUMBS, *_MESSAGES, *_EXTRA, *_REFUSED, *(key for keys in _SHAPES.values() for key in keys)}
    | {key for keys, _ in _OTHERS for key in keys}
)
"""The keys of a row that are looked at; other columns of a Parquet file are not read."""


class Chat(NamedTuple):
    """A checked chat.

    Attributes:
        id: The row's `id`, or its place.
        messages: OpenAI's: `role` (system, user, assistant or tool), `content` (a text, maybe empty), and where the row
            has them `tool_calls` (arguments as an object), `tool_call_id`, `name` and reasoning. The last is
            the assistant's.
        where: The row's place (file and line, or name and row), for error messages.
        tools: OpenAI's tools, or none.
        learned: For each of the assistant's messages, whether it is learned.
        empty: Number of the assistant's messages that say nothing, and are not learned for that.
    """

    id: str
    messages: list[dict[str, Any]]
    where: str
    tools: list[dict[str, Any]]
    learned: list[bool]
    empty: int


@dataclass
class Found:
    """What was found in a data set.

    Attributes:
        rows: Rows that were read, bad ones too.
        shapes: Shape → rows.
        unread: Keys that were not read → rows.
        empty: Empty answers that are not learned.
        left_out: Why rows were left out → their number.
        notes: What else there is to say.
        examples: Why rows were left out → the first places.
    """

    rows: int = 0
    shapes: Counter[str] = field(default_factory=Counter)
    unread: Counter[str] = field(default_factory=Counter)
    empty: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def leave_out(self, why: str, example: str) -> None:
        """Counts a row that is left out, and keeps the first places."""
        self.left_out[why] += 1
        places = self.examples.setdefault(why, [])
        if len(places) < 3:
            places.append(example)

    def lines(self, name: str, plural: str = "chats") -> list[str]:
        """What there is to say of the data set, in lines; `plural` is what its examples are called."""
        shapes = ", ".join(f"{count} {shape} row{'s' * (count > 1)}" for shape, count in self.shapes.items())
        said = [f"{name}: {shapes or f'no {plural}'}"] if shapes or not self.notes else []
        said += [f"{name}: {note}" for note in self.notes]
        if self.unread:
            keys = ", ".join(repr(key[:40]) for key, _ in self.unread.most_common(12))
            said.append(f"{name}: keys that are not read: {keys}")
        if self.empty:
            said.append(f"{name}: {self.empty} empty answers are not learned")
        for why, count in self.left_out.items():
            examples = self.examples[why]
            places = "; ".join(examples) + ("; …" if count > len(examples) else "")
            said.append(f"{name}: left out {count} of {self.rows} {plural} {why}: {places}")
        return said


def chats(
    source: DataSource, *, empty_answers: bool = False, bad: OnBad = stop, found: Found | None = None
) -> Iterator[Chat]:
    """Reads and checks the chats of a data set.

    Args:
        source: The data set.
        empty_answers: Whether answers that say nothing are learned.
        bad: What to do about a row that is no chat; by default the error is raised.
        found: Gets the shapes and the keys that are not read.

    Raises:
        MixfuseError: The data set cannot be read, or a row is not a chat that ends with the assistant's message.
    """
    seen = Found() if found is None else found

    def refuse(error: MixfuseError) -> None:
        seen.rows += 1
        bad(error)

    for where, row in rows(source, wanted=WANTED, bad=refuse, unread=seen.unread):
        try:
            chat = _chat(row, where, source.format, empty_answers, seen)
        except _NoChatError as error:
            refuse(MixfuseError(f"{where}: {error}"))
        except RecursionError:
            refuse(MixfuseError(f"{where}: a value is nested too deep"))
        else:
            seen.rows += 1
            yield chat


class _NoChatError(Exception):
    """Why a row is no chat that can be learned."""


def _chat(row: Mapping[str, Any], where: str, form: str, empty_answers: bool, found: Found) -> Chat:
    nulls = [key for key, value in row.items() if value is None]
    row = {key: value for key, value in row.items() if value is not None}
    refused = next((key for key in _REFUSED if row.get(key) not in (None, [], "", {})), None)
    if refused is not None:
        raise _NoChatError(f"{refused!r} is not read, and would change what is learned; {_instead(refused)}")
    if row.get("weight", 1) != 1:
        raise _NoChatError("'weight' of a whole row is not read; set weight: 0 or 1 on the assistant's messages")
    shape = _shape(row, form, nulls)
    used = {"id", "weight", *_EXTRA}
    if shape in _MESSAGES:
        used.add(shape)
        turns = _list(row[shape], shape)
        if any(isinstance(turn, dict) and "from" in turn for turn in turns):
            messages, learned = _sharegpt(turns, shape, found)
            name = "sharegpt"
        else:
            messages, learned = _openai(turns, shape, found)
            name = "messages" if shape == "messages" else f"messages ({shape})"
    elif shape == "alpaca":
        used.update(_SHAPES[shape])
        messages, name = _alpaca(row), shape
        learned = [True] * sum(message["role"] == "assistant" for message in messages)
    else:
        used.update(("prompt", "completion"))
        messages, learned = _prompt_completion(row, found)
        name = shape
    messages = _with_system(messages, _either(row, "system", "system_prompt"))
    if messages and messages[-1]["role"] != "assistant" and "chosen" in row and "rejected" in row:
        raise _NoChatError(f"no chat: these are {_OTHERS[0][1]} (docs/data.md)")
    _check_turns(messages, shape)
    empty = 0
    if not empty_answers:
        answers = [message for message in messages if message["role"] == "assistant"]
        for place, answer in enumerate(answers):
            if learned[place] and not _says(answer):
                learned[place] = False
                empty += 1
    identity = row.get("id", where)
    chat = Chat(str(identity), messages, where, _tools(row), learned, empty)
    _check_text(chat)
    found.shapes[name] += 1
    found.empty += empty
    found.unread.update(key for key in row if key not in used and len(found.unread) < 100)
    return chat


def _instead(key: str) -> str:
    if key in ("images", "image", "videos", "video", "audios", "audio"):
        return "the base reads text alone: leave such rows out"
    return "remove it from the rows"


def _shape(row: Mapping[str, Any], form: str, nulls: Sequence[str]) -> str:
    """The shape that the recipe names or the row's keys tell: a key of messages, `alpaca` or `prompt/completion`."""
    has = row.keys()
    thumb = next((key for key in _THUMBS if isinstance(row.get(key), bool)), None)
    if thumb is not None:
        raise _NoChatError(f"this is an answer with a thumb up or down (KTO's {thumb!r}), and SFT would learn both "
                           "kinds; keep the rows whose label is true, and remove the key")  # fmt: skip
    alpaca = "instruction" in has and ("output" in has or "response" in has)
    if form == "auto":
        for key in _MESSAGES:
            if key in has:
                return key
        if alpaca:
            return "alpaca"
        if "prompt" in has and "completion" in has:
            return "prompt/completion"
        for keys, what in _OTHERS:
            if all(key in has for key in keys):
                raise _NoChatError(f"no chat: these are {what} (docs/data.md)")
        for asked, answer in (("instruction", "output"), ("prompt", "completion")):
            if asked in has:
                raise _NoChatError(f"{asked!r} stands without {answer!r}, or with an empty one; add it (docs/data.md)")
        listed = ", ".join(repr(key[:40]) for key in list(row)[:8]) or "none"
        raise _NoChatError(
            f"missing key 'messages' (or conversations, or instruction and output, or prompt and completion); the "
            f"row's keys are {listed}{f', and without a value {nulls[0]!r}' if nulls else ''} (docs/data.md)"
        )
    wanted = {"messages": ("messages",), "sharegpt": ("conversations",), "alpaca": ("instruction", "output"),
              "prompt_completion": ("prompt", "completion")}[form]  # fmt: skip
    missing = next((key for key in wanted if key not in has), None)
    if missing is not None and not (form == "alpaca" and alpaca):
        raise _NoChatError(f"missing key {missing!r}, which rows of format {form} have")
    return {"messages": "messages", "sharegpt": "conversations"}.get(form, _FORMATS.get(form, form))


def _list(value: Any, key: str) -> list[Any]:
    if isinstance(value, str):
        value = _json(value, key)
    if not isinstance(value, (list, tuple)):
        raise _NoChatError(f"{key} must be a list of messages (or such a list as JSON text)")
    return list(value)


def _json(text: str, key: str) -> Any:
    try:
        return without_nulls(parse_json(text))
    except ValueError as error:
        raise _NoChatError(f"{key} is a text, but no JSON: {error}") from None


def _openai(turns: Sequence[Any], key: str, found: Found) -> tuple[list[dict[str, Any]], list[bool]]:
    """Messages of role and content, and for each of the assistant's whether it is learned."""
    messages: list[dict[str, Any]] = []
    learned: list[bool] = []
    for place, given in enumerate(turns):
        at = f"{key}[{place}]"
        if not isinstance(given, dict):
            raise _NoChatError(f"{at} is no object with role and content")
        turn = {name: value for name, value in given.items() if value is not None}
        role = ROLES.get(str(turn.get("role")))
        if role is None:
            raise _NoChatError(
                f"{at}: a message's role must be one of {', '.join(ROLES)}, not {str(turn.get('role'))[:40]!r}"
            )
        _check_keys(turn, at, found)
        message: dict[str, Any] = {"role": role, "content": _content(turn.get("content", ""), at)}
        for name in ("name", "tool_call_id", *REASONING):
            if turn.get(name) not in (None, ""):
                if not isinstance(turn[name], str):
                    raise _NoChatError(f"{at}.{name} must be a text")
                message[name] = turn[name]
        calls = turn.get("tool_calls") or ([turn["function_call"]] if turn.get("function_call") else [])
        if calls:
            message["tool_calls"] = _tool_calls(calls, f"{at}.tool_calls", len(messages))
        elif "content" not in turn and not any(key in message for key in REASONING):
            raise _NoChatError(f"{at}: a message's content must be a string, or a list of text parts")
        if role != "assistant" and any(key in message for key in ("tool_calls", *REASONING)):
            raise _NoChatError(f"{at}: only the assistant's messages have tool calls or reasoning")
        messages.append(message)
        _note_learned(turn, role, at, learned)
    return messages, learned


def _sharegpt(turns: Sequence[Any], key: str, found: Found) -> tuple[list[dict[str, Any]], list[bool]]:
    messages: list[dict[str, Any]] = []
    learned: list[bool] = []
    for place, given in enumerate(turns):
        at = f"{key}[{place}]"
        if not isinstance(given, dict):
            raise _NoChatError(f"{at} is no object with from and value")
        turn = {name: value for name, value in given.items() if value is not None}
        speaker = turn.get("from", turn.get("role"))
        role = SHAREGPT_ROLES.get(str(speaker))
        if role is None:
            raise _NoChatError(
                f"{at} of a ShareGPT row is from {str(speaker)[:40]!r}, which says neither user nor assistant; a "
                f"message's role must be one of {', '.join(SHAREGPT_ROLES)}; rename it, or skip such rows (on_bad_row)"
            )
        _check_keys(turn, at, found)
        value = turn.get("value", turn.get("content"))
        own = turn.get("tool_calls") or ([turn["function_call"]] if turn.get("function_call") else [])
        if value is None and own:
            value = ""
        if value is None:
            raise _NoChatError(f"{at}: a message's content must be a string, and 'value' is missing")
        if role == "function_call":
            role = "assistant"
            calls = _json(value, f"{at}.value") if isinstance(value, str) else value
            message: dict[str, Any] = {"role": role, "content": ""}
            listed = calls if isinstance(calls, list) else [calls]
            message["tool_calls"] = _tool_calls(listed, f"{at}.value", len(messages))
        else:
            message = {"role": role, "content": _content(value, at)}
            if own:
                message["tool_calls"] = _tool_calls(own, f"{at}.tool_calls", len(messages))
        for name in ("name", "tool_call_id", *REASONING):
            if turn.get(name) not in (None, ""):
                if not isinstance(turn[name], str):
                    raise _NoChatError(f"{at}.{name} must be a text")
                message[name] = turn[name]
        if role != "assistant" and any(key in message for key in ("tool_calls", *REASONING)):
            raise _NoChatError(f"{at}: only the assistant's messages have tool calls or reasoning")
        messages.append(message)
        _note_learned(turn, role, at, learned)
    return messages, learned


def _check_keys(turn: Mapping[str, Any], at: str, found: Found) -> None:
    refused = next((key for key in _REFUSED_IN_TURNS if turn.get(key) not in (None, [], "", {})), None)
    if refused is not None:
        raise _NoChatError(f"{at}.{refused} is not read, and would change what is learned; {_instead(refused)}")
    found.unread.update(f"messages.{key}" for key in turn if key not in _TURN_KEYS and len(found.unread) < 100)


def _note_learned(turn: Mapping[str, Any], role: str, at: str, learned: list[bool]) -> None:
    """Notes whether a turn is learned: `weight` of OpenAI and `train`, `training` or `loss` of others, 0 or 1."""
    said: set[bool] = set()
    for key in _LEARN:
        if key in turn:
            value = turn[key]
            if not isinstance(value, (bool, int, float)) or value not in (0, 1):
                raise _NoChatError(f"{at}.{key} must be 0 or 1, or false or true, not {str(value)[:40]!r}")
            if value and role != "assistant":
                raise _NoChatError(f"{at}.{key} asks to learn a turn of the {role}; only the assistant's are learned")
            said.add(bool(value))
    if len(said) > 1:
        raise _NoChatError(f"{at}: {' and '.join(key for key in _LEARN if key in turn)} contradict one another")
    if role == "assistant":
        learned.append(said != {False})


def _content(value: Any, at: str) -> str:
    """A text, or the texts of a list of parts."""
    if isinstance(value, str):
        return value
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            raise _NoChatError(f"{at}: the content is not UTF-8 text ({error.reason})") from None
    if not isinstance(value, list):
        raise _NoChatError(f"{at}: a message's content must be a string, or a list of text parts")
    texts: list[str] = []
    for part in value:
        if not isinstance(part, dict):
            raise _NoChatError(f"{at}: a content part must be an object with a text, not {type(part).__name__}")
        kind, text = part.get("type", "text"), part.get("text")
        if kind not in ("text", "input_text", "output_text"):
            raise _NoChatError(f"{at}: content parts of type {str(kind)[:40]!r} are not read; only text parts are")
        if not isinstance(text, str):
            raise _NoChatError(f"{at}: a text part has no text")
        texts.append(text)
    return "".join(texts)


def _tool_calls(calls: Any, at: str, turn: int) -> list[dict[str, Any]]:
    """OpenAI's tool calls, with ids, and with the arguments as an object, as chat templates take them."""
    calls = _json(calls, at) if isinstance(calls, str) else calls
    made = []
    for number, call in enumerate(calls if isinstance(calls, list) else [calls]):
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise _NoChatError(
                f"{at}[{number}] must be a call: {{name, arguments}}, or {{type: function, function: …}}"
            )
        arguments = function.get("arguments", function.get("parameters", {}))
        if isinstance(arguments, str):
            arguments = _json(arguments or "{}", f"{at}[{number}].arguments")
        if not isinstance(arguments, dict):
            raise _NoChatError(f"{at}[{number}].arguments must be an object, or one as JSON text")
        identity = (
            call.get("id") or f"call{turn:03d}{number:02d}"
        )  # nine letters and digits, as Mistral's templates ask
        made.append(
            {"id": str(identity), "type": "function", "function": {"name": function["name"], "arguments": arguments}}
        )
    return made


def _tools(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The row's tools in OpenAI's form, from a list or its JSON text."""
    key = "tools" if row.get("tools") not in (None, "") else "functions"
    value = row.get(key)
    if isinstance(value, str) and value.strip():
        value = _json(value, key)
    if not value:
        return []
    tools = []
    for tool in value if isinstance(value, list) else [value]:
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise _NoChatError(
                f"{key} must be a list of {{type: function, function: {{name, description, parameters}}}}"
            )
        tools.append({"type": "function", "function": function})
    return tools


def _either(row: Mapping[str, Any], first: str, second: str) -> Any:
    """The value of the one or the other of two keys that mean the same; None without either."""
    values = [row[key] for key in (first, second) if row.get(key) not in (None, "")]
    if len(values) > 1 and values[0] != values[1]:
        raise _NoChatError(f"{first!r} and {second!r} differ, and mean the same; keep one of them")
    return values[0] if values else row.get(first, row.get(second))


def _alpaca(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Instruction, a blank line and input; earlier turns are in `history`, as [question, answer]."""
    answers = row.get("output", row.get("response"))
    if isinstance(answers, list) and len(answers) > 1 and all(isinstance(answer, str) for answer in answers):
        raise _NoChatError(f"'output' holds {len(answers)} answers; SFT learns one, so keep the better one as a text")
    asked = [_content(row["instruction"], "instruction"), _content(_either(row, "input", "context") or "", "input")]
    asked = [text for text in asked if text.strip()]
    history = row.get("history", [])
    history = _list(history, "history") if history else []
    messages: list[dict[str, Any]] = []
    for place, pair in enumerate(history):
        if not isinstance(pair, list) or len(pair) != 2:
            raise _NoChatError(f"history[{place}] must be [question, answer]")
        said = [_content(text, f"history[{place}]") for text in pair]
        messages += [{"role": "user", "content": said[0]}, {"role": "assistant", "content": said[1]}]
    answer = _content(_either(row, "output", "response"), "output")
    return [*messages, {"role": "user", "content": "\n\n".join(asked)}, {"role": "assistant", "content": answer}]


def _opened(value: Any) -> Any:
    """A text, or the messages that it holds as JSON, as columns of Parquet and CSV files do."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            turns = without_nulls(parse_json(value))
        except ValueError:
            return value
        if (
            isinstance(turns, list)
            and turns
            and all(isinstance(t, dict) and str(t.get("role")) in ROLES for t in turns)
        ):
            return turns
    return value


def _prompt_completion(row: Mapping[str, Any], found: Found) -> tuple[list[dict[str, Any]], list[bool]]:
    """Each a text, or messages; only the completion is learned."""
    parts: list[list[dict[str, Any]]] = []
    learned: list[bool] = []
    for key, role in (("prompt", "user"), ("completion", "assistant")):
        value = _opened(row[key])
        if isinstance(value, list):
            messages, learns = _openai(value, key, found)
            parts.append(messages)
            learned += learns if key == "completion" else [False] * len(learns)
        else:
            parts.append([{"role": role, "content": _content(value, key)}])
            learned += [True] if key == "completion" else []
    return parts[0] + parts[1], learned


def _with_system(messages: list[dict[str, Any]], system: Any) -> list[dict[str, Any]]:
    """The messages with the text of the row's `system` column before them."""
    text = _content(system, "system") if system is not None else ""
    if not text.strip():
        return messages
    own = [message["content"] for message in messages if message["role"] == "system"]
    if own and own != [text]:
        raise _NoChatError("'system' and a message of the system differ; keep one of them")
    return messages if own else [{"role": "system", "content": text}, *messages]


def _check_turns(messages: list[dict[str, Any]], shape: str) -> None:
    if not any(message["role"] != "system" for message in messages[:-1]):
        raise _NoChatError(f"{shape} must be a list of at least two: somebody asks, and the assistant answers")
    if messages[-1]["role"] != "assistant":
        raise _NoChatError(f"the last message must be the assistant's, not the {messages[-1]['role']}'s")


def _says(answer: Mapping[str, Any]) -> bool:
    return bool(answer["content"].strip() or answer.get("tool_calls") or any(answer.get(key) for key in REASONING))


def _check_text(chat: Chat) -> None:
    """Checks that the chat is text that can be written: JSON can escape half a character."""
    try:
        json.dumps([chat.id, chat.messages, chat.tools], ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        what = (
            f"half a surrogate pair ({half!a})" if not 0xDC80 <= ord(half) <= 0xDCFF else f"not UTF-8 text ({half!a})"
        )
        raise _NoChatError(f"the text holds {what}, which is no character; mend or remove it") from None
    except TypeError as error:
        raise _NoChatError(f"a value is no JSON: {error}") from None
