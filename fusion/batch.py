"""Settings that the commands which ask many questions share: where, with which parameters, and where results go."""

from dataclasses import dataclass, field
from pathlib import Path

from mixfuse.fusion.store.cache import Cache


@dataclass(frozen=True)
class Target:
    """A running gateway or server.

    Attributes:
        url: Its address, without `/v1`.
        key: Sent as bearer token where set.
    """

    url: str
    key: str | None = field(default=None, repr=False)

    @property
    def v1(self) -> str:
        """The base URL of its OpenAI API."""
        return f"{self.url.rstrip('/').removesuffix('/v1')}/v1"


@dataclass(frozen=True)
class Sampling:
    """Parameters sent with every request.

    Attributes:
        temperature: None: each member's own.
        max_tokens: The longest answer; None: each member's own.
        seed: Of the first answer to a question; each further answer adds one. None: no seed.
    """

    temperature: float | None = None
    max_tokens: int | None = None
    seed: int | None = None

    def parameters(self, sample: int = 0) -> dict[str, float | int]:
        """The parameters that are set, for one of several answers to a question.

        Args:
            sample: Its number, from 0.
        """
        seed = None if self.seed is None else self.seed + sample
        values = {"temperature": self.temperature, "max_tokens": self.max_tokens, "seed": seed}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True)
class Results:
    """Where the results of an evaluation go.

    Attributes:
        out: The folder of the report and the single answers; None: no report is written.
        cache: The file of answers that are not asked for again; None: one in `out`, or none without `out`.
    """

    out: Path | None = None
    cache: Path | None = None

    def open_cache(self) -> Cache:
        """The cache, to be entered."""
        return Cache(self.cache or (self.out / "cache.sqlite3" if self.out else None))
