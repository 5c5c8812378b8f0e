"""The chat template that a base is trained and served with: one text, made of what the base's folder or a recipe names.

- Named templates (a list or dict in `tokenizer_config.json`, the folder `additional_chat_templates/`) become one:
  `default`, and `tool_use` where a chat has tools.
- Where the template cannot carry a system message (it raises, or leaves it out, always or in some chats, as the v3 form
  of Mistral's does in every chat that ends with the assistant), a prologue puts that text into the user's turn. The
  template does so itself, so training, parity checks and the engine write the same.
- A template that leaves out a user's or an assistant's turn is refused.
- A template that does not end, or that writes or holds far more than its chat, is refused (`bounded`).
- Tool calls are handed to it as it wants them (`adapted`); `left_out` names what it does not write of a chat.
"""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from mixfuse.contracts.bounded_json import open_regular, shortened
from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.files import read_json, shown

FOLD = """\
{%- set folded = namespace(messages=[], system='') -%}
{%- for message in messages -%}
{%- set role, content = message['role'], message['content'] -%}
{%- if role in ('system', 'developer') -%}
{%- if content is not string -%}{%- set content = content | map(attribute='text') | join('') -%}{%- endif -%}
{%- set folded.system = folded.system ~ ('\\n\\n' if folded.system else '') ~ content -%}
{%- else -%}
{%- if folded.system and role == 'user' -%}
{%- if content is string -%}{%- set content = folded.system ~ '\\n\\n' ~ content -%}
{%- else -%}{%- set content = [{'type': 'text', 'text': folded.system ~ '\\n\\n'}] + content -%}{%- endif -%}
{%- set message = dict(message, content=content) -%}
{%- elif folded.system -%}
{%- set folded.messages = folded.messages + [{'role': 'user', 'content': folded.system}] -%}
{%- endif -%}
{%- set folded.messages, folded.system = folded.messages + [message], '' -%}
{%- endif -%}
{%- endfor -%}
{%- if folded.system -%}
{%- set folded.messages = folded.messages + [{'role': 'user', 'content': folded.system}] -%}
{%- endif -%}
{%- set messages = folded.messages %}"""
"""A template's prologue that puts system text into the user's turn after it, or a turn of its own if none follows."""

_MOST_BYTES = 1 << 20
_MOST_WRITTEN = 1 << 20
"""Characters that a template may write of a chat of the trial, which has at most 64 Ki."""
_TRIAL = Path(__file__).with_name("template_trial.py")
_TRIAL_WALL_S = 60.0
_RAISED_BY_TEMPLATES = (
    ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, SyntaxError, TypeError, ValueError
)  # fmt: skip
_GENERATION = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")
OF_BASE = "the base's chat template"
_SYSTEM, _USER, _ASSISTANT = "qxsystem", "qxuser", "qxassistant"


class UnboundedTemplateError(MixfuseError):
    """A chat template that takes more time, memory or text than any chat needs; no engine may render it."""


def prepare(tokenizer: Any, base: Path, wanted: str | None = None) -> str:
    """Gives a tokenizer the template that it is used with, and returns that template.

    Args:
        tokenizer: A tokenizer of transformers; its `chat_template` is set.
        base: The base's folder, for messages.
        wanted: The name of one of the base's templates, or a file; by default `default`, with `tool_use` where there
            are tools.

    Raises:
        MixfuseError: There is no such template, it is no Jinja, it refuses a user's turn with its answer, or it leaves
            out a turn.
        UnboundedTemplateError: As from `bounded`.
    """
    tokenizer.chat_template = chosen(tokenizer.chat_template, base, wanted)
    source = f"{base}: the chat template" if wanted is None else f"chat_template {wanted}"
    bounded(tokenizer.chat_template, source)
    short, long = _chat(_USER, _ASSISTANT), _chat(_USER, _ASSISTANT, _USER, _ASSISTANT)
    text = render(short, tokenizer, source=source)
    for role, word in (("user", _USER), ("assistant", _ASSISTANT)):
        counts = [text.count(word), _count(tokenizer, long, word)]
        if counts[0] < 1 or 0 <= counts[1] < 2:
            raise MixfuseError(f"{source} leaves out turns of the {role}; choose another with chat_template")
    if not _carries_system(tokenizer):
        tokenizer.chat_template = f"{FOLD}\n{tokenizer.chat_template}"  # the tag takes the newline
        if not _carries_system(tokenizer):
            raise MixfuseError(f"{source} leaves out the system text; choose another with chat_template")
    return str(tokenizer.chat_template)


