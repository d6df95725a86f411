"""Options that the benchmarks share: dtype and block size of the engine, and what they are where nothing is said."""

from __future__ import annotations

from pathlib import Path

from jointkv.errors import BadInput

INTERRUPTED = 130
BLOCK_SIZE = 32
DTYPES = ("auto", "bfloat16", "float16", "float32")


def engine_dtype(name: str) -> str:
    """`name`, or for `auto` bfloat16 where that is fast. Raises `BadInput` for what is not in `DTYPES`."""
    from jointkv.system.machine import fast_dtype

    if name not in DTYPES:
        raise BadInput(f"unknown dtype {name!r}; use {', '.join(DTYPES)}")
    return fast_dtype() if name == "auto" else name


def engine_block_size(given: int | None, profile: Path | None) -> int:
    """Tokens per block: as given, else the profile's, else `BLOCK_SIZE`. Raises `BadInput` for what is no profile."""
    from jointkv.policy.profile import Profile

    return given or (BLOCK_SIZE if profile is None else Profile.load(profile).block_size)
