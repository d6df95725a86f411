"""Grade-school and competition mathematics with worked answers: GSM8K and OpenMathInstruct-2."""

from collections.abc import Mapping
from typing import Any

from jointkv.errors import BadInput
from jointkv.evaluate.datasets.base import Dataset, Local
from jointkv.evaluate.datasets.hub import Hub
from jointkv.evaluate.datasets.rows import QuestionRow, text_field

_GSM8K = Local("gsm8k/test.jsonl", "GSM8K test", "gsm8k_sample.jsonl", "the first 300 rows of GSM8K test")


def _gsm8k_row(record: Mapping[str, Any], where: str) -> QuestionRow:
    answer = text_field(record, "answer", where)
    _, mark, final = answer.rpartition("#### ")
    if not mark:
        raise BadInput(f"{where}: 'answer' does not end in '#### <result>'")
    return QuestionRow(text_field(record, "question", where), (answer,), final.strip().replace(",", ""))


class Gsm8k(Dataset):
    """Cobbe et al., arXiv 2110.14168; 1319 problems."""

    name = "GSM8K"
    hub = Hub("openai/gsm8k", "main")
    copy = _GSM8K

    def hub_row(self, record: Mapping[str, Any], where: str) -> QuestionRow:
        """Fields `question` and `answer`, the same on the hub and in the local file."""
        return _gsm8k_row(record, where)


class OpenMathInstruct(Dataset):
    """Toshniwal et al., arXiv 2410.01560; the part of one million, of which one should load a `count`."""

    name = "OpenMathInstruct-2"
    hub = Hub("nvidia/OpenMathInstruct-2", split="train_1M")
    stand_in = _GSM8K

    def hub_row(self, record: Mapping[str, Any], where: str) -> QuestionRow:
        """Fields `problem`, `generated_solution` and `expected_answer`."""
        fields = ("problem", "generated_solution", "expected_answer")
        problem, solution, final = (text_field(record, field, where) for field in fields)
        return QuestionRow(problem, (solution,), final)

    def local_row(self, record: Mapping[str, Any], where: str) -> QuestionRow:
        """A row of GSM8K."""
        return _gsm8k_row(record, where)
