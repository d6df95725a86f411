"""What the doctor overhears is what was said."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("vllm")

from jointkv.vllm_plugin.doctor.trial import COPIES, PROMPTS, Overheard, salted_prompts, trial_prompts
from jointkv.vllm_plugin.engine.runners.base import Remap
from jointkv.vllm_plugin.messages import Inquiry
from tests.vllm_plugin.scheduling import verdict_on


class Side:
    """Stands for both sides: says what the test gives it."""

    def __init__(self, said: list[Inquiry], pages: dict[str, list[int]]) -> None:
        self._said = said
        requests = {name: SimpleNamespace(block_ids=(held,)) for name, held in pages.items()}
        self.tables = SimpleNamespace(runner=SimpleNamespace(requests=requests))

    def next_inquiry(self, output: Any) -> Inquiry:
        return self._said.pop(0)

    def settle(self, verdict: Any) -> None: ...

    def apply(self, inquiry: Inquiry) -> None: ...


def test_overheard() -> None:
    asked = Inquiry(1, [], *np.array([[0, 0], [5, 6], [2, 3]]), tables={"a": ([1],)})
    told = Inquiry(2, [Remap("a", 0, 1, 7, 4, 1), Remap("a", 0, 0, 9, 4, 1), Remap("gone", 0, 0, 3, 4, 1)])
    side = Side([asked, told], {"a": [1, 7]})
    counts = Overheard(side, side).counts
    for inquiry in (side.next_inquiry(None), side.next_inquiry(None)):
        side.apply(inquiry)
    side.settle(verdict_on(asked))
    assert (counts["inquiries"], counts["pairs"], counts["answered"], counts["equal"]) == (1, 2, 2, 2)
    # Entry 1 of `a` is the page that was said, entry 0 is not; what has left is passed over rightly.
    assert (counts["remaps"], counts["applied"], counts["compared"]) == (3, 2, 1)


def test_prompts_are_duplicates_and_salts_are_not() -> None:
    model = SimpleNamespace(get_vocab_size=lambda: 512)
    engine = SimpleNamespace(vllm_config=SimpleNamespace(model_config=model))
    prompts = [tuple(prompt["prompt_token_ids"]) for prompt in trial_prompts(engine)]
    assert len(prompts) == PROMPTS * COPIES and len(set(prompts)) == PROMPTS
    salted = salted_prompts(engine)
    assert len({prompt["cache_salt"] for prompt in salted}) == COPIES
    assert len({tuple(prompt["prompt_token_ids"]) for prompt in salted}) == 1
