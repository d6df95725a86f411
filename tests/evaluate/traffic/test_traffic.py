"""The traffics make the requests they promise, with any tokenizer."""

from importlib import resources
from typing import Any

import pytest

from jointkv.errors import BadInput
from jointkv.evaluate.score.outputs import common_prefix_length
from jointkv.evaluate.traffic import LongDocuments, Request, Tokenizer, Traffic, get_traffic, traffic_names
from jointkv.evaluate.traffic.base import encode, split_request
from jointkv.evaluate.traffic.four_shot import EXAMPLE_ROWS, shared_text
from jointkv.evaluate.traffic.gsm8k import load_problems
from jointkv.evaluate.traffic.random_tokens import RandomTokens
from jointkv.evaluate.traffic.unrelated import PROMPT_TOKENS
from tests.evaluate.toy_tokenizers import ALL, MAKERS, REAL, Remembering

FOUR_SHOT = ("near_prefix", "names")
NAMES = tuple(name for name in traffic_names() if not name.startswith("agent_turns_"))
"""One of the agents stands for all, which have tests of their own."""

SHORT = tuple(sorted({*NAMES} - {"agent_turns", "near_prefix", "shuffled_examples"}))
"""Whose requests can all be made in a test."""


def sized(name: str) -> Traffic:
    """The traffic, with documents and random prompts short enough to make many of them in a test."""
    if name == "long_documents":
        return LongDocuments(tokens=300)
    if name == "random_tokens":
        return RandomTokens(tokens=64)
    return get_traffic(name)


@pytest.fixture(autouse=True)
def no_data_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JOINTKV_DATA_DIR", raising=False)


@pytest.fixture(scope="module", params=ALL)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return MAKERS[request.param]()


@pytest.fixture(scope="module")
def small_tokenizer() -> Tokenizer:
    return Remembering(MAKERS["single_digits"]())  # type: ignore[return-value]


@pytest.fixture(scope="module", params=[REAL])
def real_tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return MAKERS[request.param]()


def header_and_rest(request: Request) -> tuple[str, str]:
    header, line_break, rest = request.text.partition("\n")
    return header, line_break + rest


def common_tokens(requests: list[Request]) -> int:
    return min(common_prefix_length(requests[0].prompt, other.prompt) for other in requests[1:])


def test_packaged_sample_is_whole_and_licensed() -> None:
    problems = load_problems()
    assert len(problems) == 300
    assert all(problem.question and "\n#### " in problem.answer for problem in problems)
    sources = (resources.files("jointkv.evaluate") / "data" / "SOURCES.md").read_text(encoding="utf-8")
    assert "openai/grade-school-math@3101c7d50724" in sources
    assert "Permission is hereby granted" in sources


def test_registry() -> None:
    assert traffic_names() == (
        *("near_prefix", "names", "shuffled_examples", "tool_dialogues", "tools_reordered"),
        *("agent_turns", "agent_turns_nonce", "agent_turns_clock", "agent_turns_tools", "agent_turns_thoughts"),
        *("agent_turns_many", "agent_turns_nonce_many"),
        *("edited_document", "museum", "retrieval", "long_documents", "unrelated", "random_tokens"),
    )
    assert [get_traffic(name).name for name in traffic_names()] == list(traffic_names())
    assert get_traffic("near-prefix") is get_traffic("near_prefix")
    assert all(get_traffic(name).description for name in traffic_names())
    with pytest.raises(
        BadInput, match=r"unknown traffic 'no-such'; known: near_prefix, .*, random_tokens, dataset:NAME"
    ):
        get_traffic("no-such")


@pytest.mark.parametrize("name", NAMES)
def test_requests_are_distinct_and_complete(name: str, tokenizer: Tokenizer) -> None:
    requests = sized(name).requests(tokenizer, 24, continuation_tokens=48)
    assert len(requests) == len({request.prompt for request in requests}) == 24
    assert len({request.text for request in requests}) == 24
    assert all(len(request.continuation) == 48 for request in requests)


