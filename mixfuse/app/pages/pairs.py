"""Pairs: people vote on the pairs of a file without knowing whose they are; the votes are rows of a file beside it."""

import asyncio
import secrets
from collections.abc import Callable
from typing import Any, TypeVar
from urllib.parse import urlencode

from starlette.responses import Response

from mixfuse.app.pairs_file import Pair, PairsFile, pairs_at
from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.judge_protocol import text_of
from mixfuse.fusion.http.statuses import RequestError
from mixfuse.fusion.ui.frame import Page, Visit
from mixfuse.fusion.ui.votes import person, stand
from mixfuse.fusion.ui.voting import choice_of, skipped_by, skipping

Result = TypeVar("Result")


async def show(visit: Visit) -> Response:
    """Shows the next pair, or asks who votes."""
    file, given = await _file(visit), visit.request.query_params
    if not given.get("name", "").strip():
        return await visit.page("pairs.html.jinja", file=file, name="", asked=None, done=0)
    name, skipped = person(given["name"]), skipped_by(visit)
    asked = await _worked(file.following, name, skipped)
    shown: dict[str, Any] = {
        "file": file,
        "name": name,
        "asked": asked,
        "done": len((await _worked(file.votes)).get(name, {})),
    }
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
    await _worked(file.add, pair, said, name, comment)
    return visit.to(f"/pairs?{where}")


async def agreement(visit: Visit) -> Response:
    """Shows how far people agree with each other and with the file."""
    file = await _file(visit)
    labels = {(pair.id, 0, 1): pair.label for pair in file.pairs.values() if pair.label is not None}
    by_user = await _worked(file.votes)
    votes = {user: {(pair, 0, 1): said for pair, said in known.items()} for user, known in by_user.items()}
    return await visit.page("arena_agreement.html.jinja", standing=stand(votes, labels), of_file=True)


async def _file(visit: Visit) -> PairsFile:
    """Returns the file, for those who may see traces of their own.

    Raises:
        RequestError: The file cannot be read, or holds no pairs.
    """
    visit.owner()
    assert visit.inside.config.ui_pairs is not None  # noqa: S101 - else there is no page
    return await _worked(pairs_at, visit.inside.config.ui_pairs)


async def _worked(work: Callable[..., Result], *arguments: Any) -> Result:
    """Runs in a thread what reads or writes the files.

    Raises:
        RequestError: A file is malformed (409), or the disk refuses it (503): whoever set it must mend it.
    """
    try:
        return await asyncio.to_thread(work, *arguments)
    except MixfuseError as error:
        status = 503 if error.kind == "disk" else 409
        raise RequestError(f"the file of pairs does not work: {error}", code="pairs_file", status=status) from error


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
