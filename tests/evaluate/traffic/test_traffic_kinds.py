"""Each kind of traffic shares, and keeps apart, what its description says."""

import json
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

from jointkv.errors import BadInput
from jointkv.evaluate.datasets import ChoiceRow, Loaded, Row
from jointkv.evaluate.samples import packaged
from jointkv.evaluate.traffic import DatasetTraffic, LongDocuments, Request, Tokenizer, get_traffic
from jointkv.evaluate.traffic.base import encode
from jointkv.evaluate.traffic.four_shot import EXAMPLE_ROWS
from jointkv.evaluate.traffic.gsm8k import load_problems
from jointkv.evaluate.traffic.random_tokens import RandomTokens
from jointkv.evaluate.traffic.retrieval import load_passages
from jointkv.evaluate.traffic.tool_dialogues import ASSISTANTS, load_dialogues
from tests.evaluate.toy_tokenizers import MAKERS, REAL

BLOCK = 16


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JOINTKV_DATA_DIR", raising=False)
    monkeypatch.setitem(sys.modules, "datasets", None)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return MAKERS["single_digits"]()


@pytest.fixture(scope="module", params=[REAL])
def real_tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return MAKERS[request.param]()


def shared_blocks(requests: list[Request]) -> float:
    """The share of blocks whose tokens some other request has at the same position."""
    blocks = Counter(
        (at, request.prompt[at : at + BLOCK])
        for request in requests
        for at in range(0, len(request.prompt) - BLOCK + 1, BLOCK)
    )
    return sum(count for count in blocks.values() if count > 1) / blocks.total()


def test_samples_are_licensed_and_small() -> None:
    sources = packaged("SOURCES.md").read_text(encoding="utf-8")
    samples = [path for path in packaged("SOURCES.md").parent.iterdir() if path.suffix in (".jsonl", ".txt")]
    assert {"novel_sample.txt", "toolcall_sample.jsonl", "gov_report_sample.jsonl"} <= {path.name for path in samples}
    for path in samples:
        assert f"| `{path.name}` |" in sources
        assert path.stat().st_size < 180_000


def test_shuffled_examples_have_the_same_examples_in_many_orders(tokenizer: Tokenizer) -> None:
    requests = get_traffic("shuffled_examples").requests(tokenizer, 40)
    examples = [load_problems()[row].worked for row in EXAMPLE_ROWS]
    orders = set()
    for request in requests:
        places = [request.text.index(f"\n\n{example}\n\n") for example in examples]
        orders.add(tuple(sorted(range(4), key=places.__getitem__)))
    assert len(orders) > 12
    in_order = get_traffic("near_prefix").requests(tokenizer, 40)
    assert 0.3 < shared_blocks(requests) < shared_blocks(in_order)


def test_every_tool_a_dialogue_calls_is_in_its_assistants_list() -> None:
    dialogues = load_dialogues()
    assert len(dialogues) == len(set(dialogues)) > 80
    assert len({dialogue.instructions for dialogue in dialogues}) == len(ASSISTANTS)
    for dialogue in dialogues:
        offered = [json.loads(line)["name"] for line in dialogue.instructions.split("\n")[1:]]
        for turn in dialogue.turns:
            if turn.speaker == "Tool call":
                assert json.loads(turn.text)["name"] in offered


def test_tool_dialogues_share_lists_behind_own_headers(tokenizer: Tokenizer) -> None:
    requests = get_traffic("tool_dialogues").requests(tokenizer, 16)
    headers = {request.text.split("\n")[0] for request in requests}
    assert len(headers) == len({request.prompt[:BLOCK] for request in requests}) == 16
    lists = {dialogue.instructions for dialogue in load_dialogues()}
    used = Counter(text for request in requests for text in lists if f"\n{text}\nUser: " in request.text)
    assert list(used.values()) == [4, 4, 4, 4]
    assert 0.3 < shared_blocks(requests) < 1


def test_tool_dialogues_go_on_with_the_true_message(tokenizer: Tokenizer) -> None:
    requests = get_traffic("tool_dialogues").requests(tokenizer, 24)
    transcripts = ["".join(f"\n{turn.speaker}: {turn.text}" for turn in d.turns) for d in load_dialogues()]
    for request in requests:
        assert request.text.rsplit("\n", 1)[1] in ("Assistant:", "Tool call:")
        said = request.text[request.text.index("\nUser: ") :]
        told = said + tokenizer.decode(list(request.continuation)).rstrip("\ufffd")
        assert any(transcript.startswith(told) for transcript in transcripts)
    assert any("\nUser: " in tokenizer.decode(list(request.continuation)) for request in requests)


