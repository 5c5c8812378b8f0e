"""The fusion config: the pool, the judge, the synthesizer, and the limits of requests and calls."""

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    HttpUrl,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from mixfuse.contracts.judge_protocol import MAX_CHARS
from mixfuse.contracts.linear_patterns import Pattern
from mixfuse.contracts.mode_names import FUSED_MODES, MODEL_PREFIX
from mixfuse.contracts.paths import FilePath, Location
from mixfuse.contracts.strict_yaml import Strict

Positive = Annotated[float, Field(gt=0, le=1e12)]


_THE_GATEWAYS = frozenset({"model", "messages", "stream", "n"})
_HEADER = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
_HEADER_VALUE = re.compile(r"[\x20-\x7e]*")
_VARIABLE = re.compile(r"\$\{([A-Za-z_]\w*)\}")
_OWN_HEADERS = frozenset({"content-type", "content-length", "transfer-encoding", "connection", "host", "expect"})


def _database(url: str) -> str:
    """Checks a database's path or URL without loading the database layer."""
    scheme, separator, _ = url.partition("://")
    if separator and scheme.partition("+")[0] not in ("sqlite", "postgresql", "postgres"):
        raise ValueError(f"use a path, a sqlite:///… URL or a postgresql://… URL, not {scheme}://…")
    return url


class Price(Strict):
    """Dollars per million tokens.

    Attributes:
        prompt: The price of prompt tokens.
        completion: The price of completion tokens.
    """

    prompt: float = Field(default=0.0, ge=0, le=1e12)
    completion: float = Field(default=0.0, ge=0, le=1e12)

    def cost(self, prompt_tokens: int, completion_tokens: int) -> float:
        """Returns the price of these tokens in dollars."""
        return (self.prompt * prompt_tokens + self.completion * completion_tokens) / 1e6


class Retry(Strict):
    """When a failed call is retried.

    Retried are failures that may pass (no connection, a broken connection, 408, 429 and 5xx), as long as the client
    has not received any part of the answer. Off by default: in a pool the other members are the second attempt, and
    OpenAI's clients repeat a failed request themselves.

    Attributes:
        attempts: The most attempts at one call; 1 means no retry.
        backoff_ms: The wait before the second attempt, in milliseconds. It doubles for each further attempt, and is
            drawn at random between half and all of that. An endpoint's `Retry-After` counts if it is longer.
        max_backoff_ms: The longest wait that doubling leads to, in milliseconds.
    """

    attempts: int = Field(default=1, ge=1, le=10)
    backoff_ms: Positive = 200.0
    max_backoff_ms: Positive = 5_000.0


class Breaker(Strict):
    """When calls to a failing model stop for a while (a circuit breaker).

    Attributes:
        failures: This many failures in a row (time-outs, broken or refused connections, 5xx) open the circuit: calls
            then fail at once, as `circuit_open`.
        cooldown_ms: After this many milliseconds one call is let through; if it succeeds, the circuit closes.
    """

    failures: int = Field(default=5, ge=1)
    cooldown_ms: Positive = 10_000.0


