"""Distributions of which only the likeliest tokens are kept one by one."""

import pytest
import torch

from jointkv.evaluate.score.fidelity import score
from jointkv.evaluate.score.likeliest import Likeliest

LOGITS, OTHER = torch.randn(2, 50, generator=torch.Generator().manual_seed(0)).mul(3).unbind()


def exact(reference: torch.Tensor, logits: torch.Tensor) -> float:
    return score(logits.view(1, 1, -1), reference.view(1, 1, -1), [[0]])[0].kl


def test_a_whole_vocabulary_gives_the_exact_kl() -> None:
    assert Likeliest.of(LOGITS, 50).kl(OTHER) == pytest.approx(exact(LOGITS, OTHER), rel=1e-9)
    assert Likeliest.of(LOGITS, 999).kl(OTHER) == pytest.approx(exact(LOGITS, OTHER), rel=1e-9)


def test_fewer_tokens_give_less_and_never_too_much() -> None:
    found = [Likeliest.of(LOGITS, count).kl(OTHER) for count in (1, 5, 20, 50)]
    assert found == sorted(found) and found[0] > 0 and found[-1] <= exact(LOGITS, OTHER) * (1 + 1e-9)


@pytest.mark.parametrize("count", [1, 5, 50])
def test_a_distribution_is_no_distance_from_itself(count: int) -> None:
    assert Likeliest.of(LOGITS, count).kl(LOGITS) < 1e-12


def test_the_likeliest_token_is_the_first() -> None:
    kept = Likeliest.of(LOGITS, 5)
    assert kept.tokens[0] == LOGITS.argmax() and kept.log_probabilities.diff().le(0).all()
    assert kept.log_probabilities.exp().sum() + kept.rest.exp() == pytest.approx(1.0)


def test_tokens_that_are_ruled_out() -> None:
    ruled_out = LOGITS.index_fill(0, torch.arange(10), -torch.inf)
    assert Likeliest.of(ruled_out, 50).kl(OTHER) == pytest.approx(exact(ruled_out, OTHER), rel=1e-9)
    assert Likeliest.of(OTHER, 50).kl(ruled_out) == float("inf")
