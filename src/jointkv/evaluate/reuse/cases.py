"""Situations in which a server decides: a request, those that hold its text, and what is known of their pages."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from jointkv.core.evidence import Echoes, echoes
from jointkv.evaluate.reuse.pairs import Ratios
from jointkv.evaluate.reuse.setup import Sample

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Cases:
    """`n` situations at one text of `b` blocks behind the entry block. Ratios are error over bound.

    Attributes:
        kind, text: of the headers, and behind them.
        entry: of the entry block, read from the nearest source, `[n]`.
        true: of the blocks behind it, `[n, b]`; what predictors must not see except where they say so.
        witness_entry, witness: the same of the witnesses of that source, `[n, k]` and `[n, k, b]`.
        other_entry, other: of the other sources read from the nearest, `[n, m - 1]` and `[n, m - 1, b]`.
        other_near: the entry block of the request, read from the other sources, `[n, m - 1]`.
        own_echo, echo, witness_echo: echoes of the header of source, request and witnesses, `[n, b]` and `[n, k, b]`.
        share: of a prompt's tokens in these blocks; entry block and header are computed.
    """

    kind: str
    text: str
    entry: Floats
    true: Floats
    witness_entry: Floats
    witness: Floats
    other_entry: Floats
    other: Floats
    other_near: Floats
    own_echo: Echoes
    echo: Echoes
    witness_echo: Echoes
    share: float

    @property
    def missed(self) -> NDArray[np.bool_]:
        """Which blocks are beyond the bounds where they are reused, `[n, b]`."""
        return ~(self.true <= 1.0)


def draw_cases(
    sample: Sample,
    ratios: Ratios,
    header_tokens: int,
    sources: int,
    witnesses: int,
    draws: int,
    rng: np.random.Generator,
) -> Cases:
    """`draws` situations, each with its own request, sources and witnesses of `sample`."""
    count, blocks = len(ratios), ratios.shape[2]
    order = rng.permuted(np.tile(np.arange(count), (draws, 1)), axis=1)
    target, held, heard = order[:, 0], order[:, 1 : 1 + sources], order[:, 1 + sources : 1 + sources + witnesses]
    held = np.take_along_axis(held, np.argsort(ratios[held, target[:, None], 0], axis=1), axis=1)
    nearest, others = held[:, 0], held[:, 1:]
    found = _echoes(sample, header_tokens, blocks)
    heard_ratios = ratios[nearest[:, None], heard]
    other_ratios = ratios[nearest[:, None], others]
    tokens = len(sample.requests[0].prompt) - 1
    return Cases(
        kind=sample.kind,
        text=sample.text,
        entry=ratios[nearest, target, 0],
        true=ratios[nearest, target, 1:],
        witness_entry=heard_ratios[..., 0],
        witness=heard_ratios[..., 1:],
        other_entry=other_ratios[..., 0],
        other=other_ratios[..., 1:],
        other_near=ratios[others, target[:, None], 0],
        own_echo=found[nearest],
        echo=found[target],
        witness_echo=found[heard],
        share=(blocks - 1) * (tokens - header_tokens) / blocks / tokens,
    )


def _echoes(sample: Sample, header_tokens: int, blocks: int) -> Echoes:
    """Of every request's header, in the blocks behind the entry block, `[requests, b]`."""
    prompts = np.array([request.prompt[:-1] for request in sample.requests])
    text = prompts[0, header_tokens:]
    size = len(text) // blocks
    return np.stack([echoes(text, prompt[:header_tokens], size)[1:] for prompt in prompts])
