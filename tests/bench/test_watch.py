"""Metrics of vLLM's format, read while something goes on."""

from __future__ import annotations

import itertools
import time
from types import SimpleNamespace

import pytest

from jointkv.bench import watch as watching
from jointkv.bench.server import ServerFailed
from jointkv.bench.watch import Watch, parse

pytest.importorskip("prometheus_client", reason="comes with vLLM")

# As vLLM 0.32 with the plugin writes it; {} is a number.
PAGE = """# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{{engine="0",model_name="smollm2"}} {running}
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{{engine="0",model_name="smollm2"}} {running}
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{{engine="0",model_name="smollm2"}} 0.4
# TYPE vllm:num_preemptions counter
vllm:num_preemptions_total{{engine="0",model_name="smollm2"}} {count}
vllm:num_preemptions_created{{engine="0",model_name="smollm2"}} 1.7e+09
# TYPE vllm:prompt_tokens_by_source counter
vllm:prompt_tokens_by_source_total{{engine="0",model_name="smollm2",source="local_compute"}} 610.0
vllm:prompt_tokens_by_source_total{{engine="1",model_name="smollm2",source="local_compute"}} 10.0
vllm:prompt_tokens_by_source_total{{engine="0",model_name="smollm2",source="local_cache_hit"}} 5.0
"""
PLUGIN = """# TYPE jointkv_pages_freed counter
jointkv_pages_freed_total{{engine="0",model_name="smollm2"}} {count}
# TYPE jointkv_blocks_rejected counter
jointkv_blocks_rejected_total{{engine="0",model_name="smollm2",reason="bound"}} {count}
# TYPE jointkv_state gauge
jointkv_state{{engine="0",model_name="smollm2",state="disabled"}} 1.0
# TYPE jointkv_relative_error histogram
jointkv_relative_error_bucket{{engine="0",le="0.1",model_name="smollm2"}} {count}
jointkv_relative_error_count{{engine="0",model_name="smollm2"}} {count}
jointkv_relative_error_sum{{engine="0",model_name="smollm2"}} {count}
"""


@pytest.fixture
def pages(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the server answers next; the last page again and again, and no answer once there are none."""
    left: list[str] = []

    def answer(url: str) -> bytes:
        assert url == "http://here/metrics"
        now = left[:]
        if not now:
            raise OSError("refused")
        if len(now) > 1:
            left.pop(0)
        return now[0].encode()

    monkeypatch.setattr(watching, "get", answer)
    monkeypatch.setattr(watching, "SETTLE_POLL_SECONDS", 0.01)
    return left


def page(count: float, running: float = 0.0, plugin: bool = True) -> str:
    return (PAGE + PLUGIN * plugin).format(count=count, running=running)


def test_names_of_metrics() -> None:
    found = parse(page(3.0))
    assert found["vllm:num_preemptions_total"] == 3.0
    assert found[watching.COMPUTED_PROMPT] == 620.0
    assert found[watching.DISABLED] == 1.0
    assert not any(name.startswith(("vllm:num_preemptions_created", "jointkv_relative_error_bucket")) for name in found)


def distinct(values: list[float]) -> list[float]:
    """Without those that equal the one before: who is not looked at for a while reads more often."""
    return [value for value, _ in itertools.groupby(values)]


def test_a_timeline_and_what_grew(pages: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pages += [page(3.0), page(5.0, 2.0)]
    clock = itertools.count()
    now = SimpleNamespace(perf_counter=lambda: float(next(clock)), monotonic=time.monotonic, sleep=time.sleep)
    monkeypatch.setattr(watching, "time", now)
    with Watch("http://here", interval=0.01) as watch:
        while len(watch.readings) < 2:
            time.sleep(0.01)
        pages[:] = [page(8.0, 1.0), page(9.0)]  # on leaving: one request is not counted yet
    timeline = watch.timeline(0.5)
    assert timeline.seconds == [max(0.0, at - 0.5) for at in range(len(watch.readings))]
    assert distinct(timeline.running) == [0.0, 2.0, 1.0, 0.0] and timeline.waiting == timeline.running
    assert distinct(timeline.preemptions) == distinct(timeline.pages_freed or []) == [0.0, 2.0, 5.0, 6.0]
    assert watch.plugin_counters() == {
        "pages_freed": 6.0,
        "blocks_rejected.bound": 6.0,
        "relative_error_count": 6.0,
        "relative_error_sum": 6.0,
    }


def test_without_the_plugin(pages: list[str]) -> None:
    pages.append(page(1.0, plugin=False))
    with Watch("http://here") as watch:
        pass
    assert watch.plugin_counters() is None and watch.timeline(0.0).pages_freed is None


def test_a_server_that_stops_answering(pages: list[str]) -> None:
    with pytest.raises(ServerFailed, match="could not be read"), Watch("http://here"):
        pytest.fail("there is nothing to watch")
    pages.append(page(1.0))
    with Watch("http://here", interval=0.01) as watch:
        while len(watch.readings) < 2:
            time.sleep(0.01)
        pages.clear()
    with pytest.raises(ServerFailed, match="after the load"):
        watch.grown()
