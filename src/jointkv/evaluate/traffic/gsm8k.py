"""The packaged sample of GSM8K test, the text behind every traffic here; licence in `data/SOURCES.md`."""

from dataclasses import dataclass

from jointkv.evaluate.jsonl import read_records
from jointkv.evaluate.samples import packaged


@dataclass(frozen=True)
class Problem:
    """One grade-school problem and its worked answer, which ends in `#### <number>`."""

    question: str
    answer: str

    @property
    def worked(self) -> str:
        """Question and answer as one worked example."""
        return f"Question: {self.question}\nAnswer: {self.answer}"


def load_problems() -> tuple[Problem, ...]:
    """The sample's 300 problems, in the order of GSM8K test."""
    lines = read_records(packaged("gsm8k_sample.jsonl"))
    return tuple(Problem(line.fields["question"], line.fields["answer"]) for line in lines)
