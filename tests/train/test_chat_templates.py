"""Chat templates: named ones are chosen, system text is folded where it must be, and what would be lost is refused."""

import copy
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import train_harness as harness

from mixfuse.contracts import judge_protocol
from mixfuse.contracts.chat_template import FOLD, UnboundedTemplateError, bounded, chosen, for_engine, prepare, render
from mixfuse.contracts.errors import MixfuseError
from mixfuse.serve.engine import EngineConfig, served_template
from mixfuse.train.adapters.export import export
from mixfuse.train.data.loss_mask import IGNORED, encode
from mixfuse.train.model.tokenizer import load_tokenizer
from mixfuse.train.run import start

REFUSES = "{{ raise_exception('Only user and assistant roles are supported!') }}"
# The first template of both Mixtral Instruct models.
ALTERNATING = (
    "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}{% if m.role == 'user' %}"
    "{{ '[INST] ' + m.content + ' [/INST]' }}{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}"
    "{% else %}" + REFUSES + "{% endif %}{% endfor %}"
)
# The form of Mistral's v3 templates: the system text is written where the chat ends with the user, and nowhere else.
LAST_USER = (
    "{% set ns = namespace(system='') %}{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}"
    "{% set ns.system = m.content %}{% elif m.role == 'user' %}{{ '[INST] ' }}{% if loop.last and ns.system %}"
    "{{ ns.system + '\n\n' }}{% endif %}{{ m.content + '[/INST]' }}{% else %}{{ ' ' + m.content + eos_token }}"
    "{% endif %}{% endfor %}"
)
DROPS_SYSTEM = (
    "{% for m in messages if m.role != 'system' %}{{ '<|im_start|>' + m.role + '\n' + m.content + eos_token + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML = DROPS_SYSTEM.replace(" if m.role != 'system'", "")
CHAT = [
    {"role": "system", "content": "Answer in one word."},
    {"role": "user", "content": "Which is the colour of snow?"},
    {"role": "assistant", "content": "White"},
    {"role": "user", "content": "Of coal?"},
    {"role": "assistant", "content": "Black"},
]


def prepared(tokenizer: Any, template: Any, wanted: str | None = None) -> Any:
    tokenizer.chat_template = template
    prepare(tokenizer, Path("base"), wanted)
    return tokenizer


@pytest.mark.parametrize("template", [ALTERNATING, LAST_USER, DROPS_SYSTEM])
def test_system_text_that_a_template_cannot_carry_begins_the_first_user_turn(template: str, tokenizer: Any) -> None:
    raw = copy.deepcopy(tokenizer)
    raw.chat_template = template
    prepared(tokenizer, template)
    by_hand = [{"role": "user", "content": f"{CHAT[0]['content']}\n\n{CHAT[1]['content']}"}, *CHAT[2:]]
    for end in range(2, 6):  # as a whole chat, and as a prompt
        assert render(CHAT[:end], tokenizer) == render(by_hand[: end - 1], raw)
        assert render(CHAT[1:end], tokenizer) == render(CHAT[1:end], raw), "a chat without system text has changed"
    ids, labels = encode(CHAT, tokenizer, "all")
    end_token = tokenizer.eos_token
    assert tokenizer.decode([label for label in labels if label != IGNORED]).split() == (
        f"White{end_token} Black{end_token}".split()
        if template != DROPS_SYSTEM
        else f"White{end_token}Black{end_token}".split()
    )
    assert "Answer in one word." in tokenizer.decode(ids)


def test_a_template_that_carries_system_text_stays_as_it_is(tokenizer: Any) -> None:
    own = tokenizer.chat_template
    assert prepared(tokenizer, own).chat_template == own
    assert prepared(tokenizer, CHATML).chat_template == CHATML


def test_system_text_amid_a_chat_and_in_parts_is_folded_into_the_turn_after_it(tokenizer: Any) -> None:
    prepared(tokenizer, DROPS_SYSTEM)
    parts = {"role": "system", "content": [{"type": "text", "text": "Short."}]}
    text = render([parts, CHAT[0], CHAT[1], CHAT[2], CHAT[0], CHAT[3]], tokenizer)
    assert "user\nShort.\n\nAnswer in one word.\n\nWhich is" in text
    assert "user\nAnswer in one word.\n\nOf coal?" in text
    alone = render([CHAT[0], CHAT[2]], tokenizer)
    assert alone.startswith("<|im_start|>user\nAnswer in one word.")


@pytest.mark.parametrize("template", [ALTERNATING, LAST_USER, DROPS_SYSTEM, CHATML])
def test_a_comparison_is_whole_in_every_template_even_one_that_is_not_prepared(template: str, tokenizer: Any) -> None:
    """A judge is served by engines whose template is their own."""
    tokenizer.chat_template = template
    question = [{"role": "system", "content": "Be kind."}, *CHAT[1:4]]
    for asked in ("Which?", question, question[:3]):
        messages = judge_protocol.comparison(asked, "the first", "the second", nonce="ab12")
        for chat in (messages, [*messages, {"role": "assistant", "content": "A"}]):
            text = render(chat, tokenizer)
            assert judge_protocol.SYSTEM in text
            assert "the first" in text
            assert "the second" in text
            assert isinstance(asked, str) or "Be kind." in text


def test_named_templates_are_one_the_tools_where_there_are_any(tokenizer: Any) -> None:
    forms = {"default": CHATML + "\n", "tool_use": "\n tools: {{ tools | length }}" + CHATML + "\n  "}
    raw = copy.deepcopy(tokenizer)
    raw.chat_template = forms
    prepared(tokenizer, forms)
    for tools in (None, [{"type": "function", "function": {"name": "look"}}]):
        assert tokenizer.apply_chat_template(CHAT, tokenize=False, tools=tools) == raw.apply_chat_template(
            CHAT, tokenize=False, tools=tools
        )
    assert chosen(forms, Path("base"), "tool_use") == forms["tool_use"]
    assert chosen({"default": CHATML}, Path("base")) == CHATML


def saved(base: Path, folder: Path, template: Any, *, more: dict[str, str] | None = None) -> Path:
    """A base's tokenizer whose template lies where Mixtral's does."""
    folder.mkdir(parents=True)
    for name in ("tokenizer.json", "config.json"):
        (folder / name).write_bytes((base / name).read_bytes())
    config = json.loads((base / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": template}))
    for name, text in (more or {}).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return folder


def test_templates_are_found_where_a_base_keeps_them(tiny_base: Path, tmp_path: Path) -> None:
    listed = [{"name": "default", "template": ALTERNATING}, {"name": "tool_use", "template": CHATML}]
    as_list = load_tokenizer(saved(tiny_base, tmp_path / "list", listed))
    folder = saved(
        tiny_base,
        tmp_path / "folder",
        None,
        more={"chat_template.jinja": ALTERNATING, "additional_chat_templates/tool_use.jinja": CHATML},
    )
    assert load_tokenizer(folder).chat_template == as_list.chat_template
    assert str(as_list.chat_template).startswith(FOLD)
    assert load_tokenizer(folder, "tool_use").chat_template == CHATML
    file = tmp_path / "mine.jinja"
    file.write_text(CHATML)
    assert load_tokenizer(folder, str(file)).chat_template == CHATML
    with pytest.raises(MixfuseError, match=r"neither a readable file .* nor .*, which has default, tool_use"):
        load_tokenizer(folder, "rag")
    unnamed = saved(tiny_base, tmp_path / "unnamed", [{"name": "rag", "template": CHATML}])
    with pytest.raises(MixfuseError, match="no template named default; choose one: chat_template: rag"):
        load_tokenizer(unnamed)


@pytest.mark.parametrize("template", [ALTERNATING, LAST_USER, DROPS_SYSTEM, CHATML])
def test_an_engine_writes_what_training_wrote(template: str, tiny_base: Path, tmp_path: Path) -> None:
    base = saved(tiny_base, tmp_path / "base", [{"name": "default", "template": template}])
    trained = load_tokenizer(base).chat_template
    assert for_engine(base) == (None if template == CHATML else trained)
    named = saved(tiny_base, tmp_path / "named", None, more={"chat_template.jinja": CHATML, "mine.jinja": template})
    assert for_engine(named) is None
    assert for_engine(named, str(named / "mine.jinja")) == trained
    with pytest.raises(MixfuseError, match=r"neither a readable file .* nor a template of"):
        for_engine(named, "rag")


def test_the_engine_is_started_with_that_template(tiny_base: Path, tmp_path: Path) -> None:
    from mixfuse.serve.engine import Engine, EngineConfig, command

    base = saved(tiny_base, tmp_path / "base", ALTERNATING)
    engine = Engine(EngineConfig(base=base), log_path=tmp_path / "logs" / "engine.log")
    file = engine._template()
    assert file is not None
    assert file.read_text().startswith(FOLD)
    assert str(file) in command(engine.config, 1, template=file)
    (tmp_path / "mine.jinja").write_text(CHATML)
    own = EngineConfig(base=base, extra_args=[f"--chat-template={tmp_path / 'mine.jinja'}"])
    assert Engine(own, log_path=tmp_path / "engine.log")._template() is None
    assert Engine(EngineConfig(base=tiny_base), log_path=tmp_path / "engine.log")._template() is None
    assert "--chat-template" not in command(own, 1)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ bos_token }}{% for m in messages %}{% if loop.last %}{{ m.content + eos_token }}{% endif %}{% endfor %}",
         "leaves out turns of the user"),
        ("{% for m in messages if m.role == 'user' %}{{ m.content + eos_token }}{% endfor %}",
         "leaves out turns of the assistant"),
        ("{% for m in messages[:2] %}{{ m.content + eos_token }}{% endfor %}", "leaves out turns of the user"),
        ("{{ messages[0].content.nothing + 1 }}", "refuses the chat"),
        ("{% for m in messages %}", "refuses the chat: Unexpected end of template"),
        ("{{ raise_exception('never') }}", "refuses the chat: never"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "refuses the chat: maximum recursion"),
        ("{{" + "(" * 5000 + "1" + ")" * 5000 + "}}", "refuses the chat: maximum recursion"),
        ("{{ cycler() }}", "refuses the chat: at least one item"),
        ("{% break %}", "refuses the chat: 'break' outside loop"),
        ("{% for m in messages %}{{ m.content }}\n{% endfor %}", "would not learn to stop"),
        # Marks, but the token that ends the turn stands outside of them.
        ("{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
         "{{ eos_token }}{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}", "would not learn to stop"),
    ],
)  # fmt: skip
def test_a_template_that_loses_a_part_ends_a_run_before_anything_is_loaded(
    template: str, message: str, sft_recipe: Path, judge_recipe: Path, tmp_path: Path
) -> None:
    file = tmp_path / "template.jinja"
    file.write_text(template)
    for stage, recipe in (("sft", sft_recipe), ("judge", judge_recipe)):
        with pytest.raises(MixfuseError, match=message) as refused:
            start(stage, recipe, [f"out={tmp_path / 'run'}", f"chat_template={file}"])
        assert "\n" not in str(refused.value)
    assert not (tmp_path / "run").exists()


