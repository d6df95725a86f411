"""A long run told: first and last third, what grew, what was left; the picture has a column per load."""

from __future__ import annotations

from pathlib import Path

import pytest

from jointkv.bench.long_run import LongRun, Moment, Phase
from jointkv.bench.result import RequestSample
from jointkv.report.pictures import make_pictures
from jointkv.report.pictures.long_run import WINDOWS, windows
from tests.report import samples


def phase(share: float = 0.9, requests: int = 90) -> Phase:
    """The first token comes after 1 second at first, and after 3 in the end; the server grows by 7 MiB."""
    made = [
        RequestSample(
            start=float(number),
            prompt_tokens=100,
            output_tokens=8,
            ttft=1.0 + 2.0 * (number >= 60),
            itl=0.1,
            e2el=4.0,
        )
        for number in range(requests)
    ]
    pages = [
        {
            "jointkv_licences_granted_total": won,
            "jointkv_licences_lost_total": 1.0,
            "jointkv_licences.granted": 2.0,
            "jointkv_prompt_tokens_skipped_total": 100.0 * won,
            "vllm:kv_cache_usage_perc": 0.5,
        }
        for won in (1.0, 3.0)
    ]
    moments = [Moment.of(page, 45.0 * number, 500.0 + 7 * number) for number, page in enumerate(pages)]
    return Phase(share=share, rate=0.5, seconds=90.0, failed=1, samples=made[::-1], moments=moments, pages_left=0)


def run(arm: str) -> LongRun:
    return LongRun(
        command="long_run.py",
        machine={},
        versions={},
        model="tiny",
        traffic="the soak's",
        arm=arm,
        fusion=None,
        pool_blocks=96,
        capacity=0.55,
        phases=[phase(0.7), phase()],
        pages_held=False,
    )


def test_thirds_and_growth() -> None:
    told = phase()
    assert (told.ttft("first", 50), told.ttft("last", 50), told.ttft("all", 50)) == (1.0, 3.0, 1.0)
    assert told.grown("rss_mib") == 7.0 and told.grown("licences_granted") == 2.0 and told.grown("licences_lost") == 0
    assert told.moments[0].licences == 2.0 and told.moments[0].pool_usage == 0.5 and told.moments[0].running == 0.0
    minutes, seconds = windows(told)
    assert minutes == sorted(minutes) and len(minutes) >= WINDOWS and (seconds[0], seconds[-1]) == (1.0, 3.0)


def test_picture_and_table(tmp_path: Path) -> None:
    files = samples.save(tmp_path, **{arm: run(arm).model_dump() for arm in ("reuse", "stock")})
    assert [path.name for path in make_pictures(files, tmp_path)] == ["long_run.png", "long_run.md"]
    row = "| reuse | 90% | 0.50 | 90 | 1 | 1.00 | 3.00 | 1.00 | 3.00 | 200 | 2, 0 | 0 | +7 MiB |"
    assert row in (tmp_path / "long_run.md").read_text()


def test_nothing_seen_is_no_result() -> None:
    with pytest.raises(ValueError, match="at least 1 item"):
        Phase(**{**phase().model_dump(), "moments": []})
