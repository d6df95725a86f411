"""Tasks read a data folder made here; no hub is asked."""

import pytest

from jointkv.evaluate.datasets import base
from jointkv.evaluate.datasets.hub import HubUnavailable


@pytest.fixture(autouse=True)
def data_dir(tmp_path, monkeypatch):
    def unavailable(*_, **__):
        raise HubUnavailable("no hub in tests")

    monkeypatch.setattr(base, "fetch_records", unavailable)
    monkeypatch.setenv("JOINTKV_DATA_DIR", str(tmp_path))
    return tmp_path
