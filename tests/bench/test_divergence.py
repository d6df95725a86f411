"""Where answers part, and what the reference is asked about it; a real server is asked in `test_real_engine.py`."""

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest

from jointkv.bench import divergence
from jointkv.bench.divergence import Parting, partings, with_divergences
from jointkv.bench.result import Arm
from jointkv.bench.run import make_result
from jointkv.bench.server import ServerFailed
from tests.bench.plans import CLOSED, arm, plan, run

MADE = plan(rounds=1, loads=(CLOSED,))
OUTPUTS = {
    ("stock", "closed 2", 1): ["abc", "xyz"],
    ("fused", "closed 2", 1): ["abd", "xyz"],
}


def letters(text: str, *, add_special_tokens: bool = True) -> dict[str, list[int]]:
    assert not add_special_tokens
    return {"input_ids": [ord(letter) for letter in text]}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the server was asked. It knows 99 ("c"), 100 ("d") and 7."""
    bodies: list[dict[str, Any]] = []

    def get(url: str, timeout: float, body: dict[str, Any]) -> bytes:
        bodies.append(body)
        told = {"token_id:99": -0.5, "token_id:100": -0.55, "token_id:7": -4.0}
        return json.dumps({"choices": [{"logprobs": {"top_logprobs": [told]}}]}).encode()

    monkeypatch.setattr(divergence, "get", get)
    return bodies


@contextmanager
def serve(served: Arm, number: int) -> Iterator[Any]:
    assert served.fusion is None
    yield SimpleNamespace(url="http://there", require_alive=lambda when: None)


def result_of(made: Any) -> Any:
    runs = {(name, "closed 2", 1): run(name) for name in ("stock", "fused")}
    return make_result(made, SimpleNamespace(runs=runs, outputs=OUTPUTS), complete=True)  # type: ignore[arg-type]


def test_partings() -> None:
    assert list(partings(OUTPUTS, MADE, letters)) == [Parting("fused", "closed 2", 1, 0, (97, 98), 99, 100)]
    shorter = {**OUTPUTS, ("fused", "closed 2", 1): ["ab", "xyz!"]}
    ends = [(each.request, each.shared, each.reference_token, each.token) for each in partings(shorter, MADE, letters)]
    assert ends == [(0, (97, 98), 99, None), (1, (120, 121, 122), None, 33)]


def test_what_the_reference_thinks(asked: list[dict[str, Any]]) -> None:
    found = with_divergences(result_of(MADE), MADE, OUTPUTS, serve, letters, lambda line: nullcontext())
    (one,) = found.divergences or ()
    assert (one.arm, one.against, one.request, one.token) == ("fused", "stock", 0, 2)
    assert one.gap == pytest.approx(0.05) and one.near_tie and not one.least
    assert [body["prompt"] for body in asked] == [[1, 2, 97, 98]] and asked[0]["max_tokens"] == 1


def test_a_token_that_the_reference_does_not_name_is_no_tie(asked: list[dict[str, Any]]) -> None:
    outputs = {**OUTPUTS, ("fused", "closed 2", 1): ["abz", "xyz"]}
    found = with_divergences(result_of(MADE), MADE, outputs, serve, letters, lambda line: nullcontext())
    (one,) = found.divergences or ()
    assert one.gap == pytest.approx(3.5) and one.least and not one.near_tie


def test_nobody_is_asked_without_need(asked: list[dict[str, Any]]) -> None:
    same = {key: ["abc", "xyz"] for key in OUTPUTS}
    found = with_divergences(result_of(MADE), MADE, same, serve, letters, lambda line: nullcontext())
    assert found.divergences == [] and asked == []
    fused_alone = plan(rounds=1, loads=(CLOSED,), names=("fused",))
    fused_alone = type(fused_alone)(**{**vars(fused_alone), "arms": (arm("fused", fusion={}),)})
    result = result_of(MADE).model_copy(update={"arms": list(fused_alone.arms)})
    assert with_divergences(result, fused_alone, OUTPUTS, serve, letters, lambda line: nullcontext()) is result


def test_a_server_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def get(*arguments: Any, **options: Any) -> bytes:
        raise OSError("refused")

    monkeypatch.setattr(divergence, "get", get)
    with pytest.raises(ServerFailed, match="did not say how likely tokens are: refused"):
        with_divergences(result_of(MADE), MADE, OUTPUTS, serve, letters, lambda line: nullcontext())
