"""The program in `examples/` that needs vLLM runs as it stands."""

from __future__ import annotations

import pytest

from tests.examples.test_examples import example


@pytest.mark.real_model
def test_an_offline_batch_shares_pages(capsys: pytest.CaptureFixture[str]) -> None:
    assert example("offline_batch_vllm").main() > 0
    assert "blocks given back to the pool" in capsys.readouterr().out