NEST = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
UNBOUNDED = {
    "loops in loops": (NEST, "does not end"),
    "macros that call themselves twice": (
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "does not end",
    ),
    "dummy text": ("{{ lipsum(n=100000000) }}", "does not end"),
    "only where there are tools": (f"{{% if tools %}}{NEST}{{% endif %}}{CHATML}", "does not end"),
    "only in long chats": (f"{{% if messages | length > 20 %}}{{{{ 'x' * 10**10 }}}}{{% endif %}}{CHATML}", "memory"),
    "only after a system text": (f"{{% if messages[0].role == 'system' %}}{NEST}{{% endif %}}{CHATML}", "does not end"),
    "a constant": ("{{ 'x' * 10**10 }}", "takes more memory"),
    "a content, repeated": ("{% for m in messages %}{{ m.content * 500000 }}{% endfor %}", "writes more than 1048576"),
    "loops that write": (NEST.replace("{% endfor %}", "x{% endfor %}", 1), "writes more than 1048576"),
    "a list, repeated": ("{{ (range(99999) | list) * 100000 }}", "takes more memory"),
    "join": ("{{ (['x' * 1000] * 10000000) | join(',') }}", "takes more memory"),
    "replace": ("{{ ('x' * 100000) | replace('x', 'x' * 100000) }}", "takes more memory"),
    "a width": ("{{ '%999999999d' | format(1) }}", "takes more memory"),
    "a width of str.format": ("{{ '{:>999999999}'.format(1) }}", "takes more memory"),
    "an indent": ("{{ [1] | tojson(indent=999999999) }}", "takes more memory"),
    "a text that doubles": (
        "{% set ns = namespace(s='x') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}",
        "takes more memory",
    ),
    "a large text": ("x" * (1 << 20) + "x", "larger than 1 MiB"),
}


