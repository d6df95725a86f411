"""The binary tree of tree Fast-Fusion (paper, Algorithm 1), on pair matrices instead of the blocks themselves.

Every inner product that a tree over `N` blocks can ask for is a sum of entries of one `N x N` Gram matrix: the
direction of a group is a sum of unit vectors, so the cosine of two groups needs no further pass over the data.
Halves are merged bottom-up, all subtrees and positions of a level at once: `log2 N` levels, no loop over blocks.
"""

import torch
from torch import Tensor

NO_MATCH = -torch.inf


def subtrees(pairs: Tensor, width: int) -> Tensor:
    """The `width x width` blocks on the diagonal: `[P, N, N] -> [P, N / width, width, width]`."""
    positions, size, _ = pairs.shape
    split = pairs.view(positions, size // width, width, size // width, width)
    return split.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)


def right_left(pairs: Tensor, half: int) -> Tensor:
    """Entries (right block, left block) of every subtree of width `2 * half`: `[P, subtrees, half, half]`."""
    return subtrees(pairs, 2 * half)[:, :, half:, :half]


def pad_pairs(pairs: Tensor, size: int) -> Tensor:
    """`pairs [P, N, N]` with zeros up to `[P, size, size]`."""
    extra = size - pairs.shape[1]
    return torch.nn.functional.pad(pairs, (0, extra, 0, extra)) if extra else pairs


def power_of_two(count: int) -> int:
    """The next one that is not below `count`."""
    return 1 << max(0, (count - 1).bit_length())
