"""Saved caches, plans, prefills and checkpoints: safetensors files with a damaged header, content or meaning."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from jointkv.errors import BadInput
from jointkv.evaluate.holding import prefilled
from jointkv.evaluate.holding.prefilled import prefill
from jointkv.evaluate.traffic.base import Request
from jointkv.hf.cache import JointCache
from jointkv.hf.pool import JointPool
from jointkv.policy import FusionPolicy
from jointkv.policy.identity import checkpoint_fingerprint
from tests.fuzz.damage import PROMISE, damaged_bytes, documents, promise, slower, unreadable
from tests.hf.tiny_models import VOCABULARY, generate, joint, prompts

BOMBS = (0, 7, 2**20, 100 * 2**20, 2**40, 2**63, 2**64 - 1)
POLICIES = {
    "safe": FusionPolicy.preset("safe", candidates="both"),
    "paper": FusionPolicy.preset("paper", key_threshold=0.2, skip_first_layers=0, skip_last_layers=0),
}
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.long, torch.int32, torch.bool, torch.uint8, torch.float64)


@cache
def pool_of(model: str, policy: str) -> tuple[Any, JointPool]:
    return joint(model, POLICIES[policy])


@cache
def saved_cache(model: str, policy: str, folder: Path) -> Path:
    path = folder / f"{model}-{policy}.cache"
    loaded, pool = pool_of(model, policy)
    held = JointCache(pool)
    generate(loaded, prompts(21, 9, 14), held)
    held.save(path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("saved")


@st.composite
def damaged_file(draw: st.DrawFn, data: bytes) -> bytes:
    """A safetensors file with a damaged header, content, or size of the header."""
    size = struct.unpack("<Q", data[:8])[0]
    header, content = json.loads(data[8 : 8 + size]), data[8 + size :]
    how = draw(st.integers(0, 5))
    if how < 3:
        text = json.dumps(draw(documents(header))).encode()
        return struct.pack("<Q", len(text)) + text + content
    if how == 3:
        return struct.pack("<Q", draw(st.sampled_from(BOMBS))) + data[8:]
    if how == 4:
        return data[: 8 + size] + draw(damaged_bytes(content))
    return draw(damaged_bytes(data))


VALUES = (-1, -5, 0, 1, 3, 10**6, 2**40, float("nan"), float("inf"))
SHAPES = ((0,), (10**12, 4, 0, 2), (10**9, 0), (1, 10**15, 0, 8))
CHANGES = st.lists(
    st.tuples(
        st.integers(0, 99), st.integers(0, 7), st.sampled_from(DTYPES), st.sampled_from(VALUES), st.integers(0, 3)
    ),
    max_size=2,
)
"""Which tensor, what happens to it, and a dtype, a value and a shape to do it with."""


def changed(tensors: dict[str, Tensor], changes: list[tuple[int, int, torch.dtype, float, int]]) -> dict[str, Tensor]:
    """What a sound file may hold instead of the tensors that belong in it."""
    made = dict(tensors)
    for which, how, dtype, value, shape in changes:
        names = sorted(made)
        name = names[which % len(names)]
        tensor = made.pop(name)
        if how == 1:
            made[name] = tensor.to(dtype)
        elif how == 2:
            made[name] = tensor[:, :1] if tensor.dim() > 1 else tensor.reshape(-1)[:1]
        elif how == 3:
            made[name] = tensor.flatten()[0] if tensor.numel() else tensor.flatten()
        elif how == 4:
            made[name] = tensor[None]
        elif how == 5:
            made[name] = torch.zeros(SHAPES[shape])
        elif how == 6:
            whole = not tensor.is_floating_point() and not abs(value) < 2**62
            made[name] = torch.full(tensor.shape, 0.0 if whole else value, dtype=torch.double).to(tensor.dtype)
        elif how == 7:
            made[name] = tensors[sorted(tensors)[which * 7 % len(tensors)]]
    return {name: tensor.clone() for name, tensor in made.items()}


def opened(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(str(path), "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


def use(path: Path, model: str, policy: str) -> None:
    """Load a cache and run a step on it; whatever comes of it, the pool is as it was."""
    loaded, pool = pool_of(model, policy)
    used, faults = pool.stats()["pages_used"], pool.faults
    with promise():
        held = JointCache.load(path, pool)
        held.check_integrity()
        ids = torch.full((held.batch_size, 1), 5)
        mask = (torch.arange(held.length + 1) >= held.padding[:, None]).long()
        with torch.no_grad():
            loaded(input_ids=ids, attention_mask=mask, past_key_values=held)
        held.check_integrity()
    held = None
    assert pool.stats()["pages_used"] == used
    assert pool.faults == faults, "a damaged file switched fusion off for the whole pool"
    pool.check_integrity()


@pytest.mark.hazard("Parsers", "a damaged or hostile saved cache", PROMISE)
@slower(4)
@given(kind=st.sampled_from([("llama", "safe"), ("gemma3", "paper")]), data=st.data())
def test_saved_caches(folder: Path, kind: tuple[str, str], data: st.DataObject) -> None:
    model, policy = kind
    path = saved_cache(model, policy, folder)
    if data.draw(st.booleans()):
        (folder / "damaged").write_bytes(data.draw(damaged_file(path.read_bytes())))
    else:
        tensors, metadata = opened(path)
        metadata["length"] = data.draw(
            st.just(metadata["length"])
            | st.sampled_from(["-1", "0", "x", "", "1" * 5000, str(2**31 - 1), "10" * 15, "\uff12"])
        )
        save_file(changed(tensors, data.draw(CHANGES)), folder / "damaged", metadata=metadata)
    use(folder / "damaged", model, policy)


def damage(change: Callable[[dict[str, Tensor], dict[str, str]], Any]) -> Callable[[Path], None]:
    def refused(folder: Path) -> None:
        tensors, metadata = opened(saved_cache("llama", "safe", folder))
        change(tensors, metadata)
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "bad", metadata=metadata)
        pool = pool_of("llama", "safe")[1]
        with pytest.raises(BadInput, match="damaged"):
            JointCache.load(folder / "bad", pool)
        assert pool.faults == 0

    return refused


def test_a_padding_that_is_one_number(folder: Path) -> None:
    """The length of a tensor without dimensions was asked for, and TypeError went up to the caller."""
    damage(lambda tensors, _: tensors.update(padding=torch.tensor(0)))(folder)


def test_pages_without_elements(folder: Path) -> None:
    """A file of some hundred bytes declared 10**12 pages of no elements, and the pool was asked for as many."""
    empty = {f"{side}.{layer}": torch.zeros(10**12, 4, 0, 8) for side in ("key", "value") for layer in range(3)}
    damage(lambda tensors, _: tensors.update(empty))(folder)


def test_padding_that_costs_the_file_nothing(folder: Path) -> None:
    """A length of 2**31 - 1, nearly all of it padding, was taken, and the next step took slots for every token."""

    def pad(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        tensors.pop("tokens")
        tensors["padding"] += 2**31 - 1 - int(metadata["length"])
        metadata["length"] = str(2**31 - 1)

    damage(pad)(folder)


def test_tokens_of_another_type(folder: Path) -> None:
    """Token ids saved as floats failed inside fusion, which switched itself off for every cache of the pool."""
    damage(lambda tensors, _: tensors.update(tokens=tensors["tokens"].float()))(folder)


def test_a_length_beyond_what_a_tensor_holds(folder: Path) -> None:
    """A length of more than 64 bits was compared with a tensor, which overflowed."""
    damage(lambda _, metadata: metadata.update(length="1" * 30))(folder)


def test_no_rows(folder: Path) -> None:
    """The largest of no paddings was asked for."""
    damage(
        lambda tensors, _: tensors.update(
            {name: tensors[name][:0] for name in ("padding", "fusable", "table.0", "served.0", "tokens")}
        )
    )(folder)


@pytest.mark.hazard("Parsers", "a damaged or hostile saved cache", PROMISE)
def test_caches_that_are_no_files(folder: Path) -> None:
    pool = pool_of("llama", "safe")[1]
    for path in unreadable(folder):
        with pytest.raises(BadInput):
            JointCache.load(path, pool)


@pytest.mark.hazard("Parsers", "a damaged prefill or checkpoint", "ignored, as if it were not there")
@slower(4)
@given(data=st.data())
def test_prefills_and_checkpoints(folder: Path, data: st.DataObject) -> None:
    requests, path = prefill_in(folder)
    damaged = folder / "model-damaged" / "model.safetensors"
    damaged.parent.mkdir(exist_ok=True)
    if data.draw(st.booleans()):
        damaged.write_bytes(data.draw(damaged_file(path.read_bytes())))
    else:
        tensors, metadata = opened(path)
        save_file(changed(tensors, data.draw(CHANGES)), damaged, metadata=metadata)
    ignored = False
    with promise():
        batch = prefilled.load(damaged, requests)
        if batch is not None:
            assert len(prefilled.take(batch, [0]).requests) == 1
        found = checkpoint_fingerprint(damaged.parent)
        assert found is None or len(found) == 32
        ignored = True
    assert ignored


@pytest.mark.parametrize(
    ("name", "dtype"), [("padding", torch.bool), ("padding", torch.float32), ("served.0", torch.long)]
)
def test_a_prefill_of_other_kinds(folder: Path, name: str, dtype: torch.dtype) -> None:
    """A padding of truth values was taken, and failed when it was subtracted."""
    requests, path = prefill_in(folder)
    tensors, metadata = opened(path)
    save_file({**tensors, name: tensors[name].to(dtype)}, folder / "other", metadata=metadata)
    assert prefilled.load(path, requests) is not None and prefilled.load(folder / "other", requests) is None


@cache
def prefill_in(folder: Path) -> tuple[list[Request], Path]:
    model, _ = pool_of("llama", "safe")
    draw = torch.Generator().manual_seed(0)
    rows = [torch.randint(2, VOCABULARY, (length,), generator=draw).tolist() for length in (14, 9)]
    requests = [Request(tuple(row), (5, 6), "") for row in rows]
    path = folder / "prefill"
    prefilled.save(prefill(model, requests, block_size=4), path)
    return requests, path