@pytest.mark.parametrize("case", UNBOUNDED)
def test_a_template_that_does_not_end_or_grows_beyond_all_bounds_is_refused(case: str, tmp_path: Path) -> None:
    template, message = UNBOUNDED[case]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    with pytest.raises(UnboundedTemplateError, match=message) as refused:
        for_engine(tmp_path)
    assert len(str(refused.value)) < len(str(tmp_path)) + 200


@pytest.mark.parametrize(
    "template", [ALTERNATING, LAST_USER, DROPS_SYSTEM, CHATML, REFUSES, "{% for", "{{ messages[9].x.y }}"]
)
def test_templates_that_end_are_within_bounds_even_those_that_refuse_a_chat(template: str) -> None:
    bounded(template)


def test_no_command_and_no_engine_renders_a_template_that_does_not_end(
    sft_recipe: Path, judge_recipe: Path, tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from mixfuse.cli.entry import main
    from mixfuse.serve.engine import Engine, EngineConfig

    file = tmp_path / "template.jinja"
    file.write_text(NEST)
    for stage, recipe in (("sft", sft_recipe), ("judge", judge_recipe)):
        with pytest.raises(UnboundedTemplateError, match="does not end"):
            start(stage, recipe, [f"out={tmp_path / 'run'}", f"chat_template={file}"])
    assert main(["data", "preview", str(sft_recipe), f"chat_template={file}"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    base = saved(tiny_base, tmp_path / "base", NEST)
    for config in (
        EngineConfig(base=base),
        EngineConfig(base=tiny_base, chat_template=str(file)),
        EngineConfig(base=tiny_base, extra_args=["--chat-template", str(file)]),
        EngineConfig(base=tiny_base, extra_args=[f"--chat-template={NEST}"]),
    ):
        with pytest.raises(UnboundedTemplateError, match="does not end"):
            Engine(config, log_path=tmp_path / "engine.log")._template()
    with pytest.raises(MixfuseError, match=r"nowhere\.jinja: no such file"):
        Engine(
            EngineConfig(base=tiny_base, extra_args=["--chat-template", str(tmp_path / "nowhere.jinja")]),
            log_path=tmp_path / "engine.log",
        )._template()


@pytest.mark.slow
def test_a_run_uses_the_template_that_its_recipe_names(sft_recipe: Path, tmp_path: Path) -> None:
    file = tmp_path / "template.jinja"
    file.write_text(ALTERNATING)
    run = harness.train("sft", sft_recipe, f"out={tmp_path / 'run'}", f"chat_template={file}", "optimizer.steps=1")
    # The manifest says which text that was, and a server compares it with its own.
    manifest = export(run.out, tmp_path / "exported")
    base = Path(run.record["base"])
    assert manifest.chat_template == served_template(EngineConfig(base=base, chat_template=str(file)))
    assert manifest.chat_template != served_template(EngineConfig(base=base))
    assert export(tmp_path / "exported", tmp_path / "again").chat_template == manifest.chat_template
    file.write_text(CHATML)  # after the training
    assert export(run.out, tmp_path / "later").chat_template == manifest.chat_template
    forced = EngineConfig(base=base, extra_args=["--chat-template", str(file)])
    assert served_template(forced) is None
    assert served_template(EngineConfig(base=base, url="http://127.0.0.1:8000")) is None


@pytest.mark.parametrize(
    "found", [5, True, ["x"], [{"name": "default"}], {"default": 5}, [{"name": ["a"], "template": "x"}]]
)
def test_templates_that_are_no_texts_are_refused(found: Any, tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": found}))
    with pytest.raises(MixfuseError, match="neither a text nor named texts"):
        for_engine(tmp_path)


def test_a_template_that_is_no_file_or_too_large_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large").write_text("x" * (1 << 20) + "x")
    (tmp_path / "latin").write_bytes("{{ 'é' }}".encode("latin-1"))
    for wanted, why in (
        ("/dev/zero", "no regular file"),
        (tmp_path / "pipe", "no regular file"),
        (tmp_path, "no regular file"),
        (tmp_path / "large", "larger than 1 MiB"),
        (tmp_path / "latin", "no chat template in UTF-8"),
        ("x" * 5000, "File name too long"),
        ("a\0b", "embedded null byte"),
        (tmp_path / "nowhere", "no such file"),
    ):
        with pytest.raises(MixfuseError, match=r"neither a readable file .* nor a template") as refused:
            chosen(CHATML, tmp_path, str(wanted))
        assert why in str(refused.value)
        assert len(str(refused.value)) < 2 * len(str(tmp_path)) + 400
    (tmp_path / "large").rename(tmp_path / "chat_template.jinja")
    with pytest.raises(MixfuseError, match="larger than 1 MiB"):
        for_engine(tmp_path)
    (tmp_path / "latin").rename(tmp_path / "chat_template.jinja")
    with pytest.raises(MixfuseError, match="no chat template in UTF-8"):
        for_engine(tmp_path)


@pytest.mark.parametrize(
    ("make", "message"), [(Path.mkdir, r"chat_template\.jinja: is no regular file"), (os.mkfifo, "is no regular file")]
)
def test_a_bases_template_that_is_a_folder_or_a_pipe_is_named(
    make: Any, message: str, tiny_base: Path, tmp_path: Path
) -> None:
    base = shutil.copytree(tiny_base, tmp_path / "base")
    (base / "chat_template.jinja").unlink()
    make(base / "chat_template.jinja")
    for look in (load_tokenizer, for_engine):
        with pytest.raises(MixfuseError, match=message):
            look(base)


def test_a_bases_template_that_is_no_utf_8_is_one_line_in_its_fingerprint(tiny_base: Path, tmp_path: Path) -> None:
    from mixfuse.contracts.adapter import fingerprint

    base = shutil.copytree(tiny_base, tmp_path / "base")
    (base / "chat_template.jinja").write_bytes("{{ 'é' }}".encode("latin-1"))
    for look in (fingerprint, load_tokenizer):
        with pytest.raises(MixfuseError, match=r"utf-8|UTF-8"):
            look(base)
