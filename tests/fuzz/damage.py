"""Input as damage and malice make it, and the promise that every parser gives."""

from __future__ import annotations

import copy
import json
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st

from jointkv.errors import JointKVError
from tests.effort import FUZZ_EXAMPLES, fuzz_settings

PROMISE = "read, or refused with one named error; nothing is executed, time and memory stay in proportion to it"
CPU_SECONDS = 5.0
MEMORY = 2 << 30
LONGEST = 2000
"""Characters of a message: a line that a person reads."""

NUMBERS = st.sampled_from([-1, 0, 1, 2**31, 2**63, 2**64, -(2**63) - 1, 10**30, 10**400, 5e-324, 1.7e308])
TEXTS = st.text(max_size=20) | st.sampled_from(
    ["", " ", "\x00", "\ud800", "../../etc/passwd", "~nobody-here/x", "1e999"]
)
SCALARS = st.none() | st.booleans() | st.integers(-3, 40) | NUMBERS | st.floats() | TEXTS
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)


def slower(times: int) -> settings:
    """For a parser that takes so many times as long as others."""
    return settings(fuzz_settings(), max_examples=max(10, FUZZ_EXAMPLES // times))


@contextmanager
def promise(typed: object = "") -> Iterator[None]:
    """Lets a `JointKVError` with a short message pass; everything else fails, and so do long times and much memory.

    Args:
        typed: what the message may repeat as it is, because somebody typed it.
    """

    def late(*_: object) -> None:
        raise TimeoutError(f"more than {CPU_SECONDS:g} s")

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGVTALRM, late)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, limits[1]))
    signal.setitimer(signal.ITIMER_VIRTUAL, CPU_SECONDS)
    try:
        yield
    except JointKVError as error:
        message = str(error)
        assert message.strip(), f"{type(error).__name__} says nothing"
        assert len(message) < LONGEST + 2 * len(repr(typed)), f"{len(message)} characters: {message[:200]}"
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, limits)


@st.composite
def documents(draw: st.DrawFn, valid: Any) -> Any:
    """`valid`, which JSON can hold, with one to three of its parts dropped, doubled, renamed, nested or replaced."""
    made = copy.deepcopy(valid)
    for _ in range(draw(st.integers(1, 3))):
        if not isinstance(made, dict | list) or not made:
            return draw(VALUES)
        _change(draw, *_place(draw, made))
    return made


def _place(draw: st.DrawFn, container: Any) -> tuple[Any, Any]:
    while True:
        keys = list(container) if isinstance(container, dict) else range(len(container))
        key = draw(st.sampled_from(keys))
        inner = container[key]
        if not isinstance(inner, dict | list) or not inner or draw(st.integers(0, 3)) == 0:
            return container, key
        container = inner


def _change(draw: st.DrawFn, container: Any, key: Any) -> None:
    how = draw(st.sampled_from(["replace", "replace", "replace", "drop", "add", "nest", "text"]))
    if how == "replace":
        container[key] = draw(VALUES)
    elif how == "drop":
        del container[key]
    elif how == "nest":
        container[key] = [container[key]]
    elif how == "text":
        container[key] = json.dumps(container[key])
    elif isinstance(container, dict):
        container[draw(TEXTS)] = draw(VALUES)
    else:
        container.insert(key, copy.deepcopy(container[key]))


@st.composite
def json_bytes(draw: st.DrawFn, valid: Any) -> bytes:
    """JSON of a damaged `valid`, or its own text damaged: cut, flipped, spliced, in another encoding, too deep."""
    how = draw(st.integers(0, 11))
    if how < 6:
        return json.dumps(draw(documents(valid))).encode()
    if how == 6:
        return draw(st.binary(max_size=64))
    if how == 7:
        return json.dumps(draw(VALUES)).encode()
    text = json.dumps(valid).encode()
    if how == 8:
        return draw(
            st.sampled_from([b"\xef\xbb\xbf" + text, text.decode().encode("utf-16"), text + text, text + b"\x00"])
        )
    if how == 9:
        depth = draw(st.sampled_from([150, 900, 1100, 100_000]))
        return b"[" * depth + draw(st.sampled_from([b"", b"]" * depth])) if draw(st.booleans()) else b'{"a":' * depth
    return draw(damaged_bytes(text))


@st.composite
def damaged_bytes(draw: st.DrawFn, data: bytes) -> bytes:
    """`data` cut, with some bytes replaced, or with others put in."""
    if draw(st.booleans()):
        return data[: draw(st.integers(0, len(data)))]
    made = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(made)))
        made[at : at + draw(st.integers(0, 3))] = draw(st.binary(max_size=6))
    return bytes(made)


def unreadable(folder: Path) -> list[Path]:
    """Paths that are no file: none there, a folder, below a file, too long, and no path at all."""
    (folder / "folder").mkdir(exist_ok=True)
    (folder / "file").write_text("x")
    return [folder / "none", folder / "folder", folder / "file" / "x", folder / ("n" * 300), Path("a\x00b")]
