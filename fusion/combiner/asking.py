"""Whom to ask next: looks a policy up. Light, for the gateway; `policy.py` works policies out."""

from collections.abc import Sequence

from mixfuse.fusion.combiner.artefact import BINS, Combiner, Policy


def policy_for(combiner: Combiner, target: float) -> Policy | None:
    """The policy of the lowest target that is not below this one, else of the highest; None where there are none."""
    return next((policy for policy in combiner.policies if policy.target >= target - 1e-9), None) or (
        combiner.policies[-1] if combiner.policies else None
    )


def next_member(
    combiner: Combiner, policy: Policy, asked: Sequence[str], confidence: float, domain: str | None = None
) -> str | None:
    """The member to ask next; None to stop.

    A policy holds the states that it leads to. In another, for example where one of its members cannot be asked, the
    most accurate of its members is asked until the target is reached.

    Args:
        combiner: Names the members' order.
        policy: For the target.
        asked: Members that have been asked, whether or not they answered, and members that cannot be asked.
        confidence: Reached so far, calibrated by the number of answers; 0 before the first.
        domain: The question's, where it is known.
    """
    if asked and confidence >= policy.target:
        return None
    first = policy.first.get(domain or "")
    if first is not None and not confidence and first not in asked:
        return first
    considered = {name for actions in policy.actions.values() for name in actions if name} | set(policy.first.values())
    actions = policy.actions.get("+".join(name for name in combiner.members if name in considered and name in asked))
    if actions is not None:
        return actions[bin_of(confidence)] or None
    left = [name for name in combiner.members if name in considered and name not in asked]
    return max(left, key=lambda name: combiner.members[name].accuracy, default=None)


def bin_of(confidence: float) -> int:
    """The bin of a policy that a confidence is in."""
    return min(BINS - 1, int(confidence * BINS))
