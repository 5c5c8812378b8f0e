"""Every config loads, says how it is launched and what it takes, and every key of it is explained."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from mixfuse.app.config_reference import meanings, models_in, rewritten
from mixfuse.app.pairs_spec import PairsSpec
from mixfuse.app.server import ServeConfig
from mixfuse.contracts.strict_yaml import Strict, load
from mixfuse.contracts.tasks import TaskFile
from mixfuse.fusion.config import FusionConfig
from mixfuse.train.recipe import JudgeRecipe, SftRecipe, TrainRecipe

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "configs"
KINDS: dict[str, type[Strict]] = {
    "domain_sft": SftRecipe,
    "domain_sft_quantised": SftRecipe,
    "judge_dpo": JudgeRecipe,
    "judge_dpo_quantised": JudgeRecipe,
    "serve": ServeConfig,
    "serve_fp8": ServeConfig,
    "serve_awq": ServeConfig,
    "serve_two_nodes": ServeConfig,
    "fusion": FusionConfig,
    "tasks": TaskFile,
    "pairs": PairsSpec,
}
FILES = sorted(CONFIGS.glob("*/*.yaml"))
RECIPES = [path for path in FILES if path.stem.startswith(("domain_sft", "judge_dpo"))]
DEEPSPEED = sorted((CONFIGS / "deepspeed").glob("*.json"))
# The numbers of GPUs that the headers speak of; those of the tiny base speak of the recipe's own processes.
WORLDS: dict[str, tuple[int, ...]] = {"tiny": (), "mixtral-8x7b": (8,), "mixtral-8x22b": (8, 16)}


def name(path: Path) -> str:
    return str(path.relative_to(CONFIGS))


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths in configs count from the project's folder."""
    monkeypatch.chdir(ROOT)


def test_each_model_has_all_four() -> None:
    for family in WORLDS:
        assert {"domain_sft", "judge_dpo", "serve", "fusion"} <= {path.stem for path in (CONFIGS / family).iterdir()}


@pytest.mark.parametrize("path", FILES, ids=name)
def test_a_config_loads(path: Path) -> None:
    config = load(path, KINDS[path.stem])
    if isinstance(config, TrainRecipe):
        assert config.deepspeed in [file.relative_to(ROOT) for file in DEEPSPEED]
        for world in WORLDS[path.parent.name] or (config.processes,):
            assert config.optimizer.batch_size % (config.optimizer.micro_batch * world) == 0
        assert config.optimizer.warmup(config.optimizer.steps) < config.optimizer.steps
    if isinstance(config, ServeConfig):
        assert isinstance(config.fusion, Path)
        fusion = load(config.fusion, FusionConfig)
        roles = {member.role for member in (*fusion.members, fusion.judge, fusion.synthesizer) if member}
        assert roles <= {None, "base", *config.roles}


@pytest.mark.parametrize("path", [path for path in FILES if path.stem == "fusion"], ids=name)
def test_a_pool_starts_without_a_combiner_and_takes_one_once_it_is_fitted(path: Path, tmp_path: Path) -> None:
    assert load(path, FusionConfig).combiner is None  # a gateway refuses to start without the file
    uncommented = tmp_path / "fusion.yaml"
    uncommented.write_text(re.sub(r"^#( *(?:combiner|abstain_below):)", r"\1", path.read_text(), flags=re.MULTILINE))
    config = load(uncommented, FusionConfig)
    assert config.combiner is not None
    assert f"--out {config.combiner}" in path.read_text()
    assert len({(member.role, member.model) for member in config.members}) > 2, "samples of one model gain nothing"


@pytest.mark.parametrize("family", WORLDS)
def test_the_readme_exports_every_adapter_that_the_server_starts_with(family: str) -> None:
    readme = (CONFIGS / family / "README.md").read_text()
    exported = re.findall(r"mixfuse adapter export \S+ (\S+)", readme)
    roles = load(CONFIGS / family / "serve.yaml", ServeConfig).roles
    adapters = {str(adapter) for adapter in roles.values() if adapter is not None}
    assert adapters <= set(exported)


@pytest.mark.parametrize("path", [path for path in FILES if path.stem != "tasks"], ids=name)
def test_a_config_says_how_it_is_launched_and_what_it_takes(path: Path) -> None:
    head = path.read_text().split("\n\n")[0]
    for word in ("Launch", "Hardware", "Memory", "Tested"):
        assert re.search(rf"^# {word}: +\S.+$", head, re.MULTILINE), f"no line '# {word}: …'"
    launched = re.search(r"configs/\S+\.yaml", head)
    assert launched
    assert (ROOT / launched[0]).is_file()
    assert launched[0].split("/")[1] == path.parent.name