class ModelConfig(Strict):
    """One model to call: a role of the server beside this gateway, or any OpenAI-compatible endpoint.

    Attributes:
        role: A role of the server; "base" is the base model without an adapter.
        base_url: The URL before `/chat/completions`, typically ending in `/v1`.
        model: The model's name at that endpoint.
        api_key_env: The environment variable that holds the endpoint's key; read when a call is made, never
            stored.
        temperature: Sent if the request sets none.
        max_tokens: Sent if the request sets no limit.
        system: Instructions put before the request's own system message.
        defaults: Other parameters, sent if the request sets none of that name.
        extra_body: Parameters sent with every call, in place of the request's own.
        extra_headers: HTTP headers sent with every call. `${NAME}` stands for an environment variable, so that no
            secret is in the config. They are in no log and no trace.
        drop_params: Parameters that are not sent, since the endpoint refuses them.
        rename_params: Parameters that the endpoint knows by another name. That a model wants `max_completion_tokens`
            is also learned from its error.
        thoughts: How the model's thoughts are told from its answer where its endpoint sends both as one text.
            `auto`: by marks such as `<think>`. `open`: every answer begins in the thoughts, up to `</think>`. `none`:
            the text is the answer.
        images: Whether it takes images; a request with images goes only to members that do.
        price: The price of its tokens.
        tokenizer: Its `tokenizer.json` on this machine. What a call may cost at most is then counted by it; otherwise
            each byte of the prompt is reserved as a token.
        timeout_s: The longest that one attempt at a call may take, in seconds.
        retry: When a failed call is retried.
        hedge_after_ms: If the call has brought no text after this many milliseconds, a second one is made beside it;
            the first to answer counts, and both are paid for. Unset: never.
        breaker: When calls to the model stop because it keeps failing; null: never.
        max_concurrency: The most calls under way at once; unset: no limit.
        max_queue: The most calls that wait for one of those places; more are refused, as `queue_full`.
    """

    role: str | None = Field(default=None, min_length=1)
    base_url: str | None = None
    model: str | None = Field(default=None, min_length=1)
    api_key_env: str | None = None
    temperature: float | None = Field(default=None, ge=0)
    max_tokens: int | None = Field(default=None, gt=0, le=2**31 - 1)
    system: str | None = None
    defaults: dict[str, Any] = {}
    extra_body: dict[str, Any] = {}
    extra_headers: dict[str, str] = Field(default={}, repr=False)
    drop_params: tuple[str, ...] = ()
    rename_params: dict[str, str] = {}
    thoughts: Literal["auto", "open", "none"] = "auto"
    images: bool = False
    price: Price = Price()
    tokenizer: FilePath | None = None
    timeout_s: Positive = 120.0
    retry: Retry = Retry()
    hedge_after_ms: Positive | None = None
    breaker: Breaker | None = Breaker()
    max_concurrency: int | None = Field(default=None, ge=1)
    max_queue: int = Field(default=64, ge=0)

    @model_validator(mode="after")
    def _role_or_endpoint(self) -> "ModelConfig":
        if (self.role is None) == (self.base_url is None):
            raise ValueError("set exactly one of 'role' and 'base_url' (with 'model')")
        if self.role is not None and (self.model is not None or self.api_key_env is not None):
            raise ValueError("'model' and 'api_key_env' go with 'base_url', not with 'role'")
        if self.base_url is not None:
            if self.model is None:
                raise ValueError("'base_url' needs 'model', the model's name at that endpoint")
            _check_url(self.base_url)
        if self.api_key_env is not None and not os.environ.get(self.api_key_env):
            raise ValueError(f"the environment variable {self.api_key_env} (api_key_env) is not set")
        return self

    @model_validator(mode="after")
    def _wire(self) -> "ModelConfig":
        named = {
            "defaults": self.defaults,
            "extra_body": self.extra_body,
            "drop_params": self.drop_params,
            "rename_params": [*self.rename_params, *self.rename_params.values()],
        }
        for key, names in named.items():
            if taken := [name for name in names if name in _THE_GATEWAYS]:
                raise ValueError(f"{key}: {taken[0]!r} is set by the gateway")
        for name, value in self.extra_headers.items():
            if not _HEADER.fullmatch(name) or name.lower() in _OWN_HEADERS:
                raise ValueError(f"extra_headers: {name!r} is no header that can be set")
            if name.lower() == "authorization" and self.api_key_env is not None:
                raise ValueError("extra_headers: 'authorization' and 'api_key_env' exclude each other")
            for variable in _VARIABLE.findall(value):
                if not os.environ.get(variable):
                    raise ValueError(f"the environment variable {variable} (extra_headers.{name}) is not set")
            if not _HEADER_VALUE.fullmatch(value):
                raise ValueError(f"extra_headers.{name}: a header's value is printable ASCII in one line")
        return self

    @property
    def headers(self) -> tuple[tuple[str, str], ...]:
        """The extra headers, with the values of the environment variables that they name."""
        return tuple(
            (name, _VARIABLE.sub(lambda found: os.environ.get(found[1], ""), value).strip())
            for name, value in self.extra_headers.items()
        )

    @property
    def api_key(self) -> str | None:
        """The endpoint's key, from the environment."""
        return os.environ.get(self.api_key_env) if self.api_key_env else None


