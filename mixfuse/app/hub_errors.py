"""What goes wrong at the Hugging Face Hub, as one line each: what happened, and what to do."""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager

import httpx2
from huggingface_hub import constants, get_token, is_offline_mode
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from mixfuse.contracts.errors import MixfuseError


def hub_error(message: str) -> MixfuseError:
    """An error of kind "hub"."""
    return MixfuseError(message, kind="hub")


@contextmanager
def hub_errors(what: str) -> Iterator[None]:
    """Turns every error of the Hub, the network or the client into one line without a traceback.

    Args:
        what: What is read or written, for the message.

    Raises:
        MixfuseError: Of kind "hub".
    """
    if is_offline_mode():
        raise hub_error(f"HF_HUB_OFFLINE is set, so {what} is not requested from the Hub; unset it and run again")
    _hide_signed_urls()
    try:
        yield
    except MixfuseError:
        raise
    except (HfHubHTTPError, HFValidationError, httpx2.HTTPError, OSError, RuntimeError, ValueError) as error:
        text = _explain(error, what)
        if token := get_token():
            text = text.replace(token, "…")  # a proxy may quote the request that it refused
        raise hub_error(text) from None


def _explain(error: BaseException, what: str) -> str:
    """One line about the first informative cause; the client wraps the failure of an upload once or twice."""
    causes = [error]
    while following := causes[-1].__cause__ or causes[-1].__context__:
        causes.append(following)
    again = "the same command continues where it stopped"
    for cause in causes:
        if isinstance(cause, HfHubHTTPError):
            return _refusal(cause, what)
        if isinstance(cause, httpx2.HTTPError | OfflineModeIsEnabled | ConnectionError):
            return f"{constants.ENDPOINT} cannot be reached for {what} ({cause}); {again}"
    message = " ".join(str(error).split())[:300]
    return f"{what}: {message}; {again}"


def _refusal(error: HfHubHTTPError, what: str) -> str:
    status = error.response.status_code
    message = " ".join((error.server_message or "").split())[:200]
    answer = f" ({status}{': ' + message if message else ''})"
    if isinstance(error, GatedRepoError):
        return f"{what} is gated{answer}: request access on its page"
    if isinstance(error, RevisionNotFoundError):
        return f"{what}: no such branch, tag or commit on the Hub{answer}"
    if isinstance(error, RepositoryNotFoundError):
        return f"{what} is not on the Hub, or is private and your token may not see it{answer}"
    if status == 401:
        return f"the Hub does not accept your token for {what}{answer}: set HF_TOKEN, or log in with: hf auth login"
    if status == 403:
        return f"your token may not do this to {what}{answer}: use a token with write access"
    if status in (409, 412):
        return f"somebody else changed {what} meanwhile{answer}: check what it holds now, then push again"
    if status == 429:
        wait = error.response.headers.get("retry-after")
        when = f"in {wait} s" if wait else "later"
        return f"too many requests to the Hub for {what}{answer}: run the same command again {when}"
    return f"the Hub refused {what}{answer}; run the same command again: it sends only what is missing"


def _hide_signed_urls() -> None:
    """Removes the query from addresses in the client's warnings, because an upload's query holds its signature."""
    for handler in logging.getLogger("huggingface_hub").handlers:
        handler.addFilter(_without_query)


def _without_query(record: logging.LogRecord) -> bool:
    record.msg, record.args = re.sub(r"(https?://[^\s?]+)\?\S+", r"\1?…", record.getMessage()), ()
    return True
