"""OpenTelemetry spans of finished requests: one for the request, and a child for each call.

They are made from the finished trace and its times, so they take no time while the request runs. The SDK is loaded
only if `otel` is configured.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.trace import Trace
from mixfuse.fusion.config import OtelConfig

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer


class Spans:
    """Sends spans to a collector over OTLP/HTTP; a thread of the SDK sends them in batches.

    Args:
        config: The collector and the service name.

    Raises:
        MixfuseError: The SDK is not installed.
    """

    def __init__(self, config: OtelConfig) -> None:
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            raise MixfuseError(
                f"otel.endpoint is set, but OpenTelemetry is not installed ({error.name}): pip install 'mixfuse[otel]'"
            ) from error
        # Not the global provider, which two gateways in one process would share.
        self._provider = TracerProvider(resource=Resource.create({"service.name": config.service_name}))
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=config.endpoint, timeout=5)))
        self._tracer: Tracer = self._provider.get_tracer("mixfuse")

    def send(self, trace: Trace, headers: Mapping[str, str]) -> None:
        """Sends the spans of a finished request.

        Args:
            trace: The request's trace; none of its texts are sent.
            headers: The client's headers; their `traceparent` names the parent span.
        """
        from opentelemetry.trace import Status, StatusCode, set_span_in_context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        began_ns = int(trace.created_at * 1e9)

        def at(milliseconds: float) -> int:
            return began_ns + int(milliseconds * 1e6)

        parent = TraceContextTextMapPropagator().extract(headers)
        usage = trace.usage
        attributes: dict[str, Any] = {
            "mixfuse.trace_id": trace.id,
            "mixfuse.mode": trace.mode,
            "mixfuse.reason": trace.reason,
            "mixfuse.cost": trace.cost,
            "gen_ai.operation.name": "chat",
            "gen_ai.request.model": trace.model,
            "gen_ai.usage.input_tokens": usage.prompt_tokens,
            "gen_ai.usage.output_tokens": usage.completion_tokens,
        }
        root = self._tracer.start_span(
            f"fusion {trace.mode}", context=parent, start_time=began_ns, attributes=attributes
        )
        if trace.outcome != "ok":
            root.set_attribute("error.type", trace.outcome)
            root.set_status(Status(StatusCode.ERROR))
        below = set_span_in_context(root)
        for call in trace.calls:
            span = self._tracer.start_span(
                f"{call.stage} {call.member}",
                context=below,
                start_time=at(call.started_ms),
                attributes={
                    "mixfuse.member": call.member,
                    "mixfuse.stage": call.stage,
                    "mixfuse.attempt": call.attempt,
                    "mixfuse.cost": call.cost,
                    "gen_ai.request.model": call.model,
                    "gen_ai.usage.input_tokens": call.usage.prompt_tokens,
                    "gen_ai.usage.output_tokens": call.usage.completion_tokens,
                },
            )
            if call.outcome != "ok":
                span.set_attribute("error.type", call.outcome)
                span.set_status(Status(StatusCode.ERROR))
            span.end(end_time=at(call.started_ms + call.duration_ms))
        root.end(end_time=at(trace.duration_ms))

    def close(self) -> None:
        """Sends the remaining spans and stops."""
        self._provider.shutdown()
