"""The QuantizedCache of transformers; run in the environment of `make setup-eval`."""

import pytest

from jointkv.evaluate.compare.comparison import run_methods
from jointkv.evaluate.holding.dense import prefill_dense
from jointkv.evaluate.methods import get_method
from jointkv.evaluate.methods.quantized import _cache, held_tensors
from tests.evaluate.methods.tiny_batches import LAYERS, PER_TOKEN, SIZE, batch_of, different

pytest.importorskip("hqq")
pytest.importorskip("optimum.quanto")


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_bytes_are_packed_codes_and_a_scale_and_a_zero_per_token_and_head(bits):
    batch = batch_of(different(rows=1, length=73))  # 144 groups: quanto fills up to a multiple of 4 at 2 bits
    held = get_method("quantized").hold(batch, bits)
    numbers = sum(batch.lengths) * PER_TOKEN
    assert held.nbytes_packed == numbers * bits // 8
    assert held.nbytes == held.nbytes_packed + numbers // SIZE * 2 * 4


def test_tokens_fed_stay_in_the_residual_window():
    batch = batch_of(different(rows=1))
    cache = prefill_dense(batch.model, batch.requests[0], _cache(batch, 4))
    before = sum(tensor.nbytes for tensor in held_tensors(cache))
    prefill_dense(batch.model, batch.requests[0], cache)
    assert sum(tensor.nbytes for tensor in held_tensors(cache)) == before + batch.lengths[0] * PER_TOKEN * 4
    assert len(cache.layers) == LAYERS


def test_fewer_bits_cost_more():
    method = get_method("quantized")
    rows = list(run_methods(batch_of(different()), [(method, level) for level in method.levels]))
    assert [row.not_run for row in rows] == [None] * 3
    assert rows[0].kl < rows[1].kl < rows[2].kl
