"""What each task asks, and how it scores answers."""

import pytest

from jointkv.errors import BadInput
from jointkv.evaluate.datasets import LONGBENCH_PROMPTS
from jointkv.evaluate.datasets.long_context import PASSAGES_INSTRUCTION
from jointkv.evaluate.methods.unfused import Unfused
from jointkv.evaluate.tasks import get_task
from jointkv.evaluate.tasks.gsm8k import Gsm8k, final_number
from jointkv.evaluate.tasks.longbench import LONGBENCH
from jointkv.evaluate.tasks.mmlu import Mmlu
from jointkv.evaluate.tasks.multi_hop import CHOICES, DATA, PASSAGES, QUESTIONS, WORDS
from jointkv.evaluate.tasks.run import run_task
from jointkv.hf.models import load_model
from tests.evaluate.tasks.toy_tasks import Characters, Chat, Words, example, write_jsonl


@pytest.mark.parametrize(
    ("text", "flexible", "strict"),
    [
        ("so 3 + 4 = 7.\n#### 7", "7", "7"),
        ("#### 1,234.00 dollars, or 9", "1234", "1234"),
        ("#### $-5", "-5", "-5"),
        ("#### 0.50", "0.50", "0.50"),
        ("It is 12, then 13.", "13", None),
        ("####", None, None),
        ("none", None, None),
    ],
)
def test_the_final_number(text, flexible, strict):
    assert (final_number(text), final_number(text, strict=True)) == (flexible, strict)


def test_gsm8k_asks_unseen_questions_after_its_worked_examples():
    asked = get_task("gsm8k").examples(Characters(), 5, seed=3)
    texts = [one.request.text for one in asked]
    assert len(set(texts)) == 5 and all(text.count("Question:") == 5 for text in texts)
    shown = {part for part in texts[0].split("\n\n")[:4]}
    assert all(text.split("\n\n")[:4] == texts[0].split("\n\n")[:4] for text in texts)
    assert not any(text.split("Question:")[-1].strip() in part for text in texts for part in shown)
    assert all(text.endswith("\nAnswer:") for text in texts)
    assert asked[0].loaded_from.source == "packaged copy: the first 300 rows of GSM8K test"
    with pytest.raises(BadInput, match="has 296 examples, 297 requested"):
        get_task("gsm8k").examples(Characters(), 297)


def test_gsm8k_shots():
    (none,) = Gsm8k(0).examples(Characters(), 1)
    assert none.request.text.count("Question:") == 1
    with pytest.raises(BadInput, match="shots must be 0 to 4, got 5"):
        Gsm8k(5)


def test_gsm8k_scores_flexibly_or_strictly():
    one = example(references=("7",))
    flexible, strict = get_task("gsm8k"), get_task("gsm8k_strict")
    assert (flexible.score("it is 7", one), strict.score("it is 7", one)) == (1.0, 0.0)
    assert (flexible.score("7 #### 8", one), strict.score("#### 7.0", one)) == (0.0, 1.0)
    assert flexible.score("", one) == 0.0


def write_mmlu(data_dir, subject, rows=6):
    for split in ("dev", "test"):
        path = data_dir / "mmlu" / split / f"{subject}_{split}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{split} question {i} of {subject},w{i},x,y,z,{'ABCD'[i % 4]}\n" for i in range(rows)))


def test_mmlu_asks_every_subject_after_five_of_its_solved_questions(data_dir):
    for subject in ("first_topic", "second_topic"):
        write_mmlu(data_dir, subject)
    asked = Mmlu(("first_topic", "second_topic")).examples(Words(), 5)
    texts = [one.request.text for one in asked]
    assert [("first topic" in text, "second topic" in text) for text in texts] == [(True, False)] * 3 + [
        (False, True)
    ] * 2
    text = texts[0]
    assert text.startswith("The following are multiple choice questions (with answers) about first topic.\n\ndev ques")
    assert "\nA. w1\nB. x\nC. y\nD. z\nAnswer: B\n\n" in text and text.count("Answer: ") == 5
    assert "dev question 4" in text and "dev question 5" not in text and "test question" in text
    assert text.endswith("\nD. z\nAnswer:") and asked[0].choices == ((0,), (1,), (2,), (3,))
    right = "ABCD".index(asked[0].references[0])
    scores = [Mmlu().score(choice, asked[0]) for choice in range(4)]
    assert scores == [float(choice == right) for choice in range(4)]


def test_mmlu_with_fewer_questions_than_subjects(data_dir):
    for subject in ("one", "two"):
        write_mmlu(data_dir, subject)
    assert len(Mmlu(("one", "two")).examples(Words(), 1)) == 1
    with pytest.raises(BadInput, match="count must be at least 1"):
        Mmlu(("one", "two")).examples(Words(), 0)


def test_mmlu_refuses_a_tokenizer_without_letters(data_dir):
    write_mmlu(data_dir, "one")
    with pytest.raises(BadInput, match="no single token of ' A'"):
        Mmlu(("one",)).examples(Characters(), 1)


