"""Tasks with known answers to score a method by, by name."""

from jointkv.evaluate.named import find
from jointkv.evaluate.tasks.base import Example, Task
from jointkv.evaluate.tasks.gsm8k import Gsm8k
from jointkv.evaluate.tasks.longbench import LONGBENCH
from jointkv.evaluate.tasks.mmlu import PAPER_SUBJECTS, Mmlu
from jointkv.evaluate.tasks.multi_hop import MultiHop
from jointkv.evaluate.tasks.ruler import Ruler

__all__ = ["Example", "Task", "get_task", "task_names"]

_TASKS: tuple[Task, ...] = (
    Gsm8k(),
    Gsm8k(strict=True),
    Mmlu(),
    *(Mmlu((subject,)) for subject in PAPER_SUBJECTS),
    *LONGBENCH,
    MultiHop(),
    Ruler(),
)


def task_names() -> tuple[str, ...]:
    """The names that `get_task` knows, in the order of reports."""
    return tuple(task.name for task in _TASKS)


def get_task(name: str) -> Task:
    """The task called `name`. Raises `BadInput` for an unknown name."""
    return find("task", _TASKS, name)
