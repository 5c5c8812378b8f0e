"""The judge: every pair of candidates in both orders, each verdict one prefill-only call, all at once.

How a comparison is written and its verdict read is `mixfuse.judge_protocol`'s.
"""

from collections.abc import Sequence
from itertools import combinations

from fusion.config import ModelConfig
from fusion.pool import Pool, all_or_raise, fan_out
from fusion.run import Candidate
from fusion.upstream import CallError, Client, Endpoint, Ledger, Purpose, call, first_token_logprobs
from mixfuse.judge_protocol import combine, comparison, new_nonce, read_verdict
from mixfuse.trace import Verdict

# One token is enough: the verdict is read from its alternatives; 20 is the most OpenAI and vLLM give.
VERDICT_PARAMETERS = {"max_tokens": 1, "temperature": 0, "logprobs": True, "top_logprobs": 20}


class JudgeError(Exception):
    """The judge could not be asked, or none of its verdicts could be read."""


async def verdict(
    client: Client,
    endpoint: Endpoint,
    question: str,
    first: str,
    second: str,
    *,
    purpose: Purpose,
    ledger: Ledger,
) -> float | None:
    """Judges one pair in one order.

    Returns:
        The probability that the answer shown first is the better one; None where no verdict could be read.

    Raises:
        CallError: The call failed.
    """
    nonce = new_nonce(question, first, second)
    messages = comparison(question, first, second, nonce=nonce)
    reply = await call(client, endpoint, messages, VERDICT_PARAMETERS, purpose=purpose, ledger=ledger)
    return read_verdict(first_token_logprobs(reply.logprobs))


async def judge(
    pool: Pool, model: ModelConfig | None, question: str, candidates: Sequence[Candidate], ledger: Ledger
) -> list[Verdict]:
    """Compares every pair of candidates in both orders.

    One lease holds for all verdicts of a request, so one adapter revision gives them all.

    Raises:
        JudgeError: There is no judge, a call failed (the others are cancelled then), or none of the verdicts
            could be read.
    """
    if model is None:
        raise JudgeError("no judge is configured")
    pairs = list(combinations(candidates, 2))
    purpose = Purpose("verdict", "judge", price=model.price, timeout_s=model.timeout_s)
    try:
        async with pool.lease(model, purpose, ledger) as endpoint:
            orders = [
                verdict(pool.client, endpoint, question, one.text, other.text, purpose=purpose, ledger=ledger)
                for first, second in pairs
                for one, other in ((first, second), (second, first))
            ]
            read = all_or_raise(await fan_out(orders, quorum=len(orders)))
    except CallError as failure:
        raise JudgeError(str(failure)) from failure
    if all(view is None for view in read):
        raise JudgeError("none of the judge's replies names a verdict")
    verdicts: list[Verdict] = []
    for (first, second), forward, backward in zip(pairs, read[::2], read[1::2], strict=True):
        outcome = combine(forward, backward)
        verdicts.append(Verdict(first=first.index, second=second.index, **outcome._asdict()))
    return verdicts


def ranking(verdicts: Sequence[Verdict], candidates: Sequence[Candidate]) -> list[Candidate]:
    """Orders candidates, best first: by pairs won, then by mean score, then by candidate order."""
    wins = {candidate.index: 0 for candidate in candidates}
    scores: dict[int, list[float]] = {candidate.index: [] for candidate in candidates}
    for verdict_ in verdicts:
        if verdict_.winner != "tie":
            wins[verdict_.first if verdict_.winner == "first" else verdict_.second] += 1
        scores[verdict_.first].append(verdict_.score)
        scores[verdict_.second].append(1.0 - verdict_.score)

    def place(candidate: Candidate) -> tuple[int, float, int]:
        own = scores[candidate.index]
        return -wins[candidate.index], -(sum(own) / len(own) if own else 0.0), candidate.index

    return sorted(candidates, key=place)