def test_retrieval_brings_the_passage_that_it_asks_for(tokenizer: Tokenizer) -> None:
    texts = {passage.text: passage for passage in load_passages()}
    assert len({passage.opening for passage in texts.values()}) == len(texts) > 100
    places, uses = Counter(), Counter()
    for request in get_traffic("retrieval").requests(tokenizer, 64):
        question, *found, last = request.text.split("\n\n")
        assert last == f"{question}\nAnswer:"
        passages = [texts[text.split("] ", 1)[1]] for text in found]
        assert 5 <= len(set(passages)) == len(passages) <= 6
        (place,) = (at for at, passage in enumerate(passages) if f'"{passage.opening}"' in question)
        answer = tokenizer.decode(list(request.continuation)).rstrip("\ufffd")
        assert f" {passages[place].rest}".startswith(answer)
        places[place] += 1
        uses.update(passages)
    assert len(places) >= 5
    assert max(uses.values()) >= 10
    assert min(uses.values()) == 1


def test_documents_are_disjoint_true_text(tokenizer: Tokenizer) -> None:
    novel = packaged("novel_sample.txt").read_text(encoding="utf-8")
    requests = LongDocuments(tokens=1000, kinds=("novel",)).requests(tokenizer, 30)
    places = []
    for request in requests:
        assert len(request.prompt) == 1000
        text = tokenizer.decode([*request.prompt, *request.continuation]).strip("\ufffd")
        assert text in novel
        places.append((novel.index(text), len(text)))
    places.sort()
    assert all(at + length <= after for (at, length), (after, _) in pairwise(places))
    assert shared_blocks(requests) == 0


def test_documents_of_the_data_folder_take_turns(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "longbench").mkdir()
    (tmp_path / "text" / "ffmpeg_manpage.txt").write_text("-option value\n" * 500, encoding="utf-8")
    rows = [{"prompt": f"def function_{number}():\n" + "    pass\n" * 400} for number in range(3)]
    code = tmp_path / "longbench" / "repobench-p.jsonl"
    code.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    monkeypatch.setenv("JOINTKV_DATA_DIR", str(tmp_path))
    traffic = LongDocuments(tokens=200)
    novel, first_code, man_page, _, second_code = traffic.requests(tokenizer, 5)
    assert "option value" in man_page.text
    assert first_code.text.startswith("def function_")
    assert second_code.text.startswith("def function_")
    assert "option" not in novel.text
    code.write_text('{"text": "a"}\n', encoding="utf-8")
    with pytest.raises(BadInput, match=r"repobench-p\.jsonl:1: prompt: Field required"):
        traffic.requests(tokenizer, 5)


@pytest.mark.parametrize("fields", [{"kinds": ("poem",)}, {"kinds": ()}, {"tokens": 0}])
def test_senseless_documents_are_refused(fields: dict[str, object]) -> None:
    with pytest.raises(BadInput, match=r"kinds must|tokens must"):
        LongDocuments(**fields)


def test_random_tokens_count_through_the_vocabulary_without_special_tokens() -> None:
    tokenizer = MAKERS["with_bos"]()
    allowed = set(range(tokenizer.vocab_size)) - set(tokenizer.all_special_ids)
    requests = RandomTokens(tokens=300).requests(tokenizer, 64, continuation_tokens=8)
    wraps = 0
    for request in requests:
        assert (len(request.prompt), len(request.continuation)) == (300, 8)
        ids = (*request.prompt[1:], *request.continuation)
        assert set(ids) <= allowed
        steps = [after - before for before, after in pairwise(ids)]
        wraps += sum(step != 1 for step in steps)
        assert all(step in (1, min(allowed) - max(allowed)) for step in steps)
    assert wraps > 0
    assert shared_blocks(requests) == 0
    with pytest.raises(BadInput, match="tokens must be at least 2"):
        RandomTokens(tokens=1)


def test_dataset_traffic_sends_rows_with_their_answers(tokenizer: Tokenizer) -> None:
    traffic = get_traffic("dataset:gsm8k")
    assert traffic.name == "dataset:GSM8K"
    assert traffic.description == "GSM8K, packaged copy: the first 300 rows of GSM8K test"
    problems = {f"Question: {problem.question}\nAnswer:": problem.answer for problem in load_problems()}
    requests = traffic.requests(tokenizer, 64, continuation_tokens=16)
    assert len({request.prompt for request in requests}) == 64
    for request in requests:
        answer = tokenizer.decode(list(request.continuation)).rstrip("\ufffd")
        assert f" {problems[request.text]}".startswith(answer)
    assert traffic.requests(tokenizer, 64, continuation_tokens=16) == requests
    assert "stand-in" in DatasetTraffic("OpenMathInstruct-2").description


