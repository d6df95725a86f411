"""Agents' turns: the whole history every time, in the order of sessions, and one thing changed about it."""

import re
from itertools import pairwise

import pytest

from jointkv.errors import BadInput
from jointkv.evaluate.score.outputs import common_prefix_length
from jointkv.evaluate.traffic import Request, Tokenizer, agent_turns, get_traffic
from jointkv.evaluate.traffic.agent_turns import AgentTurns
from jointkv.evaluate.traffic.base import encode
from jointkv.evaluate.traffic.tool_dialogues import load_dialogues
from jointkv.evaluate.traffic.writing import as_row
from tests.evaluate.toy_tokenizers import MAKERS, REAL

CHANGES = tuple(AgentTurns.CHANGES)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return MAKERS["single_digits"]()


@pytest.fixture(scope="module")
def made(tokenizer: Tokenizer) -> dict[str, list[Request]]:
    return {change: AgentTurns(change).requests(tokenizer, 16, continuation_tokens=2) for change in CHANGES}


def by_session(requests: list[Request]) -> list[list[Request]]:
    numbers = dict.fromkeys(request.course.session for request in requests)
    return [[request for request in requests if request.course.session == number] for number in numbers]


@pytest.mark.parametrize("change", CHANGES)
def test_sessions_are_interleaved_and_in_their_order(made: dict[str, list[Request]], change: str) -> None:
    requests, sessions = made[change], by_session(made[change])
    times = [request.course.seconds for request in requests]
    assert times == sorted(times) and times[0] == 0
    assert len(sessions) >= 4 and max(map(len, sessions)) >= 3
    order = [request.course.session for request in requests]
    assert any(one != other for one, other in pairwise(order)) and len(set(order[:4])) > 1
    for turns in sessions:
        assert [len(turn.course.messages) for turn in turns] == sorted(len(turn.course.messages) for turn in turns)
        assert len({turn.course.tenant for turn in turns}) == 1
        assert all(turn.course.think > 0 for turn in turns[1:])
    assert len({request.course.tenant for request in requests}) == 2


def test_without_a_change_every_turn_begins_with_the_one_before(made: dict[str, list[Request]]) -> None:
    for turns in by_session(made["nothing"]):
        for one, other in pairwise(turns):
            assert other.prompt[: len(one.prompt)] == one.prompt
            assert other.course.messages[: len(one.course.messages)] == one.course.messages
    heads = {request.text.split("\nUser:")[0] for request in made["nothing"]}
    assert len(heads) == 1


def test_number_and_clock_differ_in_the_first_line_of_every_request(made: dict[str, list[Request]]) -> None:
    first = [request.text.split("\n")[0] for request in made["nonce"]]
    assert len(set(first)) == len(first)
    assert all(re.fullmatch(r"System: Request \d{12}, 2026-03-02 09:\d\d:\d\d\.", line) for line in first)
    tails = {request.text.split("\n", 1)[1].split("\nUser:")[0] for request in made["nonce"]}
    assert len(tails) == 1


def test_the_clock_stands_amid_the_tools(made: dict[str, list[Request]]) -> None:
    one, other = made["clock"][0], made["clock"][5]
    at = common_prefix_length(one.prompt, other.prompt)
    tools = [request.text.index('{"name"') for request in (one, other)]
    assert tools[0] == tools[1] and 0.25 < at / len(one.prompt) < 0.75


def test_tools_come_in_another_order_in_every_session(made: dict[str, list[Request]]) -> None:
    orders = [
        {tuple(line for line in turn.text.split("\n") if line.startswith('{"name"')) for turn in turns}
        for turns in by_session(made["tools"])
    ]
    assert all(len(order) == 1 for order in orders)
    assert len(set.union(*orders)) == len(orders) and len({tuple(sorted(*order)) for order in orders}) == 1


def test_only_the_last_answer_has_its_thought(made: dict[str, list[Request]]) -> None:
    for turns in by_session(made["thoughts"]):
        assert [turn.text.count("<think>") for turn in turns] == [0, *[1] * (len(turns) - 1)]
        for turn in turns[1:]:
            said = [content for role, content in turn.course.messages if role == "assistant"]
            assert said[-1].startswith("<think>") and not any("<think>" in text for text in said[:-1])


def test_the_packaged_dialogues_are_enough_for_so_many(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent_turns, "load_dialogues", lambda: load_dialogues()[:3])
    with pytest.raises(BadInput, match=r"can make \d+ distinct requests .* 1000 requested") as refused:
        AgentTurns("nothing").requests(tokenizer, 1000)
    possible = int(str(refused.value).split("can make ")[1].split()[0])
    assert 3 <= len(AgentTurns("nothing").requests(tokenizer, possible)) == possible


def test_an_unknown_change_is_refused() -> None:
    with pytest.raises(BadInput, match="nothing, nonce, clock, tools, thoughts, got 'all'"):
        AgentTurns("all")


@pytest.mark.parametrize("name", [REAL])
@pytest.mark.parametrize(("traffic", "tools"), [("agent_turns_nonce", 20), ("agent_turns_nonce_many", 40)])
def test_the_tools_are_as_long_as_those_of_agents(name: str, traffic: str, tools: int) -> None:
    tokenizer = MAKERS[name]()
    (request,) = get_traffic(traffic).requests(tokenizer, 1)
    assert request.text.count('\n{"name": ') == tools
    assert 1500 <= len(encode(tokenizer, request.text.split("\nUser:")[0])) <= 4000


def test_more_tools_change_nothing_else(tokenizer: Tokenizer, made: dict[str, list[Request]]) -> None:
    few, many = made["nonce"], AgentTurns("nonce", many=True).requests(tokenizer, 16, continuation_tokens=2)
    assert [one.course.messages[1:] for one in few] == [one.course.messages[1:] for one in many]


def test_rows_hold_what_servers_take(made: dict[str, list[Request]], tokenizer: Tokenizer) -> None:
    request = made["nonce"][3]
    row = as_row(request, 3, "m", 7)
    assert (row["custom_id"], row["method"], row["url"]) == ("request-3", "POST", "/v1/chat/completions")
    assert row["session_id"] == request.course.session and row["timestamp"] == round(request.course.seconds, 3)
    body = row["body"]
    assert (body["model"], body["max_tokens"], body["cache_salt"]) == ("m", 7, request.course.tenant)
    assert [message["role"] for message in body["messages"]][:2] == ["system", "user"]
    (plain,) = get_traffic("names").requests(tokenizer, 1)
    row = as_row(plain, 0, "m", 7)
    assert row["url"] == "/v1/completions" and row["body"]["prompt"] == plain.text and "timestamp" not in row
