"""Arena: people vote on pairs of answers without knowing whose they are; a vote is feedback, which becomes pairs."""

import math
import secrets
from urllib.parse import urlencode

from starlette.responses import Response

from mixfuse.contracts.trace import Trace
from mixfuse.fusion.http.statuses import RequestError
from mixfuse.fusion.store.trace_facts import question, storable
from mixfuse.fusion.ui.frame import Page, Visit
from mixfuse.fusion.ui.votes import (
    VOTES,
    Place,
    answers,
    feedback_of,
    following,
    judged,
    person,
    standing,
    verdict_on,
    votes_of,
)
from mixfuse.fusion.ui.voting import choice_of, skipped_by, skipping


async def show(visit: Visit) -> Response:
    """Shows the next pair, or asks who votes. Nothing that is sent names a member or a candidate's number."""
    owner, given = visit.owner(), visit.request.query_params
    if not given.get("name", "").strip():
        return await visit.page("arena.html.jinja", name="", asked=None, further=None)
    name, after, skipped = person(given["name"]), _place(given.get("after")), skipped_by(visit)
    found = await visit.read(lambda connection: following(connection, owner, name, after, skipped))
    where = {"name": name, **({"after": _written(found.after)} if found.after is not None else {})}
    known = {"skip": given["skip"]} if skipped else {}
    if found.asked is None:
        further = urlencode(where | known) if found.more else None
        return await visit.page("arena.html.jinja", name=name, asked=None, further=further, skipped=bool(skipped))
    trace, pair = found.asked.trace, found.asked.pair
    left, right = pair if secrets.randbits(1) else pair[::-1]
    texts = answers(trace)
    return await visit.page(
        "arena.html.jinja",
        name=name,
        asked=trace,
        question=question(trace),
        sides=[("Left", texts[left]), ("Right", texts[right])],
        ticket=visit.seal(["arena", trace.id, left, right, name, urlencode(where | known)]),
        skip=urlencode(where | {"skip": skipping(visit, skipped, trace.id)}),
        further=None,
    )


async def vote(visit: Visit) -> Response:
    """Takes a vote."""
    form = await visit.form()
    trace_id, left, right, name, _ = _ticket(visit, form.get("ticket", ""))
    said = choice_of(form, swapped=left > right)
    pair = (min(left, right), max(left, right))
    await visit.call("POST", f"/v1/traces/{trace_id}/feedback", feedback_of(pair, said, name, form.get("comment", "")))
    return visit.to(f"/arena/told?{urlencode({'ticket': form['ticket']})}")


async def told(visit: Visit) -> Response:
    """Says whose answers they were, once the visitor has voted."""
    sealed = visit.request.query_params.get("ticket", "")
    trace_id, left, right, name, where = _ticket(visit, sealed)
    trace = await visit.inside.traces.get(trace_id, key_id=visit.owner())
    pair = (min(left, right), max(left, right))
    mine = [] if trace is None else [one for one in votes_of(trace.id, trace.feedback) if one.user == name]
    said = next((one.vote for one in reversed(mine) if one.pair[1:] == pair), None)
    if trace is None or said is None:
        return visit.to(f"/arena?{where}")
    verdict = verdict_on(trace, pair)
    return await visit.page(
        "arena_told.html.jinja",
        trace=trace,
        sides=[(side, trace.candidates[index]) for side, index in (("Left", left), ("Right", right))],
        said=_in_words(trace, pair, said),
        judge=_in_words(trace, pair, judged(trace, pair)),
        flipped=verdict is not None and not verdict.consistent,
        next=where,
        name=name,
    )


async def agreement(visit: Visit) -> Response:
    """Shows how far people agree with each other and with the judge."""
    owner = visit.owner()
    found = await visit.read(lambda connection: standing(connection, owner))
    return await visit.page("arena_agreement.html.jinja", standing=found, of_file=False)


def _in_words(trace: Trace, pair: tuple[int, int], said: str | None) -> str:
    places = dict(zip(VOTES, pair, strict=False))
    if said in places:
        return f"{trace.candidates[places[said]]} is better"
    return {"tie": "neither is better", "bad": "both are bad"}.get(said or "", "it was not asked about this pair")


def _ticket(visit: Visit, sealed: str) -> tuple[str, int, int, str, str]:
    found = visit.unseal(sealed)
    if not isinstance(found, list) or found[:1] != ["arena"]:
        message = "this pair was shown too long ago, or by another gateway; open the arena again"
        raise RequestError(message, code="invalid_value", param="ticket")
    _, trace_id, left, right, name, where = found
    return trace_id, left, right, name, where


def _written(place: Place) -> str:
    return f"{place.flipped}~{place.unsure}~{place.at!r}~{place.id}"


def _place(value: str | None) -> Place | None:
    if not value:
        return None
    flipped, _, rest = value.partition("~")
    unsure, _, rest = rest.partition("~")
    at, _, trace_id = rest.partition("~")
    try:
        found = Place(int(flipped == "1"), int(unsure == "1"), float(at), storable(trace_id))
    except ValueError:
        found = None
    if found is None or not math.isfinite(found.at):
        raise RequestError("'after' is no place in this queue; open the arena again", code="invalid_value")
    return found


PAGE = Page(
    "Arena",
    order=30,
    gets={"": show, "/told": told, "/agreement": agreement},
    posts={"/vote": vote},
)
