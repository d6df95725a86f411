"""The scheduler's tables: what may be replaced, what answers for a hash afterwards, and what is noticed when wrong."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm")

from vllm.v1.core.kv_cache_utils import make_block_hash_with_group_id
from vllm.v1.request import Request, RequestStatus

from jointkv.errors import IntegrityError
from jointkv.vllm_plugin.engine.tables import BlockTables
from tests.vllm_plugin.scheduling import BLOCK, TOKENS, new_manager, new_request, start


def two(prefix_caching: bool = True) -> tuple[BlockTables, Request, Request]:
    """Tables with two requests of four blocks each, whose first blocks differ."""
    manager = new_manager(prefix_caching=prefix_caching)
    first, second = (new_request({}, name, prompt_token_ids=[ord(name), *TOKENS[1:]]) for name in "ab")
    for request in (first, second):
        start(manager, request)
    return BlockTables(manager), first, second


def page(tables: BlockTables, request: Request, slot: int) -> int:
    block = tables.block(request.request_id, 0, slot)
    assert block is not None
    return block.block_id


def answers(tables: BlockTables, request: Request, slot: int) -> int | None:
    """The page that the prefix cache finds for the hash of a block."""
    key = make_block_hash_with_group_id(request.block_hashes[slot], 0)
    block = tables.pool.cached_block_hash_to_block.get_one_block(key)
    return None if block is None else block.block_id


def test_of() -> None:
    tables, first, _ = two()
    assert tables.of(["a", "gone"]) == {"a": ([page(tables, first, slot) for slot in range(4)],), "gone": ([],)}
    assert tables.block("a", 0, 4) is None and tables.block("gone", 0, 0) is None


def test_replacing_frees_the_page_and_keeps_counts_right() -> None:
    tables, first, second = two()
    own, kept, free = page(tables, second, 2), page(tables, first, 2), tables.pool.get_num_free_blocks()
    tables.replace("b", 0, 2, kept)
    assert page(tables, second, 2) == kept and tables.pool.get_num_free_blocks() == free + 1
    assert tables.shared_pages() == {1: 6, 2: 1} and tables.pool.blocks[own].ref_cnt == 0
    tables.check_integrity()


def test_pages_are_held_while_one_is_left_for_every_table() -> None:
    tables, *_ = two()
    free, held = tables.free, []
    while (taken := tables.hold()) is not None:
        held.append(taken)
    assert tables.free == 2 and len(set(held)) == len(held) == free - 2 and tables.held == set(held)
    tables.check_integrity()
    for taken in held:
        tables.release(taken)
    assert tables.free == free and not tables.held
    tables.check_integrity()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("nothing", None),
        ("status", "request_gone"),
        ("epoch", "request_gone"),
        ("page", "entry_changed"),
        ("slot", "entry_changed"),
        ("shared", "page_shared"),
        ("uncached", "not_cached_yet"),
    ],
)
def test_may_replace(change: str, reason: str | None) -> None:
    tables, _, second = two()
    own, slot, epoch = page(tables, second, 2), 2, 0
    if change == "status":
        second.status = RequestStatus.PREEMPTED
    elif change == "epoch":
        epoch = 1
    elif change == "page":
        own += 1
    elif change == "slot":
        slot = 9
    elif change == "shared":
        tables.pool.touch([tables.pool.blocks[own]])
    elif change == "uncached":
        tables.groups[0].num_cached_block["b"] = 2
    assert tables.may_replace(second, epoch, 0, slot, own) == reason


def test_a_private_hash_is_found_by_its_owner_until_it_is_forgotten() -> None:
    tables, first, second = two()
    exact = list(second.block_hashes)
    tables.make_private(second, 2 * BLOCK, None, b"secret")
    assert second.block_hashes[:2] == exact[:2] and set(second.block_hashes[2:]).isdisjoint(exact)
    tables.replace("b", 0, 2, page(tables, first, 2))
    tables.answer_for(second, 2 * BLOCK, None)
    assert [answers(tables, second, slot) for slot in range(4)] == [page(tables, second, slot) for slot in range(4)]
    assert answers(tables, first, 2) == page(tables, first, 2)
    tables.forget(second, 2 * BLOCK)
    assert answers(tables, second, 2) is answers(tables, second, 3) is None
    assert answers(tables, first, 2) == page(tables, first, 2) and not tables.pool.cached_block_hashes_by_block


def test_what_is_wrong_is_noticed() -> None:
    tables, _, _ = two()
    block = tables.block("a", 0, 0)
    assert block is not None
    block.ref_cnt += 1
    with pytest.raises(IntegrityError, match="2 references and 1 entries"):
        tables.check_integrity()
    block.ref_cnt -= 1
    tables.pool.free_blocks([block])
    block.ref_cnt += 1
    with pytest.raises(IntegrityError, match="free and referenced"):
        tables.check_integrity()
