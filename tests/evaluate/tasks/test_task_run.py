"""Decoding in a batch, choosing, scoring; and a real cache against the unfused model."""

import weakref

import pytest
import torch

from jointkv.errors import BadInput
from jointkv.evaluate.datasets import Loaded
from jointkv.evaluate.holding.work import Work
from jointkv.evaluate.methods.fused import Fused
from jointkv.evaluate.methods.unfused import Unfused
from jointkv.evaluate.score.bootstrap import Interval
from jointkv.evaluate.tasks import get_task, gsm8k, task_names
from jointkv.evaluate.tasks.base import Task, answer_tokens, cut_prompt, draw, whole_prompt
from jointkv.evaluate.tasks.result import TaskRow
from jointkv.evaluate.tasks.run import answer, run_task
from jointkv.hf.models import load_model
from jointkv.policy import FusionPolicy
from tests.evaluate.tasks.toy_tasks import LOADED, VOCABULARY, Characters, Chat, Script, Words, example, tiny_model

ENDS = frozenset({ord("|")})


class Toy(Task):
    """Scores 1 for the letter x in an answer, or for choice 1."""

    name, description, metric = "toy", "toy", "presence"

    def __init__(self, **fields):
        self.fields = fields

    def examples(self, tokenizer, count, seed=0, *, max_tokens=None):
        self.max_tokens = max_tokens
        return [example(**self.fields) for _ in range(count)]

    def score(self, given, example):
        return float(given == 1 if isinstance(given, int) else "x" in given)


def answers(script, *examples):
    held = script.compress(type("Requests", (), {"requests": examples}), 1.0)
    return answer(held, examples, Characters(), ENDS)


def test_rows_end_by_end_token_stop_text_and_length():
    script = Script("yes|ignored", "one\n\ntwo", "longer than allowed")
    limits = {"max_new_tokens": 8, "stop": ("\n\n", "Q:")}
    assert answers(script, *[example(**limits) for _ in range(3)]) == ["yes", "one", "longer t"]


def test_decoding_stops_when_the_last_row_has_ended_and_feeds_what_it_wrote():
    script = Script("ab|", "c|")
    answers(script, example("xy", max_new_tokens=50), example("z", max_new_tokens=50))
    # The last prompt token first, then what was written; a row that has ended is fed its last token again.
    assert script.fed == [[ord("y"), ord("z")], [ord("a"), ord("c")], [ord("b"), ord("|")]]


def test_a_stop_text_ends_decoding_and_the_earliest_in_one_token_counts():
    class LongToken(Characters):
        def decode(self, token_ids, **options):
            return super().decode(token_ids, **options).replace("@", "a.b!c")

    script = Script("@xyz")
    held = script.compress(type("Requests", (), {"requests": [0]}), 1.0)
    asked = [example(max_new_tokens=5, stop=("!c", "."))]
    assert answer(held, asked, LongToken(), ENDS) == ["a"] and len(script.fed) == 1


def chosen(script, *choices):
    task = Toy(choices=tuple(tuple(map(ord, choice)) for choice in choices))
    rows = len(script.texts)
    return run_task(task, script, 1.0, tiny_model(), Characters(), count=rows, batch_size=rows)


def test_a_choice_is_the_likeliest_among_the_choices_only():
    script = Script("d", "b")
    assert chosen(script, "a", "b", "d").answers == (2, 1)
    assert len(script.fed) == 1
    assert chosen(Script("z"), "a", "b").answers == (0,)


def test_a_long_choice_is_as_likely_as_its_tokens_are_on_average():
    script = Script("bc|", "bd|")
    found = chosen(script, "a", "bc", "bdd").likelihoods
    (likely, other), total = torch.tensor([1.0, 0.0]), torch.tensor([1.0, *(0.0,) * (VOCABULARY - 1)]).logsumexp(0)
    means = [(other, likely, (likely + 2 * other) / 3), (other, (likely + other) / 2, (2 * likely + other) / 3)]
    assert found == tuple(pytest.approx([float(mean - total) for mean in row]) for row in means)
    # The prompt's last token, then what each of the longer choices begins with.
    assert script.fed == [[ord(token)] * 2 for token in "bbbd"]


def test_choices_leave_what_is_written_as_it_is():
    task = Toy(choices=((ord("a"),), tuple(map(ord, "xyz"))), max_new_tokens=3)
    found = run_task(task, Script("xx|", "ab|"), 1.0, tiny_model(), Characters(), count=2, batch_size=2)
    assert found.answers == ("xx", "ab") and found.scores == (1.0, 0.0) and found.margins[0] > 0 > found.margins[1]


@pytest.mark.parametrize("kinds", [({"choices": ((1,), (2,))}, {}), ({"choices": ((1,),)}, {"max_new_tokens": 3})])
def test_a_batch_of_both_kinds_is_refused(kinds):
    class Mixed(Toy):
        def examples(self, tokenizer, count, seed=0, *, max_tokens=None):
            return [example(**fields) for fields in kinds]

    with pytest.raises(BadInput, match="all be written or none"):
        run_task(Mixed(), Script("d", "b"), 1.0, tiny_model(), Characters(), count=2, batch_size=2)


