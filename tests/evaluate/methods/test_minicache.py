"""Cross-layer merging."""

import pytest
import torch

from jointkv.evaluate.compare.comparison import run_methods
from jointkv.evaluate.methods import get_method
from jointkv.evaluate.methods.minicache import RETAINED, UPPER, merge_pair
from tests.evaluate.methods.tiny_batches import HEADS, LAYERS, PER_TOKEN, SIZE, batch_of, different


def states(*shape, seed=0):
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(seed))


def test_layers_of_one_direction_come_back_as_they_were():
    lower = states(2, 20, 8)
    upper = lower * (1 + torch.rand(1, 2, 20, 1))
    read = merge_pair(lower, upper).read()
    torch.testing.assert_close(read, torch.cat((lower, upper)))


def test_norms_are_kept_and_the_direction_lies_between_nearer_to_the_upper():
    lower, upper = states(2, 20, 8), states(2, 20, 8, seed=1)
    read = merge_pair(lower, upper).read()
    torch.testing.assert_close(read.norm(dim=-1), torch.cat((lower, upper)).norm(dim=-1))
    unit = torch.nn.functional.normalize
    angle = (unit(lower, dim=-1) * unit(upper, dim=-1)).sum(-1).arccos()[0]
    moved = (unit(read[1], dim=-1) * unit(upper[0], dim=-1)).sum(-1).clamp(max=1).arccos()
    merged = moved > 1e-2  # retained tokens did not move
    torch.testing.assert_close(moved[merged], (1 - UPPER) * angle[merged], rtol=1e-3, atol=1e-3)
    assert merged.sum() == 2 * (20 - round(RETAINED * 20))


def test_the_tokens_that_differ_most_are_retained():
    lower = states(2, 40, 8)
    upper = lower + 0.01 * states(2, 40, 8, seed=1)
    upper[:, :, [7, 31]] = states(2, 2, 8, seed=2)
    pair = merge_pair(lower, upper)
    assert pair.retained.tolist() == [7, 31]
    assert torch.equal(pair.read()[:, :, [7, 31]], torch.cat((lower, upper))[:, :, [7, 31]])


def test_bytes_are_one_direction_two_norms_and_what_is_retained():
    batch = batch_of(different(rows=1, length=41))
    held = get_method("minicache").hold(batch, 0.7)  # 4 of 6 layers
    tokens, pairs = 40, 2
    retained = round(RETAINED * tokens)
    side = HEADS * ((tokens - retained) * (SIZE + 2) + 2 * retained * SIZE) * 4 + retained * 4
    assert held.nbytes == tokens * PER_TOKEN * 4 * (LAYERS - 2 * pairs) // LAYERS + pairs * 2 * side


def test_more_merged_layers_cost_more():
    method = get_method("minicache")
    rows = list(
        run_methods(batch_of(different(), num_hidden_layers=8), [(method, level) for level in (0.0, *method.levels)])
    )
    assert rows[0].kl < 1e-9 < rows[1].kl < rows[-1].kl


@pytest.mark.parametrize("cosine", [1.0, -1.0])
def test_equal_and_opposite_directions_give_numbers(cosine):
    lower = states(1, 30, 8)
    assert merge_pair(lower, cosine * lower).read().isfinite().all()
