"""Whether fusing helps: a pool's modes on tasks whose answers can be checked, beside what else one could do.

The fair rival of a fused answer is not one call of one member. It is the best member, sampled as often as the whole
pool is and fused by the same judge: `self_fusion`. The best member is chosen on tasks that are not reported.
"""

import asyncio
import hashlib
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import aiohttp
from rich.table import Table

from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.mode_names import FUSED_MODES, model_name
from mixfuse.contracts.progress import bar as progress_bar
from mixfuse.fusion.answering.agreement import text_key
from mixfuse.fusion.calls.failures import CallError
from mixfuse.fusion.calls.pool import all_or_raise, fan_out
from mixfuse.fusion.calls.upstream import Client, http_client
from mixfuse.fusion.config import Agreement, FusedMode, FusionConfig
from mixfuse.fusion.labels.collect import AnyTask
from mixfuse.fusion.measure.statistics import Clusters, Difference, Figure, difference
from mixfuse.fusion.store.cache import Cache

SIGNIFICANT = 0.05


class Answer(NamedTuple):
    """What one request came to.

    Attributes:
        text: None where it failed.
        cost: Dollars, all calls together.
        latency_ms: As the gateway took it.
        tokens: Prompt and completion of all calls.
        failed: The failure's type.
    """

    text: str | None
    cost: float = 0.0
    latency_ms: float = 0.0
    tokens: int = 0
    failed: str | None = None


@dataclass(frozen=True)
class Arm:
    """One way to get answers, on the tasks that are reported.

    Attributes:
        accuracy: Share of right answers; a failed request counts as wrong.
        cost: Dollars a task, on average.
        tokens: Tokens a task, on average.
        latency_ms: Median and 95th percentile of a task; None of an arm nobody waits for (`random_member`, `oracle`).
        failed: Failed requests, by type.
        marks: Of each task, 0 to 1; in the tasks' order.
    """

    accuracy: Figure
    cost: float
    tokens: float
    latency_ms: tuple[float, float] | None
    failed: dict[str, int] = field(default_factory=dict)
    marks: tuple[float, ...] = field(default=(), repr=False)

    def to_json(self) -> dict[str, Any]:
        """One JSON object, without the marks."""
        latency = self.latency_ms and dict(zip(("median", "p95"), self.latency_ms, strict=True))
        figures = {"accuracy": self.accuracy.to_json(), "cost": self.cost, "tokens": self.tokens}
        return {**figures, "latency_ms": latency, "failed": self.failed}


@dataclass(frozen=True)
class Verdict:
    """What to do, and what it rests on.

    Attributes:
        choice: `fuse`, `self_fusion` (the best member, sampled and judged), or `member`.
        mode: Of fusing.
        member: The best member.
        words: The verdict in words.
    """

    choice: Literal["fuse", "self_fusion", "member"]
    mode: FusedMode | None
    member: str
    words: str


