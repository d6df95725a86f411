"""Batches after an unfused prefill, outside any pool: made, joined, cut down to some rows, kept in files."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

from jointkv.errors import UnsupportedModel
from jointkv.evaluate.traffic.base import Request
from jointkv.hf.cache import JointCache
from jointkv.hf.identity import full_attention_layers
from jointkv.hf.pool import JointPool
from jointkv.system.files import replace_tensors

KINDS = {
    "table": torch.long,
    "padding": torch.long,
    "tokens": torch.long,
    "served": torch.bool,
    "fusable": torch.bool,
}


@dataclass(frozen=True)
class Prefilled:
    """A batch of requests after an unfused prefill of all but their last prompt tokens; several policies start from it.

    Attributes:
        state: K, V and tables in one layer group, see `jointkv.hf.saving.State`.
        length: tokens per row, left padding included.
        mask: attention mask of the prompt, `[requests, length]`.
        seconds: time of the forward pass.
    """

    requests: Sequence[Request]
    state: dict[str, Tensor]
    length: int
    mask: Tensor
    seconds: float

    @property
    def block_size(self) -> int:
        """Tokens per page."""
        return self.state["key.0"].shape[1]

    @property
    def layers(self) -> int:
        """Layers that have pages."""
        return sum(name.startswith("key.") for name in self.state)

    @property
    def table(self) -> Tensor:
        """The page of every block, long `[requests, blocks]`, -1 where there is none."""
        return self.state["table.0"]

    @property
    def full_blocks(self) -> Tensor:
        """Blocks of each request that are full, long `[requests]`."""
        return (self.length - self.state["padding"]) // self.block_size


@torch.inference_mode()
def prefill(model: PreTrainedModel, requests: Sequence[Request], *, block_size: int = 16) -> Prefilled:
    """Prefill all but the last prompt token of `requests` as one left-padded batch."""
    cache = JointCache(JointPool(model, "off", block_size=block_size))
    prompt, mask = left_padded([request.prompt[:-1] for request in requests], pad=model.config.pad_token_id or 0)
    start = time.perf_counter()
    model(
        input_ids=prompt.to(model.device),
        attention_mask=mask.to(model.device),
        position_ids=(mask.cumsum(1) - 1).clamp(min=0).to(model.device),
        past_key_values=cache,
        logits_to_keep=1,
    )
    seconds = time.perf_counter() - start
    return Prefilled(requests, cache.state(), cache.length, mask, seconds)


def left_padded(rows: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask of left-padded rows, both `[rows, longest]`."""
    width = max(len(row) for row in rows)
    ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def join(batches: Sequence[Prefilled]) -> Prefilled:
    """One batch of all requests of `batches`, padded on the left to the longest.

    Raises:
        UnsupportedModel: the model has sliding-window layers, whose cache depends on the padding of its batch.
    """
    if len(batches) == 1:
        return batches[0]
    if any(name.startswith("sliding.") for batch in batches for name in batch.state):
        raise UnsupportedModel("batches of a model with sliding-window layers cannot be joined; prefill them as one")
    length = max(batch.length for batch in batches)
    slots = max(batch.state["table.0"].shape[1] for batch in batches)
    states: list[dict[str, Tensor]] = []
    pages = 0
    for batch in batches:
        state = dict(batch.state)
        table = state["table.0"]
        state["table.0"] = pad(torch.where(table < 0, table, table + pages), (0, slots - table.shape[1]), value=-1)
        state["served.0"] = pad(state["served.0"], (0, slots - table.shape[1]))
        state["padding"] = state["padding"] + (length - batch.length)
        pages += len(state["key.0"])
        states.append(state)
    return Prefilled(
        requests=[request for batch in batches for request in batch.requests],
        state={name: torch.cat([state[name] for state in states]) for name in states[0] if name != "tokens"},
        length=length,
        mask=torch.cat([pad(batch.mask, (length - batch.length, 0)) for batch in batches]),
        seconds=sum(batch.seconds for batch in batches),
    )


