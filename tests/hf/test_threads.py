"""Threads with caches of their own share a pool, and a model with transformers' own caches."""

from __future__ import annotations

import copy
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from jointkv.core.pool import BlockPool
from jointkv.core.table import BlockTable
from jointkv.fusion.fuser import Fuser
from jointkv.hf import step as step_module
from jointkv.hf.cache import JointCache
from jointkv.hf.pool import JointPool
from jointkv.hf.residents import Residents
from jointkv.hf.step import Step
from jointkv.policy import FusionPolicy
from tests.hf.reusing import near, padded, reusing, text
from tests.hf.tiny_models import BLOCK, build_model, generate, joint, prompts, step, stock_cache
from tests.machines.test_answers_machine import run

SHARED = text(8 * BLOCK, 7)
CLOSE = {"rtol": 1e-4, "atol": 1e-4}

CHANGES: list[tuple[Any, tuple[str, ...]]] = [
    (BlockPool, ("allocate", "share", "free", "copy_pages", "collect_dropped", "check_integrity")),
    (BlockTable, ("extend", "append", "truncate", "select", "adopt", "make_writable", "apply")),
    (Fuser, ("fuse", "forget")),
    (Residents, ("find", "add", "forget", "witness")),
    (step_module, ("write_tokens",)),
    (JointPool, ("prepare", "disable_fusion")),
]


@pytest.fixture
def pools(monkeypatch: pytest.MonkeyPatch) -> list[JointPool]:
    """All pools that are made."""
    made: list[JointPool] = []
    begin = JointPool.__init__

    def noted(pool: JointPool, *arguments: Any, **options: Any) -> None:
        begin(pool, *arguments, **options)
        made.append(pool)

    monkeypatch.setattr(JointPool, "__init__", noted)
    return made


@pytest.mark.parametrize("kind", ["three layers", "sliding"])
def test_what_threads_share_is_changed_by_one_at_a_time(
    kind: str, pools: list[JointPool], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    called: Counter[str] = Counter()

    def locked(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*arguments: Any, **options: Any) -> Any:
            called[name] += 1
            locks: list[Any] = [pool.lock for pool in pools]
            assert any(lock._is_owned() for lock in locks), f"{name} without the lock"
            return method(*arguments, **options)

        return wrapper

    for where, names in CHANGES:
        for name in names:
            monkeypatch.setattr(where, name, locked(name, getattr(where, name)))
    for seed in range(3):
        run(seed, kind, tmp_path, Counter())
    often = {"allocate", "share", "free", "extend", "truncate", "fuse", "forget", "write_tokens", "prepare"}
    assert often <= set(called)


@pytest.fixture
def restless() -> Iterator[None]:
    """Threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def together(*work: Callable[[], None]) -> None:
    """Each in a thread of its own; raises what one of them raised."""
    errors: list[BaseException] = []

    def kept(each: Callable[[], None]) -> None:
        try:
            each()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=kept, args=(each,)) for each in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def test_each_thread_has_its_answers(restless: None) -> None:
    model, pool = reusing(policy=FusionPolicy(max_relative_error=1e-3, max_token_error=1e-3), moved=True, fuses=True)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
        model.model.layers[-1].self_attn.o_proj.weight.normal_(std=0.3)
    texts = [padded(near(SHARED, seed, header=BLOCK + seed % 3), near(SHARED, seed + 1)) for seed in range(4)]
    expected = [generate(model, prompt, stock_cache(model), tokens=6).logits for prompt in texts]

    def answer(first: int, cache: Callable[[], Any], prefills: bool) -> None:
        for number in range(12):
            seed = (first + number) % len(texts)
            held = cache()
            if prefills:
                held.prefill(model, *texts[seed])
            for found, true in zip(generate(model, texts[seed], held, tokens=6).logits, expected[seed], strict=True):
                torch.testing.assert_close(found, true, **CLOSE)

    together(
        lambda: answer(0, lambda: JointCache(pool), True),
        lambda: answer(1, lambda: JointCache(pool), False),
        lambda: answer(2, lambda: stock_cache(model), False),
    )
    pool.check_integrity()
    assert not pool.faults and pool.reuse is not None and model.config._attn_implementation == "sdpa"


def test_a_forward_pass_in_another_thread_leaves_attention_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was switched back between a layer's cache and its attention, which then saw the new token alone."""
    model, pool = joint("llama")
    ids, _ = prompts(3 * BLOCK)
    cache, stock = JointCache(pool), stock_cache(model)
    for held in (cache, stock):
        step(model, held, ids)
    expected = step(model, stock, ids[:, :1])
    write, others = Step.write, []

    def another() -> None:
        others.append(stock_cache(model))
        step(model, others[0], ids)

    def interrupted(now: Step, batch: Any, index: int, *states: Tensor, **options: Any) -> Any:
        written = write(now, batch, index, *states, **options)
        if index == 1 and not others:
            together(another)
        return written

    monkeypatch.setattr(Step, "write", interrupted)
    torch.testing.assert_close(step(model, cache, ids[:, :1]), expected)
    assert others[0].get_seq_length() == 3 * BLOCK and model.config._attn_implementation == "sdpa"


@pytest.mark.slow
def test_what_a_compiled_model_has_written_follows_pages_that_were_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    """In its graphs there is no lock, and no look at where pages are now."""
    model = build_model("llama")
    compiled = torch.compile(model, backend="eager")
    pool = JointPool(model, "off", block_size=BLOCK)
    ids, _ = prompts(3 * BLOCK)
    caches = JointCache(pool), stock_cache(model)
    for held, run_by in zip(caches, (compiled, model), strict=True):
        for part in (ids, ids[:, :5]):
            step(run_by, held, part)
    write_begun, begin_step = [], JointCache.begin_step

    def growing(cache: JointCache, *arguments: Any) -> None:
        begin_step(cache, *arguments)
        with pool.lock:
            pool.blocks._grow(10 * pool.blocks.num_pages)
        write_begun.append(True)

    monkeypatch.setattr(JointCache, "begin_step", growing)
    step(compiled, caches[0], ids[:, :2])
    monkeypatch.undo()
    step(model, caches[1], ids[:, :2])
    assert write_begun
    torch.testing.assert_close(step(model, caches[0], ids[:, :1]), step(model, caches[1], ids[:, :1]), **CLOSE)


def test_a_copy_of_a_model_has_a_switch_of_its_own() -> None:
    model, _ = joint("llama")
    twin = copy.deepcopy(model)
    mine, theirs = (each.get_decoder()._jointkv_attention for each in (model, twin))
    mine.on()
    assert (model.config._attn_implementation, twin.config._attn_implementation) == ("jointkv", "sdpa")
    assert mine.reads_pages and not theirs.reads_pages
    mine.off()
