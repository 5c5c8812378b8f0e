"""What the engines say of themselves, as metrics of the gateway: cache, queue, time to first token, adapters in use.

vLLM counts its cache, queue and times for the engine as a whole; of adapters it says which have requests. The figures
are those of the last comparison (`serve/supervisor.py`), so they are up to `engine.restart.check_s` old.
"""

import logging
import re
from collections.abc import Iterable

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from mixfuse.serve.engine_group import EngineGroup
from mixfuse.serve.roles import RoleTable
from mixfuse.serve.slots import OWNED_BY

logger = logging.getLogger(__name__)

_GAUGES = {
    "vllm:kv_cache_usage_perc": ("mixfuse_engine_kv_cache_usage", "Share of the engine's KV cache that is in use"),
    "vllm:num_requests_running": ("mixfuse_engine_requests_running", "Requests in the engine's batch"),
    "vllm:num_requests_waiting": ("mixfuse_engine_requests_waiting", "Requests in the engine's queue"),
}
_COUNTERS = {
    "vllm:prompt_tokens": ("mixfuse_engine_prompt_tokens", "Tokens that the engine has read"),
    "vllm:generation_tokens": ("mixfuse_engine_generation_tokens", "Tokens that the engine has written"),
    "vllm:num_preemptions": ("mixfuse_engine_preemptions", "Requests that had to give their place in the cache up"),
}
_FIRST_TOKEN = "vllm:time_to_first_token_seconds"  # noqa: S105 - a time
_ADAPTERS = "vllm:lora_requests_info"
_WANTED = re.compile(rf"(?:# \w+ )?(?:{'|'.join((*_GAUGES, *_COUNTERS, _FIRST_TOKEN, _ADAPTERS))})(?:_\w+)?[ {{]")
_LABELS = ("engine", "core")


class EngineMetrics(Collector):
    """The engines' metrics, read at each scrape. An engine is named by its place in the config, a core by vLLM.

    Args:
        engines: The engines.
        table: The roles that they serve.
    """

    def __init__(self, engines: EngineGroup, table: RoleTable) -> None:
        self._engines, self._table = engines, table

    def collect(self) -> Iterable[Metric]:
        """Reads the metrics."""
        ready = GaugeMetricFamily("mixfuse_engine_ready", "1 where an engine takes requests", labels=["engine"])
        active = GaugeMetricFamily(
            "mixfuse_engine_adapter_active",
            "1 for an adapter with requests in an engine, running or waiting",
            labels=["engine", "role", "revision"],
        )
        gauges = {key: GaugeMetricFamily(*names, labels=_LABELS) for key, names in _GAUGES.items()}
        counters = {key: CounterMetricFamily(*names, labels=_LABELS) for key, names in _COUNTERS.items()}
        first = HistogramMetricFamily(
            "mixfuse_engine_time_to_first_token_seconds", "Seconds to the first token in an engine", labels=_LABELS
        )
        for number, replica in enumerate(self._engines.replicas):
            engine = str(number)
            ready.add_metric([engine], float(replica.ready))
            samples = _samples(replica.metrics if replica.ready else "")
            for key, gauge in gauges.items():
                for sample in samples.get(key, []):
                    gauge.add_metric([engine, sample.labels.get("engine", "0")], sample.value)
            for key, counter in counters.items():
                for sample in samples.get(key, []):
                    if sample.name.endswith("_total"):
                        counter.add_metric([engine, sample.labels.get("engine", "0")], sample.value)
            _add_histogram(first, engine, samples.get(_FIRST_TOKEN, []))
            for role, revision in self._active(samples.get(_ADAPTERS, [])):
                active.add_metric([engine, role, revision], 1)
        yield ready
        yield from gauges.values()
        yield from counters.values()
        yield first
        yield active

    def _active(self, samples: list[Sample]) -> list[tuple[str, str]]:
        """(Role, revision) of each adapter in the newest line; the value of a line is its time."""
        if not samples:
            return []
        labels = max(samples, key=lambda sample: sample.value).labels
        text = f"{labels.get('running_lora_adapters', '')},{labels.get('waiting_lora_adapters', '')}"
        parts = [name.rpartition("@") for name in text.split(",") if "@" in name]
        found = sorted({(role, revision.partition(OWNED_BY)[0]) for role, _, revision in parts})
        return [(role, revision) for role, revision in found if role in self._table.names()]


def _samples(text: str) -> dict[str, list[Sample]]:
    """The samples of the families that are passed on, by family."""
    lines = [line for line in text.splitlines() if _WANTED.match(line)]
    try:
        return {family.name: family.samples for family in text_string_to_metric_families("\n".join(lines) + "\n")}
    except ValueError as error:
        logger.debug("an engine's metrics cannot be read: %s", error)
        return {}


def _add_histogram(into: HistogramMetricFamily, engine: str, samples: list[Sample]) -> None:
    for core in dict.fromkeys(sample.labels.get("engine", "0") for sample in samples):
        own = [sample for sample in samples if sample.labels.get("engine", "0") == core]
        buckets = [(sample.labels["le"], sample.value) for sample in own if "le" in sample.labels]
        total = next((sample.value for sample in own if sample.name.endswith("_sum")), 0.0)
        if buckets:
            into.add_metric([engine, core], buckets, total)
