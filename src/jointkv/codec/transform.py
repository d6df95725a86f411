"""The transform that K and V are quantised in: fitted once per model on samples of other text.

Keys are turned back to position 0 first, token by token, so that a channel means the same everywhere; then, layer by
layer, a principal component analysis over all heads (as in KVTC, arXiv 2511.01815) puts what varies into few numbers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from jointkv.attention.rotary import Rotary, Turning
from jointkv.codec.pages import Layout, Pages
from jointkv.errors import BadInput, ModelMismatch
from jointkv.system.files import replace_tensors

FORMAT = "jointkv.transform/1"
KEPT_TOKENS = 4
"""At the beginning of a text, kept as they are: attention leans on them, whatever they say (arXiv 2309.17453)."""

EDGES = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
"""Between the bands of a plan, in steps."""

LEAST = 0.08
"""Components that deviate by less, in steps, are zero but for accidents, and are left out."""


@dataclass(frozen=True, eq=False)
class Side:
    """K or V of all layers.

    Attributes:
        mean: float32 `[layers, D]`, where `D` are the numbers of a token in a layer.
        basis: components as columns, those that vary most first, float32 `[layers, D, D]`, orthonormal.
        deviation: of each component, float32 `[layers, D]`.
        unit: what steps are a share of, float32 `[layers]`: the layer's standard deviation, weighted.
    """

    mean: Tensor
    basis: Tensor
    deviation: Tensor
    unit: Tensor


@dataclass(frozen=True, eq=False)
class Plan:
    """In which order the quantised components of a page are packed.

    Attributes:
        widths: components of each layer that take part: K of all layers, then V of all layers.
        order: of the components, all layers in a row, `[sum of widths]` long.
        place: of each component in that order.
        bands: how many of them are packed together each time.
    """

    widths: tuple[int, ...]
    order: Tensor
    place: Tensor
    bands: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Transform:
    """How K and V of one model are turned, centred and rotated before they are quantised.

    Attributes:
        rotary: of each layer.
        key, value: see `Side`.
    """

    rotary: tuple[Rotary, ...]
    key: Side
    value: Side
    _plans: dict[float, Plan] = field(default_factory=dict, repr=False)

    @classmethod
    def fit(cls, samples: Pages, rotary: Sequence[Rotary]) -> Transform:
        """Fit to pages of text that is like what will come, and not the same; a few thousand tokens are enough.

        Args:
            rotary: of each layer.

        Raises:
            BadInput: too few tokens, or numbers that are not finite.
        """
        counted = positions_of(samples) >= KEPT_TOKENS
        if int(counted.sum()) < 2:
            raise BadInput("a transform is fitted to more tokens than these")
        rows = [numbers[counted.flatten()] for numbers in rows_of(samples, rotary)]
        key, value = (_fit_side(torch.stack(side)) for side in (rows[: len(rotary)], rows[len(rotary) :]))
        return cls(tuple(rotary), key, value)

    def weighted(self, weights: Tensor) -> Transform:
        """With the steps of K and of V of each layer times `weights [2, layers]`: below 1 where errors matter more."""
        key, value = (
            replace(side, unit=side.unit * own) for side, own in zip((self.key, self.value), weights, strict=True)
        )
        return Transform(self.rotary, key, value)

    def check(self, layout: Layout) -> None:
        """Raises ModelMismatch unless pages of `layout` can be of this transform's model."""
        expected = (self.key.mean.shape, self.value.mean.shape)
        found = (layout.layers, layout.heads * layout.key_size), (layout.layers, layout.heads * layout.value_size)
        if any(tuple(one) != other for one, other in zip(expected, found, strict=True)):
            raise ModelMismatch(f"the transform is of K {list(expected[0])}; these pages have {list(found[0])}")

    @cached_property
    def identity(self) -> bytes:
        """A hash of everything in it, 8 bytes."""
        digest = hashlib.blake2b(digest_size=8)
        for name, tensor in sorted(self._tensors().items()):
            digest.update(f"{name}{tuple(tensor.shape)}".encode() + tensor.numpy().tobytes())
        return digest.digest()

    @property
    def layers(self) -> list[tuple[Tensor, Tensor]]:
        """Basis and unit of K of every layer, then of V of every layer."""
        return [pair for side in (self.key, self.value) for pair in zip(side.basis, side.unit, strict=True)]

    def plan(self, share: float) -> Plan:
        """For steps that are `share` of the units; components of alike spread come together."""
        if share not in self._plans:
            self._plans[share] = self._planned(share)
        return self._plans[share]

    def _planned(self, share: float) -> Plan:
        steps = [side.deviation / (side.unit[:, None] * share) for side in (self.key, self.value)]
        rows = [row for side in steps for row in side]
        widths = tuple(int((row >= LEAST).sum()) for row in rows)
        spread = torch.cat([row[:width] for row, width in zip(rows, widths, strict=True)])
        band = torch.bucketize(spread, torch.tensor(EDGES))
        order = band.argsort(stable=True)
        bands = band.bincount(minlength=len(EDGES) + 1)
        return Plan(widths, order, order.argsort(), tuple(bands.tolist()))

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {f"rotary.{index}": rotary.frequencies for index, rotary in enumerate(self.rotary)}
        tensors["interleaved"] = torch.tensor([rotary.interleaved for rotary in self.rotary])
        for name, side in (("key", self.key), ("value", self.value)):
            tensors |= {f"{name}.{part}": tensor for part, tensor in vars(side).items()}
        # Layers may share the tensor of their frequencies, which the file format refuses.
        return {name: tensor.clone().contiguous() for name, tensor in tensors.items()}

    def save(self, path: Path | str) -> None:
        """Write it to a safetensors file. Raises BadInput when that cannot be."""
        replace_tensors(path, self._tensors(), {"format": FORMAT})

    @classmethod
    def load(cls, path: Path | str) -> Transform:
        """Read what `save` wrote. Raises BadInput for anything else."""
        try:
            with safe_open(str(path), framework="pt") as file:
                if (file.metadata() or {}).get("format") != FORMAT:
                    raise BadInput(f"{path}: not a transform ({FORMAT})")
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return cls._from(tensors)
        except (OSError, SafetensorError) as error:
            raise BadInput(f"{path}: not a transform: {error}") from None
        except (KeyError, ValueError, RuntimeError, TypeError) as error:
            raise BadInput(f"{path}: a damaged transform: {error}") from None

    @classmethod
    def _from(cls, tensors: dict[str, Tensor]) -> Transform:
        interleaved = tensors["interleaved"].tolist()
        frequencies = [tensors[f"rotary.{index}"] for index in range(len(interleaved))]
        sides = []
        for name in ("key", "value"):
            side = Side(*(tensors[f"{name}.{part}"] for part in ("mean", "basis", "deviation", "unit")))
            layers, size = side.mean.shape
            shapes = [tuple(tensor.shape) for tensor in vars(side).values()]
            sound = shapes == [(layers, size), (layers, size, size), (layers, size), (layers,)]
            if not sound or layers != len(interleaved) or any(t.dtype != torch.float32 for t in vars(side).values()):
                raise ValueError(f"{name} of {shapes}")
            if not all(tensor.isfinite().all() for tensor in vars(side).values()) or (side.unit <= 0).any():
                raise ValueError(f"{name} has numbers that no transform has")
            sides.append(side)
        if any(f.dtype != torch.float64 or f.dim() != 1 or 2 * len(f) > sides[0].mean.shape[1] for f in frequencies):
            raise ValueError("frequencies of rotary embeddings")
        rotary = (Rotary(f, bool(pairs)) for f, pairs in zip(frequencies, interleaved, strict=True))
        return cls(tuple(rotary), sides[0], sides[1])