class Member(ModelConfig):
    """A model of the pool.

    Attributes:
        name: Its name in traces and answers, and as a model of the gateway.
        samples: The number of answers it gives to one request; each is a candidate.
    """

    name: str = Field(min_length=1)
    samples: int = Field(default=1, ge=1, le=64)


class Judge(ModelConfig):
    """The model that compares candidates.

    Attributes:
        kind: `compare`: a chat model that is shown two answers. `reward`: a model that gives one answer a score; it is
            asked once about each answer, and the difference of two scores is the log-odds (Bradley-Terry).
        route: Where a `reward` model gives its scores, as vLLM does: `/classify`, `/pooling` or `/score` of the server
            at `base_url`. `auto`: the first of the three that the server has.
        verdicts: How its verdicts are read. `logprobs`: from one token's log-probabilities, which takes only a prefill.
            `parsed`: from a JSON object that it writes, for endpoints without log-probabilities. `rationale`: from the
            end of a rationale that it writes first. `auto`: `logprobs`, or `parsed` once the endpoint has shown that
            it gives none. Each verdict in a trace says how it was read.
        batch: Whether all verdicts of a round are asked for in one call where the endpoint can answer it, as vLLM's
            `/v1/chat/completions/batch` does.
    """

    kind: Literal["compare", "reward"] = "compare"
    route: Literal["auto", "classify", "pooling", "score"] = "auto"
    verdicts: Literal["auto", "logprobs", "parsed", "rationale"] = "auto"
    batch: bool = True

    @model_validator(mode="after")
    def _of_one_kind(self) -> "Judge":
        if self.kind == "compare" and self.route != "auto":
            raise ValueError("'route' goes with kind: reward")
        if self.kind == "reward":
            if self.base_url is None:
                raise ValueError("kind: reward needs 'base_url' and 'model'; a role writes text and gives no scores")
            texts = {
                "verdicts",
                "batch",
                "system",
                "temperature",
                "max_tokens",
                "defaults",
                "thoughts",
                "hedge_after_ms",
            }
            if given := sorted(texts & self.model_fields_set):
                raise ValueError(
                    f"{given[0]!r} is for judges that write; a reward model (kind: reward) has scores alone"
                )
        return self


def _fused_mode(name: str) -> str:
    if name not in FUSED_MODES:
        raise ValueError(f"there is no mode {name!r}; the modes are {', '.join(FUSED_MODES)}")
    return name


FusedMode = Annotated[str, AfterValidator(_fused_mode)]
"""The name of a mode that fuses the answers of a pool."""

Expose = Literal["none", "summary", "full"]
OnJudgeError = Literal["first", "fail"]
Prefer = Literal["cost", "latency"]
Agreement = Literal["never", "exact", "number", "json", "choice"]


