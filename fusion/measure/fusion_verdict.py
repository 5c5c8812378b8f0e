"""The recommendation that an evaluation of fusing ends with."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from mixfuse.fusion.config import FusedMode
from mixfuse.fusion.measure.statistics import Difference

SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Verdict:
    """The recommendation, and the evidence for it.

    Attributes:
        choice: `fuse`, `self_fusion` (the best member, sampled and judged), or `member`.
        mode: The mode to fuse in: the pool, or for `self_fusion` the samples of the best member. None for `member`.
        member: The best member.
        words: The recommendation in words, with its evidence.
    """

    choice: Literal["fuse", "self_fusion", "member"]
    mode: FusedMode | None
    member: str
    words: str


def decide(
    best: str,
    modes: Mapping[FusedMode, float],
    differences: Mapping[FusedMode, Mapping[str, Difference]],
    *,
    pool_size: int,
) -> Verdict:
    """Recommends fusing only where a mode is shown to beat the best member, and equal compute is not shown to beat it.

    With several modes the best of them had several chances, so each must pass at its share of the error (Bonferroni).

    Args:
        best: The best member.
        modes: Mode → its accuracy.
        differences: Mode → rival → the mode minus the rival.
        pool_size: How many answers the pool asks for.
    """
    level = SIGNIFICANT / len(modes)

    def shown(gap: Difference | None, sign: int) -> bool:
        return gap is not None and gap.p < level and (gap.low > 0 if sign > 0 else gap.high < 0)

    better = [mode for mode in modes if shown(differences[mode]["best_member"], 1)]
    mode = max(better or modes, key=lambda name: modes[name])
    alone, equal = differences[mode]["best_member"], differences[mode].get("self_fusion")
    if not better:
        worse = " It is shown to be worse." if shown(alone, -1) else ""
        words = (
            f"Use {best} alone. No mode is shown to be better; the nearest, {mode}, differs from it by {alone}.{worse}"
        )
        return Verdict("member", None, best, words)
    gain = f"{mode} beats {best} alone by {alone}"
    if equal is None:
        return Verdict("fuse", mode, best, f"Fuse, by {mode}: {gain}.")
    beside = f"beside {best} sampled {pool_size} times and fused in the same way it stands at {equal}"
    if shown(equal, -1):
        words = (
            f"Use {best}, sampled {pool_size} times and judged: {gain}, but {beside}. The other members do not help."
        )
        return Verdict("self_fusion", mode, best, words)
    not_shown = "" if shown(equal, 1) else " The same compute spent on that one member is not told apart from it."
    return Verdict("fuse", mode, best, f"Fuse, by {mode}: {gain}; {beside}.{not_shown}")
