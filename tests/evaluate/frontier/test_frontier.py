"""The grid of policies, where a series ends, and which rows nothing beats."""

from dataclasses import replace

import pytest

pytest.importorskip("jointkv.hf", exc_type=ImportError)  # the environment of the baselines has an older transformers

from jointkv.errors import BadInput, InvalidPolicy
from jointkv.evaluate.frontier import run as running
from jointkv.evaluate.frontier.grid import FrontierSettings, Series, all_series
from jointkv.evaluate.frontier.result import best_within, frontier
from jointkv.evaluate.frontier.run import run_frontier, steps
from tests.evaluate.sharing_requests import BLOCK, requests

SETTINGS = FrontierSettings(
    traffics=("unrelated",), requests=6, tokens=6, block_sizes=(BLOCK,), bounds=(0.2, 0.6, 1.5), cosines=(0.99, 0.5)
)


class Sharing:
    """The requests that are at hand for tiny models, as a traffic."""

    name, scope = "sharing", "batch"

    def requests(self, tokenizer, count, *, continuation_tokens, seed):
        return requests(count)


@pytest.fixture
def rows(model, monkeypatch):
    monkeypatch.setattr(running, "get_traffic", lambda name: Sharing())
    lines = []
    found = list(run_frontier(model, None, SETTINGS, lines.append))
    assert len(lines) == steps(SETTINGS) == len(list(all_series(SETTINGS)))
    return found


def test_a_series_ends_with_the_first_policy_beyond_the_limit(rows, model, monkeypatch):
    series = {}
    for row in rows:
        series.setdefault((row.candidates, row.serves, row.decides, row.layer_groups), []).append(row)
    layers = model.config.num_hidden_layers
    assert len(series) == 8 and {groups for *_, groups in series} == {1, layers}
    for found in series.values():
        assert all(row.kl <= SETTINGS.most_kl for row in found[:-1])
        assert len(found) == (2 if found[0].decides == "keys" else 3) or found[-1].kl > SETTINGS.most_kl
    tighter = list(run_frontier(model, None, replace(SETTINGS, most_kl=0.0), lambda line: None))
    assert len(tighter) < len(rows)


def test_what_the_policies_may_do(rows):
    assert any(row.ratio > 1.2 for row in rows if row.candidates == "tokens")
    strict = {
        row.candidates: row for row in rows if row.level == 0.2 and row.serves == "page" and row.layer_groups == 1
    }
    assert strict["signature"].ratio >= strict["tokens"].ratio
    bounded = Series("signature", "direction", "error", 1).policy(0.6, "chunk")
    assert (bounded.key_threshold, bounded.max_relative_error, bounded.scope) == (pytest.approx(0.8), 0.6, "chunk")
    alone = Series("signature", "direction", "keys", 1).policy(0.9, "batch")
    assert alone.key_threshold == 0.9 and alone.max_relative_error is None and alone.similarity == "key"


def test_the_frontier_is_what_nothing_beats(rows):
    best = frontier(rows)
    assert best == sorted(best, key=lambda row: row.kl) == sorted(best, key=lambda row: row.ratio)
    for row in rows:
        assert any(other.ratio >= row.ratio and other.kl <= row.kl for other in best)
    assert best_within(rows, best[-1].kl) == best[-1] and best_within(rows, -1.0) is None


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"traffics": ("poems",)}, BadInput, "unknown traffic 'poems'"),
        ({"bounds": ()}, BadInput, "bounds: give at least one"),
        ({"bounds": (0.0,)}, BadInput, "bounds: 0 leaves nothing to trade"),
        ({"requests": 1}, BadInput, "requests: 1 have nobody to share with"),
        ({"layer_groups": (7,)}, InvalidPolicy, "7 does not divide"),
        ({"layer_groups": ("each",)}, InvalidPolicy, "neither a whole number"),
    ],
)
def test_bad_settings_are_named(changes, error, words, model):
    with pytest.raises(error, match=words):
        list(run_frontier(model, None, replace(SETTINGS, **changes), lambda line: None))
