"""Pairs: people vote on the pairs of a file without knowing whose they are; the votes are rows of a file beside it."""

import asyncio
import secrets
from typing import Any
from urllib.parse import urlencode

from starlette.responses import Response

from mixfuse.app.pairs_file import Pair, PairsFile, pairs_at
from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.judge_protocol import text_of
from mixfuse.fusion.http.statuses import RequestError
from mixfuse.fusion.ui.frame import Page, Visit
from mixfuse.fusion.ui.votes import person, stand
from mixfuse.fusion.ui.voting import choice_of, skipped_by, skipping


async def show(visit: Visit) -> Response:
    """Shows the next pair, or asks who votes."""
    file, given = await _file(visit), visit.request.query_params
    if not given.get("name", "").strip():
        return await visit.page("pairs.html.jinja", file=file, name="", asked=None, done=0)
    name, skipped = person(given["name"]), skipped_by(visit)
    asked = await asyncio.to_thread(file.following, name, skipped)
    shown: dict[str, Any] = {"file": file, "name": name, "asked": asked, "done": len(file.votes().get(name, {}))}
    if asked is None:
        return await visit.page("pairs.html.jinja", **shown, skipped=bool(skipped))
    swapped = bool(secrets.randbits(1))
    left, right = asked.answers[::-1] if swapped else asked.answers
    known = {"skip": given["skip"]} if skipped else {}
    return await visit.page(
        "pairs.html.jinja",
        **shown,
        question=text_of(asked.messages[-1]["content"]),
        sides=[("Left", left), ("Right", right)],
        ticket=visit.seal(["pairs", asked.id, swapped, name, urlencode({"name": name, **known})]),
        skip=urlencode({"name": name, "skip": skipping(visit, skipped, asked.id)}),
    )


async def vote(visit: Visit) -> Response:
    """Takes a vote."""
    file, form = await _file(visit), await visit.form()
    pair, swapped, name, where = _ticket(visit, file, form.get("ticket", ""))
    said, comment = choice_of(form, swapped=swapped), form.get("comment", "").strip()
    await asyncio.to_thread(file.add, pair, said, name, comment)
    return visit.to(f"/pairs?{where}")


async def agreement(visit: Visit) -> Response:
    """Shows how far people agree with each other and with the file."""
    file = await _file(visit)
    labels = {(pair.id, 0, 1): pair.label for pair in file.pairs.values() if pair.label is not None}
    by_user = await asyncio.to_thread(file.votes)
    votes = {user: {(pair, 0, 1): said for pair, said in known.items()} for user, known in by_user.items()}
    return await visit.page("arena_agreement.html.jinja", standing=stand(votes, labels), of_file=True)


async def _file(visit: Visit) -> PairsFile:
    """Returns the file, for those who may see traces of their own.

    Raises:
        RequestError: The file cannot be read, or holds no pairs: whoever set it must mend it.
    """
    visit.owner()
    assert visit.inside.config.ui_pairs is not None  # noqa: S101 - else there is no page
    try:
        return await asyncio.to_thread(pairs_at, visit.inside.config.ui_pairs)
    except MixfuseError as error:
        raise RequestError(f"no pairs can be shown: {error}", code="pairs_file", status=409) from error


def _ticket(visit: Visit, file: PairsFile, sealed: str) -> tuple[Pair, bool, str, str]:
    found = visit.unseal(sealed)
    if not isinstance(found, list) or found[:1] != ["pairs"] or found[1] not in file.pairs:
        message = "this pair was shown too long ago, or is no longer in the file; open the page again"
        raise RequestError(message, code="invalid_value", param="ticket")
    _, pair_id, swapped, name, where = found
    return file.pairs[pair_id], swapped, name, where


PAGE = Page(
    "Pairs",
    order=32,
    gets={"": show, "/agreement": agreement},
    posts={"/vote": vote},
    shown=lambda inside: inside.config.ui_pairs is not None,
    alone=True,
    writes_files=True,
)
