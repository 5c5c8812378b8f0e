"""Durations, tolerances and limits that stand in the code lie within bounds that have a reason.

No behaviour test notices such a constant when it is far off: a retry after 1e9 seconds passes every test that sets the
constant to a hundredth of a second, and a tolerance of 50 passes every test with an adapter that fits. So the values
are read from the files. A new duration or tolerance needs an entry here.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import uvicorn

from mixfuse.fusion.calls import upstream
from mixfuse.serve.engine import EngineConfig, environment

ROOT = Path(__file__).parent.parent
FILES = [
    path
    for folder in ("contracts", "fusion", "serve", "train", "mixfuse/app", "mixfuse/cli", "mixfuse/sandbox")
    for path in sorted((ROOT / folder).rglob("*.py"))
]
MUST_BE_LISTED = re.compile(r"_S$|_SECONDS$|TOLERANCE|^BEAT$|^SILENCE$")
UVICORN_KEEP_ALIVE_S = uvicorn.Config("").timeout_keep_alive
"""vLLM and our own gateway are served by uvicorn: it closes a connection that is idle for so long."""


class Bounds(NamedTuple):
    """The least and the greatest value, and why."""

    least: float
    most: float
    reason: str


BOUNDS = {
    # Chat templates, tried in a process of their own.
    "template_trial.PROCESSOR_S": Bounds(
        1, 4, "a long template in use takes a tenth of a second, on a busy machine several times that"
    ),
    "chat_template._TRIAL_WALL_S": Bounds(20, 120, "an interpreter starts within it on a machine that is overloaded"),
    # The gateway and its upstreams.
    "upstream._KEEP_ALIVE_S": Bounds(
        1, UVICORN_KEEP_ALIVE_S - 2, "closed before the other end closes it, also where this process stalls"
    ),
    "upstream._CONNECT_S": Bounds(
        2, 30, "a lost SYN is sent again after 1 s and 3 s; a dead host must not use up 120 s"
    ),
    "responses.LONGEST_RESPONSE": Bounds(
        1 << 20, 1 << 28, "bytes; a long answer fits, a hundred of them fit in memory"
    ),
    "responses.MOST_TOKENS": Bounds(20_000_000, 1 << 31, "above the longest contexts; a million sums fit in 63 bits"),
    "responses.LONGEST_RETRY_AFTER_S": Bounds(3600, 604_800, "an endpoint may ask to come back tomorrow"),
    "bounded_json.MAX_DEPTH": Bounds(50, 150, "levels; pydantic reads 200, and a trace adds some"),
    "gateway._LEAVE_S": Bounds(1, 10, "probes of Kubernetes and of load balancers give up after some seconds"),
    "keys._REFRESH_S": Bounds(0.1, 2, "docs/operations.md: a revoked key is refused within two seconds"),
    "keys._AGAIN_S": Bounds(0.005, 0.2, "a commit takes milliseconds; all tries end before the next refresh"),
    "team._WRITE_S": Bounds(0.1, 2, "what a worker says of itself is seconds old at most; each write wakes it"),
    "runs._SILENT_S": Bounds(60, 1800, "a slow step or an evaluation of a live run takes minutes, not an hour"),
    "team._SILENT_S": Bounds(3, 30, "several writes; a worker that stands still is named soon"),
    "workers._END_S": Bounds(11, 30, "after the drain, traces get gateway._LEAVE_S and traces._CLOSE_S"),
    "workers._AGAIN_S": Bounds(0.1, 10, "a worker that cannot start is tried again, but not in a busy loop"),
    "server._LOOK_S": Bounds(0.001, 0.1, "a worker says that it serves without a delay that one sees"),
    "response_cache._PEEK_S": Bounds(0.05, 2, "a request that goes past the cache does not wait long for it first"),
    "auto._USUAL_S": Bounds(1, 30, "an answer of a large model takes seconds"),
    "auto._QUICKEST_S": Bounds(0.001, 0.1, "no endpoint answers quicker; only keeps a division from zero"),
    "sessions.LASTS_S": Bounds(3600, 86_400, "a working day; a browser left open is logged out by the next"),
    "connections._LINGER_S": Bounds(0.5, 10, "a client that still sends gets its answer; then it is cut"),
    # Traces.
    "traces._OTHERS_S": Bounds(1, 5, "a worker that was killed is replaced by then; a read does not wait longer"),
    "traces._LOOK_S": Bounds(0.001, 0.05, "less than traces._COLLECT_S, for which it waits"),
    "traces._COLLECT_S": Bounds(0.001, 1, "a trace is in the database soon"),
    "traces._RETRY_S": Bounds(0.1, 10, "a database that is back is used again within seconds"),
    "frame._ANSWER_S": Bounds(5, 10, "docs/failures.md: who needs the database is answered within ten seconds"),
    "frame._WRITTEN_S": Bounds(0.1, 5, "a page without the last trace is better than no page, or a late one"),
    "frame._REST_S": Bounds(0.01, 1, "a hundred thousand older traces are in the lists within minutes"),
    "trace_facts._SEARCH_S": Bounds(0.05, 0.25, "a list is there within 300 ms; a long search goes on page by page"),
    "traces._PURGE_S": Bounds(60, 86_400, "the retention is given in days"),
    "traces._CLOSE_S": Bounds(1, 15, "Docker kills a process 10 s after SIGTERM, Kubernetes after 30 s"),
    "traces._ANSWER_S": Bounds(5, 10, "docs/failures.md: who needs the database is answered within ten seconds"),
    "roles_store._ANSWER_S": Bounds(10, 30, "docs/failures.md: /admin within thirty"),
    "engine_lease._LASTS_S": Bounds(15, 120, "several renewals; a killed gateway's successor does not wait long"),
    "engine_lease._RENEW_S": Bounds(1, 10, "several times before the lease ends"),
    "engine_lease._LOOK_S": Bounds(0.05, 1, "a swap ends soon after the last gateway has followed"),
    "server._BURY_S": Bounds(1, 30, "what a killed gateway leaves takes places in the engines"),
    "server._SAY_S": Bounds(0.05, 1, "a swap waits for it at another gateway"),
    "database._CLOSE_S": Bounds(1, 10, "Docker kills a process 10 s after SIGTERM, Kubernetes after 30 s"),
    "traces._MOST_TRIES": Bounds(2, 10, "a trace is set aside within seconds, but not for one lost connection"),
    "traces._REDACT_S": Bounds(0.5, 5, "a client waits for it; a megabyte takes milliseconds"),
    "response_format.CHECK_S": Bounds(0.2, 5, "a client waits for it; the schemas of tools take milliseconds"),
    "response_format.MAX_SCHEMA_BYTES": Bounds(100_000, 1 << 18, "OpenAI takes 120 000; a megabyte takes 4 s"),
    "traces._PURGE_ROWS": Bounds(50, 5000, "rows; a read that waits for their removal waits for milliseconds"),
    "traces._LONGEST_LIST": Bounds(1 << 20, 1 << 27, "bytes of one answer"),
    "traces._BATCH": Bounds(10, 10_000, "rows of one transaction"),
    "traces._MOST_WAITING": Bounds(1000, 200_000, "traces of some 10 KB that are held in memory"),
    "spool.SEGMENT_BYTES": Bounds(1 << 16, 1 << 28, "one file of the spool is read into memory at the start"),
    # The engine and its roles.
    "engine._STOP_GRACE_S": Bounds(5, 60, "vLLM takes some seconds to give its GPU memory back"),
    "engine._GONE_S": Bounds(30, 600, "a driver frees 80 GB in seconds, a full host in a minute"),
    "engine._LOOK_S": Bounds(0.02, 1, "a restart is not held up, and nvidia-smi not asked in a busy loop"),
    "supervisor.RETRY_S": Bounds(10, 600, "a refused adapter is hashed and loaded again, which stalls the engine"),
    "following.RETRY_S": Bounds(10, 600, "a version that could not be followed is tried again within minutes"),
    "watch._MAX_TRIES": Bounds(2, 10, "an adapter that the engine refuses is not loaded for ever"),
    "probes._TIMES_NOISE": Bounds(1.5, 10, "an adapter that the engine ignores moves nothing beyond the noise"),
    "probes._SHARE": Bounds(
        0.02, 0.2, "of a busy engine's time: few requests meet a probe, and a swap ends in minutes"
    ),
    "probes._LOOK_S": Bounds(0.05, 2, "an engine that has become idle is not left so"),
    "probes._MOST_PAUSED_S": Bounds(30, 300, "with the probes well below client._CHANGE_S"),
    "agreement._LOW_BATCH_TOLERANCE": Bounds(0.02, 0.3, "nats; another batch takes another kernel below float32"),
    "agreement.LOW_TOLERANCE": Bounds(0.005, 0.05, "nats; below a trained adapter's effect; the base's drift is added"),
    "agreement.UNKNOWN_TOLERANCE": Bounds(0.2, 1, "nats; an unlikely token is a few tenths off in bfloat16"),
    "server._HUB_POLL_S": Bounds(10, 600, "the Hugging Face Hub limits the rate of requests"),
    "hub._ANSWER_S": Bounds(2, 60, "a Hub that is away is reported, not waited for"),
    "client._READ_S": Bounds(5, 120, "reading the role table takes no time"),
    "client._CHANGE_S": Bounds(60, 3600, "a swap answers once the old revision is drained"),
    "gates._CHECK_S": Bounds(0.05, 5, "a canary that breaks its limits is stopped within seconds"),
    "roles_commands._POLL_S": Bounds(0.05, 5, "a person waits in front of the command"),
    "loop._POLL_S": Bounds(0.05, 30, "a gate takes minutes"),
    # Training.
    "adapter.PARITY_TOLERANCE": Bounds(1e-5, 1e-2, "float32 against float32"),
    "embedded_base.LOGIT_TOLERANCE": Bounds(1e-5, 1e-2, "float32 against float32"),
    "heartbeat.BEAT": Bounds(1, 10, "several beats within SILENCE"),
    "heartbeat.SILENCE": Bounds(20, 50, "a dead process ends the job within a minute; a busy disk does not"),
    "doctor.JOIN_SECONDS": Bounds(30, 600, "the machines of a job start minutes apart at most"),
}


def value_of(node: ast.expr | None) -> float | None:
    """The number that an expression of numbers comes to, such as `64 << 20`."""
    if node is None or not all(
        isinstance(part, ast.Constant | ast.BinOp | ast.UnaryOp | ast.operator | ast.unaryop) for part in ast.walk(node)
    ):
        return None
    value = eval(compile(ast.Expression(node), "", "eval"), {"__builtins__": {}})
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def assignments(body: list[ast.stmt]) -> Iterator[tuple[str, float]]:
    """Names and numbers that the statements of a module or a class assign."""
    for statement in body:
        targets = statement.targets if isinstance(statement, ast.Assign) else []
        if isinstance(statement, ast.AnnAssign):
            targets = [statement.target]
        for target in targets:
            assert isinstance(statement, ast.Assign | ast.AnnAssign)
            value = value_of(statement.value)
            if isinstance(target, ast.Name) and value is not None:
                yield target.id, value


TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}
CONSTANTS = [(f"{path.stem}.{name}", value) for path, tree in TREES.items() for name, value in assignments(tree.body)]


def test_every_duration_and_tolerance_has_bounds() -> None:
    names = {name for name, _ in CONSTANTS}
    assert not {name for name in names if MUST_BE_LISTED.search(name.partition(".")[2])} - BOUNDS.keys()
    assert not BOUNDS.keys() - names, "these bounds are of constants that are gone"


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, value in CONSTANTS if name in BOUNDS])
def test_a_constant_is_within_its_bounds(name: str, value: float) -> None:
    least, most, reason = BOUNDS[name]
    assert least <= value <= most, reason


def test_a_dead_process_ends_the_job_within_a_minute() -> None:
    beat, silence = dict(CONSTANTS)["heartbeat.BEAT"], dict(CONSTANTS)["heartbeat.SILENCE"]
    assert 3 * beat < silence
    assert silence + 2 * beat < 60


def waits() -> Iterator[tuple[str, float]]:
    """Every duration given as a number: `sleep(0.2)`, `timeout=5`, the default of a field or an argument."""
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            named: list[tuple[str, ast.expr | None]] = []
            if isinstance(node, ast.Call):
                function = ast.unparse(node.func).rpartition(".")[2]
                named = [(keyword.arg or "", keyword.value) for keyword in node.keywords]
                if function in ("sleep", "timeout") and node.args:
                    named.append(("timeout", node.args[0]))
            elif isinstance(node, ast.AnnAssign):
                named = [(ast.unparse(node.target), node.value)]
            elif isinstance(node, ast.arguments):
                positional = [*node.posonlyargs, *node.args]
                with_default = positional[len(positional) - len(node.defaults) :]
                named = [(a.arg, default) for a, default in zip(with_default, node.defaults, strict=True)]
                named += [(a.arg, default) for a, default in zip(node.kwonlyargs, node.kw_defaults, strict=True)]
            for name, expression in named:
                value = value_of(expression)
                if value is not None and re.search(r"(^|_)(timeout|delay)$|_m?s$", name):
                    yield f"{path.relative_to(ROOT)}:{name}", value / (1000 if name.endswith("_ms") else 1)


def test_no_wait_is_longer_than_an_hour() -> None:
    found = list(waits())
    assert len(found) > 20
    assert not [(where, seconds) for where, seconds in found if not 0 <= seconds <= 3600]


def test_engines_keep_idle_connections_longer_than_the_gateway() -> None:
    seconds = float(environment(EngineConfig(base=Path("base")), cpu=True)["VLLM_HTTP_TIMEOUT_KEEP_ALIVE"])
    assert seconds > 10 * upstream._KEEP_ALIVE_S
