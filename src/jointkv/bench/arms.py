"""Arms of the serving benchmark: those with a name, and those that are written on the command line."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jointkv.bench.result import Arm
from jointkv.errors import BadInput
from jointkv.system.nearest import not_known
from jointkv.vllm_plugin.settings import PluginSettings, read_value

LARGE_POOL = "large_pool"
LARGE_POOL_FACTOR = 8
DEFAULT_ARMS = ("stock", "fused")
STORE = "stored"
"""The folder of stored pages of an arm that was given none, within the benchmark's."""

CACHE_DTYPE = "--kv-cache-dtype"
WIDTHS = {"float32": 4, "bfloat16": 2, "float16": 2, "fp8": 1, "fp8_e4m3": 1, "fp8_e5m2": 1}
"""Bytes of one number in the KV pool."""

OURS = (
    *("--model", "--dtype", "--block-size", "--max-num-seqs", "--max-model-len", "--num-gpu-blocks-override", "--seed"),
    *("--port", "--host", "--uds", "--api-key", "--ssl-keyfile", "--ssl-certfile", "--root-path", "--config"),
    *("--served-model-name", "--kv-transfer-config", "--worker-cls", "--scheduler-cls"),
    "--disable-log-stats",
)
"""Flags that the benchmark sets itself, or that would hide the server from it."""
SHARED = (
    *("--tokenizer", "--revision", "--tokenizer-revision", "--code-revision", "--quantization", "-q", "--hf-overrides"),
    *("--load-format", "--gpu-memory-utilization", "--kv-cache-memory-bytes", "--cpu-offload-gb", "--swap-space"),
    *("--tensor-parallel-size", "-tp", "--pipeline-parallel-size", "-pp", "--data-parallel-size", "-dp", "--device"),
)
"""Flags that change the model or its memory: the same for all arms, or arms could not be compared."""


@dataclass(frozen=True)
class PoolSize:
    """The KV pool that is the same, in bytes, for all arms but those with a large one.

    Attributes:
        blocks: of an arm with one block table and the cache in `dtype`.
        numbers_per_token: in K and V of all layers together.
        layers: that have a KV cache.
        dtype: of the model.
    """

    blocks: int
    block_size: int
    numbers_per_token: int
    layers: int
    dtype: str

    def block_bytes(self, flags: Sequence[str] = (), layer_groups: int = 1) -> int:
        """Bytes of one block under `flags`, which may choose the cache's dtype. Raises `BadInput`."""
        width = cache_width(flags, self.dtype)
        if self.layers % layer_groups:
            raise BadInput(f"layer_groups={layer_groups} does not divide the model's {self.layers} layers")
        return self.numbers_per_token * width * self.block_size // layer_groups


@dataclass(frozen=True)
class BuiltIn:
    """What a name stands for.

    Attributes:
        options: of the plugin, unless others are given.
        layers_in_group: as many layers have a block table of their own, unless groups are chosen.
    """

    title: str
    pool_factor: int = 1
    fused: bool = False
    reuse: str = "off"
    in_layer_groups: bool = False
    stored: bool = False
    flags: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    layers_in_group: int | None = None


BUILT_IN: Mapping[str, BuiltIn] = {
    "stock": BuiltIn("stock vLLM"),
    "fused": BuiltIn("with jointkv", fused=True),
    "reuse": BuiltIn("with jointkv and compute reuse", fused=True, reuse="licensed"),
    LARGE_POOL: BuiltIn(f"stock vLLM, {LARGE_POOL_FACTOR} times the pool", pool_factor=LARGE_POOL_FACTOR),
    "reuse_large_pool": BuiltIn(
        f"with jointkv and compute reuse, {LARGE_POOL_FACTOR} times the pool",
        pool_factor=LARGE_POOL_FACTOR,
        fused=True,
        reuse="licensed",
    ),
    "no_prefix_caching": BuiltIn("stock vLLM, prefix caching off", flags=("--no-enable-prefix-caching",)),
    "fp8": BuiltIn("stock vLLM, fp8 cache", flags=(CACHE_DTYPE, "fp8")),
    "fp8_fused": BuiltIn("with jointkv, fp8 cache", fused=True, flags=(CACHE_DTYPE, "fp8")),
    "store": BuiltIn("with jointkv and stored pages", fused=True, stored=True),
    "both": BuiltIn("with jointkv, blocks of other text looked for", fused=True, options={"candidates": "both"}),
    "paper": BuiltIn(
        "with jointkv, the paper's policy",
        fused=True,
        options={"policy": "paper", "accept_unbounded": True},
        layers_in_group=2,
    ),
    "layer_groups": BuiltIn("with jointkv, layers in groups", fused=True, in_layer_groups=True),
}


def make_arms(
    written: Sequence[str], pool: PoolSize, fusion: Mapping[str, Any], common_flags: Sequence[str] = ()
) -> list[Arm]:
    """The arms in the order given.

    Args:
        written: each a name of `BUILT_IN`, or `NAME=BUILT_IN [KEY=VALUE...] [--FLAG...]`, where the pairs are options
            of the plugin and the flags those of `vllm serve`.
        fusion: options of `PluginSettings` for all arms that fuse; an arm's own win.
        common_flags: of all arms, given by the user.

    Raises:
        BadInput: an unknown or repeated name, a flag that may not differ between arms, an option the plugin refuses, or
            a pool that cannot have as many bytes as the others.
        InvalidPolicy: thresholds that make no sense together.
    """
    check_flags(common_flags, OURS, "--flags")
    arms = [_arm(text, pool, fusion, common_flags) for text in written]
    names = [arm.name for arm in arms]
    for name in names:
        if names.count(name) > 1:
            raise BadInput(f"the arm {name!r} is there twice")
    return arms


