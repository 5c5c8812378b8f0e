"""The gateway's Prometheus metrics: counters of finished traces, and gauges that are read at each scrape."""

import operator
import os
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest, values
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from mixfuse.contracts.trace import Trace
from mixfuse.fusion.http.team import Family, Team

if TYPE_CHECKING:
    from mixfuse.fusion.calls.model_limits import Guard
    from mixfuse.fusion.store.traces import TraceStore

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)

# Of several workers the highest counts, not the sum.
_OF_ONE_ENDPOINT = ("mixfuse_circuit_state", "mixfuse_judge_failing")


class Metrics:
    """The metrics of one gateway, in their own registry.

    Labels are names from the config and the kinds in `calls/failures.py`; nothing that a client sends becomes a label.

    Args:
        guards: The models' limits, by name; read at each scrape.
        traces: The trace store; its backlog is a metric.
        team: The worker processes, if there are several; the metrics are those of all.
    """

    def __init__(self, guards: Mapping[str, "Guard"], traces: "TraceStore", team: Team | None = None) -> None:
        self._team = team
        self._states: list[Collector] = []
        self._registry = registry = CollectorRegistry()
        self._children: dict[tuple[Any, ...], Any] = {}
        self._exposed = registry
        if team is not None:
            # Counters of this process go to files, of which the collector reads those of all.
            os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(team.folder)
            values.ValueClass = values.MultiProcessValue()  # type: ignore[no-untyped-call]
            self._exposed = CollectorRegistry()
            MultiProcessCollector(self._exposed, path=str(team.folder))  # type: ignore[no-untyped-call]
            self._exposed.register(_OfAll(self.states, team))
        self.register(_Gauges(guards, traces))
        self._requests = Counter(
            "mixfuse_requests", "Requests that reached a mode", ["mode", "outcome"], registry=registry
        )
        self._refused = Counter(
            "mixfuse_refused_requests", "Requests refused before any model was asked", ["type"], registry=registry
        )
        self._request_seconds = Histogram(
            "mixfuse_request_seconds", "Time to the whole answer", ["mode"], buckets=_SECONDS, registry=registry
        )
        self._calls = Counter("mixfuse_calls", "Attempts at a model", ["member", "stage", "outcome"], registry=registry)
        self._call_seconds = Histogram(
            "mixfuse_call_seconds", "Time of one attempt", ["member"], buckets=_SECONDS, registry=registry
        )
        self._tokens = Counter(
            "mixfuse_tokens", "Tokens of all attempts", ["member", "kind", "estimated"], registry=registry
        )
        self._cost = Counter("mixfuse_cost_dollars", "Dollars of all attempts", ["member"], registry=registry)

    def observe(self, trace: Trace) -> None:
        """Counts a finished request."""
        self._child(self._requests, trace.mode, trace.outcome).inc()
        self._child(self._request_seconds, trace.mode).observe(trace.duration_ms / 1000)
        for call in trace.calls:
            member, usage = call.member, call.usage
            self._child(self._calls, member, call.stage, call.outcome).inc()
            self._child(self._call_seconds, member).observe(call.duration_ms / 1000)
            estimated = "true" if call.estimated else "false"
            if usage.prompt_tokens:
                self._child(self._tokens, member, "prompt", estimated).inc(usage.prompt_tokens)
            if usage.completion_tokens:
                self._child(self._tokens, member, "completion", estimated).inc(usage.completion_tokens)
            if call.cost:
                self._child(self._cost, member).inc(call.cost)

    def _child(self, metric: Any, *labels: str) -> Any:
        """Returns `metric.labels(*labels)` from a cache: the library's look-up checks the labels and takes a lock."""
        key = (id(metric), *labels)
        child = self._children.get(key)
        if child is None:
            child = self._children[key] = metric.labels(*labels)
        return child

    def refused(self, kind: str) -> None:
        """Counts a request that was refused before any model was asked."""
        self._refused.labels(kind).inc()

    def register(self, collector: Collector) -> None:
        """Adds metrics that are read at each scrape."""
        self._states.append(collector)
        if self._team is None:
            self._exposed.register(collector)

    def exposition(self) -> bytes:
        """Returns all metrics in Prometheus' text format."""
        return generate_latest(self._exposed)

    def states(self) -> list[Family]:
        """Returns this process's part of the metrics that are read at each scrape."""
        return [
            Family(
                metric.name,
                metric.type,
                metric.documentation,
                [(one.name, one.labels, one.value) for one in metric.samples],
            )
            for collector in self._states
            for metric in collector.collect()
        ]


class _OfAll(Collector):
    """The metrics of all workers that are read at each scrape: their sums, or of what they share the highest."""

    def __init__(self, own: Callable[[], list[Family]], team: Team) -> None:
        self._own, self._team = own, team

    def collect(self) -> Iterable[Metric]:
        """Reads the metrics."""
        families: dict[str, Family] = {}
        found: dict[str, dict[tuple[str, tuple[tuple[str, str], ...]], float]] = {}
        for family in [*self._own(), *(family for other in self._team.others() for family in other.metrics)]:
            families.setdefault(family.name, family)
            samples = found.setdefault(family.name, {})
            together = max if family.name in _OF_ONE_ENDPOINT else operator.add
            for name, labels, value in family.samples:
                key = (name, tuple(sorted(labels.items())))
                samples[key] = together(samples[key], value) if key in samples else value
        for name, family in families.items():
            metric = Metric(name, family.says, family.kind)
            for (sample, labelled), value in found[name].items():
                metric.add_sample(sample, dict(labelled), value)
            yield metric


class _Gauges(Collector):
    """The state of the models' limits and of the trace store at a scrape."""

    def __init__(self, guards: Mapping[str, "Guard"], traces: "TraceStore") -> None:
        self._guards, self._traces = guards, traces

    def collect(self) -> Iterable[Metric]:
        circuit = GaugeMetricFamily(
            "mixfuse_circuit_state", "Circuit breaker: 0 closed, 1 half-open, 2 open", labels=["member"]
        )
        under_way = GaugeMetricFamily("mixfuse_calls_under_way", "Calls being made", labels=["member"])
        failing = GaugeMetricFamily(
            "mixfuse_judge_failing", "Whether a judge could not judge when it was last asked", labels=["member"]
        )
        queued = GaugeMetricFamily("mixfuse_queue_depth", "Calls waiting for a place", labels=["member"])
        for name, guard in list(self._guards.items()):
            circuit.add_metric([name], guard.circuit)
            under_way.add_metric([name], guard.under_way)
            queued.add_metric([name], guard.queued)
            failing.add_metric([name], guard.dialect.problem is not None)
        yield from (circuit, under_way, queued, failing)
        yield GaugeMetricFamily("mixfuse_trace_backlog", "Traces not in the database yet", value=self._traces.backlog)
        yield CounterMetricFamily(
            "mixfuse_traces_set_aside", "Traces that the database did not take", value=self._traces.set_aside
        )
        yield CounterMetricFamily(
            "mixfuse_traces_unreadable", "Reads of a stored trace that cannot be read", value=self._traces.unreadable
        )
