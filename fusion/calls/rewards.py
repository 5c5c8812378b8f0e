"""Scores of a reward model: one call for each answer, on the routes that vLLM gives such models.

`/classify` and `/pooling` read the conversation with the answer as its last message, through the model's own chat
template. `/score` reads two texts. The scores are asked for without an activation, so that the difference of two of
them is the log-odds that the first answer is the better one (Bradley and Terry, Biometrika 39, 1952).
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from mixfuse.fusion.calls.failures import CallError
from mixfuse.fusion.calls.ledger import Ledger
from mixfuse.fusion.calls.upstream import Client, Endpoint, NoRouteError, Purpose, forward
from mixfuse.fusion.messages import Message, as_question

Route = Literal["auto", "classify", "pooling", "score"]

_ROUTES = ("classify", "pooling", "score")
_LARGEST = 1e6  # a score beyond it is no score of a model but a fault; differences of two stay exact


async def reward(
    client: Client,
    endpoint: Endpoint,
    question: Sequence[Message],
    answer: str,
    *,
    route: Route,
    purpose: Purpose,
    ledger: Ledger,
    more: Mapping[str, Any] | None = None,
) -> float:
    """Asks a reward model for the score of one answer.

    Args:
        client: Shared by all calls.
        endpoint: The model's endpoint; its dialect remembers the route.
        question: The conversation that the answer is the next message of.
        answer: The answer.
        route: The route, or `auto` for the first that the server has.
        purpose: The purpose of the call.
        ledger: Takes the attempts.
        more: Further parameters of the call, from the config.

    Raises:
        CallError: The call failed, or there is not one finite number in the response (`invalid_response`).
    """
    # vLLM has these routes beside `/v1`, not below it.
    root = replace(endpoint, base_url=endpoint.base_url.rstrip("/").removesuffix("/v1"))
    found = endpoint.dialect.route
    routes = (found,) if found and route == "auto" else _ROUTES if route == "auto" else (route,)
    conversation = [*question, {"role": "assistant", "content": answer}]
    for name in routes:
        body: dict[str, Any] = {"use_activation": False, **(more or {})}
        if name == "score":
            body |= {"text_1": as_question(question), "text_2": answer}
        else:
            body["messages"] = conversation
        try:
            response = await forward(
                client,
                root,
                body,
                path=f"/{name}",
                inputs=conversation,
                parameters={"max_tokens": 1},
                purpose=purpose,
                ledger=ledger,
                check=score_of,
                optional=route == "auto" and found is None,
            )
        except NoRouteError:
            continue
        endpoint.dialect.route = name
        return score_of(response)
    raise CallError("upstream_error", f"the reward model's server has none of the routes /{', /'.join(_ROUTES)}")


def score_of(response: Mapping[str, Any]) -> float:
    """Reads the one score of a response of `/classify`, `/pooling` or `/score`.

    Raises:
        CallError: It has not one finite number (`invalid_response`).
    """
    rows = response.get("data")
    if not isinstance(rows, list) or len(rows) != 1 or not isinstance(rows[0], dict):
        count = f"{len(rows)} results" if isinstance(rows, list) else "no results"
        raise CallError("invalid_response", f"the reward model sent {count} for one answer")
    value = next((rows[0][key] for key in ("probs", "data", "score") if key in rows[0]), None)
    while isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, list):
        raise CallError(
            "invalid_response", f"the reward model sent {len(value)} numbers for one answer; it must have one output"
        )
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= _LARGEST:
        raise CallError("invalid_response", f"the reward model sent no finite score: {str(value)[:40]}")
    return float(value)