def chosen(found: str | Mapping[str, str] | None, base: Path, wanted: str | None = None) -> str:
    """Chooses among a base's templates, as one text; the arguments are those of `prepare`.

    Raises:
        MixfuseError: There is no template, or none of that name.
    """
    named = {"default": found} if isinstance(found, str) else _texts(found or {}, base)
    if wanted is not None:
        if wanted in named:
            return named[wanted]
        try:
            return read_file(Path(wanted))
        except MixfuseError as error:
            why = str(error).removeprefix(f"{shown(wanted)}: ")
            raise MixfuseError(
                f"chat_template: {shortened(repr(wanted), 200)} is neither a readable file ({shortened(why, 120)}) nor "
                f"a template of {base}, which has {shortened(', '.join(sorted(named)), 200) or 'none'}"
            ) from None
    if not named:
        if os.path.lexists(file := base / "chat_template.jinja"):
            read_file(file)  # whoever looked for it took no notice of a folder or a pipe
        raise MixfuseError(f"{base} has no chat template; training on chats needs one: name a file as chat_template")
    if "default" not in named:
        raise MixfuseError(f"{base} has no template named default; choose one: chat_template: {sorted(named)[0]}")
    if "tool_use" not in named:
        return named["default"]
    # The newline after a tag is dropped, as is the one at a template's end; `{{ '' }}` keeps what is before a tag.
    default, tool_use = (named[name].removesuffix("\n") for name in ("default", "tool_use"))
    return f"{{% if tools %}}\n{tool_use}{{{{ '' }}}}{{% else %}}\n{default}{{{{ '' }}}}{{% endif %}}"


def _texts(found: Any, base: Path) -> dict[str, str]:
    """Named templates, as a dict of texts or as the list of `tokenizer_config.json`."""
    if isinstance(found, list) and all(isinstance(each, dict) and isinstance(each.get("name"), str) for each in found):
        found = {each.get("name"): each.get("template") for each in found}
    if not isinstance(found, Mapping) or not all(isinstance(part, str) for item in found.items() for part in item):
        raise MixfuseError(f"{base}: the chat_template of tokenizer_config.json is neither a text nor named texts")
    return dict(found)


def read_file(path: Path) -> str:
    """Reads a template from a file, with its lines ended by a newline alone.

    Raises:
        MixfuseError: It is no regular file, cannot be read, is larger than 1 MiB, or is not UTF-8.
    """
    with open_regular(path) as stream:
        content = stream.read(_MOST_BYTES + 1)
    if len(content) > _MOST_BYTES:
        raise MixfuseError(f"{path}: is larger than {_MOST_BYTES >> 20} MiB, so it is no chat template")
    try:
        return content.decode().replace("\r\n", "\n").replace("\r", "\n")
    except ValueError as error:
        raise MixfuseError(f"{path}: is no chat template in UTF-8: {error}") from None


def bounded(template: str, source: str = OF_BASE) -> None:
    """Checks that a template ends, and writes and holds no more than a chat needs: on chats of every shape.

    It is rendered in a process of its own, which is killed after two seconds of processor time.

    Args:
        template: Its text.
        source: How to name it in messages.

    Raises:
        UnboundedTemplateError: It does not.
        MixfuseError: It is larger than 1 MiB, or cannot be tried here.
    """
    if problem := _unbounded(template):
        raise UnboundedTemplateError(f"{source} {problem}; choose another template")


