"""Whom to ask next: looks a policy up. Light, for the gateway; `policy.py` works policies out."""

from collections.abc import Sequence

from mixfuse.fusion.combiner.artefact import BINS, Combiner, Policy


def policy_for(combiner: Combiner, target: float) -> Policy | None:
    """The policy of the lowest target that is not below this one, else of the highest; None where there are none."""
    return next((policy for policy in combiner.policies if policy.target >= target - 1e-9), None) or (
        combiner.policies[-1] if combiner.policies else None
    )


def next_member(combiner: Combiner, policy: Policy, asked: Sequence[str], confidence: float) -> str | None:
    """The member to ask next; None to stop.

    Args:
        combiner: Names the members' order.
        policy: For the target.
        asked: Members that have been asked, whether or not they answered.
        confidence: Reached so far, calibrated by the number of answers; 0 before the first.
    """
    state = "+".join(name for name in combiner.members if name in asked)
    actions = policy.actions.get(state)
    if actions is None or (asked and confidence >= policy.target):
        return None
    return actions[bin_of(confidence)] or None


def bin_of(confidence: float) -> int:
    """The bin of a policy that a confidence is in."""
    return min(BINS - 1, int(confidence * BINS))
