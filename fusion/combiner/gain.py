"""What the next step may gain: one member's answer, or one verdict of the judge, by what is known so far.

One step of foresight, for what no policy says (`policy.py` looks further ahead, at prices alone): the expected
probability that the leading answer is right after the step, minus that before it (the value of information; Howard
1966, IEEE Trans. Syst. Sci. Cybern. 2).
"""

import math
from collections.abc import Sequence

from mixfuse.contracts.judge_protocol import probability
from mixfuse.fusion.answering.strengths import Comparison
from mixfuse.fusion.combiner.artefact import Combiner, Weighing, weigh
from mixfuse.fusion.combiner.evidence import UNREAD, Answer

TYPICAL_VERDICT = 1.5
"""The log-odds of a judge's verdict until some were seen, in nats: of .82."""


def worth_of(target: float) -> float:
    """What one right answer more is worth at a target, in prices of the best member's answer: 2 · odds^1.5.

    Who sets a higher target pays more for a right answer. The curve was chosen on benchmarks/combiner.py's pools: from
    about one answer of the best member at a target of ½ to hundreds of them at 0.97.
    """
    return float(2.0 * (target / (1.0 - min(target, 0.999))) ** 1.5)


def of_member(
    combiner: Combiner,
    member: str,
    answers: Sequence[Answer],
    *,
    domain: str | None = None,
    comparisons: Sequence[Comparison] = (),
) -> float:
    """Returns what a member's answer is expected to gain, between 0 and 1.

    Args:
        combiner: The weights.
        member: Who would be asked.
        answers: Those in hand; without any the gain is the member's accuracy.
        domain: The kind of question.
        comparisons: What the judge said so far.
    """
    weights = combiner.members.get(member)
    known = combiner.members.values()
    accuracy = weights.accuracy if weights else sum(other.accuracy for other in known) / len(known)
    if not answers:
        return accuracy
    now = weigh(combiner, answers, domain=domain, comparisons=comparisons)
    read = [row for row in now.classes if answers[row.answers[0]].key != UNREAD]
    keys, truths = [row.key for row in read], [row.probability for row in read]
    elsewhere = max(0.0, 1.0 - sum(truths))
    length = answers[0].length
    expected = total = 0.0
    for place, key in enumerate([*keys, "\x00another"]):
        # It says what is right as often as it is right, and otherwise any of the other answers alike.
        right = truths[place] if place < len(keys) else elsewhere
        chance = right * accuracy + (1.0 - right) * (1.0 - accuracy) / max(1, len(keys))
        after = weigh(combiner, [*answers, Answer(member, key, length=length)], domain=domain, comparisons=comparisons)
        expected += chance * after.classes[0].probability
        total += chance
    return max(0.0, expected / total - now.classes[0].probability)


def of_verdict(weighing: Weighing, weight: float, strength: float = TYPICAL_VERDICT) -> float:
    """Returns what a verdict on the two leading classes is expected to gain; 0 where it could not turn them round.

    Args:
        weighing: Of the answers in hand.
        weight: What the judge's log-odds are multiplied by.
        strength: The log-odds that its verdicts usually have, in nats.
    """
    if len(weighing.classes) < 2 or weight <= 0:
        return 0.0
    first, second = weighing.classes[:2]
    moved = weight * strength
    if moved <= first.score - second.score:
        return 0.0
    right = probability(moved)  # as often as its log-odds say, by the weight that the fit has found
    share = first.probability + second.probability
    for_second = second.probability / share * right + first.probability / share * (1.0 - right)
    turned = probability(second.score - first.score + moved)
    return max(0.0, share * for_second * (2.0 * turned - 1.0))


def usual_strength(log_odds: Sequence[float]) -> float:
    """Returns the log-odds that verdicts usually have: the root mean square of those seen, and of one typical one."""
    squares = [TYPICAL_VERDICT**2, *(value * value for value in log_odds)]
    return math.sqrt(sum(squares) / len(squares))
