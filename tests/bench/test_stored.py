"""What a store did in a run, from the plugin's counters to the table."""

from __future__ import annotations

from jointkv.bench.result import ServingResult
from jointkv.bench.stored import Stored, stored_of
from jointkv.report.serving.table import load_table, markdown
from tests.report.samples import committed

COUNTERS = {f"store_{field}": float(number) for number, field in enumerate(Stored.model_fields)}
LOADED = "| prompt tokens loaded | pages loaded | read from the store, MB | written to the store, MB |"


def test_counters_of_an_arm_with_a_store() -> None:
    assert stored_of({"store": "pages"}, COUNTERS) == Stored(
        tokens_loaded=0,
        pages_read=1,
        bytes_read=2,
        pages_lost=3,
        pages_written=4,
        bytes_written=5,
        pages_dropped=6,
    )
    assert stored_of({}, COUNTERS) is None and stored_of(None, None) is None and stored_of({"store": "x"}, None) is None


def test_tables_have_them_where_an_arm_has_a_store() -> None:
    result = ServingResult.model_validate(committed("serving/store"))
    for run in result.runs:
        assert run.stored == stored_of({"store": "stored"} if run.arm == "store" else None, run.fusion)
    assert LOADED.strip("| ") in markdown([result])
    assert "| 5,792 | 181 | 227.2 | 13.8 |" in markdown([result]) and "| - | - | - | - |" in markdown([result])
    lines = load_table(result, result.loads[0]).groups["Stored pages"]
    assert lines[0][0] == "prompt tokens loaded" and "5,792" in lines[0]
    without = ServingResult.model_validate(committed("serving/near_prefix"))
    assert LOADED.strip("| ") not in markdown([without])
    assert load_table(without, without.loads[0]).groups["Stored pages"] == []
