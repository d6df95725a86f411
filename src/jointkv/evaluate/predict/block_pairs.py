"""Errors of all pairs of blocks of a prefilled batch that may be compared: what every prediction starts from."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from jointkv.core.blocks import LayerAggregate
from jointkv.core.packed import PackedPages
from jointkv.evaluate.holding.prefilled import Prefilled
from jointkv.fusion.pair_sums import pair_errors, pair_sums
from jointkv.fusion.signature import token_hashes
from jointkv.theory.calibrate import effective_error

PAIRS_AT_ONCE = 2048


@dataclass(frozen=True)
class Lines:
    """Blocks that may be compared: those on one line, `P` lines of at most `N` blocks.

    Attributes:
        pages: `[P, N]`, -1 where there is none. Batch scope: a line is a position, a column a request.
            Chunk scope: a line is a place in the chunks of one request, a column a chunk.
        request: which request a block belongs to, `[P, N]`.
        text: hash of its tokens, `[P, N]`.
    """

    pages: Tensor
    request: Tensor
    text: Tensor

    @property
    def valid(self) -> Tensor:
        return self.pages >= 0

    @property
    def equal_text(self) -> Tensor:
        """`[P, N, N]`."""
        return self.text[:, :, None] == self.text[:, None, :]


def lines_of(batch: Prefilled, chunk_tokens: int | None = None) -> Lines:
    """The full blocks of `batch`: by position, or with `chunk_tokens` by their place in the chunks of a request."""
    full, block_size = batch.full_blocks, batch.block_size
    is_full = torch.arange(batch.table.shape[1]) < full[:, None]
    pages = torch.where(is_full, batch.table, -1)[:, : int(full.max())]
    text = torch.zeros_like(pages)
    for row, request in enumerate(batch.requests):
        tokens = torch.tensor(request.prompt[: int(full[row]) * block_size])
        if len(tokens):
            text[row, : int(full[row])] = token_hashes(tokens[None], block_size)[0]
    owner = torch.arange(len(pages))[:, None].expand_as(pages)
    if chunk_tokens is None:
        return Lines(pages.T.contiguous(), owner.T.contiguous(), text.T.contiguous())
    width = chunk_tokens // block_size
    missing = -pages.shape[1] % width
    chunked = [
        torch.nn.functional.pad(part, (0, missing), value=-1).view(len(part), -1, width).transpose(1, 2).flatten(0, 1)
        for part in (pages, owner, text)
    ]
    return Lines(*chunked)


def pair_error_matrices(
    batch: Prefilled,
    lines: Lines,
    groups: Sequence[Sequence[int]],
    *,
    token_limit: float = math.inf,
    aggregate: LayerAggregate = "rms",
    progress: Callable[[float], None] | None = None,
) -> Tensor:
    """The least bound under which each block may be served by each other one of its line: `[groups, P, N, N]`.

    Entry `[g, p, i, j]` is for block `i` read from block `j`'s page in the layers `groups[g]`: the larger one of its
    relative error (K or V) and its worst token's over `TOKEN_SLACK`. Infinite where one of the two is missing or a
    token is off by more than `token_limit`; 0 on the diagonal. Groups may overlap.

    Args:
        aggregate: over the layers of a group, `"rms"` or `"max"`.
        progress: called with the fraction that is done.
    """
    count = lines.pages.shape[1]
    valid = lines.valid
    line, first, second = (valid[:, :, None] & valid[:, None, :]).triu(1).nonzero(as_tuple=True)
    found = torch.full((len(groups), *lines.pages.shape, count), math.inf)
    found.diagonal(dim1=2, dim2=3).masked_fill_(valid, 0.0)
    own, other = lines.pages[line, first], lines.pages[line, second]
    for number, layers in enumerate(groups):
        for part in _parts(len(own)):
            sums = _sums(batch, layers, own[part], other[part])
            where = line[part], first[part], second[part]
            for (at, i, j), order in ((where, [0, 1, 2]), ((where[0], where[2], where[1]), [0, 2, 1])):
                key, value, token = pair_errors(sums[..., order], aggregate)
                least = effective_error(key, value, token)
                found[number, at, i, j] = least.masked_fill(token > token_limit, math.inf)
            if progress is not None:
                progress((number + (int(part[-1]) + 1) / len(own)) / len(groups))
    return found


def errors_of(
    batch: Prefilled, layers: Sequence[int], own: Tensor, read: Tensor, aggregate: LayerAggregate = "rms"
) -> Tensor:
    """The least bounds under which blocks `own [n]` may be read from the pages of blocks `read [n]`, `[n]`."""
    parts = [torch.zeros(0)]
    for part in _parts(len(own)):
        parts.append(effective_error(*pair_errors(_sums(batch, layers, own[part], read[part]), aggregate)))
    return torch.cat(parts)


def _parts(count: int) -> tuple[Tensor, ...]:
    return torch.arange(count).split(PAIRS_AT_ONCE) if count else ()


def _sums(batch: Prefilled, layers: Sequence[int], own: Tensor, other: Tensor) -> Tensor:
    """`pair_sums` over `layers`; only the pages that appear are copied into the kernel's layout."""
    pages, local = torch.cat((own, other)).unique(return_inverse=True)
    shape = batch.state[f"key.{layers[0]}"].shape
    value_size = batch.state[f"value.{layers[0]}"][0].numel()
    tokens = torch.arange(shape[1])
    key_size = shape[1:].numel()
    token_of = torch.cat(
        (tokens.repeat_interleave(key_size // shape[1]), tokens.repeat_interleave(value_size // shape[1]))
    )
    is_value = torch.arange(len(token_of)) >= key_size
    packed = [
        torch.cat([batch.state[f"{side}.{layer}"][pages].flatten(1) for side in ("key", "value")], 1)
        for layer in layers
    ]
    return pair_sums(PackedPages(packed, token_of, is_value), local[: len(own)], local[len(own) :])
