"""The paper's data sets, and those of the tasks, by name; vLLM's random data is the traffic `random_tokens`."""

from jointkv.evaluate.datasets.base import Dataset, Loaded, Local
from jointkv.evaluate.datasets.dialogues import HelpSteer, SyntheticTherapy
from jointkv.evaluate.datasets.hub import Hub
from jointkv.evaluate.datasets.long_context import LONGBENCH_PROMPTS, LongBench, RulerNeedle
from jointkv.evaluate.datasets.math_problems import Gsm8k, OpenMathInstruct
from jointkv.evaluate.datasets.mmlu import Mmlu
from jointkv.evaluate.datasets.rows import ChoiceRow, DialogueRow, QuestionRow, Row, Turn
from jointkv.evaluate.named import find

__all__ = [
    "LONGBENCH_PROMPTS",
    "ChoiceRow",
    "Dataset",
    "DialogueRow",
    "Hub",
    "Loaded",
    "Local",
    "LongBench",
    "Mmlu",
    "QuestionRow",
    "Row",
    "Turn",
    "dataset_names",
    "get_dataset",
]

_DATASETS: tuple[Dataset, ...] = (
    HelpSteer(),
    SyntheticTherapy(),
    OpenMathInstruct(),
    Gsm8k(),
    Mmlu(),
    *(Mmlu(subject) for subject in ("conceptual_physics", "electrical_engineering", "formal_logic")),
    *(LongBench(task) for task in LONGBENCH_PROMPTS),
    RulerNeedle(),
)


def dataset_names() -> tuple[str, ...]:
    """The names that `get_dataset` knows, as the literature writes them."""
    return tuple(dataset.name for dataset in _DATASETS)


def get_dataset(name: str) -> Dataset:
    """The data set called `name`; case, blanks, `-` and `_` do not matter. Raises `BadInput` for an unknown name."""
    return find("data set", _DATASETS, name)
