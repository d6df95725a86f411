"""What forces answers, without an engine around it."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from jointkv.bench.forced_answers import ARGUMENT, ForcedAnswers, read_answers, write_answers

CPU = torch.device("cpu")
LOGITS = torch.randn(2, 3, 40, generator=torch.Generator().manual_seed(0))


def answered(forced: ForcedAnswers, number: int, logits: torch.Tensor) -> list[int]:
    """The tokens of an answer for which the model holds `logits [tokens, vocab]`."""
    params: Any = SimpleNamespace(extra_args={ARGUMENT: number})
    force = forced.new_req_logits_processor(params)
    assert force is not None
    force([], torch.zeros(40))  # half a prompt
    output: list[int] = []
    for row in logits:
        before = row.clone()
        output.append(int(force(output, row).argmax()))
        assert row.equal(before)
    return output


def test_an_engine_that_is_forced_gives_the_answers_of_another(tmp_path: Path) -> None:
    own = ForcedAnswers(None, CPU, False)
    expected = [answered(own, number, logits) for number, logits in enumerate(LOGITS)]
    assert expected == LOGITS.argmax(2).tolist() and not own.is_argmax_invariant()
    write_answers(tmp_path / "answers.safetensors", own.answers())

    same, other = ForcedAnswers(None, CPU, False), ForcedAnswers(None, CPU, False)
    same.reference = other.reference = read_answers(tmp_path / "answers.safetensors")
    assert [answered(same, number, LOGITS[number]) for number in (1, 0)] == expected[::-1]
    assert [answered(other, number, LOGITS[1 - number]) for number in (0, 1)] == expected
    for row in same.sums():
        assert (row.positions, row.top1_equal, row.nll) == (3, 3, row.nll_reference) and row.kl < 1e-9
    assert all(row.kl > 0.1 and row.positions == 3 and row.nll > row.nll_reference for row in other.sums())


@pytest.mark.parametrize("extra", [None, {}, {"jointkv": True}])
def test_requests_without_a_number_are_left_alone(extra: Any) -> None:
    params: Any = SimpleNamespace(extra_args=extra)
    assert ForcedAnswers(None, CPU, False).new_req_logits_processor(params) is None
