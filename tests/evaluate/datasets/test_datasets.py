"""Data sets come from the hub or from named stand-ins, and every faulty row is named by file and line."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jointkv.errors import BadInput
from jointkv.evaluate.datasets import (
    LONGBENCH_PROMPTS,
    ChoiceRow,
    DialogueRow,
    LongBench,
    Mmlu,
    QuestionRow,
    Row,
    Turn,
    dataset_names,
    get_dataset,
)

TEST_CSV = '"Which, then?",no,"yes, this",maybe,never,B\nSecond?,1,2,3,4,D\n'


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty data folder, on a machine without the library `datasets`."""
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("JOINTKV_DATA_DIR", str(tmp_path))
    return tmp_path


class FakeHub:
    """Stands for `datasets` and `huggingface_hub`: gives the same records for every data set, and notes the calls."""

    def __init__(self, records: list[dict[str, Any]], error: Exception | None = None) -> None:
        self.records, self.error = records, error
        self.probed: list[tuple[str, float]] = []
        self.loaded: list[dict[str, Any]] = []

    def dataset_info(self, repository: str, *, timeout: float) -> None:
        self.probed.append((repository, timeout))
        if self.error is not None:
            raise self.error

    def load_dataset(self, repository: str, config: str | None = None, **options: Any) -> list[dict[str, Any]]:
        self.loaded.append({"repository": repository, "config": config, **options})
        return self.records


@pytest.fixture
def install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[FakeHub], FakeHub]:
    def replace(hub: FakeHub) -> FakeHub:
        monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=hub.load_dataset))
        client = SimpleNamespace(HfApi=lambda: SimpleNamespace(dataset_info=hub.dataset_info))
        monkeypatch.setitem(sys.modules, "huggingface_hub", client)
        return hub

    return replace


