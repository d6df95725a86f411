"""Grade-school and competition mathematics with worked answers: GSM8K and OpenMathInstruct-2."""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from jointkv.errors import BadInput
from jointkv.evaluate.datasets.base import Dataset, Local
from jointkv.evaluate.datasets.hub import Hub
from jointkv.evaluate.datasets.rows import QuestionRow
from jointkv.evaluate.jsonl import Text, validated


class _Problem(BaseModel):
    question: Text
    answer: Text


class _Solution(BaseModel):
    problem: Text
    generated_solution: Text
    expected_answer: Text


class Gsm8k(Dataset):
    """Cobbe et al., arXiv 2110.14168; 1319 problems."""

    name = "GSM8K"
    hub = Hub("openai/gsm8k", "main")
    copy = Local("gsm8k/test.jsonl", "GSM8K test", "gsm8k_sample.jsonl", "the first 300 rows of GSM8K test")

    def hub_row(self, record: Mapping[str, Any]) -> QuestionRow:
        """The same on the hub and in the local file."""
        found = validated(_Problem.model_validate, record)
        _, mark, final = found.answer.rpartition("#### ")
        if not mark:
            raise BadInput("'answer' does not end in '#### <result>'")
        return QuestionRow(found.question, (found.answer,), final.strip().replace(",", ""))


class OpenMathInstruct(Dataset):
    """Toshniwal et al., arXiv 2410.01560; the part of one million, of which one should load a `count`."""

    name = "OpenMathInstruct-2"
    hub = Hub("nvidia/OpenMathInstruct-2", split="train_1M")
    stand_in = Gsm8k.copy

    def hub_row(self, record: Mapping[str, Any]) -> QuestionRow:
        found = validated(_Solution.model_validate, record)
        return QuestionRow(found.problem, (found.generated_solution,), found.expected_answer)

    def local_row(self, record: Mapping[str, Any]) -> QuestionRow:
        """A row of GSM8K."""
        return Gsm8k().hub_row(record)
