"""What is typed on the command line, and what a command says about a bad file: exit code 2 and one clear line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from jointkv.bench.arms import PoolSize, make_arms
from jointkv.bench.loads import make_loads
from jointkv.bench.options import _cores
from jointkv.cli.main import app
from jointkv.errors import BadInput
from jointkv.evaluate.compare.suite import choices_of
from jointkv.evaluate.traffic import get_traffic
from jointkv.system.machine import allowed_cores
from tests.core.profiles import make_profile
from tests.effort import fuzz_settings
from tests.fuzz.damage import PROMISE, TEXTS, damaged_bytes, json_bytes, promise, slower
from tests.fuzz.test_policies_and_settings import PROFILE
from tests.fuzz.test_request_files import LINES, lines
from tests.fuzz.test_result_files import serving

POOL = PoolSize(blocks=100, block_size=32, numbers_per_token=120, layers=4, dtype="float32")
WORDS = st.sampled_from(
    [
        *(
            "stock",
            "fused",
            "fp8_fused",
            "layer_groups",
            "large_pool",
            "tight",
            "=",
            " ",
            "'",
            '"',
            "--",
            ",",
            "@",
            ":",
        ),
        *("max_relative_error=0.1", "layer_groups=3", "layer_groups=0", "profile=/nowhere", "--kv-cache-dtype", "fp8"),
        *("--kv_cache-dtype=int4", "--model", "--max-num-batched-tokens=7", "1e999", "nan", "²", "9" * 400, "[" * 3000),
    ]
)
TYPED = st.lists(WORDS | TEXTS, max_size=6).map("".join)
NUMBERS = st.lists(st.sampled_from(["1", "2.5", "nan", "inf", "-1", "1e308", "1e999", "", "x", "16", "³"]), max_size=4)


@pytest.mark.hazard("Parsers", "wrong or hostile options on the command line", PROMISE)
@fuzz_settings()
@given(written=st.lists(TYPED, max_size=3), flags=st.lists(TYPED, max_size=2))
def test_arms(written: list[str], flags: list[str]) -> None:
    with promise((written, flags)):
        arms = make_arms(written, POOL, {"max_relative_error": 0.2}, flags)
        assert len({arm.name for arm in arms}) == len(written) and all(arm.pool_blocks > 0 for arm in arms)


@pytest.mark.hazard("Parsers", "wrong or hostile options on the command line", PROMISE)
@fuzz_settings()
@given(
    texts=st.lists(st.none() | NUMBERS.map(",".join) | TYPED, min_size=4, max_size=4),
    replay=st.booleans(),
    one_first=st.booleans(),
)
def test_loads(texts: list[str | None], replay: bool, one_first: bool) -> None:
    with promise(texts):
        loads = make_loads(*texts, replay=replay, one_first=one_first, requests=20, max_running=8)
        assert len({load.label for load in loads}) == len(loads) > 0


@pytest.mark.hazard("Parsers", "wrong or hostile options on the command line", PROMISE)
@fuzz_settings()
@given(text=st.lists(st.sampled_from([*"0123,--", "0-1", "²", "9" * 9, "99999999999", " "]), max_size=6).map("".join))
def test_cores(text: str) -> None:
    with promise():
        assert _cores("server_cores", text) <= allowed_cores()


@pytest.mark.hazard("Parsers", "wrong or hostile options on the command line", PROMISE)
@fuzz_settings()
@given(
    methods=st.lists(TYPED | st.sampled_from(["fused@0.1", "snapkv@nan", "fused@", "quantized@1e999"]), max_size=2),
    policies=st.lists(st.sampled_from(["safe", "paper", "off"]) | TEXTS, max_size=2),
    traffic=TYPED,
)
def test_methods_and_traffics(methods: list[str], policies: list[str], traffic: str) -> None:
    with promise((methods, policies)):
        assert choices_of(methods, policies, None)
    with promise(traffic):
        assert get_traffic(traffic).name


def test_a_range_of_more_cores_than_memory_holds() -> None:
    """`--server-cores 0-99999999999` made a set of that many numbers."""
    for text in ("0-99999999999", "0-999999999", "²"):
        with promise(), pytest.raises(BadInput, match="server_cores"):
            _cores("server_cores", text)


def refused(arguments: list[str]) -> str | None:
    """Run a command; the line it ends with, or None if it is content. Anything but exit code 2 and a line fails."""
    result = CliRunner().invoke(app, arguments)
    if result.exit_code == 0:
        return None
    assert isinstance(result.exception, SystemExit), f"{arguments}: {result.exception!r}"
    assert result.exit_code == 2, result.output
    error = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(error) == 1 and "Traceback" not in result.output, result.output
    assert error[0].isprintable(), repr(error[0])
    return error[0]


@pytest.mark.hazard("Parsers", "a command is given a damaged file or a wrong option", "exit code 2 and one clear line")
@slower(20)
@given(data=st.data())
def test_commands(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "given"
    sound: dict[str, tuple[st.SearchStrategy[bytes], list[str]]] = {
        "html": (json_bytes(serving()), ["report", "html", str(path), "-o", str(tmp_path / "page.html")]),
        "profile": (
            json_bytes(PROFILE),
            ["serve", "here/there", "--dry-run", "--device", "cpu", "--profile", str(path)],
        ),
        "prompts": (lines(*LINES), ["generate", "--model", "/nowhere", "--file", str(path)]),
        "data": (lines(*LINES), ["inspect", "--model", "/nowhere", "--data", str(path)]),
        "plots": (damaged_bytes(b'{"format": "jointkv.serving/1"}'), ["report", "plots", str(path)]),
    }
    content, arguments = sound[data.draw(st.sampled_from(sorted(sound)))]
    path.write_bytes(data.draw(content))
    refused(arguments)


@pytest.mark.hazard("Parsers", "a command is given a damaged file or a wrong option", "exit code 2 and one clear line")
@slower(20)
@given(option=TYPED, bound=TYPED, scope=TEXTS)
def test_options_of_serve(option: str, bound: str, scope: str) -> None:
    arguments = ["serve", "here/there", "--dry-run", "--device", "cpu", "--fuse", option, "--max-relative-error", bound]
    refused([*arguments, *(["--scope", scope] if scope else [])])


def test_a_sound_file_is_not_refused(tmp_path: Path) -> None:
    """The commands above do come to an end with exit code 0."""
    make_profile().save(tmp_path / "profile.json")
    arguments: list[Any] = [
        "serve",
        "here/there",
        "--dry-run",
        "--device",
        "cpu",
        "--profile",
        tmp_path / "profile.json",
    ]
    assert refused([str(word) for word in arguments]) is None
