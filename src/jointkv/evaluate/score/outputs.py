"""Generated tokens side by side."""

from __future__ import annotations

from collections.abc import Collection, Sequence


def common_prefix_length(a: Sequence[int], b: Sequence[int]) -> int:
    """How many token ids `a` and `b` have in common before they first differ or one of them ends."""
    for index, (left, right) in enumerate(zip(a, b, strict=False)):
        if left != right:
            return index
    return min(len(a), len(b))


def cut_at_end(tokens: Sequence[int], ends: Collection[int]) -> tuple[int, ...]:
    """`tokens` up to the first of `ends`, which is kept."""
    stop = next((index for index, token in enumerate(tokens) if token in ends), len(tokens))
    return tuple(tokens[: stop + 1])
