"""What the answers of an arm are worth: how far its distributions moved, and how near its texts come to true ones."""

from __future__ import annotations

from typing import Self

from jointkv.bench.record import Record
from jointkv.evaluate.score.summary import Fidelity


class Scored(Record):
    """An engine of an arm that was made to give the answers of the reference arm, to the same requests.

    What stands before a token is so the same in both, and its distribution is held against the reference's; natural
    logarithms throughout.

    Attributes:
        against: the reference arm.
        kl: mean over all tokens of KL(reference || arm).
        kl_worst_request: the largest mean of one request.
        top1, top1_worst_request: part of the tokens of which both hold the same one for the likeliest.
        nll, nll_reference: mean negative log-likelihood of the reference's answers.
        pages_freed: by merging meanwhile; None without the plugin.
    """

    arm: str
    against: str
    kl: float
    kl_worst_request: float
    top1: float
    top1_worst_request: float
    nll: float
    nll_reference: float
    requests: int
    positions: int
    pages_freed: int | None = None

    @classmethod
    def of(cls, arm: str, against: str, found: Fidelity, pages_freed: int | None) -> Self:
        """From what was summed up."""
        return cls(arm=arm, against=against, pages_freed=pages_freed, **vars(found))


class TrueAnswers(Record):
    """The texts of an arm beside the true answers, of the requests that have one; all rounds together.

    Attributes:
        f1: mean over the answers of F1 of the bags of words.
    """

    arm: str
    load: str
    f1: float
    answers: int