def take(batch: Prefilled, rows: Sequence[int]) -> Prefilled:
    """The requests `rows` of `batch`, without padding that all of them have; K and V are copied."""
    index = torch.tensor(rows)
    state = {name: tensor[index] for name, tensor in batch.state.items() if not name.startswith(("key.", "value."))}
    spare = int(state["padding"].min())
    table = state["table.0"]
    table = table[:, : int((table >= 0).sum(1).max())]
    pages, local = table.unique(return_inverse=True)
    empty = int((pages < 0).sum())
    state["table.0"] = local - empty
    state["served.0"] = state["served.0"][:, : table.shape[1]]
    state["padding"] = state["padding"] - spare
    for name, tensor in batch.state.items():
        if name.startswith(("key.", "value.")):
            state[name] = tensor[pages[empty:]]
    if "tokens" in state:
        state["tokens"] = state["tokens"][:, spare:]
    requests = [batch.requests[row] for row in rows]
    return Prefilled(requests, state, batch.length - spare, batch.mask[index, spare:], batch.seconds)


def save(batch: Prefilled, path: Path) -> None:
    """Write `batch`, without its requests, to `path`. Raises `BadInput`."""
    tensors = {name: tensor.contiguous() for name, tensor in batch.state.items()}
    metadata = {"length": str(batch.length), "seconds": str(batch.seconds)}
    replace_tensors(path, {**tensors, "mask": batch.mask}, metadata)


def load(path: Path, requests: Sequence[Request]) -> Prefilled | None:
    """What `save` wrote for `requests`; None if there is no such file, or a damaged one."""
    try:
        with safe_open(str(path), framework="pt") as file:
            told = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        mask = state.pop("mask")
        found = Prefilled(requests, state, int(told["length"]), mask, float(told["seconds"]))
        return found if _is_whole(found) else None
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, RuntimeError):
        return None


def _is_whole(batch: Prefilled) -> bool:
    """Whether the tensors belong together. Raises what torch raises for tensors of a kind that makes no sense."""
    rows, table = len(batch.requests), batch.state["table.0"]
    pages = {name: tensor for name, tensor in batch.state.items() if name.startswith(("key.", "value."))}
    others = [tensor for name, tensor in batch.state.items() if name not in pages]
    return (
        batch.mask.shape == (rows, batch.length)
        and all(tensor.dtype == KINDS.get(name.split(".")[0], tensor.dtype) for name, tensor in batch.state.items())
        and batch.state["padding"].shape == batch.state["fusable"].shape == (rows,)
        and batch.state["served.0"].shape == table.shape
        and all(len(tensor) == rows for tensor in others)
        and len({tensor.shape[:2] for tensor in pages.values()}) == 1
        and -1 <= int(table.min()) <= int(table.max()) < len(pages["key.0"])
    )


def from_dense(
    model: PreTrainedModel, requests: Sequence[Request], caches: Sequence[Any], block_size: int
) -> Prefilled:
    """Dense caches, one per request, on pages: what `prefill` gives for the batch, without another forward pass.

    Args:
        caches: `DynamicCache`s that hold all but the last prompt token; not changed.

    Raises:
        UnsupportedModel: the model has sliding-window layers, which keep no pages.
    """
    layers = full_attention_layers(model)
    if len(layers) < len(caches[0].layers):
        raise UnsupportedModel("a model with sliding-window layers is prefilled as one batch")
    lengths = torch.tensor([len(request.prompt) - 1 for request in requests])
    blocks = -(-lengths // block_size)
    slots = torch.arange(int(blocks.max()))
    table = torch.where(slots < blocks[:, None], slots + (blocks.cumsum(0) - blocks)[:, None], -1)
    state = {"padding": lengths.max() - lengths, "fusable": torch.ones(len(lengths), dtype=torch.bool)}
    state |= {"table.0": table, "served.0": torch.zeros_like(table, dtype=torch.bool)}
    for index, layer in enumerate(layers):
        for side in ("key", "value"):
            parts = [_blocks(getattr(cache.layers[layer], f"{side}s"), block_size) for cache in caches]
            state[f"{side}.{index}"] = torch.cat(parts)
    length = int(lengths.max())
    mask = (torch.arange(length) >= state["padding"][:, None]).long()
    return Prefilled(requests, state, length, mask, 0.0)


def _blocks(states: Tensor, block_size: int) -> Tensor:
    """`[1, h, n, d]` as blocks `[ceil(n / t), t, h, d]`, the last one filled up with zeros."""
    tokens = states[0].transpose(0, 1)
    return pad(tokens, (0, 0, 0, 0, 0, -len(tokens) % block_size)).unflatten(0, (-1, block_size))