def block_bytes(arm: Arm, pool: PoolSize, common_flags: Sequence[str] = ()) -> int:
    """Bytes of one block of the pool of `arm`."""
    return pool.block_bytes((*common_flags, *arm.flags), _groups(arm.fusion))


def cache_width(flags: Sequence[str], dtype: str) -> int:
    """Bytes of one number in the pool of a server with `flags` and a model in `dtype`. Raises `BadInput`."""
    chosen = _cache_dtype(flags)
    width = WIDTHS.get(dtype if chosen == "auto" else chosen)
    if width is None:
        raise BadInput(f"{CACHE_DTYPE} {chosen}: no arm of equal memory; use auto, {', '.join(WIDTHS)}")
    return width


def check_flags(flags: Sequence[str], refused: Sequence[str], where: str) -> None:
    """Raises `BadInput` when `flags` has one that is `refused`, in any spelling that vLLM understands."""
    for flag in flags:
        name = re.split(r"[=.]", flag, maxsplit=1)[0].replace("_", "-")
        # vLLM takes long options shortened as far as they stay unique.
        for known in refused:
            if name == known or (len(name) > 2 and name.startswith("--") and known.startswith(name)):
                spelling = "" if name == known else f" (short for {known})"
                reason = "is set by the benchmark" if known in OURS else "must be the same in all arms, see --flags"
                raise BadInput(f"{where}: {flag}{spelling} {reason}")


def split_words(text: str, where: str) -> list[str]:
    """The words of a command line. Raises `BadInput` for an open quotation; `where` is for the message."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise BadInput(f"{where}: {error}") from None


def _arm(text: str, pool: PoolSize, fusion: Mapping[str, Any], common_flags: Sequence[str]) -> Arm:
    name, base_name, pairs, own_flags = _read(text)
    base = BUILT_IN[base_name]
    check_flags(own_flags, (*OURS, *SHARED), f"arm {name!r}")
    if pairs and not base.fused:
        raise BadInput(f"arm {name!r}: {base_name} does not fuse, so {pairs[0]} has no meaning; start from fused")
    options: dict[str, Any] | None = None
    if base.fused:
        own = {name: read_value(value) for name, _, value in (pair.partition("=") for pair in pairs)}
        stored = {"store": STORE} if base.stored else {}
        options = {**base.options, **stored, **fusion, **_reuse(name, base, fusion), **own}
        if base.layers_in_group is not None:
            options.setdefault("layer_groups", max(1, pool.layers // base.layers_in_group))
        if base.in_layer_groups and _groups(options) == 1:
            fewest = (groups for groups in range(2, pool.layers + 1) if pool.layers % groups == 0)
            options["layer_groups"] = next(fewest, 2)  # which a model with one layer is refused for
        PluginSettings.parse(options)
    flags = [*base.flags, *own_flags]
    size = pool.block_bytes((*common_flags, *flags), _groups(options))
    wanted = base.pool_factor * pool.blocks * pool.block_bytes(common_flags)
    if wanted % size:
        raise BadInput(f"arm {name!r}: a pool of {wanted} bytes cannot be made of blocks of {size}")
    written = shlex.join([*pairs, *own_flags])
    title = f"{base.title}, {written}" if written else base.title
    return Arm(name=name, title=title, pool_blocks=wanted // size, fusion=options, flags=flags)


def _reuse(name: str, base: BuiltIn, fusion: Mapping[str, Any]) -> dict[str, Any]:
    """What is about reuse: as given only for an arm that reuses. Raises `BadInput` where that is "off"."""
    if base.reuse == "off":
        return {"reuse": "off", **({"moved": False} if "moved" in fusion else {})}
    chosen = fusion.get("reuse", base.reuse)
    if chosen == "off":
        raise BadInput(f"arm {name!r}: reuse=off is the arm fused")
    return {"reuse": chosen}


def _read(text: str) -> tuple[str, str, list[str], list[str]]:
    """Name, built-in arm, pairs and flags of an arm as written."""
    name, separator, rest = text.partition("=")
    words = split_words(rest, f"arm {text!r}") if separator else [name]
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise BadInput(f"arm {text!r}: expected a name, or NAME=ARM KEY=VALUE... --FLAG...")
    if not words or words[0] not in BUILT_IN:
        raise BadInput(f"arm {text!r}: no arm to start from: {not_known(words[0] if words else '', BUILT_IN)}")
    if separator and name in BUILT_IN:
        raise BadInput(f"arm {text!r}: {name} is the name of a built-in arm")
    first_flag = next((index for index, word in enumerate(words) if word.startswith("-")), len(words))
    pairs = words[1:first_flag]
    for pair in pairs:
        if "=" not in pair:
            raise BadInput(f"arm {name!r}: expected KEY=VALUE or a flag, found {pair!r}")
    return name, words[0], pairs, words[first_flag:]


def _groups(options: Mapping[str, Any] | None) -> int:
    return 1 if options is None else PluginSettings.parse(dict(options)).layer_groups


def _cache_dtype(flags: Sequence[str]) -> str:
    """What `flags` choose for the cache; the last one counts. Raises `BadInput` for a spelling that may be another."""
    chosen = "auto"
    for index, flag in enumerate(flags):
        name, separator, value = flag.partition("=")
        name = name.replace("_", "-")
        if name == CACHE_DTYPE:
            chosen = value if separator else (*flags, "")[index + 1]
        elif name.startswith("--kv") and CACHE_DTYPE.startswith(name):
            raise BadInput(f"{flag}: write {CACHE_DTYPE}")
    return chosen
