"""Asks a running gateway in every mode, and its members alone; `fusion_report` computes the figures.

The best member is chosen on tasks that are not reported. It is then asked as often as the whole pool, see
`fusion_report`.
"""

import asyncio
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import aiohttp

from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.files import sha256_file
from mixfuse.contracts.mode_names import FUSED_MODES, model_name
from mixfuse.contracts.progress import bar as progress_bar
from mixfuse.contracts.tasks import AnyTask, TaskSet
from mixfuse.fusion.batch import Sampling, Target
from mixfuse.fusion.calls.failures import CallError
from mixfuse.fusion.calls.pool import all_or_raise, fan_out
from mixfuse.fusion.calls.upstream import Client, http_client
from mixfuse.fusion.config import Agreement, FusedMode, FusionConfig
from mixfuse.fusion.measure.fusion_report import Answer, Answers, FusionReport, report
from mixfuse.fusion.store.cache import Cache


@dataclass(frozen=True)
class Design:
    """What an evaluation compares, and how it asks.

    Attributes:
        modes: The modes to evaluate.
        choose_share: The share of the tasks to choose the best member on. With 0 it is chosen on the reported tasks,
            which flatters it.
        sampling: Sent with every request.
        concurrency: Requests in flight at once; latencies are measured at this load.
        same: When two answers count as one for the majority vote.
    """

    modes: Sequence[FusedMode] = FUSED_MODES
    choose_share: float = 0.3
    sampling: Sampling = field(default_factory=Sampling)
    concurrency: int = 4
    same: Agreement = "exact"


