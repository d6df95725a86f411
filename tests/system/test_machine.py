"""Facts of the machine."""

import os
import platform
from collections import namedtuple

import psutil
import pytest

from jointkv.system import machine
from jointkv.system.machine import allowed_cores, core_list, foreign_seconds, on_cores, versions

Times = namedtuple("Times", "user nice system idle iowait irq softirq steal guest guest_nice")


def test_time_of_other_processes_is_counted_on_the_given_cores(monkeypatch):
    second = Times(1, 1, 1, 999999, 999999, 1, 1, 1, 0, 0)
    monkeypatch.setattr(psutil, "cpu_times", lambda percpu: [second] * 3)
    own = os.times()
    # Six of the counters of each of two cores.
    assert foreign_seconds({0, 2}) == pytest.approx(12 - own.user - own.system, abs=1.0)


@pytest.mark.parametrize(
    ("cores", "said"), [({0, 1, 2, 3, 6}, "0-3,6"), ({5}, "5"), ({4, 2}, "2,4"), ({0, 1}, "0-1"), (set(), "")]
)
def test_cores_are_listed_as_vllm_reads_them(cores, said):
    assert core_list(cores) == said


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="cores cannot be chosen here")
def test_cores_are_given_back():
    before = allowed_cores()
    with on_cores({min(before)}):
        assert allowed_cores() == {min(before)}
    assert allowed_cores() == before


def test_only_installed_packages_have_versions(monkeypatch):
    monkeypatch.setattr(machine, "PACKAGES", ("torch", "no-such-package"))
    assert versions().keys() == {"python", "torch"} and versions()["python"] == platform.python_version()


@pytest.mark.parametrize(
    ("name", "capability", "dtype"),
    [("x86_64", "AVX2", "float32"), ("x86_64", "AVX512", "bfloat16"), ("aarch64", "DEFAULT", "bfloat16")],
)
def test_bfloat16_where_it_is_fast(monkeypatch, name, capability, dtype):
    monkeypatch.setattr("platform.machine", lambda: name)
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: capability)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert machine.fast_dtype() == dtype
