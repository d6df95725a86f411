"""Facts of the machine."""

import os
from pathlib import Path

import pytest

from jointkv.system.machine import foreign_seconds


def test_time_of_other_processes_is_counted_on_the_given_cores(tmp_path: Path) -> None:
    stat = tmp_path / "stat"
    tick, own = os.sysconf("SC_CLK_TCK"), os.times()
    second = " ".join([str(tick)] * 3 + ["999999 999999"] + [str(tick)] * 3 + ["0 0"])
    stat.write_text(f"cpu {second}\ncpu0 {second}\ncpu1 {second}\ncpu2 {second}\nintr 5\n")
    # Six of the eight counters of each of two cores.
    assert foreign_seconds({0, 2}, stat) == pytest.approx(12 - own.user - own.system, abs=1.0)
    assert foreign_seconds({0}, tmp_path / "missing") is None