def test_an_adapter_of_the_recipes_fits_the_server_beside_them() -> None:
    for family in WORLDS:
        serve = load(CONFIGS / family / "serve.yaml", ServeConfig)
        for stem in ("domain_sft", "judge_dpo"):
            recipe = load(CONFIGS / family / f"{stem}.yaml", KINDS[stem])
            assert isinstance(recipe, TrainRecipe)
            assert recipe.lora.r <= serve.engine.max_lora_rank
            assert recipe.base == serve.engine.base
            assert recipe.max_length <= serve.engine.max_model_len
            assert recipe.role in serve.roles


@pytest.mark.parametrize("model", KINDS.values(), ids=lambda model: model.__name__)
def test_every_key_is_explained(model: type[Strict]) -> None:
    for group in models_in(model):
        unexplained = set(group.model_fields) - set(meanings(group))
        assert not unexplained, f"{group.__name__}'s docstring does not explain {unexplained}"


@pytest.mark.parametrize("page", [path for path in (ROOT / "docs").glob("*.md") if "<!-- keys:" in path.read_text()])
def test_the_tables_in_the_docs_are_the_models(page: Path) -> None:
    text = page.read_text()
    assert rewritten(text) == text, f"run: python -m mixfuse.app.config_reference docs/{page.name}"


def test_the_training_page_has_a_table_of_every_group_and_no_other() -> None:
    tables = set(
        re.findall(r"<!-- keys: mixfuse\.train\.recipe:(\w+) -->", (ROOT / "docs" / "training.md").read_text())
    )
    models = {group.__name__ for model in (SftRecipe, JudgeRecipe) for group in models_in(model)}
    assert tables == models | {"TrainRecipe"}


def test_the_training_page_names_every_deepspeed_config_and_command() -> None:
    page = (ROOT / "docs" / "training.md").read_text()
    for path in DEEPSPEED:
        assert f"`{path.name}`" in page
    required = {"base": "b", "out": "o", "deepspeed": "d", "optimizer": {"steps": 1}}
    for block in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL):
        SftRecipe.model_validate(required | yaml.safe_load(block))
    commands = [shlex.split(line) for line in page.splitlines() if line.startswith("mixfuse train ")]
    assert len(commands) == 2
    for _, _, stage, config, *overrides in commands:
        load(ROOT / config, {"sft": SftRecipe, "judge": JudgeRecipe}[stage], overrides)


@pytest.mark.parametrize("path", DEEPSPEED, ids=name)
def test_deepspeed_accepts_its_config(path: Path) -> None:
    """DeepSpeed's own parser, which refuses unknown keys of its groups; the trainer fills in what is `auto`."""
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum

    config = json.loads(path.read_text())
    zero = config["zero_optimization"]
    assert zero["stage"] == 3
    filled = fill(
        config, {"train_batch_size": 32, "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 32}
    )
    parsed = DeepSpeedConfig(filled).zero_config
    assert parsed.zero_hpz_partition_size == zero.get("zero_hpz_partition_size", 1)
    assert parsed.zero_quantized_weights == zero.get("zero_quantized_weights", False)
    device = zero.get("offload_param", {}).get("device", "none")
    assert (parsed.offload_param.device if parsed.offload_param else "none") == OffloadDeviceEnum(device)
    broken = json.loads(json.dumps(filled))
    broken["zero_optimization"]["offload_parameters"] = {}
    with pytest.raises(ValueError, match="offload_parameters"):
        DeepSpeedConfig(broken)


def test_the_nvme_buffers_hold_the_largest_partition() -> None:
    """Of Mixtral 8x22B's largest parameter, the fused gate and up projections, on 8 GPUs."""
    config = json.loads((CONFIGS / "deepspeed" / "zero3_nvme_offload.json").read_text())
    experts, inner, hidden = 8, 16384, 6144
    assert config["zero_optimization"]["offload_param"]["buffer_size"] >= experts * 2 * inner * hidden / 8


def fill(config: Any, values: dict[str, int]) -> Any:
    """The config with every `auto` replaced."""
    defaults = {"enabled": True, "gradient_clipping": 1.0}
    if not isinstance(config, dict):
        return config
    return {
        key: values.get(key, defaults.get(key, 1_000_000)) if value == "auto" else fill(value, values)
        for key, value in config.items()
    }
