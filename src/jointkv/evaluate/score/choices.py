"""What a model makes of answers to choose from: how far the right one is ahead, and in which order they stand.

Accuracy hides what a change of the model's numbers does: answers can change places and their number of right ones stay.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import combinations

from jointkv.errors import BadInput


def margin(likelihoods: Sequence[float], right: Collection[int]) -> float:
    """By how much the likeliest right answer is ahead of the likeliest wrong one, in nats.

    Args:
        likelihoods: log-probability of each answer.
        right: indices of the right ones.

    Raises:
        BadInput: all are right, or none.
    """
    best = {True: -float("inf"), False: -float("inf")}
    for index, likelihood in enumerate(likelihoods):
        best[index in right] = max(best[index in right], likelihood)
    if -float("inf") in best.values():
        raise BadInput(f"a margin needs right and wrong answers; of {len(likelihoods)} {len(right)} are right")
    return best[True] - best[False]


def flipped(one: Sequence[float], other: Sequence[float]) -> float:
    """The share of pairs of answers of which another one is the likelier in `one` than in `other`, 0 to 1.

    Raises:
        BadInput: not the same answers, or fewer than two.
    """
    if len(one) != len(other) or len(one) < 2:
        raise BadInput(f"orders of {len(one)} and {len(other)} answers")
    pairs = list(combinations(range(len(one)), 2))
    return sum((one[a] - one[b]) * (other[a] - other[b]) < 0 for a, b in pairs) / len(pairs)