def positions_of(pages: Pages) -> Tensor:
    """Of every token, long `[n, t]`."""
    return pages.positions[:, None] + torch.arange(pages.keys.shape[2])


def rows_of(pages: Pages, rotary: Sequence[Rotary]) -> Iterator[Tensor]:
    """K of every layer as at position 0, then V of every layer, float32 `[n * t, D]` each; not to be written to."""
    turning = Turning(rotary, -positions_of(pages).flatten())
    for layer, keys in enumerate(pages.keys):
        yield turning(layer, keys.float().flatten(0, 1)).flatten(1)
    for values in pages.values:
        yield values.float().flatten(0, 1).flatten(1)


def _fit_side(numbers: Tensor) -> Side:
    """Of `numbers [layers, m, D]`."""
    mean = numbers.mean(1)
    centred = numbers - mean[:, None]
    covariance = centred.transpose(1, 2) @ centred / numbers.shape[1]
    if not covariance.isfinite().all():
        raise BadInput("a transform cannot be fitted to numbers that are not finite")
    variance, basis = torch.linalg.eigh(covariance.double())
    deviation = variance.clamp(min=0).sqrt().flip(-1).float()
    unit = deviation.square().mean(1).sqrt().clamp(min=1e-12)
    return Side(mean, basis.flip(-1).float().contiguous(), deviation, unit)
