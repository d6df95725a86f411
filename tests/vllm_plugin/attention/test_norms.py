"""Blocks that read another's page with their own norms: within the bound with them, and never read without them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest

pytest.importorskip("vllm")

import torch
from torch import Tensor
from vllm.distributed.kv_transfer import get_kv_transfer_group
from vllm.v1.core.kv_cache_utils import make_block_hash_with_group_id

from jointkv.errors import IntegrityError, LayoutError
from jointkv.vllm_plugin.attention.backend import JointAttention
from jointkv.vllm_plugin.attention.norms import OwnNorms
from jointkv.vllm_plugin.engine.runners.base import Remap
from jointkv.vllm_plugin.messages import Inquiry
from tests.hazards import FIRST
from tests.vllm_plugin.engines import Engine, engine, near_prefix, text
from tests.vllm_plugin.scheduling import step_of

BOUND = 0.3
NORMS = {"max_relative_error": BOUND, "max_token_error": None, "own_norms": True}
CHUNKED = {"max_num_batched_tokens": 256, "enable_chunked_prefill": True}
PROMPTS = near_prefix(8, shared=320)


def layers(served: Engine) -> list[Any]:
    return list(served.core.vllm_config.compilation_config.static_forward_context.values())


class Auditor:
    """Checks blocks that are read with factors against what was written for them, at every fifth attention call.

    Attributes:
        seen: entries of tables that were read with a factor; largest error among them.
        apart: how far shared-page attention and its definition were apart, at the most.
    """

    def __init__(self, served: Engine) -> None:
        self.served, self.calls, self.seen, self.worst, self.apart = served, 0, 0, 0.0, 0.0
        self.written: dict[tuple[str, int], list[tuple[Tensor, Tensor]]] = {}
        norms: OwnNorms = get_kv_transfer_group().worker.norms
        commit = norms.commit

        def committed(remaps: list[Remap]) -> None:
            commit(remaps)
            for remap in remaps:
                self.written[remap.request_id, remap.slot] = self.proposed[remap.step, remap.own]

        comparer = get_kv_transfer_group().worker.comparer
        begin = comparer.begin

        def begun(inquiry: Any) -> Any:
            for page in inquiry.own.tolist():
                self.proposed[inquiry.step, page] = [
                    tuple(side[page].clone() for side in layer.impl.pages.read()) for layer in layers(served)
                ]
            return begin(inquiry)

        self.proposed: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
        norms.commit = committed
        comparer.begin = begun

    def look(self, impl: JointAttention, query: Tensor, metadata: Any) -> None:
        self.calls += 1
        if self.calls % 5:
            return
        names = self.served.runner.input_batch.req_ids
        for row, name in enumerate(names[: len(metadata.seq_lens)]):
            for slot in range(int(metadata.seq_lens[row]) // impl.reading.block_size):
                factors = metadata.factors[:, impl.place, row, slot]
                if (factors != 1).any():
                    page = int(metadata.block_table[row, slot])
                    for own, held, factor in zip(
                        self.written[name, slot][impl.place], impl.pages.read(), factors, strict=True
                    ):
                        error = (own - factor * held[page]).norm() / own.norm()
                        plain = (own - held[page]).norm() / own.norm()
                        assert error <= plain + 1e-6
                        self.worst = max(self.worst, float(error))
                    self.seen += 1
        answer = JointAttention._shared.__wrapped__(impl, query, metadata)  # type: ignore[attr-defined]
        truth = impl._by_definition(query, metadata)
        self.apart = max(self.apart, float((answer - truth).norm() / truth.norm()))


@pytest.fixture
def audited(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Auditor]]:
    auditors: list[Auditor] = []
    shared = JointAttention._shared

    def looked(impl: JointAttention, query: Tensor, metadata: Any) -> Tensor | None:
        if metadata.factors is not None and auditors:
            auditors[0].look(impl, query, metadata)
        return shared(impl, query, metadata)

    looked.__wrapped__ = shared  # type: ignore[attr-defined]
    monkeypatch.setattr(JointAttention, "_shared", looked)
    yield auditors


@pytest.mark.hazard(
    "State",
    "blocks are read with their own norms while requests are preempted and resumed",
    "every block, its norms included, is within its bound of what was written",
)
@pytest.mark.runs("own norms", *FIRST)
def test_blocks_are_read_with_their_own_norms(calm: Path, audited: list[Auditor]) -> None:
    with engine(calm, pages=40, fusion={**NORMS, "across_layers": "max"}, **CHUNKED) as own:
        audited.append(Auditor(own))
        prompts = PROMPTS + [text(length, length) for length in (31, 33, 200)]
        for again in (prompts, PROMPTS):
            for prompt in again:
                own.submit(prompt, 120)
            own.finish()
        assert own.statistics["faults"] == 0 and own.statistics["blocks_merged"] > 0 and own.preempted > 0
        own.assert_drained()
        (auditor,) = audited
        assert auditor.seen > 1000 and 0 < auditor.worst <= BOUND + 1e-5
        assert auditor.apart < 1e-5
        own.step()
        assert len(get_kv_transfer_group().worker.norms) == 0


@pytest.mark.runs("own norms", *FIRST)
def test_more_blocks_are_within_a_bound(calm: Path) -> None:
    merged = {}
    for own_norms in (False, True):
        fusion = {**NORMS, "max_relative_error": 0.1, "across_layers": "rms", "own_norms": own_norms}
        with engine(calm, fusion={**fusion, "attention": "shared"}) as served:
            served.generate(PROMPTS)
            merged[own_norms] = served.statistics["blocks_merged"]
    assert merged[True] >= merged[False] > 0


@pytest.mark.hazard(
    "Faults",
    "attention fails while blocks are read with their own norms",
    "they are computed by its slow definition until their requests end; no token differs",
)
def test_after_an_error_no_block_is_read_without_its_factors(calm: Path) -> None:
    outputs = []
    for broken in (False, True):
        with engine(calm, fusion=NORMS) as own:
            names = [own.submit(prompt, 24) for prompt in PROMPTS]
            own.run_until_decoding()
            own.step()
            norms = get_kv_transfer_group().worker.norms
            assert len(norms) > 0
            if broken:
                with patch(
                    "jointkv.vllm_plugin.attention.cpu.JointCPUAttention.kernel", side_effect=RuntimeError("planted")
                ):
                    own.step()
                assert "planted" in layers(own)[0].impl.reading.fault and not norms.enabled
            own.finish()
            outputs.append([own.outputs[name] for name in names])
            later = own.statistics["blocks_merged"]
            own.generate(PROMPTS)
            assert own.statistics["blocks_merged"] > later and own.statistics["faults"] == 0
            own.step()
            assert len(norms) == 0
    assert outputs[0] == outputs[1]


def test_blocks_that_are_computed_again_answer_for_their_hashes(calm: Path) -> None:
    """The page that had served them did: after a second preemption it was read as it stands, without the factors."""
    with engine(calm, fusion=NORMS) as own:
        names = [own.submit(prompt, 40) for prompt in PROMPTS]
        own.run_until_decoding()
        own.step()
        scheduler, tables = own.vllm_scheduler, own.side.tables
        request = scheduler.running[-1]
        tracked = own.side.requests.active[request.request_id]
        (first, *_) = table = own.table(names[-1])
        assert tracked.private_from and request.request_id.startswith(names[-1])
        scheduler.running.remove(request)
        scheduler._preempt_request(request, 0.0)
        own.pool._maybe_evict_cached_block(own.pool.blocks[first])  # so it finds nothing
        with patch.object(own.side.candidates, "new_members", return_value=iter(())):
            own.step()
        assert request.num_preemptions == 1 and not set(own.table(names[-1])) & set(table[1:8])
        for slot in range(tracked.private_from // 32, request.num_computed_tokens // 32):
            key = make_block_hash_with_group_id(request.block_hashes[slot], 0)
            found = tables.pool.cached_block_hash_to_block.get_one_block(key)
            assert found is not None and found.block_id == own.table(names[-1])[slot]
        own.finish()
        own.assert_drained()


def test_where_attention_stays_vllms_pages_are_read_as_they_stand(calm: Path) -> None:
    with (
        patch("jointkv.attention.layouts.LayerPages.confirm", side_effect=LayoutError("never seen")),
        engine(calm, fusion=NORMS) as plain,
    ):
        plain.generate(PROMPTS)
        assert get_kv_transfer_group().worker.norms is None and plain.statistics["blocks_merged"] > 0


def new_step(computed: dict[str, int]) -> Any:
    """A scheduler's output in which requests come back, with so many tokens computed or loaded."""
    running = [(name, [3, 7, 8], count) for name, count in computed.items()]
    return SimpleNamespace(**vars(step_of(running=running, resumed=list(computed))), finished_req_ids=())