class Modes(Strict):
    """How long the modes wait, and how they decide.

    Attributes:
        min_responses: The quorum: with fewer answers than this the request fails.
        grace_ms: The wait for the other members once the quorum is met, in milliseconds; unset: until the deadline.
        deadline_ms: The wait for members after the request began, in milliseconds; all rounds of a debate share it.
        max_cost: The most dollars that one request may cost, all calls together; unset: no limit.
        max_rounds: The most rounds of revisions in a debate.
        debate_ending: The mode that makes one answer from a debate's last round.
        agreement: When candidates agree, so that no judge is needed and a debate ends: if they are equal as text (white
            space aside), in their last number, as JSON, or in the option they choose; `never`: not at all.
        on_judge_error: What follows if the judge fails: the first candidate in the config's order, or an error.
        tools: What `merge` and `debate` do with a request that has tools, since a text written anew calls none: the
            first member answers alone, or the request is refused.
        cite: Whether `merge` names the candidates that each paragraph drew on.
        analysis: Whether the synthesizer of `merge` first writes down where the candidates agree, contradict each other
            and leave gaps, and then the answer from that; one more call.
        max_candidate_chars: The most characters of one answer that the judge and the synthesizer are shown.
        expose: How much the answer's `fusion` object tells the client.
        include_reasoning: Whether the answer carries what the model that wrote it thought, as `reasoning_content`.
        target: In `auto`, the confidence at which no further member is asked.
        prefer: In `auto`, whether members are asked in the order that gains most for its price (`cost`), or per second
            (`latency`).
        width: In `auto`, how many members are asked at once; unset: one for `cost`, all for `latency`.
        patience_ms: In `auto`, how long an answer is waited for, in milliseconds, before the next member is asked
            beside it.
        escalate: In `auto`, what follows where everybody was asked and the answer is not sure enough: nothing, an
            answer that the synthesizer writes from theirs (`merge`), or a round in which the members read each
            other's answers (`debate`), if they are different models.
        abstain_below: In `auto`, the confidence below which an answer is marked as `low_confidence`; needs `combiner`.
        on_abstain: What follows below it: the answer with that mark, or an error.
        explore: In `auto`, the share of requests in which every member is asked, so that a combiner can be fitted to
            the traces without bias.
        keep_alive_ms: The longest silence of a stream, in milliseconds, before a comment is sent to keep it open.
        cache: Whether a request that asks exactly the same again, with the same API key, gets the answer that was given
            before, at no cost.
        cache_ttl_s: For how long an answer is kept, in seconds.
    """

    min_responses: int = Field(default=1, ge=1, le=4096)
    grace_ms: float | None = Field(default=None, ge=0, le=1e12)
    deadline_ms: Positive = 120_000.0
    max_cost: Positive | None = None
    max_rounds: int = Field(default=2, ge=1, le=10)
    debate_ending: FusedMode = "best_of"
    agreement: Agreement = "exact"
    on_judge_error: OnJudgeError = "first"
    tools: Literal["primary", "refuse"] = "primary"
    cite: bool = False
    analysis: bool = False
    max_candidate_chars: int = Field(default=MAX_CHARS, ge=200, le=MAX_CHARS)
    expose: Expose = "summary"
    include_reasoning: bool = False
    target: float = Field(default=0.9, gt=0, le=1)
    prefer: Prefer = "cost"
    width: int | None = Field(default=None, ge=1, le=64)
    patience_ms: Positive = 15_000.0
    escalate: Literal["nothing", "merge", "debate"] = "nothing"
    abstain_below: float | None = Field(default=None, gt=0, le=1)
    on_abstain: Literal["mark", "refuse"] = "mark"
    explore: float = Field(default=0.0, ge=0, le=1)
    keep_alive_ms: Positive = 1000.0
    cache: bool = False
    cache_ttl_s: Positive = 3600.0


class Caps(Strict):
    """The most that a request may ask for; more is refused by name. Presets are the operator's own and may have more.

    Attributes:
        calls: The most calls that one request may plan, with all samples, rounds and verdicts; for presets too.
        samples: The most answers of one member.
        rounds: The most rounds of revisions in a debate.
        deadline_ms: The longest wait for members, in milliseconds.
    """

    calls: int = Field(default=512, ge=1, le=100_000)
    samples: int = Field(default=16, ge=1, le=64)
    rounds: int = Field(default=10, ge=1, le=10)
    deadline_ms: float = Field(default=600_000.0, gt=0, le=86_400_000)


