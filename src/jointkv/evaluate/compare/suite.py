"""A whole evaluation: methods on the requests of several traffics at equal bytes, and task scores paired by request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from jointkv.errors import BadInput
from jointkv.evaluate.compare.comparison import Wanted, equal_bytes
from jointkv.evaluate.compare.other_environment import compare_methods
from jointkv.evaluate.compare.result import MethodRow
from jointkv.evaluate.holding.batch import Batch
from jointkv.evaluate.methods import get_method, method_names
from jointkv.evaluate.methods.base import Method
from jointkv.evaluate.methods.fused import Fused
from jointkv.evaluate.methods.reuse import Reuse
from jointkv.evaluate.progress import Report
from jointkv.evaluate.tasks import Task
from jointkv.evaluate.tasks.result import TaskRow
from jointkv.evaluate.tasks.run import run_task
from jointkv.evaluate.traffic.base import Request, Traffic
from jointkv.policy import FusionPolicy
from jointkv.policy.profile import Profile

REFERENCE_LEVEL = 0.2
"""The bound of the preset `safe`: other methods are asked for as many bytes as fusion takes there."""

NOTHING_SAVED = 0.95
"""Above this share of the bytes equal bytes compare nothing, and other methods run at their own levels."""


@dataclass(frozen=True)
class Choice:
    """What the user asked to compare: a method at one level, or at those that make sense beside fusion."""

    method: Method
    level: float | None = None


@dataclass(frozen=True)
class Suite:
    """A model and how it is evaluated.

    Attributes:
        folder: where the model's files are, for methods that run in another environment.
        worker_python: interpreter of that environment.
        generate: tokens generated greedily per request, for the common prefix of outputs.
        all_levels: methods that can be set to any size also run at their own levels.
        seed: of the examples of tasks.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    folder: Path
    worker_python: Path | None
    block_size: int = 16
    generate: int = 0
    all_levels: bool = False
    seed: int = 0

    def run_traffic(
        self, traffic: Traffic, requests: Sequence[Request], choices: Sequence[Choice], report: Report
    ) -> list[MethodRow]:
        """All `choices` on the same requests; those without a level at as many bytes as fusion takes, if they can."""
        batch = Batch(self.model, requests, self.block_size)
        scoped = [replace(choice, method=choice.method.in_scope(traffic.scope)) for choice in choices]
        first = [(choice.method, choice.level) for choice in scoped if choice.level is not None]
        free = [choice.method for choice in scoped if choice.level is None]
        share = self._fused_share(batch, traffic, scoped)
        wanted: list[Wanted] = list(first)
        if share < NOTHING_SAVED:
            wanted += equal_bytes(free, share)
        if share >= NOTHING_SAVED or self.all_levels:
            wanted += [(method, level) for method in free for level in method.levels]
        wanted = list(dict.fromkeys(wanted))
        return compare_methods(
            batch,
            wanted,
            model_folder=self.folder,
            worker_python=self.worker_python,
            traffic=traffic.name,
            generate=self.generate,
            progress=report,
        )

    def _fused_share(self, batch: Batch, traffic: Traffic, choices: Sequence[Choice]) -> float:
        """Share of the bytes that fusion takes, as first asked for or at its default bound; 1 if nobody needs it."""
        if all(choice.level is not None or choice.method.level_for_share(0.5) is None for choice in choices):
            return 1.0
        asked = [(each.method, each.level) for each in choices if isinstance(each.method, Fused) and each.level]
        method, level = asked[0] if asked else (get_method("fused").in_scope(traffic.scope), REFERENCE_LEVEL)
        return min(1.0, method.hold(batch, level).nbytes / batch.unfused_nbytes)

    def run_task(
        self, task: Task, wanted: Sequence[Wanted], count: int, batch_size: int, report: Report
    ) -> list[TaskRow]:
        """The task under the unfused model and under each of `wanted`."""
        rows: list[TaskRow] = []
        for method, level in [(get_method("unfused"), 1.0), *wanted]:
            report(f"{task.name}: {method.name} at {level:g}")
            result = run_task(
                *(task, method, level, self.model, self.tokenizer, count, batch_size),
                seed=self.seed,
                block_size=self.block_size,
            )
            rows.append(result.beside(rows[0]) if rows else result)
        return rows


def choices_of(methods: Sequence[str], policies: Sequence[str], profile: Profile | None) -> list[Choice]:
    """What the names on the command line stand for; everything that there is if none is given.

    Args:
        methods: `NAME` or `NAME@LEVEL`.
        policies: names of presets.
        profile: fusion under it, and reuse where it has audits of that.

    Raises:
        BadInput: unknown name or no number.
        InvalidPolicy: unknown preset.
    """
    chosen = [Choice(method, method.levels[0]) for method in map(_preset, policies)]
    if profile is not None:
        fitted: list[Method] = [Fused("profile", profile.policy(), follows_traffic=False)]
        fitted += [] if profile.reuse is None else [Reuse(profile)]
        chosen += [Choice(method, method.levels[0]) for method in fitted]
    chosen += [_method(text) for text in methods]
    return chosen or [Choice(get_method(name)) for name in method_names() if name != "unfused"]


def task_methods(choices: Sequence[Choice]) -> list[Wanted]:
    """What tasks run under: `choices` at their level, or at the first of their own; safe and paper if all were chosen.

    Raises:
        BadInput: a method needs packages that are not installed here; tasks run in this environment only.
    """
    if all(choice.level is None for choice in choices) and len(choices) == len(method_names()) - 1:
        choices = choices_of([], ["safe", "paper"], None)
    for choice in choices:
        missing = choice.method.missing_packages()
        if missing:
            raise BadInput(f"tasks cannot run under {choice.method.name} here: it needs {', '.join(missing)}")
    return [(each.method, each.method.levels[0] if each.level is None else each.level) for each in choices]


def _preset(name: str) -> Fused:
    return Fused(name, FusionPolicy.preset(name))


def _method(text: str) -> Choice:
    name, separator, number = text.partition("@")
    method = get_method(name)
    if not separator:
        return Choice(method)
    try:
        level = float(number)
    except ValueError:
        raise BadInput(f"--method {text}: expected NAME or NAME@LEVEL, with a number") from None
    method.check_level(level)
    return Choice(method, level)