def write(path: Path, *rows: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_names() -> None:
    names = dataset_names()
    assert {"HelpSteer", "Synthetic Therapy Conversations", "OpenMathInstruct-2", "GSM8K", "MMLU"} <= set(names)
    assert {"MMLU formal_logic", "LongBench qmsum", "LongBench repobench-p", "RULER niah_multikey_3"} <= set(names)
    assert [get_dataset(name).name for name in names] == list(names)
    assert get_dataset("longbench-repobench_P") is get_dataset("LongBench repobench-p")
    with pytest.raises(BadInput, match=r"unknown data set 'GSM9K'; did you mean 'GSM8K'\? Known: HelpSteer, "):
        get_dataset("GSM9K")


@pytest.mark.parametrize(
    ("name", "file", "record", "source", "row"),
    [
        (
            "HelpSteer",
            "helpful/ultrafeedback_test150.jsonl",
            {"chosen": [{"content": "Hi", "role": "user"}, {"content": "Hello", "role": "assistant"}]},
            "local stand-in: UltraFeedback test_prefs, 150 rows (for HelpSteer)",
            DialogueRow("Hi", ("Hello",)),
        ),
        (
            "Synthetic Therapy Conversations",
            "chat/counselling_bench_question.jsonl",
            {"turns": ["I am sad."]},
            "local stand-in: counselling_bench questions, 229 without replies (for Synthetic Therapy Conversations)",
            DialogueRow("I am sad.", ()),
        ),
        (
            "OpenMathInstruct-2",
            "gsm8k/test.jsonl",
            {"question": "1+1?", "answer": "Two.\n#### 2"},
            "local stand-in: GSM8K test (for OpenMathInstruct-2)",
            QuestionRow("1+1?", ("Two.\n#### 2",), "2"),
        ),
        (
            "GSM8K",
            "gsm8k/test.jsonl",
            {"question": "900+100?", "answer": "#### 1,000"},
            "local copy: GSM8K test",
            QuestionRow("900+100?", ("#### 1,000",), "1000"),
        ),
        (
            "LongBench qmsum",
            "longbench/qmsum.jsonl",
            {"prompt": "Read.", "answers": ["a", "b"]},
            "local copy: the rows of LongBench qmsum that MiniLongBench keeps",
            Row("Read.", ("a", "b")),
        ),
        (
            "RULER niah_multikey_3",
            "ruler/niah_multikey_3_4k.jsonl",
            {"input": "It is", "outputs": ["17"]},
            "local copy: RULER niah_multikey_3 of 4096 tokens, 50 rows",
            Row("It is", ("17",)),
        ),
    ],
)
def test_local_rows_and_their_source(
    folder: Path, name: str, file: str, record: dict[str, object], source: str, row: Row
) -> None:
    write(folder / file, record, record, record)
    loaded = get_dataset(name).load()
    assert (loaded.name, loaded.source) == (name, source)
    assert loaded.stand_in == ("stand-in" in source)
    assert loaded.rows == (row, row, row)
    assert len(get_dataset(name).load(2).rows) == 2
    for field in record:
        write(folder / file, record, {key: value for key, value in record.items() if key != field})
        with pytest.raises(BadInput, match=rf"\.jsonl:2: {field}: Field required"):
            get_dataset(name).load()


@pytest.mark.parametrize(
    ("name", "file", "record", "reason"),
    [
        (
            "HelpSteer",
            "helpful/ultrafeedback_test150.jsonl",
            {"chosen": [{"content": "a"}]},
            "chosen: List should",
        ),
        ("HelpSteer", "helpful/ultrafeedback_test150.jsonl", {"chosen": {}}, "chosen: Input should be a valid list"),
        ("GSM8K", "gsm8k/test.jsonl", {"question": "a", "answer": "b"}, "'answer' does not end in '#### <result>'"),
        ("GSM8K", "gsm8k/test.jsonl", {"question": 3, "answer": "#### 1"}, "question: Input should be a valid string"),
        (
            "LongBench lcc",
            "longbench/lcc.jsonl",
            {"prompt": "a", "answers": []},
            "answers: Tuple should have",
        ),
        (
            "LongBench lcc",
            "longbench/lcc.jsonl",
            {"prompt": "a", "answers": ["a", 1]},
            "answers.1: Input should be a valid string",
        ),
        (
            "RULER niah_multikey_3",
            "ruler/niah_multikey_3_4k.jsonl",
            {"input": " ", "outputs": ["1"]},
            "input: is empty",
        ),
    ],
)
def test_malformed_rows_are_named(folder: Path, name: str, file: str, record: dict[str, object], reason: str) -> None:
    write(folder / file, record)
    with pytest.raises(BadInput, match=rf"\.jsonl:1: {reason}"):
        get_dataset(name).load()


def test_mmlu_from_csv(folder: Path) -> None:
    test = folder / "mmlu" / "test"
    test.mkdir(parents=True)
    for subject in ("formal_logic", "anatomy"):
        (test / f"{subject}_test.csv").write_text(TEST_CSV, encoding="utf-8")
    first, second = get_dataset("mmlu-formal-logic").load().rows
    assert isinstance(second, ChoiceRow)
    assert first == ChoiceRow("Which, then?", ("B",), ("no", "yes, this", "maybe", "never"), 1, "formal_logic")
    assert first.text == "Which, then?\nA. no\nB. yes, this\nC. maybe\nD. never\nAnswer:"
    assert (second.correct, second.answers) == (3, ("D",))
    every = get_dataset("MMLU").load()
    assert [row.subject for row in every.rows if isinstance(row, ChoiceRow)] == [
        "anatomy",
        "anatomy",
        "formal_logic",
        "formal_logic",
    ]
    assert every.source == "local copy: MMLU test, the subjects in the folder"
    assert not every.stand_in
    with pytest.raises(BadInput, match=r"mmlu/dev/anatomy_dev\.csv does not exist"):
        Mmlu("anatomy", split="dev").load()


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("a,b,c", "six columns expected .*, found 3"),
        (" ,1,2,3,4,A", "the question is empty"),
        ("a,1,2,3,4,E", "the answer must be A, B, C or D, found 'E'"),
        ("a,1,2,3,4,", "the answer must be A, B, C or D, found ''"),
    ],
)
def test_faults_in_csv_are_named_by_line(folder: Path, line: str, reason: str) -> None:
    path = folder / "mmlu" / "test" / "formal_logic_test.csv"
    path.parent.mkdir(parents=True)
    path.write_text(f"{TEST_CSV}{line}\n", encoding="utf-8")
    with pytest.raises(BadInput, match=rf"formal_logic_test\.csv:3: {reason}"):
        get_dataset("MMLU formal_logic").load()


