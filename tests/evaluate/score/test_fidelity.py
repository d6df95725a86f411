"""The metrics equal their definitions, and shapes that make no sense are refused."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from jointkv.errors import LayoutError
from jointkv.evaluate.score import fidelity as scoring
from jointkv.evaluate.score.outputs import common_prefix_length, cut_at_end
from jointkv.evaluate.score.summary import Fidelity, summarize


def score(logits: Tensor, reference: Tensor, targets: Tensor) -> Fidelity:
    return summarize(scoring.score(logits, reference, targets))


def random_case(
    seed: int, requests: int = 3, positions: int = 5, vocab: int = 11, noise: float = 0.5
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    reference = 3 * torch.randn(requests, positions, vocab, generator=generator)
    logits = reference + noise * torch.randn(requests, positions, vocab, generator=generator)
    targets = torch.randint(vocab, (requests, positions), generator=generator)
    return logits, reference, targets


def test_equal_logits_are_perfect() -> None:
    _, reference, targets = random_case(0)
    fidelity = score(reference, reference.clone(), targets)
    assert fidelity.kl == fidelity.kl_worst_request == 0
    assert fidelity.top1 == fidelity.top1_worst_request == 1
    assert fidelity.nll == fidelity.nll_reference > 0
    assert (fidelity.requests, fidelity.positions) == (3, 15)


def test_kl_does_not_depend_on_the_offset_of_logits() -> None:
    _, reference, targets = random_case(0)
    assert score(reference + 20, reference, targets).kl == pytest.approx(0, abs=1e-9)


# 130 positions cross the border at which positions are taken in chunks.
@pytest.mark.parametrize("positions", [1, 5, 64, 130])
def test_equals_torch(positions: int) -> None:
    logits, reference, targets = random_case(1, positions=positions)
    fidelity = score(logits, reference, targets)
    log_q, log_p = logits.double().log_softmax(-1), reference.double().log_softmax(-1)
    per_request = functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1).mean(-1)
    equal = (logits.argmax(-1) == reference.argmax(-1)).double().mean(-1)
    assert fidelity.kl == pytest.approx(per_request.mean().item())
    assert fidelity.kl_worst_request == pytest.approx(per_request.max().item())
    assert fidelity.top1 == pytest.approx(equal.mean().item())
    assert fidelity.top1_worst_request == pytest.approx(equal.min().item())
    nll = functional.cross_entropy(logits.double().flatten(0, 1), targets.flatten())
    nll_reference = functional.cross_entropy(reference.double().flatten(0, 1), targets.flatten())
    assert fidelity.nll == pytest.approx(nll.item())
    assert fidelity.nll_reference == pytest.approx(nll_reference.item())


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    requests=st.integers(1, 4),
    positions=st.integers(1, 6),
    vocab=st.integers(1, 9),
    noise=st.sampled_from([0.0, 1e-6, 1e-3, 1.0, 30.0]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
)
def test_bounds(seed: int, requests: int, positions: int, vocab: int, noise: float, dtype: torch.dtype) -> None:
    logits, reference, targets = random_case(seed, requests, positions, vocab, noise)
    fidelity = score(logits.to(dtype), reference.to(dtype), targets)
    assert 0 <= fidelity.kl <= fidelity.kl_worst_request + 1e-12
    assert 0 <= fidelity.top1_worst_request <= fidelity.top1 + 1e-12 <= 1 + 1e-12
    assert fidelity.nll >= 0 and fidelity.nll_reference >= 0
    assert fidelity.requests == requests and fidelity.positions == requests * positions


def test_positions_weigh_equally_whichever_request_they_belong_to() -> None:
    logits, reference, targets = random_case(2)
    (first,) = scoring.score(logits[:1], reference[:1], targets[:1])
    (second,) = scoring.score(logits[1:2, :1], reference[1:2, :1], targets[1:2, :1])
    found = summarize([first, second])
    assert found.kl == pytest.approx((first.kl + second.kl) / 6)
    assert found.kl_worst_request == pytest.approx(max(first.kl / 5, second.kl))


def test_worst_request_is_the_one_that_moved() -> None:
    _, reference, targets = random_case(3)
    logits = reference.clone()
    logits[1] = -reference[1]
    fidelity = score(logits, reference, targets)
    assert fidelity.kl_worst_request == pytest.approx(3 * fidelity.kl)
    assert fidelity.top1_worst_request == 0
    assert fidelity.top1 == pytest.approx(2 / 3)


def test_tokens_ruled_out_by_the_reference_add_nothing() -> None:
    reference = torch.tensor([[[0.0, 0.0, -math.inf]]])
    targets = torch.zeros(1, 1, dtype=torch.long)
    assert score(reference, reference, targets).kl == 0
    assert score(torch.zeros(1, 1, 3), reference, targets).kl == pytest.approx(math.log(1.5))
    assert score(reference, torch.zeros(1, 1, 3), targets).kl == math.inf


@pytest.mark.parametrize("broken", [0, 1, 2])
def test_nan_shows(broken: int) -> None:
    logits, reference, targets = random_case(4)
    logits[broken, 0, 0] = math.nan
    fidelity = score(logits, reference, targets)
    assert math.isnan(fidelity.kl) and math.isnan(fidelity.kl_worst_request) and math.isnan(fidelity.nll)
    assert math.isfinite(fidelity.nll_reference)


def test_inputs_are_left_alone() -> None:
    logits, reference, targets = random_case(5)
    copies = logits.clone(), reference.clone(), targets.clone()
    score(logits, reference, targets)
    assert all(torch.equal(*pair) for pair in zip((logits, reference, targets), copies, strict=True))


def test_wrong_shapes_are_refused() -> None:
    logits, reference, targets = random_case(6)
    with pytest.raises(
        LayoutError, match=r"one shape \[requests, positions, vocab\], got \(3, 5, 11\) and \(3, 5, 10\)"
    ):
        score(logits, reference[..., :10], targets)
    for wrong in (logits[0], logits[:, :0], logits[..., :0]):
        with pytest.raises(LayoutError, match=r"requests, positions, vocab"):
            score(wrong, wrong, targets)
    with pytest.raises(LayoutError, match="floating point"):
        score(logits.long(), reference, targets)
    with pytest.raises(LayoutError, match=r"targets must be \(3, 5\), got \(3, 4\)"):
        score(logits, reference, targets[:, :4])
    with pytest.raises(LayoutError, match="integer token ids"):
        score(logits, reference, targets.float())
    with pytest.raises(LayoutError, match=r"targets must lie in 0..10, got .*\.\.11"):
        score(logits, reference, torch.full_like(targets, 11))
    with pytest.raises(LayoutError, match="no request was scored"):
        score(logits[:0], reference[:0], targets[:0])


def test_outputs_are_cut_behind_their_first_end_token() -> None:
    assert cut_at_end([4, 9, 5, 8], {8, 9}) == (4, 9)
    assert cut_at_end([4, 5], {9}) == (4, 5) == cut_at_end([4, 5], ())
    assert cut_at_end([], {9}) == ()


def test_common_prefix_length() -> None:
    assert common_prefix_length([1, 2, 3], [1, 2, 4]) == 2
    assert common_prefix_length([1, 2], [1, 2, 4]) == 2
    assert common_prefix_length((), [1]) == 0


TOKENS = st.lists(st.integers(0, 2), max_size=8)


@given(a=TOKENS, b=TOKENS)
def test_common_prefix_length_is_the_longest(a: list[int], b: list[int]) -> None:
    length = common_prefix_length(a, b)
    assert common_prefix_length(b, a) == length
    assert a[:length] == b[:length]
    assert a[: length + 1] != b[: length + 1] or length == len(a) == len(b)