def test_dataset_traffic_cuts_prompts_and_takes_the_end_where_answers_are_short(tokenizer: Tokenizer) -> None:
    problems = load_problems()
    whole = {encode(tokenizer, f"Question: {problem.question}\nAnswer: {problem.answer}") for problem in problems}
    cut = DatasetTraffic("gsm8k", prompt_tokens=32).requests(tokenizer, 30, continuation_tokens=10)
    assert {len(request.prompt) for request in cut} == {32}
    assert all(any(ids[:42] == request.prompt + request.continuation for ids in whole) for request in cut)
    late = DatasetTraffic("gsm8k").requests(tokenizer, 100, continuation_tokens=150)
    assert all(any(ids[: len(r.prompt) + 150] == r.prompt + r.continuation for ids in whole) for r in late)
    assert any(not request.text.endswith("\nAnswer:") for request in late)
    with pytest.raises(BadInput, match=r"can make 0 distinct requests .*; 300 of 300 rows leave fewer than 32 tokens"):
        DatasetTraffic("gsm8k").requests(tokenizer, 1, continuation_tokens=10_000)
    with pytest.raises(BadInput, match="prompt_tokens must be at least 32"):
        DatasetTraffic("gsm8k", prompt_tokens=31)
    with pytest.raises(BadInput, match="unknown data set 'no such'; known: HelpSteer, "):
        get_traffic("dataset:no such")


def test_dataset_traffic_leaves_out_short_prompts(tokenizer: Tokenizer) -> None:
    traffic = DatasetTraffic("gsm8k")
    rows = [
        Row("few words", ("an answer " * 30,)),
        *(Row(f"{i} and many more words " * 20, ("yes",)) for i in range(3)),
    ]
    vars(traffic)["loaded"] = Loaded("toy", "here", False, tuple(rows))
    requests = traffic.requests(tokenizer, 3, continuation_tokens=8)
    assert all(len(request.prompt) >= 32 and "few" not in request.text for request in requests)
    with pytest.raises(BadInput, match=r"make 3 distinct .* 4 requested; 1 of 4 rows leave fewer than 32 tokens"):
        traffic.requests(tokenizer, 4, continuation_tokens=8)


def test_choices_stand_behind_solved_questions_of_their_subject(tokenizer: Tokenizer) -> None:
    rows = [
        ChoiceRow(f"question {i} on {subject}", ("B",), ("up", "down", "left", "right"), 1, subject)
        for subject in ("law", "art")
        for i in range(8)
    ]
    traffic = DatasetTraffic("mmlu")
    vars(traffic)["loaded"] = Loaded("toy", "here", False, tuple(rows))
    for request in traffic.requests(tokenizer, 6, continuation_tokens=4):
        whole = tokenizer.decode(list(request.prompt + request.continuation))
        subject, other = ("law", "art") if "on law" in whole else ("art", "law")
        assert whole.count(f"on {subject}") == 6 and other not in whole and whole.count("Answer: B") == 6
        assert whole.startswith(f"question 0 on {subject}") and whole.endswith("Answer: B")
        assert any(f"question {i} on" in whole.split("Answer: B")[5] for i in (5, 6, 7))
    with pytest.raises(BadInput, match=r"make 6 distinct"):
        traffic.requests(tokenizer, 7, continuation_tokens=4)


@pytest.mark.parametrize(
    ("name", "shortest", "longest", "shared"),
    [
        ("shuffled_examples", 600, 1000, (0.5, 0.9)),
        ("tool_dialogues", 500, 1100, (0.5, 0.9)),
        ("retrieval", 600, 1100, (0.0, 0.1)),
        ("random_tokens", 1024, 1024, (0.0, 0.0)),
    ],
)
def test_lengths_and_sharing_with_a_real_tokenizer(
    name: str, shortest: int, longest: int, shared: tuple[float, float], real_tokenizer: Tokenizer
) -> None:
    requests = get_traffic(name).requests(real_tokenizer, 64)
    assert all(shortest <= len(request.prompt) <= longest for request in requests)
    assert shared[0] <= shared_blocks(requests[:24]) <= shared[1]


def test_packaged_novel_makes_four_long_documents_with_a_real_tokenizer(real_tokenizer: Tokenizer) -> None:
    requests = get_traffic("long_documents").requests(real_tokenizer, 4, continuation_tokens=64)
    assert {len(request.prompt) for request in requests} == {4096}
