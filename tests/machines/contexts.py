"""What a model would compute: equal context gives equal K and V, similar text gives similar ones."""

from __future__ import annotations

import torch
from torch import Tensor

VOCABULARY = 6
SINK = 0
"""The token whose K and V are fifty times as large as those of the others."""

KEY_SHAPE, VALUE_SHAPE = (1, 4), (1, 3)
ROOT = -1
FIRST_CONTEXTS = 256


class Contexts:
    """K and V of the last token of every context that came up; a context is a token behind another context.

    Contexts behind an approximated block are private: nobody else can get into them, and no exact hash names them.

    Args:
        layers: of the model.
        dtype: that K and V are rounded to.
        noise: how much the context changes K and V, over what the token alone decides.
        poison: share of contexts with a NaN in K or V.

    Attributes:
        sides: K `[contexts, layers, *KEY_SHAPE]` and V `[contexts, layers, *VALUE_SHAPE]`.
        public: per context, whether it is what an exact model computes for its text.
    """

    def __init__(self, layers: int, dtype: torch.dtype, noise: float, poison: float) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.noise, self.poison = noise, poison
        shapes = (KEY_SHAPE, VALUE_SHAPE)
        self._centres = [torch.randn(VOCABULARY, layers, *shape, generator=self.generator) for shape in shapes]
        for centre in self._centres:
            centre[SINK] *= 50
        self.sides = [torch.zeros(FIRST_CONTEXTS, layers, *shape, dtype=dtype) for shape in shapes]
        self.public: list[bool] = []
        self._known: dict[tuple[int, int], int] = {}

    def after(self, context: int, token: int, exact: bool = True) -> int:
        """The context of `token` behind `context`; not `exact` if some of what attention reads is approximated."""
        public = exact and (context == ROOT or self.public[context])
        # What was approximated, and how, differs each time: a context of its own.
        known = self._known.get((context, token)) if public else None
        if known is None:
            known = self._new(token, public)
            if public:
                self._known[context, token] = known
        return known

    def _new(self, token: int, public: bool) -> int:
        number = len(self.public)
        self.public.append(public)
        spread, broken, side = torch.rand(3, generator=self.generator).tolist()
        for index, centre in enumerate(self._centres):
            if number == len(self.sides[index]):
                self.sides[index] = torch.cat((self.sides[index], torch.zeros_like(self.sides[index])))
            size = self.noise * (8 if spread < 0.05 else 1)
            noise = torch.randn(centre[token].shape, generator=self.generator)
            # "+ 0.0" makes -0.0 a 0.0.
            self.sides[index][number] = centre[token] + size * centre[token].abs().mean() * noise + 0.0
        if broken < self.poison:
            self.sides[side < 0.5][number].view(-1)[0] = torch.nan
        return number

    def states(self, contexts: list[list[int]]) -> list[Tensor]:
        """K and V of `contexts [rows][n]`, `ROOT` for padding, as in a forward pass: `[layers, rows, h, n, d]`."""
        index = torch.tensor(contexts)
        made = []
        for side in self.sides:
            states = side[index.clamp(min=0)]
            states[index == ROOT] = torch.randn(side.shape[1:], generator=self.generator).to(side.dtype)
            made.append(states.permute(2, 0, 3, 1, 4).contiguous())
        return made