@pytest.mark.parametrize("name", NAMES)
def test_requests_depend_on_the_seed_only(name: str, small_tokenizer: Tokenizer) -> None:
    traffic = sized(name)
    first = traffic.requests(small_tokenizer, 6, seed=3)
    assert traffic.requests(small_tokenizer, 6, seed=3) == first
    assert traffic.requests(small_tokenizer, 6, seed=4) != first


@pytest.mark.parametrize("name", FOUR_SHOT)
def test_four_shot_text_is_shared_after_the_header(name: str, tokenizer: Tokenizer) -> None:
    requests = get_traffic(name).requests(tokenizer, 12)
    shared = shared_text(load_problems())
    headers, rests = zip(*map(header_and_rest, requests), strict=True)
    assert len(set(headers)) == len(requests)
    assert all(rest.startswith(shared) for rest in rests)
    assert all(rest.endswith("\nAnswer:") for rest in rests)
    questions = [rest.removeprefix(shared) for rest in rests]
    assert len(set(questions)) == len(requests)
    examples = {load_problems()[row].question for row in EXAMPLE_ROWS}
    assert not any(example in question for question in questions for example in examples)


def test_near_prefix_headers_have_one_length_and_align_the_shared_text(tokenizer: Tokenizer) -> None:
    requests = get_traffic("near_prefix").requests(tokenizer, 12)
    shared = shared_text(load_problems())
    header_tokens = {len(encode(tokenizer, header_and_rest(request)[0])) for request in requests}
    assert len(header_tokens) == 1
    length = header_tokens.pop()
    until = min(len(encode(tokenizer, header_and_rest(request)[0] + shared)) for request in requests)
    assert len({request.prompt[length:until] for request in requests}) == 1
    assert common_tokens(requests) < length


def test_near_prefix_requests_differ_in_their_first_block(small_tokenizer: Tokenizer) -> None:
    requests = get_traffic("near_prefix").requests(small_tokenizer, 40)
    assert len({request.prompt[:16] for request in requests}) == len(requests)


def test_names_have_headers_of_many_lengths(tokenizer: Tokenizer) -> None:
    requests = get_traffic("names").requests(tokenizer, 24)
    headers = [header_and_rest(request)[0] for request in requests]
    assert len({len(encode(tokenizer, header)) for header in headers}) >= 3
    assert common_tokens(requests) < min(len(encode(tokenizer, header)) for header in headers)


def test_unrelated_prompts_have_256_tokens_and_share_no_text(tokenizer: Tokenizer) -> None:
    requests = get_traffic("unrelated").requests(tokenizer, 24)
    assert {len(request.prompt) for request in requests} == {PROMPT_TOKENS}
    questions = [line for request in requests for line in set(request.text.split("\n")) if "Question:" in line]
    assert len(questions) == len(set(questions))


@pytest.mark.parametrize("name", FOUR_SHOT)
def test_continuation_is_the_true_answer(name: str, small_tokenizer: Tokenizer) -> None:
    answers = {problem.question: problem.answer for problem in load_problems()}
    for request in get_traffic(name).requests(small_tokenizer, 8):
        question = request.text.rsplit("Question: ", 1)[1].removesuffix("\nAnswer:")
        continuation = small_tokenizer.decode(list(request.continuation))
        # A cut may fall inside a character of several bytes.
        assert f" {answers[question]}".startswith(continuation.rstrip("\ufffd"))
        assert small_tokenizer.decode(list(request.prompt)) == request.text


@pytest.mark.parametrize("name", NAMES)
def test_prompt_starts_with_bos_where_the_tokenizer_adds_one(name: str) -> None:
    for request in sized(name).requests(MAKERS["with_bos"](), 3):
        assert request.prompt.count(0) == 1
        assert request.prompt[0] == 0
        assert 0 not in request.continuation
        assert "<s>" not in request.text


