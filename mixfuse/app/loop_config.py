"""What `mixfuse loop` reads: its config, group by group."""

from typing import Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from mixfuse.app.pairs_spec import Source
from mixfuse.app.verifiers import ByTasks
from mixfuse.contracts.paths import FilePath, Location
from mixfuse.contracts.strict_yaml import Strict
from mixfuse.train.data.pair_filters import Filters

FEEDBACK = "feedback"
"""The name of the pairs that a round builds from its traces."""


class Traces(Strict):
    """Which traces a round learns from.

    Attributes:
        database: The gateway's `trace_db`: a path or a URL.
        tasks: Tasks whose verifiers outweigh feedback for traces with their prompts.
        min_agreement: Feedback of users who agree with the others less often is ignored; see `mixfuse traces export`.
        settle_s: A round takes only traces that are at least this old, in seconds. People need time to give feedback,
            and a request that is still under way, or waits in a gateway's spool, would otherwise be in no round.
        min_rows: With fewer new traces that have a label there is no round; they wait for the next.
    """

    database: Location
    tasks: ByTasks | None = None
    min_agreement: float | None = Field(default=0.5, ge=0, le=1)
    settle_s: float = Field(default=600.0, ge=0)
    min_rows: PositiveInt = 100


class Pairs(Filters):
    """How the round's pairs are filtered (see `train/data/pair_filters.py`), and further training data.

    Attributes:
        dev_share: Share of the prompts that are held out from training; those of the fresh traces are evaluated on.
        sources: Further sources, as in a spec of `mixfuse pairs build`. They anchor the judge against bad feedback.
        weight: Weight of the round's own pairs, if the sources have weights.
        seed: Seed of every random choice.
    """

    dev_share: float = Field(default=0.25, gt=0, lt=1)
    sources: tuple[Source, ...] = ()
    weight: PositiveFloat | None = None
    seed: int = 0


class Promote(Strict):
    """What a new judge must achieve to be promoted.

    Attributes:
        measure: The measure to compare, over the pairs that people did not call a tie; see `mixfuse eval judge`.
        margin: On the frozen set the new judge must be better by more than this: the lower end of the 95 % interval of
            the paired difference must lie above it.
        alpha: The paired test's p-value must not be above this.
        min_prompts: With fewer prompts in the frozen set, no judge is promoted.
        min_fresh: With fewer prompts among the fresh traces, these are not evaluated.
    """

    measure: Literal["both_orders_correct", "order_averaged"] = "both_orders_correct"
    margin: float = Field(default=0.0, ge=0, lt=1)
    alpha: float = Field(default=0.05, gt=0, le=0.5)
    min_prompts: PositiveInt = 50
    min_fresh: PositiveInt = 20


class Server(Strict):
    """The running server whose judge is improved.

    Attributes:
        url: Address of the server.
        role: The judge's role.
        shadow: Number of live requests that both judges judge before the swap; null: the judge is swapped at once.
        timeout_s: Longest wait for these requests, in seconds.
    """

    url: str = "http://127.0.0.1:8080"
    role: str = "judge"
    shadow: PositiveInt | None = None
    timeout_s: PositiveFloat = 3600.0


class Combining(Strict):
    """How a round fits a combiner, and what it must achieve to be promoted.

    Attributes:
        file: The gateway's `combiner`. A promoted one takes its place; see `mixfuse combiner swap`.
        frozen: Recorded pools with marks that decide, as `pool collect` writes them. They are never fitted to.
        data: Further recorded pools to fit to. They anchor the combiner against bad feedback.
        prices: A YAML or JSON file of members and dollars an answer.
        agreement: What makes two answers equal; unset: as the rows suggest.
        target: The confidence that the gateway asks for (`modes.target`); the two are compared at it.
        margin: The lower end of the 95 % interval of the paired difference must lie above it, in right answers.
        alpha: The paired test's p-value must not be above this.
        most_ece: Its calibration error may exceed the serving one's by this.
        min_questions: With fewer questions in the frozen set, no combiner is promoted.
        min_fresh: With fewer marked live traces, these are not compared.
    """

    file: FilePath
    frozen: tuple[FilePath, ...] = Field(min_length=1)
    data: tuple[FilePath, ...] = ()
    prices: FilePath | None = None
    agreement: Literal["exact", "number", "json", "choice"] | None = None
    target: float = Field(default=0.9, gt=0, lt=1)
    margin: float = Field(default=0.0, ge=0, lt=1)
    alpha: float = Field(default=0.05, gt=0, le=0.5)
    most_ece: float = Field(default=0.03, ge=0, lt=1)
    min_questions: PositiveInt = 200
    min_fresh: PositiveInt = 50


class LoopConfig(Strict):
    """What `mixfuse loop` reads. A round trains a judge (`recipe`), fits a combiner (`combiner`), or both.

    Attributes:
        rounds: Folder of the rounds.
        traces: Where feedback comes from.
        frozen: Files of labelled pairs that decide on the judge, in any shape that `mixfuse eval judge` reads. Their
            prompts are never trained on.
        recipe: The judge's training recipe; unset: no judge is trained. The round replaces its `data`,
            `evaluation.data` and `out`.
        overrides: `key=value` for the recipe.
        pairs: Filters and further sources.
        promote: What a new judge must achieve.
        server: The server to swap on. null: the decision names a promoted judge, and nothing is swapped.
        judge: Without a server: the adapter directory that serves, null for the base. After a promotion it is the
            promoted adapter.
        parity: Compare the new adapter in vLLM with PEFT before it is evaluated.
        combiner: How a combiner is fitted; unset: none is.
    """

    rounds: FilePath
    traces: Traces
    frozen: tuple[FilePath, ...] = ()
    recipe: FilePath | None = None
    overrides: tuple[str, ...] = ()
    pairs: Pairs = Pairs()
    promote: Promote = Promote()
    server: Server | None = Server()
    judge: FilePath | None = None
    parity: bool = True
    combiner: Combining | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.recipe is None and self.combiner is None:
            raise ValueError("name a 'recipe' to train a judge, or a 'combiner' to fit one")
        if self.recipe is not None and not self.frozen:
            raise ValueError("'frozen' is missing: files of labelled pairs that decide whether the judge is promoted")
        if any(source.label == FEEDBACK for source in self.pairs.sources):
            raise ValueError(f"pairs.sources: {FEEDBACK!r} is the name of the round's own pairs; choose another")
        if self.server is not None and self.judge is not None:
            raise ValueError("'judge' needs server: null; a running server reports itself which judge serves")
        return self