@dataclass(frozen=True)
class FusionReport:
    """What an evaluation of fusing came to.

    Attributes:
        tasks: Tasks reported.
        chosen_on: Tasks the best member was chosen on; 0: on the reported ones.
        best_member: Who was right most often there.
        members: Each member alone, as often as the pool asks it; its mean is what asking it once gives.
        modes: The pool, fused.
        self_fusion: The best member sampled as often as the pool is, fused in the same mode by the same judge.
        baselines: `random_member`; `majority` of all members' answers; `oracle`: somebody is right.
        differences: mode → against `best_member`, `self_fusion` and `majority`: the mode minus it.
        gap_closed: mode → the share of the way from the best member to the oracle that it goes; None where there is no
            way to go.
        verdict: What to do.
    """

    tasks: int
    chosen_on: int
    best_member: str
    members: dict[str, Arm]
    modes: dict[FusedMode, Arm]
    self_fusion: dict[FusedMode, Arm]
    baselines: dict[str, Arm]
    differences: dict[FusedMode, dict[str, Difference]]
    gap_closed: dict[FusedMode, Figure | None]
    verdict: Verdict

    def to_json(self) -> dict[str, Any]:
        """One JSON object; every accuracy is `{"value", "low", "high"}`."""
        groups = ("members", "modes", "self_fusion", "baselines")
        return {
            "tasks": self.tasks,
            "chosen_on": self.chosen_on,
            "best_member": self.best_member,
            **{group: {name: arm.to_json() for name, arm in getattr(self, group).items()} for group in groups},
            "differences": {
                mode: {name: one.to_json() for name, one in by_rival.items()}
                for mode, by_rival in self.differences.items()
            },
            "gap_closed": {mode: figure and figure.to_json() for mode, figure in self.gap_closed.items()},
            "verdict": vars(self.verdict),
        }

    def arms(self) -> list[tuple[str, Arm]]:
        """Every arm with its name in words."""
        found: list[tuple[str, Arm]] = [(mode, arm) for mode, arm in self.modes.items()]
        found += [
            (f"{self.best_member}, as often, {mode}", arm) for mode, arm in self.self_fusion.items()
        ]  # equal compute
        found += [(f"{name} alone", arm) for name, arm in self.members.items()]
        return found + [(name.replace("_", " "), arm) for name, arm in self.baselines.items()]

    def table(self) -> Table:
        """The report for the terminal."""
        table = Table(title=f"{self.tasks} tasks; the best member was chosen on {self.chosen_on or 'these'}")
        for header in ("", "right, 95 % interval", "$ a task", "tokens a task", "median s", "p95 s", "failed"):
            table.add_column(header)
        for name, arm in self.arms():
            table.add_row(name, *arm_cells(arm))
        return table


def arm_cells(arm: Arm) -> tuple[str, ...]:
    """An arm's figures as cells: accuracy, dollars, tokens, median and 95th percentile in seconds, failures."""
    latency = ("-", "-") if arm.latency_ms is None else tuple(f"{one / 1000:.2f}" for one in arm.latency_ms)
    failed = ", ".join(f"{count} {kind}" for kind, count in arm.failed.items())
    return str(arm.accuracy), f"{arm.cost:.3g}", f"{arm.tokens:.0f}", *latency, failed or "-"


Answers = dict[str, dict[str, list[Answer]]]
"""Task id → arm → its answers. Arms are called `member NAME`, `MODE` and `self MODE`."""


async def evaluate(
    config: FusionConfig,
    url: str,
    tasks: Sequence[AnyTask],
    *,
    verify: Callable[[AnyTask, str], bool],
    modes: Sequence[FusedMode] = FUSED_MODES,
    same: Agreement = "exact",
    choose_share: float = 0.3,
    parameters: Mapping[str, Any] | None = None,
    concurrency: int = 4,
    cache: Cache,
    served: Mapping[str, Any] | None = None,
    api_key: str | None = None,
    progress: bool = True,
) -> tuple[FusionReport, Answers]:
    """Asks a running gateway in every mode, and its members alone, and works out what that says.

    Args:
        config: The gateway's, for its members and how often each is sampled.
        url: The gateway.
        tasks: What to ask; split by the hash of their prompts.
        verify: Whether an answer to a task is right.
        modes: Those to evaluate.
        same: When two answers are one for the majority vote.
        choose_share: The share of the tasks to choose the best member on; 0: on the reported ones, which flatters it.
        parameters: Sent with every request (`temperature`, `max_tokens`, `seed`).
        concurrency: Requests under way at once; latencies are with so many.
        cache: Entered; answers that are in it are not asked for again.
        served: What else the answers depend on (the roles' revisions): part of the cache's keys.
        api_key: Sent to the gateway.
        progress: Show a bar on stderr.

    Returns:
        The report, and every answer.

    Raises:
        MixfuseError: There are too few tasks, the gateway cannot be reached or refuses, or does not know a member.
    """
    if len({task.id for task in tasks}) < len(tasks):
        raise MixfuseError("two tasks have the same id; give each its own")
    choosing, reported = split(tasks, choose_share)
    members = config.members
    pool_size = sum(member.samples for member in members)
    answers: Answers = {task.id: {} for task in tasks}
    free = asyncio.Semaphore(concurrency)
    with progress_bar(progress) as bar:
        async with http_client() as client:
            gateway = _Gateway(client, url, api_key, cache, {"config": _identity(config), "served": dict(served or {})})
            await gateway.check(config)

            async def one(task: AnyTask, way: _Way, number: int) -> None:
                body = {
                    "model": way.model,
                    "messages": [{"role": "user", "content": task.prompt}],
                    **(parameters or {}),
                }
                if "seed" in body:
                    body["seed"] += number
                async with free:
                    answers[task.id][way.arm][number] = await gateway.ask(body | {"fusion": way.options}, number)
                bar.advance(shown)

            async def ask_all(ways: Sequence[_Way], asked: Sequence[AnyTask]) -> None:
                for task in asked:
                    answers[task.id] |= {way.arm: [Answer(None)] * way.times for way in ways}
                requests = [one(task, way, n) for task in asked for way in ways for n in range(way.times)]
                all_or_raise(await fan_out(requests, quorum=len(requests)))

            rivals = 2 if len(members) > 1 else 1  # one member, sampled and judged, is its own self-fusion
            total = len(tasks) * pool_size + len(reported) * len(modes) * rivals
            shown = bar.add_task("requests", total=total)
            await ask_all([_Way(f"member {one.name}", one.name, {}, one.samples) for one in members], tasks)
            best = _best(config, choosing or reported, answers, verify)
            ways = [_Way(mode, model_name(mode), {}) for mode in modes]
            if rivals > 1:
                again = {"members": [best], "samples": pool_size}
                ways += [_Way(f"self {mode}", model_name(mode), again) for mode in modes]
            await ask_all(ways, reported)
    found = report(reported, answers, config, modes, best=best, chosen_on=len(choosing), verify=verify, same=same)
    return found, answers


