"""Side channels and influence: the tables equal the JSON, and what was told apart stands out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jointkv.errors import BadInput
from jointkv.report.isolation_results import Influence, SideChannel
from jointkv.report.pictures import make_pictures
from jointkv.report.pictures.influence import DRIFTS, InfluenceOfAttackers
from jointkv.report.pictures.side_channel import SideChannelAUC
from jointkv.report.results import read_result


def told_apart(arm: str, scenario: str, guess: str, salts: str, observable: str, auc: float) -> dict[str, Any]:
    return {
        "arm": arm,
        "scenario": scenario,
        "guess": guess,
        "salts": salts,
        "observable": observable,
        "auc": auc,
        "low": max(0.0, auc - 0.08),
        "high": min(1.0, auc + 0.07),
        "accuracy": 0.6,
        "p_value": 1e-6 if abs(auc - 0.5) > 0.2 else 0.4,
        "median_absent": 0.02,
        "median_resident": 0.01,
        "absent": 100,
        "resident": 100,
        "varies": auc != 0.5,
        "found": abs(auc - 0.5) > 0.2,
        "values_absent": [0.02],
        "values_resident": [0.01],
    }


def side_channel(model: str = "smollm2") -> dict[str, Any]:
    return {
        "format": "jointkv.side_channel/1",
        "model": model,
        "observables": {"cpu_ttft": "seconds to the first token", "cached_tokens": "of the usage field"},
        "tests": 12,
        "level": 0.05,
        "smallest_auc": 0.66,
        "smallest_auc_single_test": 0.61,
        "rows": [
            told_apart(arm, scenario, guess, salts, observable, auc)
            for arm, shift in (("stock", 0.4), ("fused", 0.1))
            for scenario in ("idle", "busy")
            for guess in ("exact", "near")
            for salts in ("none", "different")
            for observable, auc in (("cpu_ttft", 0.48 - shift * (salts == "none")), ("cached_tokens", 0.5))
        ],
    }


def attackers(bound: float, kind: str, kl: list[float], victim: int = 0) -> dict[str, Any]:
    row = {"bound": 2 * bound, "actual": bound, "holds": True}
    return {
        "victim": victim,
        "bound": bound,
        "attacker": kind,
        "kl": kl,
        "kl_worst_token": [3 * value for value in kl],
        "changed": [0.25] * len(kl),
        "blocks": [0, *[4] * (len(kl) - 1)],
        "block_error": [bound] * len(kl),
        "token_error": [bound] * len(kl),
        **({"rows": {name: dict(row) for name in DRIFTS}} if kind == "search" else {}),
    }


def influence() -> dict[str, Any]:
    return {
        "format": "jointkv.influence/1",
        "model": "smollm2",
        "search_budget": 48,
        "rows": [
            attackers(bound, kind, [0.0, bound / 10, bound / 5], victim)
            for victim in (0, 1)
            for bound in (0.05, 0.2)
            for kind in ("text", "search")
        ],
    }


def save(folder: Path, name: str, result: dict[str, Any]) -> Path:
    path = folder / f"{name}.json"
    path.write_text(json.dumps(result))
    return path


def test_both_formats_have_their_picture(tmp_path: Path) -> None:
    paths = [save(tmp_path, "tiny", side_channel("tiny")), save(tmp_path, "smollm2", side_channel())]
    written = make_pictures([*paths, save(tmp_path, "influence", influence())], tmp_path / "plots")
    assert {path.name for path in written} == {
        f"{name}.{kind}" for name in ("side_channel", "influence") for kind in ("png", "md")
    }
    assert all(path.stat().st_size > 10_000 for path in written if path.suffix == ".png")


def test_side_channel_table(tmp_path: Path) -> None:
    result = read_result(save(tmp_path, "one", side_channel()))
    assert isinstance(result, SideChannel)
    text = SideChannelAUC().table([result])
    assert "| smollm2 | stock | idle | exact | none | **0.08 [0.00, 0.15]** | - |" in text
    assert "| smollm2 | fused | busy | near | different | 0.48 [0.40, 0.55] | - |" in text
    assert text.count("| smollm2 |") == 16
    assert "12 tests share the level 0.05" in text and "from 0.66 (a single test: 0.61)" in text
    assert "- cpu_ttft: seconds to the first token" in text


def test_influence_table(tmp_path: Path) -> None:
    result = read_result(save(tmp_path, "one", influence()))
    assert isinstance(result, Influence)
    text = InfluenceOfAttackers().table([result])
    assert "| 0.05 | text | 2 | 6 | 67% | 4 | 0.005 | 0.01 | 0.03 | 25% | 0.050 | 0.050 | - | - | - |" in text
    assert "| 0.2 | search | 2 | 6 | 67% | 4 | 0.02 | 0.04 | 0.12 | 25% | 0.200 | 0.200 | 0.4 / 0.2 |" in text
    assert "a search with 48 evaluations" in text


def test_a_broken_bound_is_named(tmp_path: Path) -> None:
    broken = influence()
    broken["rows"][-1]["rows"]["kl"]["holds"] = False
    result = read_result(save(tmp_path, "one", broken))
    assert InfluenceOfAttackers().table([result]).count("(broken)") == 1  # type: ignore[list-item]


def test_influence_without_a_search_leaves_the_rows_out(tmp_path: Path) -> None:
    drawn = influence()
    drawn["rows"] = [row for row in drawn["rows"] if row["attacker"] == "text"]
    assert make_pictures([save(tmp_path, "one", drawn)], tmp_path / "plots")


def test_results_of_different_models_are_not_joined(tmp_path: Path) -> None:
    paths = [save(tmp_path, "a", influence()), save(tmp_path, "b", {**influence(), "model": "other"})]
    with pytest.raises(BadInput, match="model smollm2 and other"):
        make_pictures(paths, tmp_path / "plots")