@pytest.mark.parametrize("name", SHORT)
def test_too_many_requests_are_refused_with_the_possible_number(name: str, small_tokenizer: Tokenizer) -> None:
    traffic = sized(name)
    with pytest.raises(BadInput, match=r"can make \d+ distinct requests .* 100000 requested") as refusal:
        traffic.requests(small_tokenizer, 100_000)
    possible = int(str(refusal.value).split("can make ")[1].split()[0])
    assert len(set(traffic.requests(small_tokenizer, possible))) == possible
    with pytest.raises(BadInput, match=f"can make {possible} "):
        traffic.requests(small_tokenizer, possible + 1)


@pytest.mark.parametrize("name", sorted({*SHORT} - {"random_tokens"}))
def test_continuation_longer_than_all_text_is_refused(name: str, small_tokenizer: Tokenizer) -> None:
    with pytest.raises(BadInput, match="can make 0 distinct requests"):
        get_traffic(name).requests(small_tokenizer, 1, continuation_tokens=100_000)


@pytest.mark.parametrize(
    ("count", "continuation_tokens", "field"),
    [(0, 8, "count"), (-1, 8, "count"), (1, 0, "continuation_tokens")],
)
@pytest.mark.parametrize("name", NAMES)
def test_senseless_numbers_are_refused(
    name: str, count: int, continuation_tokens: int, field: str, small_tokenizer: Tokenizer
) -> None:
    with pytest.raises(BadInput, match=f"^{field} must be at least 1"):
        sized(name).requests(small_tokenizer, count, continuation_tokens=continuation_tokens)


def test_headers_of_unequal_length_are_refused(small_tokenizer: Tokenizer) -> None:
    class Numbering:
        """Gives every text other tokens than the text before, so that nothing ever aligns."""

        bos_token_id = None
        calls = 0

        def __call__(self, text: str, *, add_special_tokens: bool = True) -> dict[str, list[int]]:
            self.calls += 1
            return {"input_ids": [self.calls] * len(text)}

    with pytest.raises(BadInput, match="can make 1 session lines of one token length"):
        get_traffic("near_prefix").requests(Numbering(), 2)


def test_split_request_refuses_a_token_across_the_border(small_tokenizer: Any) -> None:
    token = max(small_tokenizer.get_vocab(), key=len)
    word = small_tokenizer.decode([small_tokenizer.convert_tokens_to_ids(token)])
    assert split_request(small_tokenizer, word[:-1], word[-1] + " and more", 1) is None
    assert split_request(small_tokenizer, word, " and more", 1) is not None


@pytest.mark.parametrize("name", FOUR_SHOT)
def test_four_shot_prompts_have_the_length_that_was_measured(name: str, real_tokenizer: Tokenizer) -> None:
    requests = get_traffic(name).requests(real_tokenizer, 100)
    assert all(550 <= len(request.prompt) <= 1000 for request in requests)
    shared = len(encode(real_tokenizer, shared_text(load_problems())))
    assert 550 <= shared <= 750


def test_versions_of_a_document_have_a_paragraph_of_their_own(real_tokenizer: Tokenizer) -> None:
    made = get_traffic("edited_document").requests(real_tokenizer, 6, seed=1)
    lines = [request.text.split("\n") for request in made]
    heads, inserted = {tuple(each[:4]) for each in lines}, [set(each) - set(lines[-1]) for each in lines[:-1]]
    assert len(heads) == 1 and all(2 <= len(own) <= 6 + 12 for own in inserted)
    common = set(lines[0]).intersection(*lines[1:])
    assert len(common) >= 70 and len({len(request.prompt) for request in made}) > 3
    assert all(700 < len(request.prompt) < 1500 for request in made)


def test_the_same_tools_in_another_order(real_tokenizer: Tokenizer) -> None:
    as_they_are, reordered = (
        get_traffic(name).requests(real_tokenizer, 8, seed=2) for name in ("tool_dialogues", "tools_reordered")
    )
    orders = {tuple(line for line in request.text.split("\n") if line.startswith("{")) for request in reordered}
    lists = {tuple(line for line in request.text.split("\n") if line.startswith("{")) for request in as_they_are}
    assert len(orders) > len(lists) and {tuple(sorted(tools)) for tools in orders} <= {
        tuple(sorted(tools)) for tools in lists
    }