def split(tasks: Sequence[AnyTask], choose_share: float) -> tuple[list[AnyTask], list[AnyTask]]:
    """(tasks to choose the best member on, tasks to report), by the hash of their prompts.

    Raises:
        MixfuseError: One of the two would be empty.
    """

    def place(task: AnyTask) -> str:
        return hashlib.sha256(task.prompt.encode(errors="surrogatepass")).hexdigest()

    count = max(1, round(choose_share * len(tasks))) if choose_share else 0
    if len(tasks) <= count:
        raise MixfuseError(
            f"{len(tasks)} tasks are too few: {count} are to choose the best member on, the rest to report"
        )
    chosen = {task.id for task in sorted(tasks, key=place)[:count]}
    return [task for task in tasks if task.id in chosen], [task for task in tasks if task.id not in chosen]


class _Way(NamedTuple):
    """How an arm's answers are asked for."""

    arm: str
    model: str
    options: dict[str, Any]
    times: int = 1


class _Gateway:
    """A running gateway, asked one completion at a time.

    Args:
        client: Shared by all requests.
        url: Of the gateway.
        api_key: Sent where set.
        cache: Answers there are already.
        identity: What else an answer depends on beside the request.
    """

    def __init__(self, client: Client, url: str, api_key: str | None, cache: Cache, identity: dict[str, Any]) -> None:
        self._client, self._url, self._cache, self._identity = client, url.rstrip("/"), cache, identity
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}

    async def check(self, config: FusionConfig) -> None:
        """Looks whether the gateway is there and knows the config's members.

        Raises:
            MixfuseError: It is not, or does not.
        """
        status, content = await self._send("GET", "/v1/models", None)
        if status != 200:
            raise MixfuseError(f"{self._url}/v1/models answered {status}: {_message(content)}")
        known = {model["id"] for model in content["data"]}
        if missing := [member.name for member in config.members if member.name not in known]:
            raise MixfuseError(f"the gateway at {self._url} has no member {missing[0]!r}; name the config it runs with")

    async def ask(self, body: dict[str, Any], sample: int = 0) -> Answer:
        """One completion; failures that another task might not meet are answers, too.

        Args:
            body: The request.
            sample: Which of several answers to the same request this is.

        Raises:
            CallError: The gateway is gone or refuses the request itself.
        """
        body = body | {"fusion": {"expose": "summary", **body["fusion"]}}
        question = {**self._identity, "body": body, "sample": sample}
        if known := self._cache.get(question):
            return Answer(*known.value)
        status, content = await self._send("POST", "/v1/chat/completions", body)
        if status in (400, 401, 403, 404):  # nor will it take the next
            raise CallError("upstream_error", f"{body['model']}: the gateway answered {status}: {_message(content)}")
        tokens = (content.get("usage") or {}).get("total_tokens", 0)
        if status != 200:
            error = content.get("error") or {}
            return Answer(None, tokens=tokens, failed=str(error.get("type", status)))
        told = content["fusion"]
        text = content["choices"][0]["message"]["content"] or ""
        answer = Answer(text, told["cost"], told["latency_ms"], tokens)
        self._cache.put(question, answer)
        return answer

    async def _send(self, method: str, path: str, body: dict[str, Any] | None) -> tuple[int, Any]:
        try:
            async with self._client.request(method, self._url + path, json=body, headers=self._headers) as response:
                return response.status, await response.json(content_type=None)
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            raise CallError("unreachable", f"no gateway answers at {self._url}: {error}") from None