def test_longbench_cuts_prompts_in_the_middle_and_takes_the_best_reference(data_dir):
    row = {"prompt": "h" * 100 + "middle" + "t" * 100, "answers": ["x = 1", "y"]}
    write_jsonl(data_dir / "longbench" / "lcc.jsonl", [row])
    task = get_task("longbench_lcc")
    (one,) = task.examples(Characters(), 1, max_tokens=84)
    assert one.request.text == "h" * 10 + "t" * 10 and one.max_new_tokens == 64
    assert task.score("y\nx", one) == 1.0 and task.score("x = 2", one) == 0.8


def test_longbench_asks_questions_in_a_chat_and_sends_code_as_it_is(data_dir):
    bare = {"longbench_lcc", "longbench_repobench_p"}
    for task in LONGBENCH:
        row = {"prompt": "ab" * 9, "answers": ["x"]}
        write_jsonl(data_dir / "longbench" / f"{task.name.removeprefix('longbench_').replace('_p', '-p')}.jsonl", [row])
        (one,) = task.examples(Chat(), 1)
        assert one.request.text == ("ab" * 9 if task.name in bare else f"<{'ab' * 9}>")


def test_longbench_scores_by_data_set():
    pytest.importorskip("rouge")
    one = example(references=("a green tree", "b c"))
    assert get_task("longbench_hotpotqa").score("green tree", one) == 1.0
    assert get_task("longbench_qmsum").score("b c", one) == pytest.approx(1.0, abs=1e-6)


def write_questions(data_dir, data, count):
    rows = []
    for number in range(count):
        passages = [
            f"Other {number}\nnothing",
            f"{data} {number}\nbegins" + " on" * 99,
            f"Late {data}{number}\nis answer{number}",
        ]
        given = "".join(f"Passage {place}:\n{text}\n" for place, text in enumerate(passages, start=1)).strip()
        prompt = LONGBENCH_PROMPTS[data].format(context=given, input=f"What does {data} {number} say?")
        rows.append({"prompt": prompt, "answers": [f"answer{number}", "else"]})
    write_jsonl(data_dir / "longbench" / f"{data}.jsonl", rows)


def test_multi_hop_questions_have_their_passages_in_common_in_another_order(data_dir):
    for data in DATA:
        write_questions(data_dir, data, 5)
    task = get_task("multi_hop")
    asked = task.examples(Words(), 10, seed=1)
    parts = [one.request.text.split("\n\n") for one in asked]
    assert all(part[0] == part[-2] == PASSAGES_INSTRUCTION for part in parts)
    assert all(part[-1].startswith("Question: What does ") and part[-1].endswith("say?\nAnswer:") for part in parts)
    groups = [parts[:QUESTIONS], parts[QUESTIONS : 2 * QUESTIONS], parts[2 * QUESTIONS :]]
    assert [len(group) for group in groups] == [4, 4, 2]
    for group in groups:
        orders = [tuple(part[1:-2]) for part in group]
        assert len({frozenset(order) for order in orders}) == 1 and len(set(orders)) > 1
        assert len(orders[0]) == len(set(orders[0])) == PASSAGES * len(group)
        assert not any("nothing" in passage or "Passage" in passage for passage in orders[0])
        assert max(len(passage.split()) for passage in orders[0]) <= WORDS + 1
    assert len({part[-1] for part in parts}) == 10
    assert task.score("the else", asked[0]) == 1.0 and task.score("", asked[0]) == 0.0
    for one in asked:
        assert one.choices[0] == (Words().token(one.references[0]),) and len(set(one.choices)) == CHOICES
        assert not {(Words().token(each),) for each in one.references}.intersection(one.choices[1:])
        assert [task.score(choice, one) for choice in range(CHOICES)] == [1.0, 0.0, 0.0, 0.0]
    of_group = {one.choices[0] for one in asked[:QUESTIONS]}
    assert all(set(one.choices) == of_group for one in asked[:QUESTIONS]) or len(of_group) < QUESTIONS
    assert [one.request for one in task.examples(Words(), 10, seed=1)] == [one.request for one in asked]
    with pytest.raises(BadInput, match="has 10 examples, 11 requested"):
        task.examples(Words(), 11)


def test_ruler_counts_the_needles_that_an_answer_has(data_dir):
    write_jsonl(data_dir / "ruler" / "niah_multikey_3_4k.jsonl", [{"input": "find it", "outputs": ["AB-1", "CD-2"]}])
    task = get_task("ruler_needle")
    (one,) = task.examples(Characters(), 1)
    assert one.request.text == "find it" and one.max_new_tokens == 128
    assert [task.score(text, one) for text in ("it is ab-1 and cd-2.", " AB-1", "ab-2")] == [1.0, 0.5, 0.0]
    with pytest.raises(BadInput, match="7 tokens and 128 new ones are more than the 100"):
        task.examples(Characters(), 1, max_tokens=100)


@pytest.mark.real_model
def test_the_real_model_answers_questions_on_passages(data_dir):
    for data in DATA:
        write_questions(data_dir, data, 2)
    model, tokenizer = load_model("smollm2", dtype="float32")
    found = run_task(get_task("multi_hop"), Unfused(), 1.0, model, tokenizer, count=2, batch_size=2)
    assert all(answer.strip() for answer in found.answers) and max(found.scores) > 0 and len(found.margins) == 2