@lru_cache(maxsize=64)
def _unbounded(template: str) -> str | None:
    """What makes a template one that no engine may render, a clause without its subject; None if nothing does."""
    if len(template) > _MOST_BYTES:
        return f"is larger than {_MOST_BYTES >> 20} MiB"
    task = json.dumps({"template": _GENERATION.sub("", template), "chats": _trial_chats(), "most": _MOST_WRITTEN})
    try:
        # The interpreter's own arguments keep modules of the working folder from hiding the library's.
        command = [sys.executable, "-P", str(_TRIAL)]
        done = subprocess.run(command, input=task, capture_output=True, text=True, timeout=_TRIAL_WALL_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise MixfuseError(f"the chat template cannot be tried: {error}; run the command again") from None
    if done.returncode == -signal.SIGPROF:
        return "does not end: it computes for more than two seconds on a short chat"
    if done.returncode and "MemoryError" not in done.stderr and done.returncode > 0:
        raise MixfuseError(f"the chat template cannot be tried: {shortened(done.stderr[-200:], 200)}")
    found = "memory" if done.returncode else json.loads(done.stdout)
    if found == "memory":
        return "takes more memory than any chat needs"
    return f"writes more than {_MOST_WRITTEN} characters of a short chat" if found else None


def _trial_chats() -> list[dict[str, Any]]:
    """Chats of every shape that templates tell apart; the longest has 64 turns of 1000 characters."""
    function = {"name": "look", "arguments": {"place": "here"}}
    called = {"role": "assistant", "content": "", "reasoning_content": "I look.", "tool_calls": [
        {"id": "abcdefghi", "type": "function", "function": function}]}  # fmt: skip
    result = {"role": "tool", "name": "look", "tool_call_id": "abcdefghi", "content": "A wall."}
    system, user, said = _chat(_SYSTEM, _USER, _ASSISTANT)
    parts = {"role": "user", "content": [{"type": "text", "text": "Look."}]}
    long = [{**turn, "content": "word " * 200} for _ in range(32) for turn in (user, said)]
    chats: list[tuple[list[dict[str, Any]], list[dict[str, Any]] | None]] = [
        ([user], None),
        ([user, said, user], None),
        ([user, said], None),
        ([system, user, said, user], None),
        ([system, user, called, result, said], [_tool("look")]),
        ([user, called, result], [_tool("look")]),
        ([parts], None),
        (long, None),
    ]
    return [
        {"messages": messages, "tools": tools, "add_generation_prompt": messages[-1]["role"] != "assistant"}
        for messages, tools in chats
    ]


def for_engine(base: Path, wanted: str | None = None) -> str | None:
    """The template that an engine of this base is to be started with; read with Jinja alone, without transformers.

    Args:
        base: The base's folder.
        wanted: As for `prepare`.

    Returns:
        The template; None if the folder has none, or the engine finds the same one there.

    Raises:
        MixfuseError: As from `prepare`.
    """
    folder = _Folder(base)
    found = folder.chat_template
    if not found and wanted is None:
        return None
    template = prepare(folder, base, wanted)
    # An engine reads named templates as transformers does.
    return None if wanted is None and template == chosen(found, base) else template


def digest_for_engine(base: Path, wanted: str | None = None) -> str | None:
    """The digest of the template that an engine writes chats with; None if training could not use that template.

    Args:
        base: The base's folder.
        wanted: As for `prepare`.
    """
    try:
        return digest(prepare(_Folder(base), base, wanted))
    except MixfuseError:
        return None


def digest(template: str) -> str:
    """The SHA-256 of a template's text, in hex."""
    return hashlib.sha256(template.encode()).hexdigest()


class _Folder:
    """The templates of a base's folder, rendered as transformers does, for what looks at their text alone."""

    def __init__(self, base: Path) -> None:
        self._tokens: dict[str, str] = {}
        named: dict[str, str] = {}
        path = base / "tokenizer_config.json"
        config = read_json(path) if path.is_file() else {}
        if isinstance(config, dict):
            for key, value in config.items():
                text = value.get("content") if isinstance(value, dict) else value
                if key.endswith("_token") and isinstance(text, str):
                    self._tokens[key] = text
            listed = config.get("chat_template")
            named |= {"default": listed} if isinstance(listed, str) else _texts(listed or {}, base)
        files = [*sorted((base / "additional_chat_templates").glob("*.jinja")), base / "chat_template.jinja"]
        for file in files:
            if os.path.lexists(file):
                name = "default" if file.parent == base else file.stem
                named[name] = read_file(file)
        self.chat_template: Any = named

    def apply_chat_template(
        self, messages: Any, *, tokenize: bool = False, tools: Any = None, add_generation_prompt: bool = False
    ) -> str:
        from mixfuse.contracts.template_trial import environment

        template = environment().from_string(_GENERATION.sub("", self.chat_template))
        return template.render(
            messages=messages, tools=tools, add_generation_prompt=add_generation_prompt, **self._tokens
        )


def render(messages: Sequence[Mapping[str, Any]], tokenizer: Any, *, source: str = OF_BASE, **keys: Any) -> str:
    """The chat as text, by the tokenizer's template.

    Args:
        messages: In OpenAI's form.
        tokenizer: A tokenizer of transformers with a template.
        source: How to name the template in messages.
        keys: For `apply_chat_template`.

    Raises:
        MixfuseError: The template refuses the chat.
    """
    from jinja2 import TemplateError

    try:
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, **keys))
    except (*_RAISED_BY_TEMPLATES, TemplateError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise MixfuseError(f"{source} refuses the chat: {reason}") from None


REASONING = ("reasoning_content", "reasoning", "thinking")
"""The keys in which chats hold what an assistant thought before it answered."""


class _Wants(NamedTuple):
    """How a template wants tool calls: arguments as an object or as JSON text; ids of 9 letters or any."""

    objects: bool
    short_ids: bool


def adapted(messages: Sequence[Mapping[str, Any]], tokenizer: Any) -> list[dict[str, Any]]:
    """A chat as the tokenizer's template wants it: a content that is text, arguments and ids of calls in its form.

    Args:
        messages: In OpenAI's form; arguments of calls may be JSON text or objects.
        tokenizer: A tokenizer of transformers with a template.

    Raises:
        MixfuseError: A call lacks its function, or its arguments are not a JSON object and the template needs one.
    """
    chat = [{**m, "content": ""} if m.get("content") is None else dict(m) for m in messages]
    if not any(m.get("tool_calls") or m["role"] == "tool" for m in chat):
        return chat
    wants = _wants(tokenizer, tokenizer.chat_template)
    for message in chat:
        if message.get("tool_calls"):
            message["tool_calls"] = [_call(call, wants) for call in message["tool_calls"]]
        if isinstance(message.get("tool_call_id"), str):
            message["tool_call_id"] = _id(message["tool_call_id"], wants)
    return chat


def _call(call: Any, wants: _Wants) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
        raise MixfuseError("a tool call has no function with a name")
    arguments = function.get("arguments")
    if arguments is None or arguments == "":
        arguments = {}
    if isinstance(arguments, str) and wants.objects:
        try:
            arguments = json.loads(arguments)
        except ValueError:
            arguments = None
    if not isinstance(arguments, str) and not isinstance(arguments, Mapping):
        raise MixfuseError(f"the arguments of a call of {function['name'][:40]!r} are not a JSON object")
    if not wants.objects and not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    made = {**call, "type": call.get("type") or "function", "function": {**function, "arguments": arguments}}
    return {**made, "id": _id(made["id"], wants)} if isinstance(made.get("id"), str) else made


def _id(name: str, wants: _Wants) -> str:
    if not wants.short_ids or (len(name) == 9 and name.isascii() and name.isalnum()):
        return name
    return hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest()[:9]


@lru_cache(maxsize=8)
def _wants(tokenizer: Any, template: str) -> _Wants:
    """Found by trial; `template` is the tokenizer's, and an argument so that the cache's key holds it."""
    for short_ids in (False, True):
        for objects in (True, False):
            wants = _Wants(objects, short_ids)
            function = {"name": "qxname", "arguments": '{"qxkey": "qxvalue"}'}
            call = _call({"id": "call_qx1", "function": json.loads(json.dumps(function))}, wants)
            result = {"role": "tool", "content": "qxresult", "tool_call_id": call["id"], "name": "qxname"}
            said = {"role": "assistant", "content": "", "tool_calls": [call]}
            try:
                text = render([*_chat(_USER), said, result, *_chat(_ASSISTANT)], tokenizer, tools=[_tool("qxname")])
            except MixfuseError:
                continue
            # Not as the JSON of a JSON text, and not as Python writes a dict.
            if all(word in text for word in ("qxkey", "qxvalue")) and not any(
                wrong in text for wrong in ('\\"qxkey', "{'qxkey")
            ):
                return wants
    return _Wants(objects=True, short_ids=False)


def _tool(name: str) -> dict[str, Any]:
    function = {"name": name, "description": name, "parameters": {"type": "object", "properties": {}}}
    return {"type": "function", "function": function}


def left_out(messages: Sequence[Mapping[str, Any]], tokenizer: Any, tools: Any = None) -> str | None:
    """What the tokenizer's template does not write of a chat, in words; None if it writes everything.

    A chat of the same shape whose texts are words that occur nowhere else is rendered, once for each shape.

    Args:
        messages: In OpenAI's form, as from `adapted`.
        tokenizer: A tokenizer of transformers with a template.
        tools: The chat's tools.
    """
    shape = tuple(
        (
            m["role"],
            bool(m["content"]),
            tuple(key for key in REASONING if m.get(key)),
            tuple(
                (call.get("id"), isinstance(call["function"]["arguments"], str)) for call in m.get("tool_calls") or ()
            ),
            m.get("tool_call_id"),
            m.get("name"),
        )
        for m in messages
    )
    numbers: dict[Any, str] = {}  # ids of calls differ from chat to chat, and their shape does not

    def plain(name: Any) -> str | None:
        return numbers.setdefault(name, f"qxid{len(numbers):05d}") if isinstance(name, str) else None

    shape = tuple(
        (role, content, thoughts, tuple((plain(name), text) for name, text in calls), plain(of), name)
        for role, content, thoughts, calls, of, name in shape
    )
    return _left_out(shape, bool(tools), tokenizer, tokenizer.chat_template)


@lru_cache(maxsize=4096)
def _left_out(shape: tuple[Any, ...], tools: bool, tokenizer: Any, template: str) -> str | None:
    words: dict[str, str] = {}

    def word(part: str) -> str:
        name = f"qxw{len(words)}x"
        words[name] = part
        return name

    chat: list[dict[str, Any]] = []
    for number, (role, content, thoughts, calls, of, name) in enumerate(shape, start=1):
        what = {
            "system": "the system text",
            "tool": f"the tool result in message {number}",
            "assistant": f"an assistant's turn (message {number})",
        }.get(role, f"the {role}'s text in message {number}")
        message = {"role": role, "content": word(what) if content else ""}
        message |= {key: word(f"the reasoning in message {number}") for key in thoughts}
        made = []
        for call_id, as_text in calls:
            called = word(f"a tool call in message {number}")
            arguments: Any = {"qxkey": word(f"the arguments of a tool call in message {number}")}
            function = {"name": called, "arguments": json.dumps(arguments) if as_text else arguments}
            made.append({"type": "function", "function": function, **({"id": call_id} if call_id else {})})
        message |= {"tool_calls": made} if made else {}
        message |= {key: value for key, value in (("tool_call_id", of), ("name", name)) if value}
        chat.append(message)
    try:
        text = render(chat, tokenizer, tools=[_tool(word("the tools"))] if tools else None)
    except MixfuseError:
        return None  # it looks at the words themselves, and has taken the real ones
    lost = [part for name, part in words.items() if name not in text.lower()]
    return min(lost, key=lambda part: "assistant" not in part, default=None)


def _chat(*words: str) -> list[dict[str, str]]:
    roles = {_SYSTEM: "system", _USER: "user", _ASSISTANT: "assistant"}
    return [{"role": roles[word], "content": word} for word in words]


def _count(tokenizer: Any, chat: Sequence[Mapping[str, Any]], word: str, **keys: Any) -> int:
    """How often the rendered chat holds the word; -1 if the template refuses the chat."""
    try:
        return render(chat, tokenizer, **keys).count(word)
    except MixfuseError:
        return -1


def _carries_system(tokenizer: Any) -> bool:
    """Whether the system text is in every chat that the template takes without one: whole, and as a prompt."""
    turns = (_USER, _ASSISTANT, _USER, _ASSISTANT)
    return all(
        _count(tokenizer, _chat(_SYSTEM, *turns[:end]), _SYSTEM, add_generation_prompt=end % 2 == 1) > 0
        for end in range(1, 5)
        if _count(tokenizer, _chat(*turns[:end]), _USER, add_generation_prompt=end % 2 == 1) > 0
    )
