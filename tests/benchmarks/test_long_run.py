"""The long run draws as many requests as it is asked for, of traffics that have fewer."""

from __future__ import annotations

from argparse import Namespace
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from long_run import BATCH, MIX, LongServer


def test_more_requests_are_drawn_than_a_traffic_has(tmp_path: Path) -> None:
    given = Namespace(
        model="smollm2", pool_blocks=None, share=[0.7, 0.9], capacity_requests=BATCH, requests=4 * BATCH, seed=0
    )
    given.output_tokens = 4
    made = LongServer(given, tmp_path)
    requests = [*made.first, *made.parts[0], *made.parts[1]]
    assert [len(made.first), *map(len, made.parts)] == [BATCH, 4 * BATCH, 4 * BATCH]
    prompts = Counter(request.prompt for request in requests)
    assert len(prompts) > 0.8 * len(requests) and len(MIX) == 3
    turns = [request.session for request in requests if request.session is not None]
    assert len(set(turns)) > BATCH / 10 and max(Counter(turns).values()) < 20