async def evaluate(
    config: FusionConfig,
    target: Target,
    tasks: TaskSet[AnyTask],
    design: Design,
    *,
    cache: Cache,
    served: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> tuple[FusionReport, Answers]:
    """Evaluates fusing at a running gateway.

    Args:
        config: The gateway's, for its members and how often each is sampled.
        target: The gateway.
        tasks: The questions; split by the hash of their prompts.
        design: What is compared.
        cache: Open; an answer in it is not asked for again.
        served: What else the answers depend on (the roles' revisions): part of the cache's keys.
        progress: Show a bar on stderr.

    Returns:
        The report, and every answer.

    Raises:
        MixfuseError: There are too few tasks, the gateway cannot be reached or refuses, or does not know a member.
    """
    if len({task.id for task in tasks.tasks}) < len(tasks.tasks):
        raise MixfuseError("two tasks have the same id; give each its own")
    choosing, reported = split(tasks.tasks, design.choose_share)
    members = config.members
    pool_size = sum(member.samples for member in members)
    has_self_fusion = len(members) > 1  # one member, sampled and judged, is its own self-fusion
    answers: Answers = {task.id: {} for task in tasks.tasks}
    total = len(tasks.tasks) * pool_size + len(reported) * len(design.modes) * (2 if has_self_fusion else 1)
    with progress_bar(progress) as bar:
        bar_task = bar.add_task("requests", total=total)
        async with http_client() as client:
            identity = {"config": _identity(config), "served": dict(served or {})}
            gateway = _Gateway(client, target, cache, identity)
            await gateway.check(config)
            slots = asyncio.Semaphore(design.concurrency)

            async def ask(task: AnyTask, arm: _Arm, sample: int) -> None:
                async with slots:
                    body = arm.request(task.prompt, design.sampling, sample)
                    answers[task.id][arm.name][sample] = await gateway.ask(body, sample)
                bar.advance(bar_task)

            async def ask_all(arms: Sequence[_Arm], asked_tasks: Sequence[AnyTask]) -> None:
                for task in asked_tasks:
                    answers[task.id] |= {arm.name: [Answer(None)] * arm.samples for arm in arms}
                requests = [ask(task, arm, n) for task in asked_tasks for arm in arms for n in range(arm.samples)]
                all_or_raise(await fan_out(requests, quorum=len(requests)))

            await ask_all(
                [_Arm(f"member {member.name}", member.name, {}, member.samples) for member in members], tasks.tasks
            )
            priors = accuracies(config, TaskSet(choosing or reported, tasks.verify), answers)
            best = best_member(config, TaskSet(choosing or reported, tasks.verify), answers)
            arms = [_Arm(mode, model_name(mode), {}) for mode in design.modes]
            if has_self_fusion:
                only_best = {"members": [best], "samples": pool_size}
                arms += [_Arm(f"self {mode}", model_name(mode), only_best) for mode in design.modes]
            await ask_all(arms, reported)
    reported_set = TaskSet(reported, tasks.verify)
    figures = report(
        reported_set,
        answers,
        config,
        design.modes,
        best=best,
        chosen_on=len(choosing),
        same=design.same,
        priors=priors,
    )
    return figures, answers


def split(tasks: Sequence[AnyTask], choose_share: float) -> tuple[list[AnyTask], list[AnyTask]]:
    """(tasks to choose the best member on, tasks to report), by the hash of their prompts.

    Raises:
        MixfuseError: One of the two would be empty.
    """

    def rank(task: AnyTask) -> str:
        return hashlib.sha256(task.prompt.encode(errors="surrogatepass")).hexdigest()

    count = max(1, round(choose_share * len(tasks))) if choose_share else 0
    if len(tasks) <= count:
        raise MixfuseError(
            f"{len(tasks)} tasks are too few: {count} are needed to choose the best member, and at least one to report"
        )
    chosen = {task.id for task in sorted(tasks, key=rank)[:count]}
    return [task for task in tasks if task.id in chosen], [task for task in tasks if task.id not in chosen]


def accuracies(config: FusionConfig, tasks: TaskSet[AnyTask], answers: Answers) -> dict[str, float]:
    """Each member's share of right answers."""
    shares = {}
    for member in config.members:
        given = [(task, answer) for task in tasks.tasks for answer in answers[task.id][f"member {member.name}"]]
        right = sum(answer.text is not None and tasks.verify(task, answer.text) for task, answer in given)
        shares[member.name] = right / len(given)
    return shares


def best_member(config: FusionConfig, tasks: TaskSet[AnyTask], answers: Answers) -> str:
    """The member that is right most often; of equals the cheaper, then the first."""
    shares = accuracies(config, tasks, answers)

    def merit(name: str) -> tuple[float, float]:
        given = [answer for task in tasks.tasks for answer in answers[task.id][f"member {name}"]]
        return shares[name], -sum(answer.cost for answer in given) / len(given)

    return max((member.name for member in config.members), key=merit)


class _Arm(NamedTuple):
    """One arm of the comparison, as it is asked for.

    Attributes:
        name: As in `Answers`.
        model: The model's name at the gateway.
        options: The request's `fusion` options.
        samples: Answers to each question.
    """

    name: str
    model: str
    options: dict[str, Any]
    samples: int = 1

    def request(self, prompt: str, sampling: Sampling, sample: int) -> dict[str, Any]:
        """The request's body."""
        return {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            **sampling.parameters(sample),
            "fusion": {"expose": "summary", **self.options},
        }


class _Gateway:
    """A running gateway, asked one completion at a time.

    Args:
        client: Shared by all requests.
        target: The gateway.
        cache: Answers that are known already.
        identity: What else an answer depends on beside the request.
    """

    def __init__(self, client: Client, target: Target, cache: Cache, identity: dict[str, Any]) -> None:
        self._client, self._url, self._cache, self._identity = client, target.url.rstrip("/"), cache, identity
        self._headers = {"Authorization": f"Bearer {target.key}"} if target.key else {}

    async def check(self, config: FusionConfig) -> None:
        """Checks that the gateway can be reached and knows the config's members.

        Raises:
            MixfuseError: It cannot, or does not.
        """
        status, content = await self._send("GET", "/v1/models", None)
        if status != 200:
            raise MixfuseError(f"{self._url}/v1/models answered {status}: {_message(content)}")
        served = {model["id"] for model in content["data"]}
        if missing := [member.name for member in config.members if member.name not in served]:
            raise MixfuseError(f"the gateway at {self._url} has no member {missing[0]!r}; name the config it runs with")

    async def ask(self, body: dict[str, Any], sample: int = 0) -> Answer:
        """One completion. A failure that another task might not meet is an answer, too.

        Args:
            body: The request.
            sample: Which of several answers to the same request this is.

        Raises:
            CallError: The gateway is gone or refuses the request itself.
        """
        question = {**self._identity, "body": body, "sample": sample}
        if cached := self._cache.get(question):
            return Answer(*cached.value)
        status, content = await self._send("POST", "/v1/chat/completions", body)
        if status in (400, 401, 403, 404):  # the gateway would refuse the next request, too
            raise CallError("upstream_error", f"{body['model']}: the gateway answered {status}: {_message(content)}")
        tokens = (content.get("usage") or {}).get("total_tokens", 0)
        if status != 200:
            error = content.get("error") or {}
            return Answer(None, tokens=tokens, failed=str(error.get("type", status)))
        summary = content["fusion"]
        text = content["choices"][0]["message"]["content"] or ""
        answer = Answer(text, summary["cost"], summary["latency_ms"], tokens, confidence=summary.get("confidence"))
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
    """The parts of a config that an answer depends on, with the combiner's content: it may be fitted again."""
    parts = config.model_dump(mode="json", include={"members", "judge", "synthesizer", "modes"})
    if config.combiner is not None and config.combiner.is_file():
        parts["combiner"] = sha256_file(config.combiner)
    return parts