def test_of_a_request_that_comes_back_norms_stay_of_what_it_found_and_not_of_what_is_loaded() -> None:
    """Pages that are loaded hold what their text stands for, whatever was read there before."""
    norms, start = OwnNorms(layers=1), new_step(computed={"a": 96})
    norms.propose(Inquiry(5, [], *np.array([[0, 0], [4, 5], [7, 8]])), torch.full((2, 1, 2), 1.5))
    norms.commit([Remap("a", 0, 1, page=7, own=4, step=5), Remap("a", 0, 2, page=8, own=5, step=5)])
    norms.follow(start, {0: 32}, {})
    assert len(norms) == 2
    norms.follow(start, {0: 32}, {"a": 64})
    table = norms.table(0, ["a"], torch.tensor([[3, 7, 9]]))
    assert len(norms) == 1 and table is not None and table[0, 0, 0].tolist() == [1.0, 1.5, 1.0]
    norms.follow(start, {0: 32}, {"a": 0})
    assert norms.table(0, ["a"], torch.tensor([[3, 7, 8]])) is None or not len(norms)


def test_norms_that_are_lost_end_the_step() -> None:
    norms, remap = OwnNorms(layers=2), Remap("a", 0, 3, page=7, own=4, step=5)
    with pytest.raises(IntegrityError, match="lost"):
        norms.commit([remap])
    norms.propose(Inquiry(5, [], *np.array([[0], [4], [7]])), torch.full((1, 2, 2), 1.5))
    for other in (remap._replace(own=5), remap._replace(group=1), remap._replace(step=6)):
        with pytest.raises(IntegrityError, match="lost"):
            norms.commit([other])
    norms.commit([remap])
    with pytest.raises(IntegrityError, match="another page"):
        norms.table(0, ["a"], torch.tensor([[1, 2, 3, 4]]))
    table = norms.table(0, ["b", "a"], torch.tensor([[1, 2, 3, 4], [1, 2, 3, 7]]))
    assert table is not None and (table[:, :, 1, 3] == 1.5).all() and table.sum() == 2 * 2 * (8 + 0.5)
