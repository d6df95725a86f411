"""The packaged sample of GSM8K test, the text behind every traffic here; licence in `data/SOURCES.md`."""

import json
from dataclasses import dataclass

from jointkv.evaluate.traffic.base import packaged


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
    with packaged("gsm8k_sample.jsonl").open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return tuple(Problem(row["question"], row["answer"]) for row in rows)