def refuse_disguised_numbers(cls: type[BaseModel], value: Any, info: ValidationInfo) -> Any:
    """Refuses text and `true` where a number belongs, which pydantic would convert; a validator of all fields.

    Raises:
        ValueError: The field holds numbers alone, and the value is none.
    """
    kinds = _kinds(cls.model_fields[info.field_name or ""].annotation)
    if isinstance(value, bool | str) and kinds & {int, float} and not kinds & {bool, str}:
        raise ValueError(f"must be a number, not {value!r}"[:100])
    return value


def _kinds(annotation: Any) -> set[Any]:
    inner = get_args(annotation)
    return {annotation} if not inner else set().union(*map(_kinds, inner))


class FusionOptions(Strict):
    """What a request may set in its `fusion` object, and a preset for the requests that name it.

    Attributes:
        mode: The mode, instead of the one that the model name stands for.
        members: The members to ask, by name.
        judge: The judge, by the name of a member or a role.
        synthesizer: The synthesizer, likewise.
        samples: The number of answers that each member gives.
        min_responses: See `Modes`, as for all below.
        grace_ms: …
        deadline_ms: …
        max_cost: …
        max_rounds: …
        on_judge_error: …
        cite: …
        analysis: …
        expose: …
        include_reasoning: …
        target: …
        prefer: …
        width: …
        domain: The kind of question, as the combiner knows it.
        cache: …
    """

    mode: FusedMode | None = None
    members: tuple[str, ...] | None = Field(default=None, min_length=1)
    judge: str | None = None
    synthesizer: str | None = None
    samples: int | None = Field(default=None, ge=1, le=64)
    min_responses: int | None = Field(default=None, ge=1, le=4096)
    grace_ms: float | None = Field(default=None, ge=0, le=1e12)
    deadline_ms: Positive | None = None
    max_cost: Positive | None = None
    max_rounds: int | None = Field(default=None, ge=1, le=10)
    on_judge_error: OnJudgeError | None = None
    cite: bool | None = None
    analysis: bool | None = None
    expose: Expose | None = None
    include_reasoning: bool | None = None
    target: float | None = Field(default=None, gt=0, le=1)
    prefer: Prefer | None = None
    width: int | None = Field(default=None, ge=1, le=64)
    domain: str | None = None
    cache: bool | None = None

    _numbers = field_validator("*", mode="before")(classmethod(refuse_disguised_numbers))

    def over(self, below: "FusionOptions") -> "FusionOptions":
        """Returns these options, with those below filling in what these leave unset."""
        own = {name: getattr(self, name) for name in self.model_fields_set if getattr(self, name) is not None}
        if below.expose == "none":
            own.pop("expose", None)
            own.pop("include_reasoning", None)  # thoughts tell of the members, too
        return below.model_copy(update=own)

    def settings(self, modes: Modes) -> Modes:
        """Returns `modes` with these options in place of its own; `max_cost` can only be lowered, `none` is final."""
        own = {name: value for name in _IN_BOTH if (value := getattr(self, name)) is not None}
        if modes.expose == "none":
            own.pop("expose", None)
            own.pop("include_reasoning", None)  # thoughts tell of the members, too
        if modes.max_cost is not None and "max_cost" in own:
            own["max_cost"] = min(own["max_cost"], modes.max_cost)
        return modes.model_copy(update=own) if own else modes


_IN_BOTH = frozenset(Modes.model_fields) & frozenset(FusionOptions.model_fields)


