"""What `mixfuse pairs build` reads: a spec with sources and filters, or one file of pool rows."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from mixfuse.app.verifiers import Verifier
from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.paths import FilePath, Location
from mixfuse.contracts.strict_yaml import Strict, load, validate
from mixfuse.fusion.config import ModelConfig
from mixfuse.train.data.pair_filters import Filters

Kind = Literal["auto", "pool", "references", "labels", "traces", "judge", "synthetic"]
Damage = Literal["truncate", "repeat", "number", "wrong_question"]


class Source(Strict):
    """One source of preferences.

    Attributes:
        kind: `pool`: right against wrong answers of pool rows. `references`: the reference answer against wrong ones.
            `labels`: the choices of people and benchmarks, in any shape of docs/data.md. `auto`: `pool` where the rows
            have `responses`, else `labels`. `traces`: the trace database's feedback. `judge`: a stronger
            judge's choices between a pool's answers. `synthetic`: a right answer against one that was made worse.
        path: The file; for `traces` the database's path or URL.
        name: Name of its pairs; by default the kind for synthetic ones, else the file's name.
        verifier: What marks answers as right (`pool`, `references`, `synthetic`; for `traces` it outweighs feedback):
            `marked` (the rows are marked already), `exact`, `number`, `json` or `regex` against the row's `reference`,
            `{tasks: FILE}`, `{python: module:function}`, `{tests: python}`. See `mixfuse.app.verifiers`.
        judge: For `judge`: the endpoint, as a model in a fusion config: `base_url`, `model`, `api_key_env`.
        candidates: For `judge`: most pairs of a prompt that it is asked about.
        min_agreement: For `traces`: as `mixfuse traces export --min-agreement`.
        days: For `traces`: only traces of the last so many days.
        damage: For `synthetic`: the ways in which right answers are made worse.
        weight: Pairs are left out until the sources with a weight are in this proportion.
        licence: The licence that the data's owner states, for the data card.
    """

    kind: Kind = "auto"
    path: Location
    name: str = ""
    verifier: Verifier = "marked"
    judge: ModelConfig | None = None
    candidates: PositiveInt = 4
    min_agreement: float | None = Field(default=None, ge=0, le=1)
    days: PositiveFloat | None = None
    damage: tuple[Damage, ...] = ("truncate", "repeat", "number", "wrong_question")
    weight: PositiveFloat | None = None
    licence: str | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.kind == "judge") != (self.judge is not None):
            raise ValueError("'judge' (the endpoint) and kind: judge need each other")
        if self.judge is not None and self.judge.base_url is None:
            raise ValueError("'judge' needs 'base_url' and 'model'")
        if ":" in self.name:
            raise ValueError("'name' must not hold a colon")
        return self

    @property
    def label(self) -> str:
        """The name of its pairs."""
        stem = "traces" if self.kind == "traces" else Path(self.path).stem
        return self.name or ("synthetic" if self.kind == "synthetic" else stem).replace(":", "_")


class Hard(Strict):
    """Keeps mostly the training pairs that a judge still gets wrong, for a further round of training.

    Attributes:
        judge: The endpoint of that judge, as a model in a fusion config: `base_url`, `model`, `api_key_env`.
        keep: Share of the pairs that the judge gets right in both orders and that are kept, so that it does not unlearn
            them.
    """

    judge: ModelConfig
    keep: float = Field(default=0.25, ge=0, le=1)

    @model_validator(mode="after")
    def _reachable(self) -> Self:
        if self.judge.base_url is None:
            raise ValueError("'judge' needs 'base_url' and 'model'")
        return self


class PairsSpec(Filters):
    """What `mixfuse pairs build SPEC.yaml` reads: the filters' keys, and those of the sources.

    Attributes:
        sources: Where preferences come from.
        against: Files of evaluation sets; their prompts are never trained on.
        hard: Keep mostly those training pairs that a judge gets wrong or flips, after the filters.
        seed: Seed of every random choice.
    """

    sources: tuple[Source, ...] = Field(min_length=1)
    against: tuple[FilePath, ...] = ()
    hard: Hard | None = None
    seed: int = 0

    @model_validator(mode="after")
    def _distinct_names(self) -> Self:
        names = Counter(source.label for source in self.sources)
        if repeated := [name for name, count in names.items() if count > 1]:
            raise ValueError(f"several sources have the name {repeated[0]!r}; give each its own 'name'")
        return self


def read_spec(path: Path, settings: Mapping[str, Any], overrides: Sequence[str] = ()) -> PairsSpec:
    """Reads a spec, or makes one for a single file of pool rows, which then filters nothing by default.

    Args:
        path: A `.yaml` file, or pool rows.
        settings: Keys that replace those of the spec.
        overrides: `key=value` for a spec.

    Raises:
        MixfuseError: The spec is wrong.
    """
    if path.suffix in (".yaml", ".yml"):
        return load(path, PairsSpec, [*overrides, *(f"{key}={json.dumps(value)}" for key, value in settings.items())])
    if overrides:
        raise MixfuseError(f"{path} is not a spec (.yaml), so {overrides[0]!r} replaces nothing; use options")
    plain = {"sources": [{"path": str(path)}], "balance": [], "near": None}
    return validate({**plain, **settings}, PairsSpec, source=f"mixfuse pairs build {path}")


def refuse_password(database: str) -> None:
    """Refuses a database URL with a password, because the URL is written into output files.

    Raises:
        MixfuseError: The URL holds a password; the message does not repeat it.
    """
    if urlsplit(database).password:
        raise MixfuseError(
            "the trace database's URL holds a password, which would be written into output files; set it in PGPASSWORD "
            "or ~/.pgpass instead"
        )
