"""`jointkv doctor` on the engine that is installed, sound and sabotaged."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from jointkv.cli import doctor, main
from jointkv.vllm_plugin.doctor.examine import CHECKS

pytest.importorskip("vllm")

# The worker takes the page after the one that the scheduler committed.
SABOTAGE = """
from jointkv.vllm_plugin.doctor.examine import main
from jointkv.vllm_plugin.engine.runners.v1 import V1Tables

honest = V1Tables.replace
V1Tables.replace = lambda tables, remaps: honest(tables, [r._replace(page=r.page + 1) for r in remaps])
main()
"""

# A request whose text is resident reads its first page throughout.
SABOTAGED_REUSE = """
from jointkv.vllm_plugin.doctor.examine import main
from jointkv.vllm_plugin.scheduler.sharing import Sharing

honest = Sharing.adopt
Sharing.adopt = lambda self, tracked, group, first, pages: honest(self, tracked, group, first, pages[:1] * len(pages))
main()
"""


@pytest.mark.timeout(400)
def test_a_sound_engine() -> None:
    result = CliRunner().invoke(main.app, ["doctor", "--json", "-"])
    told = json.loads(result.stdout)
    assert [check["name"] for check in told["checks"]] == list(CHECKS)
    assert {check["status"] for check in told["checks"]} == {"ok"}, told["checks"]
    assert "prompt tokens skipped; 4 of 4 answers" in told["checks"][-1]["detail"]
    assert result.exit_code == 0 and told["ok"] and told["statistics"]["blocks_merged"] > 0


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_worker_that_reads_other_pages_is_found_out(tmp_path: Path) -> None:
    patient = {"folder": str(tmp_path), "model": None, "allow_untested": False}
    examination = doctor.examine(patient, print, 300.0, (sys.executable, "-c", SABOTAGE))
    failed = {check.name for check in examination.checks if check.status == "failed"}
    assert {"remaps applied", "tables equal", "tokens identical"} <= failed, examination
    sound = {check.name for check in examination.checks if check.status == "ok"}
    assert {"worker class", "connector", "page layout", "workers answered"} <= sound


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_request_that_reuses_other_pages_is_found_out(tmp_path: Path) -> None:
    patient = {"folder": str(tmp_path), "model": None, "allow_untested": False}
    examination = doctor.examine(patient, print, 300.0, (sys.executable, "-c", SABOTAGED_REUSE))
    assert [check.name for check in examination.checks if check.status != "ok"] == ["text reused"], examination
