"""What `alone` and `difference` share: components of K and V as whole numbers of steps."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from jointkv.codec.base import LEVELS, step_share
from jointkv.codec.packing import pack_floats, pack_integers, unpack_floats, unpack_integers
from jointkv.codec.pages import Layout, Pages
from jointkv.codec.threads import each
from jointkv.codec.transform import KEPT_TOKENS, Plan, Transform
from jointkv.errors import BadInput, ModelMismatch

LARGEST = 32767.0


def encode(keys: Tensor, values: Tensor, pages: Pages, transform: Transform, level: int) -> list[bytes]:
    """Quantised `keys` and `values`, float32 `[layers, n * t, D]`, what `pages` have over what is predicted.

    The first tokens of a text are taken from `pages` as they are.
    """
    share = step_share(level)
    plan = transform.plan(share)
    kept = kept_tokens(pages.positions, pages.layout)
    quantised = _quantise(keys, values, transform, plan, share)
    quantised[:, kept.flatten()] = 0
    n, size = kept.shape
    # Tokens of one component stand together.
    columns = quantised.view(-1, n, size).transpose(0, 1)[:, plan.order].contiguous().numpy()
    head = bytes([level]) + transform.identity
    first = [_first_tokens(pages, number, chosen) for number, chosen in enumerate(kept)]
    bodies = each(lambda page: _pack(page, plan), columns)
    return [head + body + tokens for body, tokens in zip(bodies, first, strict=True)]


def decode(
    payloads: Sequence[bytes], layout: Layout, positions: Tensor, transform: Transform
) -> tuple[Tensor, Tensor, list[memoryview]]:
    """What `encode` was given, up to half a step, and the part of each payload that `put_first_tokens` reads.

    Raises:
        BadInput: malformed.
        ModelMismatch: encoded with another transform.
    """
    transform.check(layout)
    keys, values = (
        torch.empty(layout.layers, len(payloads), layout.block_size, layout.heads * size)
        for size in (layout.key_size, layout.value_size)
    )
    rest: list[memoryview] = [memoryview(b"")] * len(payloads)
    levels: dict[int, list[int]] = {}
    head = 1 + len(transform.identity)
    for number, payload in enumerate(payloads):
        if len(payload) < head or payload[0] >= LEVELS:
            raise BadInput("a quantised page ends too early, or is of an unknown level")
        if payload[1:head] != transform.identity:
            raise ModelMismatch("a page was encoded with another transform than the one given")
        levels.setdefault(payload[0], []).append(number)
    for level, numbers in levels.items():
        share = step_share(level)
        plan = transform.plan(share)
        bodies = [memoryview(payloads[number])[head:] for number in numbers]
        unpacked = each(partial(_unpack, plan=plan, block_size=layout.block_size), bodies)
        steps = torch.from_numpy(np.stack([page for page, _ in unpacked]))
        index = torch.tensor(numbers)
        keys[:, index], values[:, index] = _restore(steps, layout, transform, plan, share)
        for number, (_, left) in zip(numbers, unpacked, strict=True):
            rest[number] = left
    return keys.flatten(1, 2), values.flatten(1, 2), rest


def kept_tokens(positions: Tensor, layout: Layout) -> Tensor:
    """Which tokens are sent as they are, bool `[n, t]`."""
    return positions[:, None] + torch.arange(layout.block_size) < KEPT_TOKENS


def put_first_tokens(pages: Pages, rest: Sequence[memoryview]) -> None:
    """Write the first tokens of a text, as they were sent, into `pages`. Raises BadInput if they were not."""
    layout = pages.layout
    for number, (chosen, data) in enumerate(zip(kept_tokens(pages.positions, layout), rest, strict=True)):
        count = int(chosen.sum())
        if not count:
            if len(data):
                raise BadInput("a page holds more than it should")
            continue
        share = count * layout.page_nbytes // layout.block_size
        content = torch.from_numpy(unpack_floats(data, share, layout.dtype.itemsize))
        cut = layout.key_numbers // layout.block_size * count * layout.dtype.itemsize
        for side, part in ((pages.keys, content[:cut]), (pages.values, content[cut:])):
            numbers = part.contiguous().view(layout.dtype)
            side[:, number, chosen] = numbers.view(layout.layers, count, layout.heads, side.shape[-1])


def _first_tokens(pages: Pages, number: int, chosen: Tensor) -> bytes:
    if not chosen.any():
        return b""
    sides = [side[:, number, chosen].contiguous().view(torch.uint8).flatten() for side in (pages.keys, pages.values)]
    return pack_floats(torch.cat(sides).numpy(), pages.layout.dtype.itemsize)


def _quantise(keys: Tensor, values: Tensor, transform: Transform, plan: Plan, share: float) -> Tensor:
    """Whole steps, int16 `[components, n * t]`."""
    made = torch.empty(len(plan.order), keys.shape[1], dtype=torch.int16)
    start = 0
    for (basis, unit), numbers, width in zip(transform.layers, (*keys, *values), plan.widths, strict=True):
        steps = ((basis[:, :width] / (unit * share)).T @ numbers.T).round_()
        made[start : start + width] = steps.nan_to_num_(0.0).clamp_(-LARGEST, LARGEST).to(torch.int16)
        start += width
    return made


def _restore(steps: Tensor, layout: Layout, transform: Transform, plan: Plan, share: float) -> tuple[Tensor, Tensor]:
    """From whole steps `[n, components, t]`, in the order of the plan, to K and V `[layers, n, t, D]`."""
    n, size = len(steps), layout.block_size
    found = torch.empty_like(steps)
    found[:, plan.order] = steps
    numbers = found.transpose(0, 1).reshape(-1, n * size)
    made: list[Tensor] = []
    start = 0
    for (basis, unit), width in zip(transform.layers, plan.widths, strict=True):
        steps_to_numbers = basis[:, :width] * (unit * share)
        made.append((steps_to_numbers @ numbers[start : start + width].float()).T.reshape(n, size, -1))
        start += width
    return torch.stack(made[: layout.layers]), torch.stack(made[layout.layers :])


def _pack(page: NDArray[np.int16], plan: Plan) -> bytes:
    """`page [components, t]`, in the order of the plan."""
    parts, start = [], 0
    for band in plan.bands:
        parts.append(pack_integers(page[start : start + band].reshape(-1)))
        start += band
    return b"".join(parts)


def _unpack(data: memoryview, plan: Plan, block_size: int) -> tuple[NDArray[np.int16], memoryview]:
    parts = []
    for band in plan.bands:
        numbers, data = unpack_integers(data, band * block_size)
        parts.append(numbers.reshape(band, block_size))
    return np.concatenate(parts), data
