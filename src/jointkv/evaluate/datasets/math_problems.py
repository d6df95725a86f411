"""Grade-school and competition mathematics with worked answers: GSM8K and OpenMathInstruct-2."""

from jointkv.errors import BadInput
from jointkv.evaluate.datasets.base import Dataset, Local
from jointkv.evaluate.datasets.hub import Hub
from jointkv.evaluate.datasets.rows import QuestionRow, Record
from jointkv.evaluate.jsonl import Text


class _Problem(Record):
    question: Text
    answer: Text

    def row(self) -> QuestionRow:
        _, mark, final = self.answer.rpartition("#### ")
        if not mark:
            raise BadInput("'answer' does not end in '#### <result>'")
        return QuestionRow(self.question, (self.answer,), final.strip().replace(",", ""))


class Gsm8k(Dataset):
    """Cobbe et al., arXiv 2110.14168; 1319 problems."""

    name = "GSM8K"
    hub = Hub("openai/gsm8k", "main")
    copy = Local("gsm8k/test.jsonl", "GSM8K test", "gsm8k_sample.jsonl", "the first 300 rows of GSM8K test")
    record = _Problem


class _Solution(Record):
    problem: Text
    generated_solution: Text
    expected_answer: Text

    def row(self) -> QuestionRow:
        return QuestionRow(self.problem, (self.generated_solution,), self.expected_answer)


class OpenMathInstruct(Dataset):
    """Toshniwal et al., arXiv 2410.01560; the part of one million, of which one should load a `count`."""

    name = "OpenMathInstruct-2"
    hub = Hub("nvidia/OpenMathInstruct-2", split="train_1M")
    stand_in = Gsm8k.copy
    record, local_record = _Solution, _Problem
