"""What `alone` and `difference` share: components of what K and V have over a prediction, as whole numbers of steps.

A payload: the level, the transform's identity, which tokens are predicted by a reference (where there is one), the
steps of the bands of the plan, and the first tokens of a text as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from jointkv.attention.rotary import Turning
from jointkv.codec.base import LEVELS, Aids, step_share
from jointkv.codec.first_tokens import first_tokens, kept_tokens, put_first_tokens
from jointkv.codec.packing import pack_integers, unpack_integers
from jointkv.codec.pages import Layout, Pages
from jointkv.codec.threads import each
from jointkv.codec.transform import Plan, Transform, positions_of, rows_of
from jointkv.errors import BadInput, ModelMismatch

LARGEST = 32767.0


@dataclass(frozen=True, eq=False)
class Prediction:
    """What pages are expected to be: reference pages where `by_reference`, the mean of the layer elsewhere.

    Attributes:
        transform: of the pages' model.
        references: a page for each page, or None.
        by_reference: tokens, bool `[n, t]`; None without references.
    """

    transform: Transform
    references: Pages | None = None
    by_reference: Tensor | None = None

    def rows(self) -> Iterator[Tensor]:
        """As `rows_of` has them, of every layer: `[n * t, D]`, or `[D]` where all tokens are expected to be alike."""
        means = (*self.transform.key.mean, *self.transform.value.mean)
        if self.references is None or self.by_reference is None:
            yield from means
            return
        chosen = self.by_reference.flatten()[:, None]
        for mean, rows in zip(means, rows_of(self.references, self.transform.rotary), strict=True):
            yield torch.where(chosen, rows, mean)


def encode(pages: Pages, prediction: Prediction, level: int) -> list[bytes]:
    """Payloads of `pages`, whose steps are those of `level`."""
    transform, share = prediction.transform, step_share(level)
    plan = transform.plan(share)
    kept = kept_tokens(pages.positions, pages.layout)
    steps = _quantise(rows_of(pages, transform.rotary), prediction, plan, share, kept).numpy()
    bodies = each(lambda page: pack_integers(page, plan.bands), steps)
    said = _packed_mask(prediction.by_reference, len(pages))
    first = first_tokens(pages, prediction.references, kept)
    head = bytes([level]) + transform.identity
    return [head + mask + body + tokens for mask, body, tokens in zip(said, bodies, first, strict=True)]


def decode(
    payloads: Sequence[bytes], layout: Layout, positions: Tensor, aids: Aids, references: Pages | None = None
) -> Pages:
    """The pages that `encode` was given, up to half a step.

    Raises:
        BadInput: malformed.
        ModelMismatch: encoded with another transform.
    """
    transform = aids.the_transform()
    transform.check(layout)
    levels: dict[int, list[int]] = {}
    head = 1 + len(transform.identity)
    for number, payload in enumerate(payloads):
        if len(payload) < head or payload[0] >= LEVELS:
            raise BadInput("a quantised page ends too early, or is of an unknown level")
        if payload[1:head] != transform.identity:
            raise ModelMismatch("a page was encoded with another transform than the one given")
        levels.setdefault(payload[0], []).append(number)
    pages = Pages.empty(layout, positions)
    for level, numbers in levels.items():
        index = torch.tensor(numbers)
        given = None if references is None else references.take(index)
        bodies = [memoryview(payloads[number])[head:] for number in numbers]
        made = _decode_level(bodies, layout, positions[index], transform, given, level)
        if len(levels) == 1:
            return made
        pages.put(numbers, made)
    return pages


def _decode_level(
    bodies: Sequence[memoryview],
    layout: Layout,
    positions: Tensor,
    transform: Transform,
    references: Pages | None,
    level: int,
) -> Pages:
    share = step_share(level)
    plan, size = transform.plan(share), layout.block_size
    by_reference, bodies = _unpacked_mask(bodies, size) if references is not None else (None, bodies)
    steps = np.empty((len(bodies), len(plan.order), size), np.int16)
    rest = each(lambda number: unpack_integers(bodies[number], steps[number], plan.bands), range(len(bodies)))
    rows = _restore(steps, Prediction(transform, references, by_reference), plan, share)
    pages = Pages.empty(layout, positions)
    turning = Turning(transform.rotary, positions_of(pages).flatten())
    for layer, keys in enumerate(pages.keys):
        tokens = keys.flatten(0, 1)
        tokens.copy_(turning(layer, next(rows).view(tokens.shape)))
    for values in pages.values:
        values.copy_(next(rows).view_as(values))
    put_first_tokens(pages, references, rest)
    return pages


def _quantise(rows: Iterator[Tensor], prediction: Prediction, plan: Plan, share: float, kept: Tensor) -> Tensor:
    """Whole steps, int16 `[n, components, t]` in the order of the plan; 0 for tokens that are kept.

    What is not a number becomes any number: such a page is within no bound.
    """
    n, size = kept.shape
    made = torch.empty(n, len(plan.order), size, dtype=torch.int16)
    start = 0
    for numbers, expected, (basis, unit), width in zip(
        rows, prediction.rows(), prediction.transform.layers, plan.widths, strict=True
    ):
        chosen, scale = basis[:, :width].T, 1 / (float(unit) * share)
        if expected.dim() == 2:
            numbers, expected = numbers - expected, torch.zeros_like(expected[0])
        steps = torch.addmm((chosen @ expected)[:, None], chosen, numbers.T, beta=-scale, alpha=scale)
        steps.round_().clamp_(-LARGEST, LARGEST)
        made[:, start : start + width] = steps.view(width, n, size).transpose(0, 1)
        start += width
    ordered = made.index_select(1, plan.order)
    if kept.any():
        ordered.masked_fill_(kept[:, None], 0)
    return ordered


def _restore(steps: NDArray[np.int16], prediction: Prediction, plan: Plan, share: float) -> Iterator[Tensor]:
    """From whole steps `[n, components, t]`, in the order of the plan, to what `rows_of` would give."""
    found = torch.from_numpy(steps).index_select(1, plan.place).transpose(0, 1)
    start = 0
    for expected, (basis, unit), width in zip(prediction.rows(), prediction.transform.layers, plan.widths, strict=True):
        numbers = found[start : start + width].to(torch.float32, memory_format=torch.contiguous_format)
        yield torch.addmm(
            expected, numbers.view(width, found[0].numel()).T, basis[:, :width].T, alpha=float(unit) * share
        )
        start += width


def _packed_mask(by_reference: Tensor | None, count: int) -> list[bytes]:
    if by_reference is None:
        return [b""] * count
    return [page.tobytes() for page in np.packbits(by_reference.numpy(), axis=1)]


def _unpacked_mask(bodies: Sequence[memoryview], size: int) -> tuple[Tensor, list[memoryview]]:
    """Which tokens are predicted by a reference, bool `[n, size]`, and what comes behind that."""
    nbytes = -(-size // 8)
    if any(len(body) < nbytes for body in bodies):
        raise BadInput("a page that is a difference ends too early")
    bits = np.stack([np.frombuffer(body[:nbytes], np.uint8) for body in bodies])
    mask = np.unpackbits(bits, axis=1, count=size).astype(bool)
    return torch.from_numpy(mask), [body[nbytes:] for body in bodies]