def _message(content: Any) -> str:
    error = content.get("error") if isinstance(content, dict) else None
    return str(error.get("message") if isinstance(error, dict) else error or content)[:300]


def _identity(config: FusionConfig) -> dict[str, Any]:
    """What of a config an answer depends on."""
    return config.model_dump(mode="json", include={"members", "judge", "synthesizer", "modes"})


def _best(
    config: FusionConfig, tasks: Sequence[AnyTask], answers: Answers, verify: Callable[[AnyTask, str], bool]
) -> str:
    """The member that is right most often; of equals the cheaper, then the first."""

    def merit(name: str) -> tuple[float, float]:
        given = [(task, answer) for task in tasks for answer in answers[task.id][f"member {name}"]]
        right = sum(answer.text is not None and verify(task, answer.text) for task, answer in given)
        return right / len(given), -sum(answer.cost for _, answer in given) / len(given)

    return max((member.name for member in config.members), key=merit)


def report(
    tasks: Sequence[AnyTask],
    answers: Answers,
    config: FusionConfig,
    modes: Sequence[FusedMode],
    *,
    best: str,
    chosen_on: int,
    verify: Callable[[AnyTask, str], bool],
    same: Agreement,
) -> FusionReport:
    """Works out the figures; pure.

    Args:
        tasks: Those to report.
        answers: To them, in every arm.
        config: The pool.
        modes: Those that were asked in.
        best: The best member.
        chosen_on: How many tasks it was chosen on.
        verify: Whether an answer is right.
        same: When two answers are one for the majority vote.
    """
    clusters = Clusters([task.prompt for task in tasks])
    names = [member.name for member in config.members]

    def right(task: AnyTask, answer: Answer) -> float:
        return float(answer.text is not None and verify(task, answer.text))

    def arm(of: Callable[[AnyTask], list[Answer]]) -> Arm:
        given = [(task, of(task)) for task in tasks]
        marks = tuple(_mean([right(task, one) for one in several]) for task, several in given)
        every = [one for _, several in given for one in several]
        return Arm(
            clusters.mean(marks),
            _mean([one.cost for one in every]),
            _mean([one.tokens for one in every]),
            _latency([one.latency_ms for one in every if one.failed is None]),
            dict(Counter(one.failed for one in every if one.failed is not None)),
            marks,
        )

    def of_arm(name: str) -> Callable[[AnyTask], list[Answer]]:
        return lambda task: answers[task.id][name]

    def of_all(task: AnyTask) -> list[Answer]:
        return [answer for name in names for answer in answers[task.id][f"member {name}"]]

    members = {name: arm(of_arm(f"member {name}")) for name in names}
    fused = {mode: arm(of_arm(mode)) for mode in modes}
    self_fusion = {mode: arm(of_arm(f"self {mode}")) for mode in modes} if len(names) > 1 else {}
    at_random = tuple(map(_mean, zip(*(one.marks for one in members.values()), strict=True)))
    pool_cost, pool_tokens = (
        _mean([sum(values) for task in tasks for values in [[getattr(one, kind) for one in of_all(task)]]])
        for kind in ("cost", "tokens")
    )
    slowest = _latency([max(one.latency_ms for one in of_all(task)) for task in tasks])
    votes = tuple(_mean([right(task, one) for one in [_majority(of_all(task), same)]]) for task in tasks)
    oracle = tuple(max(right(task, one) for one in of_all(task)) for task in tasks)
    baselines = {
        "random_member": Arm(
            clusters.mean(at_random),
            _mean([one.cost for one in members.values()]),
            _mean([one.tokens for one in members.values()]),
            None,
            marks=at_random,
        ),
        "majority": Arm(clusters.mean(votes), pool_cost, pool_tokens, slowest, marks=votes),
        "oracle": Arm(clusters.mean(oracle), pool_cost, pool_tokens, None, marks=oracle),
    }
    prompts = [task.prompt for task in tasks]
    differences: dict[FusedMode, dict[str, Difference]] = {}
    for mode in modes:
        rivals = {"best_member": members[best], "majority": baselines["majority"]}
        if self_fusion:
            rivals["self_fusion"] = self_fusion[mode]
        differences[mode] = {
            name: difference(prompts, fused[mode].marks, rival.marks) for name, rival in rivals.items()
        }
    return FusionReport(
        tasks=len(tasks),
        chosen_on=chosen_on,
        best_member=best,
        members=members,
        modes=fused,
        self_fusion=self_fusion,
        baselines=baselines,
        differences=differences,
        gap_closed={mode: _gap_closed(clusters, one.marks, members[best].marks, oracle) for mode, one in fused.items()},
        verdict=_verdict(best, fused, differences, pool_size=sum(member.samples for member in config.members)),
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _latency(values: Sequence[float]) -> tuple[float, float] | None:
    """(median, 95th percentile)."""
    ordered = sorted(values)
    if not ordered:
        return None
    return ordered[len(ordered) // 2], ordered[min(len(ordered) - 1, math.ceil(0.95 * len(ordered)) - 1)]


def _majority(given: Sequence[Answer], same: Agreement) -> Answer:
    """The first of the answers that most gave; of as many, the earlier one. A failed answer where all failed."""
    first: dict[str, Answer] = {}
    votes: Counter[str] = Counter()
    for answer in given:
        if answer.text is not None:
            what = text_key(answer.text, same)
            first.setdefault(what, answer)
            votes[what] += 1
    return first[votes.most_common(1)[0][0]] if votes else given[0]


def _gap_closed(
    clusters: Clusters, mode: Sequence[float], best: Sequence[float], oracle: Sequence[float]
) -> Figure | None:
    def closed(rows: Sequence[int]) -> float | None:
        way = sum(oracle[row] - best[row] for row in rows)
        return sum(mode[row] - best[row] for row in rows) / way if way > 1e-9 else None

    return None if closed(range(len(mode))) is None else clusters.of(closed)


def _verdict(
    best: str,
    modes: Mapping[FusedMode, Arm],
    differences: Mapping[FusedMode, Mapping[str, Difference]],
    *,
    pool_size: int,
) -> Verdict:
    """Fuse only where a mode is shown to beat the best member, and equal compute is not shown to beat the mode.

    With several modes the best of them had several chances, so each must pass at its share of the error.
    """
    level = SIGNIFICANT / len(modes)

    def shown(gap: Difference | None, sign: int) -> bool:
        return gap is not None and gap.p < level and (gap.low > 0 if sign > 0 else gap.high < 0)

    better = [mode for mode in modes if shown(differences[mode]["best_member"], 1)]
    mode = max(better or modes, key=lambda one: modes[one].accuracy.value)
    alone, equal = differences[mode]["best_member"], differences[mode].get("self_fusion")
    if not better:
        worse = " It is shown to be worse." if shown(alone, -1) else ""
        words = (
            f"Use {best} alone. No mode is shown to be better; the nearest, {mode}, differs from it by {alone}.{worse}"
        )
        return Verdict("member", None, best, words)
    gain = f"{mode} beats {best} alone by {alone}"
    if equal is None:
        return Verdict("fuse", mode, best, f"Fuse, by {mode}: {gain}.")
    beside = f"beside {best} sampled {pool_size} times and fused in the same way it stands at {equal}"
    if shown(equal, -1):
        words = (
            f"Use {best}, sampled {pool_size} times and judged: {gain}, but {beside}. The other members do not help."
        )
        return Verdict("self_fusion", mode, best, words)
    fair = "" if shown(equal, 1) else " The same compute spent on that one member is not told apart from it."
    return Verdict("fuse", mode, best, f"Fuse, by {mode}: {gain}; {beside}.{fair}")
