"""A mistake in a training recipe or its data is one line, found before any process is started."""

import json
from pathlib import Path

import pytest
import train_harness as harness

from mixfuse.cli.entry import main
from mixfuse.contracts.errors import MixfuseError
from mixfuse.train.run import start


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.batch_size=5", "batch_size 5 is no multiple of micro_batch"),
        ("processes=3", "batch_size 4 is no multiple of micro_batch"),
        ("optimizer.steps=0", "'optimizer.steps'"),
        ("optimizer.learning_rate=fast", "'optimizer.learning_rate'"),
        ("optimizer.momentum=1", "unknown key 'optimizer.momentum'; known keys: "),
        ("lora.rank=8", "unknown key 'lora.rank'"),
        ("batch_size=8", "unknown key 'batch_size'"),
        ("wandb=of", "'wandb'"),
        ("role=my judge", "'my judge' cannot be a role's name"),
        ("optimizer={steps: 1, warmup_steps: 1, warmup_ratio: 0.1}", "set warmup_steps or warmup_ratio, not both"),
        ("optimizer={steps: 1, schedule: linear, min_learning_rate: 1e-5}", "the schedule is 'linear'"),
        ("optimizer.min_learning_rate=1", "min_learning_rate 1.0 is above learning_rate 0.01"),
        ("optimizer.betas=[0.9, 1]", "'optimizer.betas.1'"),
        ("evaluation={every: 5}", "set exactly one of 'data' (held-out examples) and 'share'"),
        (
            "evaluation={share: 0.1, patients: 1}",
            "unknown key 'evaluation.patients'; did you mean 'evaluation.patience'?",
        ),
        ("evaluation.data=nowhere.jsonl", "nowhere.jsonl: no such file"),
        ("evaluation={data: [{path: a.jsonl, weight: 2}]}", "leave 'weight' out"),
        ("data=[]", "names no data set"),
        ("data=[{path: a.jsonl, hub: a/b}]", "name exactly one of 'path'"),
        ("data=[{path: a.jsonl, split: test}]", "'subset' and 'split' go with 'hub'"),
        ("data=[{path: a.jsonl, wieght: 2}]", "unknown key 'data.0.wieght'; did you mean 'data.0.weight'?"),
        ("data=[{path: a.jsonl, weight: 0}]", "'data.0.weight'"),
        ("data=[{hub: nobody/nothing}]", "nobody/nothing (train): cannot be loaded from the Hugging Face Hub"),
        ("data=nowhere.parquet", "nowhere.parquet: no such file"),
        ("truncation=middle", "'truncation'"),
        ("attention=paged", "'attention'"),
        ("lora={attention: false, experts: none}", "set lora.attention to true or lora.experts to all"),
        ("lora.experts=true", "'lora.experts': is all, none, auto or {layer: [expert, ...]} (got True)"),
        ("lora.experts=most", "is all, none, auto or {layer: [expert, ...]}"),
        ("lora.experts={}", "names no layer; write none"),
        ("lora.experts={0: [1, -1]}", "layer 0 needs a list of expert numbers, not [1, -1]"),
        ("lora.experts={0: []}", "leave a layer without experts out"),
        ("lora.experts={first: [0]}", "a layer is a number from 0 on, not 'first'"),
        ("lora.experts={2: [0]}", "lora.experts: layer 2, experts [0]: the base has layers 0 to 1 with experts 0 to 3"),
        ("lora.experts={1: [0, 4]}", "lora.experts: layer 1, experts [0, 4]: the base has layers 0 to 1"),
        ("lora.expert_share=0", "'lora.expert_share'"),
        ("lora.dropout=1", "'lora.dropout'"),
        (
            "parallel={experts: 8}",
            "parallel.experts: training is under ZeRO-3 alone (docs/parallelism.md); by its calc",
        ),
        ("parallel={tensors: 2}", "unknown key 'parallel.tensors'; known keys: sequences"),
        ("parallel.sequences=0", "'parallel.sequences'"),
        ("parallel.sequences=2", "parallel.sequences: 2 does not divide the run's 1 processes"),
        ("lora.router=true", "vLLM serves no adapter of a router"),
        ("base=nowhere", "mixfuse base build nowhere"),
        ("data=nowhere.jsonl", "nowhere.jsonl: no such file"),
        ("deepspeed=nowhere.json", "nowhere.json: no such file"),
        ("steps", "not of the form key=value"),
    ],
)
def test_one_line_names_the_mistake(override: str, message: str, sft_recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(MixfuseError) as caught:
        start("sft", sft_recipe, [f"out={tmp_path / 'run'}", override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("config", [{}, [], {"zero_optimization": {"stage": 2}}, {"zero_optimization": None}])
def test_another_zero_stage_is_refused(config: object, sft_recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "zero.json").write_text(json.dumps(config))
    with pytest.raises(MixfuseError, match="mixfuse trains with stage 3"):
        start("sft", sft_recipe, [f"deepspeed={tmp_path / 'zero.json'}"])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"chats.jsonl:2: malformed JSON"),
        ("[]", r"chats.jsonl:2: expected a JSON object"),
        ('{"id": "1"}', r"chats.jsonl:2: missing key 'messages'"),
        ('{"messages": []}', "chats.jsonl:2: messages must be a list of at least two"),
        (
            '{"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}',
            "chats.jsonl:2: the last message",
        ),
        (
            '{"messages": [{"role": "bot", "content": "a"}, {"role": "user", "content": "b"}]}',
            "chats.jsonl:2: .*a message's role",
        ),
        (
            '{"messages": [{"role": "user", "content": 1}, {"role": "assistant", "content": "b"}]}',
            "chats.jsonl:2: .*a message's",
        ),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(line: str, message: str, sft_recipe: Path, tmp_path: Path) -> None:
    good = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    (tmp_path / "chats.jsonl").write_text(f"{json.dumps(good)}\n{line}\n")
    with pytest.raises(MixfuseError, match=message):
        start("sft", sft_recipe, [f"data={tmp_path / 'chats.jsonl'}"])


def test_an_empty_data_set_is_refused(sft_recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(MixfuseError, match=r"empty.jsonl: the data set is empty"):
        start("sft", sft_recipe, [f"data={tmp_path / 'empty.jsonl'}"])


def test_the_command_exits_with_2_and_says_only_that(sft_recipe: Path) -> None:
    done = harness.mixfuse("train", "sft", sft_recipe, "optimizer.batch_size=5")
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("mixfuse: error: optimizer.batch_size 5 is no multiple of")


@pytest.mark.parametrize(
    "text",
    [
        "[]", "3", "null", "{", "[" * 5000, '{"zero_optimization": null}', '{"zero_optimization": {"stage": "3"}}',
        '{"zero_optimization": {"stage": 3, "stage": 3}}',
        '{"zero_optimization": {"stage": 3, "offload_param": "cpu"}}',
        '{"zero_optimization": {"stage": 3, "stage3_max_live_parameters": NaN}}',
    ],
)  # fmt: skip
def test_training_and_its_plan_refuse_the_same_deepspeed_json(text: str, sft_recipe: Path, tmp_path: Path, capsys):
    (tmp_path / "zero.json").write_text(text)
    for command in (["train", "sft"], ["plan"]):
        assert main([*command, str(sft_recipe), f"deepspeed={tmp_path / 'zero.json'}"]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert "zero.json" in said or "deepspeed: " in said
