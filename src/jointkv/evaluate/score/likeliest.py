"""Next-token distributions kept small: their likeliest tokens one by one, and all others as one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Likeliest:
    """A distribution over a vocabulary.

    Attributes:
        tokens: the likeliest first, int64 `[count]`.
        log_probabilities: theirs, float64 `[count]`.
        rest: log-probability of all other tokens together, float64 scalar; -inf where there is none.
    """

    tokens: Tensor
    log_probabilities: Tensor
    rest: Tensor

    @classmethod
    def of(cls, logits: Tensor, count: int) -> Self:
        """From logits `[vocab]`; at most `count` tokens are kept one by one."""
        every = torch.log_softmax(logits.double(), dim=-1)
        tokens = every.topk(min(count, len(every))).indices
        return cls(tokens, every[tokens], _rest(every, tokens))

    def kl(self, logits: Tensor) -> float:
        """KL of this distribution against that of `logits [vocab]`, in nats.

        Tokens that are not kept one by one count as one: what is found is that of the whole vocabulary or less, by the
        data processing inequality. It is never negative but for rounding, which is cut off.
        """
        every = torch.log_softmax(logits.double(), dim=-1)
        mine = torch.cat((self.log_probabilities, self.rest[None]))
        theirs = torch.cat((every[self.tokens], _rest(every, self.tokens)[None]))
        # What this distribution rules out adds 0; the plain product would be 0 * inf = NaN.
        return max(0.0, float(torch.where(mine.isneginf(), 0.0, mine.exp() * (mine - theirs)).sum()))


def _rest(log_probabilities: Tensor, without: Tensor) -> Tensor:
    return log_probabilities.index_fill(0, without, -torch.inf).logsumexp(0)