def test_nothing_local_says_what_to_do(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remedy = r"install 'jointkv\[eval\]' .*, or set JOINTKV_DATA_DIR to a folder with helpful/ultrafeedback"
    with pytest.raises(BadInput, match=rf"'HelpSteer': the package 'datasets' .*\.jsonl does not exist; {remedy}"):
        get_dataset("HelpSteer").load()
    monkeypatch.delenv("JOINTKV_DATA_DIR")
    with pytest.raises(BadInput, match=rf"JOINTKV_DATA_DIR is not set; {remedy}"):
        get_dataset("HelpSteer").load()
    with pytest.raises(BadInput, match="count must be at least 1"):
        get_dataset("HelpSteer").load(0)


def test_gsm8k_is_packaged(folder: Path) -> None:
    loaded = get_dataset("GSM8K").load()
    assert loaded.source == "packaged copy: the first 300 rows of GSM8K test"
    assert (len(loaded.rows), loaded.stand_in) == (300, False)
    assert get_dataset("OpenMathInstruct-2").load(5).stand_in


HUB_RECORDS = [
    ("HelpSteer", {"prompt": "Hi", "response": "Hello"}, DialogueRow("Hi", ("Hello",))),
    ("GSM8K", {"question": "1?", "answer": "#### 1"}, QuestionRow("1?", ("#### 1",), "1")),
    (
        "OpenMathInstruct-2",
        {"problem": "1?", "generated_solution": "One.", "expected_answer": "1"},
        QuestionRow("1?", ("One.",), "1"),
    ),
    (
        "MMLU formal_logic",
        {"question": "q", "subject": "formal_logic", "choices": ["a", "b", "c", "d"], "answer": 2},
        ChoiceRow("q", ("C",), ("a", "b", "c", "d"), 2, "formal_logic"),
    ),
    (
        "Synthetic Therapy Conversations",
        {
            "conversations": [
                {"from": "gpt", "value": "Hello"},
                {"from": "human", "value": "I am sad"},
                {"from": "gpt", "value": "Why?"},
                {"from": "human", "value": "Bye"},
            ]
        },
        DialogueRow("I am sad", ("Why?",), (Turn("Assistant", "Hello"),)),
    ),
    (
        "LongBench repobench-p",
        {"context": "import a\n", "input": "b = {}\n", "answers": ["c"]},
        Row("Please complete the code given below. \nimport a\nb = {}\nNext line of code:\n", ("c",)),
    ),
    (
        "RULER niah_multikey_3",
        {"task": "niah_multikey_3", "context": "x ", "question": "y ", "answer_prefix": "z ", "answer": ["7"]},
        Row("x y z", ("7",)),
    ),
]


@pytest.mark.parametrize(("name", "record", "row"), HUB_RECORDS)
def test_hub_rows(install: Callable[[FakeHub], FakeHub], name: str, record: dict[str, Any], row: Row) -> None:
    hub = install(FakeHub([record] * 5))
    loaded = get_dataset(name).load(3)
    assert loaded.rows == (row,) * 3
    assert (loaded.stand_in, loaded.source) == (False, f"hub: {get_dataset(name).hub}")
    assert hub.probed[0][1] <= 10
    assert hub.loaded[0]["streaming"]
    assert len(get_dataset(name).load().rows) == 5
    assert not hub.loaded[1]["streaming"]
    for field in {*record} - {"task"}:
        install(FakeHub([record, {key: value for key, value in record.items() if key != field}]))
        with pytest.raises(BadInput, match=rf"row 1: {field}: Field required"):
            get_dataset(name).load()


def test_hub_is_asked_for_the_right_part(install: Callable[[FakeHub], FakeHub]) -> None:
    hub = install(FakeHub([]))
    for name in ("GSM8K", "RULER niah_multikey_3", "LongBench lcc"):
        get_dataset(name).load()
    gsm8k, ruler, lcc = hub.loaded
    assert (gsm8k["repository"], gsm8k["config"], gsm8k["split"]) == ("openai/gsm8k", "main", "test")
    assert (ruler["repository"], ruler["data_dir"]) == ("simonjegou/ruler", "4096")
    assert (lcc["repository"], lcc["data_files"]) == (
        "json",
        "zip://data/lcc.jsonl::hf://datasets/THUDM/LongBench/data.zip",
    )


def test_other_tasks_of_ruler_are_left_out(install: Callable[[FakeHub], FakeHub]) -> None:
    wanted = HUB_RECORDS[-1][1]
    install(FakeHub([{**wanted, "task": "vt"}, wanted, {**wanted, "task": "cwe"}, wanted]))
    assert len(get_dataset("RULER niah_multikey_3").load().rows) == 2
    assert len(get_dataset("RULER niah_multikey_3").load(2).rows) == 2


def test_unreachable_hub_gives_the_stand_in(install: Callable[[FakeHub], FakeHub]) -> None:
    hub = install(FakeHub([], error=OSError("no route to host\nand more")))
    assert get_dataset("OpenMathInstruct-2").load().stand_in
    assert not hub.loaded
    with pytest.raises(
        BadInput, match=r"the hub does not deliver nvidia/HelpSteer validation \(OSError: no route to host\)"
    ):
        get_dataset("HelpSteer").load()


def test_offline_uses_the_librarys_cache_and_never_asks_the_hub(
    install: Callable[[FakeHub], FakeHub], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hub = install(FakeHub([HUB_RECORDS[0][1]] * 3))
    assert len(get_dataset("HelpSteer").load(2).rows) == 2
    assert not hub.probed
    assert not hub.loaded[0]["streaming"]


def test_longbench_prompts_hold_context_and_refuse_unknown_tasks() -> None:
    assert all("{context}" in prompt for prompt in LONGBENCH_PROMPTS.values())
    with pytest.raises(BadInput, match="unknown LongBench task 'trec'; known: qmsum, lcc"):
        LongBench("trec")
    with pytest.raises(BadInput, match="MMLU has the splits dev and test here, not 'train'"):
        Mmlu("anatomy", "train")