def test_a_result_has_scores_by_request_and_bytes_of_all_batches():
    script, model = Script("x|", "y|"), tiny_model(context=40)
    task = Toy(prompt="abcde", max_new_tokens=3)
    result = run_task(task, script, 1.0, model, Characters(), count=5, batch_size=2, max_tokens=100)
    assert result.scores == (1.0, 0.0, 1.0, 0.0, 1.0) and result.mean == pytest.approx(0.6)
    assert result.answers == ("x", "y", "x", "y", "x") and script.batches == [2, 2, 1]
    # Two layers, one head of size 8, K and V in float32, four prefilled tokens in five requests.
    assert result.nbytes == 30 and result.unfused_nbytes == 2 * 8 * 2 * 4 * 4 * 5 and result.counted == "predicted"
    assert result.share == result.share_16bit == 30 / result.unfused_nbytes
    assert (result.source, result.stand_in) == ("written here", False)
    assert task.max_tokens == 40, "the model's context is the smaller limit"


def test_choices_are_compared_by_margins_and_orders():
    """Of `abd` the second is right: unfused it leads by one, then the first one does in every second example."""
    task = Toy(choices=tuple((ord(letter),) for letter in "abd"))
    right, mixed = (
        run_task(task, Script(*texts), 1.0, tiny_model(), Characters(), count=4, batch_size=2)
        for texts in (("b", "b"), ("b", "a"))
    )
    assert right.margins == (1.0,) * 4 and mixed.margins == (1.0, -1.0, 1.0, -1.0) and len(right.likelihoods[0]) == 3
    found = mixed.beside(right)
    assert found.difference.mean == -0.5 and found.margin_difference.mean == -1.0
    assert found.flipped_orders.mean == 0.5 and found.flipped_pairs.mean == pytest.approx(1 / 6)
    same = right.beside(right)
    assert same.flipped_orders == Interval(0.0, 0.0, 0.0) == same.margin_difference
    written = run_task(Toy(max_new_tokens=1), Script("x"), 1.0, tiny_model(), Characters(), count=2, batch_size=1)
    assert written.margins == written.likelihoods == () and written.beside(written).flipped_orders is None


def test_packed_bytes_weigh_more_at_16_bits():
    class HalfPacked(Script):
        def compress(self, batch, level):
            held = super().compress(batch, level)
            held.nbytes_packed = 5
            return held

    result = run_task(Toy(max_new_tokens=1), HalfPacked("x"), 1.0, tiny_model(), Characters(), count=2, batch_size=1)
    assert result.share_16bit == pytest.approx((10 + 10 / 2) / (result.unfused_nbytes / 2))


def test_what_prefills_computed_is_that_of_all_batches():
    class Skips(Script):
        def compress(self, batch, level):
            held = super().compress(batch, level)
            held.work = Work(10, 0, 4 * self.batches[-1], 6, 10, 0, 0)
            return held

    task, options = Toy(max_new_tokens=1), {"count": 3, "batch_size": 2}
    result = run_task(task, Skips("x"), 1.0, tiny_model(), Characters(), **options)
    assert result.work.skipped_share == 12 / 20 and result.work.computed_share == 0.6
    assert result.work.missed_share is None
    assert run_task(task, Script("x"), 1.0, tiny_model(), Characters(), **options).work is None


def test_one_batch_is_held_at_a_time():
    alive = weakref.WeakSet()

    class Watched(Unfused):
        def compress(self, batch, level):
            assert not alive
            held = super().compress(batch, level)
            alive.update([held, *batch.dense])
            return held

    task = Toy(prompt="abcde", max_new_tokens=3)
    result = run_task(task, Watched(), 1.0, tiny_model(), Characters(), count=3, batch_size=1)
    assert len(result.scores) == 3


def test_the_prefill_is_not_kept_beside_what_is_held_of_it():
    class Copied(Script):
        kept: list

        def compress(self, batch, level):
            self.prefill = weakref.ref(batch.dense[0])
            held = super().compress(batch, level)
            held.feed, feed = lambda tokens: (self.kept.append(self.prefill()), feed(tokens))[1], held.feed
            return held

    script = Copied("xx|")
    script.kept = []
    task = Toy(prompt="abcde", max_new_tokens=3)
    run_task(task, script, 1.0, tiny_model(), Characters(), count=1, batch_size=1)
    assert script.kept == [None] * 3


def test_a_stand_in_shows():
    stand_in = Loaded("toy", "another", True, LOADED.rows)
    task = Toy(loaded_from=stand_in, max_new_tokens=1)
    result = run_task(task, Script("x"), 1.0, tiny_model(), Characters(), count=1, batch_size=1)
    assert result.stand_in and result.source == "another"


@pytest.mark.parametrize("batch_size", [0, -1])
def test_a_batch_size_below_one_is_refused(batch_size):
    with pytest.raises(BadInput, match="batch_size must be at least 1"):
        run_task(Toy(), Script("x"), 1.0, tiny_model(), Characters(), count=1, batch_size=batch_size)


