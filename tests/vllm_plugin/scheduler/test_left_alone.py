"""Requests that share nothing are counted by reason, and said once."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("vllm")

from jointkv.vllm_plugin.metrics import LEFT_ALONE
from jointkv.vllm_plugin.scheduler.intake import Helper
from jointkv.vllm_plugin.scheduler.left_alone import logger
from jointkv.vllm_plugin.scheduler.side import SchedulerSide
from jointkv.vllm_plugin.settings import PluginSettings
from tests.vllm_plugin.scheduling import BLOCK, new_manager, new_request, start, step_of


@pytest.mark.parametrize(
    ("settings", "computed", "reason"),
    [
        ({}, 4 * BLOCK, "pool_usage"),
        ({}, BLOCK - 1, "short"),
        ({}, 0, None),  # it ended before it began
        ({"isolation": "strict"}, 4 * BLOCK, "no_salt"),
        ({"min_pool_usage": 0.0}, 4 * BLOCK, None),
        ({"reuse": "licensed"}, 4 * BLOCK, "pool_usage"),
    ],
)
def test_why_nothing_was_tried_is_counted_and_logged_once(
    settings: dict[str, Any], computed: int, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = new_manager()
    side = SchedulerSide(PluginSettings(**settings), manager, (0,))
    said: list[str] = []
    monkeypatch.setattr(logger, "info", lambda line, *values: said.append(line % values))
    for number in range(2):
        request = new_request({}, f"request-{number}")
        side.admit(request)
        begun = start(manager, request)
        if computed >= BLOCK:
            side.next_inquiry(step_of([begun]))
        request.num_computed_tokens = computed
        side.dismiss(request.request_id)
    assert side.totals()["left_alone"] == ({} if reason is None else {reason: 2})
    assert len(said) == (reason is not None) and all(LEFT_ALONE[reason or ""] in line for line in said)
    assert reason != "pool_usage" or "min_pool_usage is 0.5, and 0 shows" in said[0]
    report = side.report()
    assert report is not None and report.data["left_alone"] == side.totals()["left_alone"]


def test_the_plugins_own_requests_are_not_counted_as_left_alone() -> None:
    side = SchedulerSide(PluginSettings(reuse="probed"), new_manager(), (0,))
    helper = new_request({}, "gap", {"jointkv": False})
    side.helpers["gap"] = Helper(helper, "request", 1)
    side.admit(helper)
    assert not side.totals()["left_alone"]