class TraceConfig(Strict):
    """What a trace stores, and for how long.

    Attributes:
        retention_days: Traces older than this many days are removed; unset: never.
        redact: Regular expressions without look-around and back-references; their matches in prompts, answers, errors
            and feedback are replaced before anything is stored.
        store_text: Whether prompts and answers are stored. Without them a trace still has calls, tokens, cost, times
            and verdicts, but no preference data can be made from it.
        spool: The folder, on a local disk, of traces that are not in the database yet; unset: beside a SQLite file, or
            a folder for each database in runs/trace-spool.
    """

    retention_days: Positive | None = None
    redact: tuple[str, ...] = ()
    store_text: bool = True
    spool: FilePath | None = None

    @field_validator("redact")
    @classmethod
    def _patterns(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in patterns:
            Pattern(pattern)
        return patterns


class Limits(Strict):
    """What a client may send, and how long it may take.

    Attributes:
        body_bytes: The longest body of a request, in bytes; a longer one is refused with 413.
        body_timeout_s: The longest that a whole body may take to arrive, in seconds; then 408.
        header_bytes: The longest URL and headers of a request together, in bytes; longer ones are refused with 431.
        header_timeout_s: The longest that they may take to arrive, in seconds, from the connection or from their first
            byte; then 408.
        idle_timeout_s: How long a connection is kept between two requests, in seconds.
        write_timeout_s: How long a client may read nothing of an answer that waits for it, in seconds; then the
            connection is cut and the request cancelled.
        connections: The most connections at once. Beyond it the one that has waited longest for the rest of a request
            is closed for a new one, and where there is none the new one is refused with 503. Never more than half of
            the open files that the system allows.
        pipelined: The most requests that may wait on one connection for the answer to the one before.
    """

    body_bytes: int = Field(default=10 << 20, ge=1024, le=1 << 30)
    body_timeout_s: float = Field(default=60.0, gt=0, le=3600)
    header_bytes: int = Field(default=64 << 10, ge=1024, le=1 << 24)
    header_timeout_s: float = Field(default=10.0, gt=0, le=3600)
    # Longer than clients and load balancers keep an idle connection (5 to 60 s), so that none sends a request into a
    # connection that the gateway is closing.
    idle_timeout_s: float = Field(default=75.0, gt=0, le=3600)
    write_timeout_s: float = Field(default=30.0, gt=0, le=3600)
    connections: int = Field(default=4096, ge=1)
    pipelined: int = Field(default=16, ge=0, le=1000)


class OtelConfig(Strict):
    """Where OpenTelemetry spans are sent.

    Attributes:
        endpoint: An OTLP collector's URL for traces over HTTP, e.g. http://127.0.0.1:4318/v1/traces.
        service_name: The gateway's name in the spans.
    """

    endpoint: str
    service_name: str = "mixfuse"

    @field_validator("endpoint")
    @classmethod
    def _http(cls, endpoint: str) -> str:
        _check_url(endpoint, "endpoint")
        return endpoint


class FusionConfig(Strict):
    """A gateway's config file.

    Attributes:
        members: The pool. Its order settles ties; if the judge fails, the first candidate in this order is returned.
        judge: The model that compares candidates; without one `best_of` is refused.
        synthesizer: The model that writes `merge`'s answer; without one `merge` is refused.
        modes: How long the modes wait, and how they decide.
        embeddings: Models for `/v1/embeddings` alone; they are no members of the pool.
        combiner: A file that `mixfuse combiner fit` wrote; `auto` weighs answers by it. It is read again when it
            changes.
        caps: The most that a request may ask for.
        presets: Options by name; a client asks for a preset as for a model.
        openrouter_alias: Whether requests for OpenRouter's Fusion are accepted: the model `openrouter/fusion`, and the
            plugin `fusion` in `plugins`.
        trace_db: The database of traces and API keys: a SQLite file's path, or a URL (postgresql://…; put the password
            into PGPASSWORD or ~/.pgpass).
        traces: What a trace stores, and for how long.
        api_keys: Whether `/v1` needs an API key: "auto" as soon as one has been added, "required", or "off".
        allowed_hosts: Names under which browsers and clients may reach a gateway that asks for no key, beside loopback
            names and IP addresses (`Host` header, without the port); `*` allows every name.
        cors_origins: Web pages that may call the gateway from a browser, such as https://app.example; `*` allows every
            page.
        limits: What a client may send, and how long it may take.
        otel: Where OpenTelemetry spans are sent; unset: nowhere.
        ui: Whether there is a page for people at `/ui`; unset: only where the gateway listens on loopback.
        ui_runs: The folder whose training runs and reports that page shows to the admin; null shows none.
        ui_pairs: A file of pairs of answers for people to vote on, on that page; the votes go into a file beside it.
    """

    members: tuple[Member, ...] = Field(min_length=1)
    judge: Judge | None = None
    synthesizer: ModelConfig | None = None
    modes: Modes = Modes()
    caps: Caps = Caps()
    embeddings: tuple[Member, ...] = ()
    combiner: FilePath | None = None
    presets: dict[str, FusionOptions] = {}
    openrouter_alias: bool = False
    trace_db: Annotated[Location, BeforeValidator(str), AfterValidator(_database)] = "runs/traces.sqlite3"
    traces: TraceConfig = TraceConfig()
    api_keys: Literal["auto", "required", "off"] = "auto"
    allowed_hosts: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    limits: Limits = Limits()
    otel: OtelConfig | None = None
    ui: bool | None = None
    ui_runs: FilePath | None = Path("runs")
    ui_pairs: FilePath | None = None

    @property
    def priced(self) -> bool:
        """Whether any model has a price, so that limits in dollars limit something."""
        return any(model.price != Price() for _, model in self._models)

    @property
    def unpriced(self) -> tuple[str, ...]:
        """The names of the models without a price: what they do is free to budgets in dollars."""
        return tuple(dict.fromkeys(name for name, model in self._models if model.price == Price()))

    @property
    def _models(self) -> list[tuple[str, ModelConfig]]:
        named: list[tuple[str, ModelConfig]] = [(one.name, one) for one in (*self.members, *self.embeddings)]
        others = (("the judge", self.judge), ("the synthesizer", self.synthesizer))
        return named + [(name, model) for name, model in others if model is not None]

    @field_validator("cors_origins")
    @classmethod
    def _origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        for origin in origins:
            if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s]+", origin):
                raise ValueError(f"{origin!r} is no origin; write scheme and host, such as https://app.example")
        return origins

    @model_validator(mode="after")
    def _names_and_quorum(self) -> "FusionConfig":
        names = [member.name for member in (*self.members, *self.embeddings)]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two members are called {name!r}; names must be unique")
            if name.startswith(MODEL_PREFIX):
                raise ValueError(f"member {name!r}: names that begin with {MODEL_PREFIX!r} are modes")
        for preset, options in self.presets.items():
            if preset in names or preset.startswith(MODEL_PREFIX):
                raise ValueError(f"preset {preset!r}: that name is a member's or begins with {MODEL_PREFIX!r}")
            pool = [member.name for member in self.members]
            if unknown := [name for name in options.members or () if name not in pool]:
                raise ValueError(f"preset {preset!r}: there is no member {unknown[0]!r}")
        limited = ["modes"] if self.modes.max_cost is not None else []
        limited += [f"presets.{name}" for name, options in self.presets.items() if options.max_cost is not None]
        if limited and not self.priced:
            raise ValueError(f"{limited[0]}.max_cost limits nothing, since no model has a 'price'; name the prices")
        if self.modes.cache and not self.traces.store_text:
            raise ValueError("modes.cache keeps answers, and traces.store_text: false forbids it; drop one of the two")
        if self.modes.abstain_below is not None and self.combiner is None:
            raise ValueError("modes.abstain_below needs a 'combiner': votes alone do not say how sure an answer is")
        candidates = sum(member.samples for member in self.members)
        if self.modes.min_responses > candidates:
            raise ValueError(
                f"modes.min_responses is {self.modes.min_responses}, but the members give only {candidates}"
            )
        return self


def _check_url(url: str, name: str = "base_url") -> None:
    try:
        TypeAdapter(HttpUrl).validate_python(url)
    except ValidationError:
        raise ValueError(f"{name} {url!r} is not an http(s) URL") from None