def run_gsm8k(method, batch_size) -> TaskRow:
    return run_task(get_task("gsm8k"), method, method.levels[0], tiny_model(), Words(), count=4, batch_size=batch_size)


def test_fusion_of_equal_blocks_answers_as_the_unfused_model_in_less_memory(monkeypatch):
    equal = FusionPolicy(max_relative_error=1e-5, max_token_error=1e-5)  # up to rounding, which may differ by row
    monkeypatch.setattr(gsm8k, "MAX_NEW_TOKENS", 24)
    unfused = run_gsm8k(Unfused(), 4)
    fused = run_gsm8k(Fused("equal", equal), 4)
    assert fused.answers == unfused.answers and len(set(unfused.answers)) > 1
    # The four worked examples are held once, and whole blocks only are shared.
    assert fused.nbytes < 0.6 * unfused.nbytes and fused.unfused_nbytes == unfused.unfused_nbytes == unfused.nbytes
    alone = run_gsm8k(Fused("equal", equal), 1)
    assert alone.answers == unfused.answers and alone.nbytes >= unfused.nbytes, "only a batch shares"


def test_more_examples_begin_with_the_fewer():
    rows = LOADED.rows * 1 + tuple(range(20))
    assert draw(Toy(), rows, 9, seed=1)[:4] == draw(Toy(), rows, 4, seed=1) != draw(Toy(), rows, 4, seed=2)
    with pytest.raises(BadInput, match="'toy' has 21 examples, 22 requested"):
        draw(Toy(), rows, 22, seed=0)
    with pytest.raises(BadInput, match="count must be at least 1"):
        draw(Toy(), rows, 0, seed=0)


def test_a_long_prompt_is_refused_or_loses_its_middle():
    assert whole_prompt(Toy(), Characters(), "abcdef", 4, 10).text == "abcdef"
    with pytest.raises(BadInput, match="6 tokens and 5 new ones are more than the 10"):
        whole_prompt(Toy(), Characters(), "abcdef", 5, 10)
    assert cut_prompt(Toy(), Characters(), "abcdef", 4, 10).text == "abcdef"
    cut = cut_prompt(Toy(), Characters(), "abcdefghij", 5, 10)
    assert cut.text == "abij" and cut.prompt == tuple(map(ord, "abij"))
    assert cut_prompt(Toy(), Characters(), "abcdefghij", 5, None).text == "abcdefghij"
    with pytest.raises(BadInput, match="no room for a prompt"):
        cut_prompt(Toy(), Characters(), "abcdef", 9, 10)


def test_a_chat_prompt_is_a_users_message_and_its_middle_is_cut():
    asked = whole_prompt(Toy(), Chat(), "abcdef", 4, 13, chat=True)
    assert asked.text == "<abcdef>" and asked.prompt == tuple(map(ord, "<abcdef>"))
    with pytest.raises(BadInput, match="8 tokens and 6 new ones"):
        whole_prompt(Toy(), Chat(), "abcdef", 6, 13, chat=True)
    assert cut_prompt(Toy(), Chat(), "abcdef", 4, 10, chat=True).text == "<abef>"
    for tokenizer, chat in ((Chat(), False), (Characters(), True)):
        assert cut_prompt(Toy(), tokenizer, "abcdef", 4, 10, chat=chat).text == "abcdef"


def test_an_answer_after_a_prompt():
    asked = whole_prompt(Toy(), Chat(), "ab", 0, None, chat=True)
    assert answer_tokens(Chat(), asked, "cd") == tuple(map(ord, "cd"))
    bare = whole_prompt(Toy(), Words(), "ab", 0, None)
    assert answer_tokens(Words(), bare, " cd") == (Words().token("cd"),)
    for joined in ("cd", "", " "):
        with pytest.raises(BadInput, match="no tokens of their own"):
            answer_tokens(Words(), bare, joined)


def test_tasks_are_found_by_name():
    assert len(set(task_names())) == len(task_names())
    assert all(get_task(name).name == name for name in task_names())
    assert get_task("longbench-repobench-p").metric == "edit similarity"
    with pytest.raises(BadInput, match="unknown task 'chess'; known: gsm8k, "):
        get_task("chess")


@pytest.mark.real_model
@pytest.mark.slow
@pytest.mark.parametrize("new_tokens", [16, gsm8k.MAX_NEW_TOKENS])
def test_the_safe_policy_answers_as_the_real_model_in_less_memory(new_tokens, monkeypatch):
    monkeypatch.setattr(gsm8k, "MAX_NEW_TOKENS", new_tokens)
    model, tokenizer = load_model("smollm2", dtype="float32")
    methods = (Unfused(), Fused("safe", FusionPolicy.preset("safe")))
    unfused, safe = (
        run_task(gsm8k.Gsm8k(2), method, method.levels[0], model, tokenizer, count=3, batch_size=3, max_tokens=900)
        for method in methods
    )
    assert safe.answers == unfused.answers and safe.unfused_nbytes > 1.5 * safe.nbytes
