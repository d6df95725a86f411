"""Calibration on a real model: measure half of the requests, choose thresholds, check them on the other half."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from jointkv.errors import BadInput, JointKVError, UnsupportedModel
from jointkv.evaluate.calibrate.audits import Audit
from jointkv.evaluate.calibrate.half import Half
from jointkv.evaluate.calibrate.settings import CalibrationSettings
from jointkv.evaluate.calibrate.store import Store, digest
from jointkv.evaluate.holding.batch import context_of
from jointkv.evaluate.holding.prefilled import Prefilled, join, prefill, take
from jointkv.evaluate.predict.block_pairs import Lines, lines_of, pair_error_matrices
from jointkv.evaluate.predict.prediction import predict_batch, predict_chunks
from jointkv.evaluate.progress import Progress, Silent
from jointkv.evaluate.traffic.base import Request
from jointkv.hf.identity import full_attention_layers
from jointkv.policy import LayerGroups
from jointkv.policy.identity import ModelIdentity
from jointkv.policy.profile import (
    DataIdentity,
    FrontierPoint,
    GroupThresholds,
    Measurement,
    Prediction,
    Profile,
    ReuseEvidence,
)
from jointkv.theory.calibrate import BOUNDS, Setting, acceptance_and_distortion, last_that_holds, settings_by_cost

MIN_HALF = 8
"""Requests in a half at the least: with fewer, the 95% interval of a mean is wider than the mean."""

PREFILL_ROWS = 8
REFERENCE_BOUND = 0.2


class TargetUnmet(JointKVError, RuntimeError):
    """No setting reaches the target. `frontier` has those that were considered."""

    def __init__(self, message: str, frontier: tuple[FrontierPoint, ...]) -> None:
        super().__init__(message)
        self.frontier = frontier


class Calibration:
    """One calibration. What takes long is kept in `work`, so that an interrupted one goes on where it was.

    Args:
        requests: at least twice `MIN_HALF`, each with the true tokens that follow its prompt.
        audits: further requests, of which reuse is audited as well as of the held-out half.
        work: a folder for results in between; None keeps none.

    Raises:
        BadInput: too few requests, or one that the model's context cannot hold.
        InvalidPolicy: layer groups or chunks that do not fit the model or the block size.
        UnsupportedModel: the model has layers without pages.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        requests: Sequence[Request],
        settings: CalibrationSettings,
        *,
        audits: Sequence[Request] = (),
        work: Path | None = None,
        progress: Progress | None = None,
    ) -> None:
        check_requests(requests, context_of(model), settings.block_size)
        if settings.scope == "both":
            raise BadInput("scope: calibrate batch and chunk one at a time")
        self.model, self.requests, self.settings = model, requests, settings
        self.progress = progress or Silent()
        self.audits = audits
        count = len(requests) // 2
        order = random.Random(settings.seed).sample(range(len(requests)), len(requests))
        self._rows = (sorted(order[:count]), sorted(order[count:]))
        layers = len(full_attention_layers(model))
        if layers < model.config.get_text_config(decoder=True).num_hidden_layers:
            raise UnsupportedModel("models with sliding-window layers cannot be calibrated yet; set the bounds by hand")
        groups = LayerGroups.of(settings.policy((REFERENCE_BOUND,) * settings.layer_groups), layers)
        self.layers = [range(group * groups.layers, (group + 1) * groups.layers) for group in range(groups.count)]
        self._store = Store(work, model, requests, settings)

    @cached_property
    def whole(self) -> Prefilled:
        """All requests, prefilled."""
        batches = []
        for start in range(0, len(self.requests), PREFILL_ROWS):
            part = self.requests[start : start + PREFILL_ROWS]
            make = partial(prefill, self.model, part, block_size=self.settings.block_size)
            batches.append(self._store.prefilled(part, make))
            self.progress.part((start + len(part)) / len(self.requests))
        return join(batches)

    @cached_property
    def halves(self) -> tuple[Half, Half]:
        """The half to choose on, and the one to check on."""
        first, second = (take(self.whole, rows) for rows in self._rows)
        del self.whole  # the halves are copies
        return (
            Half("calibrated", self.model, first, self.settings, len(second.requests), self._store),
            Half("held_out", self.model, second, self.settings, len(first.requests), self._store),
        )

    @cached_property
    def lines(self) -> Lines:
        """Blocks of the first half that may be compared."""
        chunk = self.settings.chunk_tokens if self.settings.scope == "chunk" else None
        return lines_of(self.halves[0].batch, chunk)

    @cached_property
    def errors(self) -> Tensor:
        """`[groups, P, N, N]`, see `pair_error_matrices`."""
        return pair_error_matrices(
            self.halves[0].batch,
            self.lines,
            self.layers,
            token_limit=self.settings.token_limit,
            aggregate=self.settings.across_layers,
            progress=self.progress.part,
        )

    def run(self, model: ModelIdentity, source: str, versions: dict[str, str]) -> Profile:
        """Measure, choose, check.

        Args:
            model, source, versions: what was calibrated, on which data and by what software, for the profile.

        Raises:
            TargetUnmet: no setting reaches the target.
        """
        self._steps()
        candidates = self._candidates()
        chosen = self._choose(candidates)
        predicted, equal_text = (self.predict(chosen, equal_text=only) for only in (False, True))
        self.progress.start("checking on the held-out half")
        calibrated, held_out = (half.measure(chosen) for half in self.halves)
        self.progress.start("auditing reuse")
        reuse = self._audit(chosen)
        return Profile(
            model=model,
            block_size=self.settings.block_size,
            scope=self.settings.scope,
            chunk_tokens=self.settings.chunk_tokens,
            across_layers=self.settings.across_layers,
            groups=tuple(self._thresholds(error, bound) for error, bound in zip(self.errors, chosen, strict=True)),
            target=self.settings.target,
            met=self._meets(held_out, chosen),
            predicted=predicted,
            predicted_equal_text=equal_text,
            calibrated=calibrated,
            held_out=held_out,
            frontier=self.frontier(candidates),
            data=self._data(source),
            versions=versions,
            reuse=reuse,
        )

    def clean(self) -> None:
        """Delete what was kept in between."""
        self._store.remove()

    def _steps(self) -> None:
        """The parts that take time, in order, each announced."""
        for description, part in (
            (f"prefill of {len(self.requests)} requests", "whole"),
            ("unfused reference", "halves"),
            ("comparing blocks", "errors"),
        ):
            self.progress.start(description)
            getattr(self, part)

    def _candidates(self) -> list[Setting]:
        """Settings to choose from; a relative error is its own setting."""
        if self.settings.target.kind == "relative_error":
            return [(self.settings.target.value,) * len(self.layers)]
        sensitivity = [1.0]
        if len(self.layers) > 1:
            self.progress.start("sensitivity of the layer groups")
            sensitivity = self._sensitivities()
        return settings_by_cost(self.errors, self.lines.valid, sensitivity)

    def _sensitivities(self) -> list[float]:
        """KL per unit of distortion of each layer group, fused alone at the first bound at which it costs anything.

        A group that never costs anything counts as much as the most sensitive one: nothing is known of it.
        """
        found = []
        for group, error in enumerate(self.errors):
            found.append(0.0)
            for bound in (bound for bound in BOUNDS if bound >= REFERENCE_BOUND):
                _, distortion = acceptance_and_distortion(error, self.lines.valid, bound)
                if distortion:
                    alone = tuple(bound if other == group else 0.0 for other in range(len(self.layers)))
                    found[-1] = self.halves[0].measure(alone).kl / distortion
                    break
            self.progress.part((group + 1) / len(self.layers))
        return [value or max(found) or 1.0 for value in found]

    def _choose(self, candidates: list[Setting]) -> Setting:
        target = self.settings.target
        self.progress.start(f"searching for {target.kind}={target.value:g}")
        chosen: Setting | None
        if target.kind == "kl":
            measure = self.halves[0].measure
            chosen = last_that_holds(candidates, lambda setting: measure(setting).kl_upper <= target.value)
        elif target.kind == "ratio":
            chosen = next((setting for setting in candidates if self.predict(setting).low >= target.value), None)
        else:
            chosen = candidates[0]
        if chosen is None:
            best = max(self.predict(setting).low for setting in candidates)
            raise TargetUnmet(
                f"{target.kind}={target.value:g} cannot be met here; the largest ratio to be relied on is {best:.2f}",
                self.frontier(candidates),
            )
        return chosen

    def _meets(self, held_out: Measurement, chosen: Setting) -> bool:
        target = self.settings.target
        if target.kind == "kl":
            return held_out.kl <= target.value
        if target.kind == "ratio":
            return held_out.ratio >= target.value
        return max(chosen) <= target.value

    def _thresholds(self, error: Tensor, bound: float) -> GroupThresholds:
        acceptance, distortion = acceptance_and_distortion(error, self.lines.valid, bound)
        return GroupThresholds(
            max_relative_error=bound,
            max_token_error=self.settings.token_bound(bound),
            acceptance=acceptance,
            distortion=distortion,
        )

    def _audit(self, chosen: Setting) -> ReuseEvidence | None:
        if self.settings.scope == "chunk" or len(chosen) > 1 or not all(chosen):
            return None
        first, second = ([self.requests[row] for row in rows] for rows in self._rows)
        settings = self.settings
        audit = Audit(self.model, settings.policy(chosen), settings.block_size, self.progress, settings.moved)
        return audit.evidence([*second, *self.audits], audit.rule(first))

    def predict(self, setting: Setting, *, equal_text: bool = False) -> Prediction:
        """Ratio expected of the held-out half."""
        predict = predict_chunks if self.settings.scope == "chunk" else predict_batch
        state = self.halves[0].batch.state
        blocks = int((state["table.0"] >= 0).sum())
        unfilled = (blocks - int(self.lines.valid.sum())) / len(self._rows[0])
        return predict(self.errors, self.lines, setting, len(self._rows[1]), unfilled, equal_text=equal_text)

    def frontier(self, candidates: Sequence[Setting]) -> tuple[FrontierPoint, ...]:
        """Predicted ratio of every setting, with what was measured on the first half."""
        return tuple(
            FrontierPoint(
                max_relative_error=setting,
                predicted=self.predict(setting),
                measured=self.halves[0].measured.get(setting),
            )
            for setting in candidates
        )

    def _data(self, source: str) -> DataIdentity:
        return DataIdentity(
            source=source,
            sha256=digest(self.requests),
            requests=len(self.requests),
            tokens=sum(len(request.prompt) for request in self.requests),
            scored_tokens=sum(len(request.continuation) for request in self.requests),
            seed=self.settings.seed,
        )


def check_requests(requests: Sequence[Request], context: int | None, block_size: int) -> None:
    """Raises BadInput for too few requests, too short or too long ones, or continuations that differ in length."""
    if len(requests) < 2 * MIN_HALF:
        raise too_few(len(requests))
    scored = len(requests[0].continuation)
    for number, request in enumerate(requests, start=1):
        length = len(request.prompt) + len(request.continuation)
        if len(request.prompt) < 2 or not scored or len(request.continuation) != scored:
            raise BadInput(f"request {number}: at least two prompt tokens, and equally many to score, are needed")
        if context is not None and length > context:
            raise BadInput(f"request {number} takes {length} tokens with its continuation; the model reads {context}")
    if max(len(request.prompt) for request in requests) <= block_size:
        raise BadInput(f"no request fills a block of {block_size} tokens; give longer ones or a smaller --block-size")


def too_few(requests: int) -> BadInput:
    """The error for too few requests; says how many are needed."""
    return BadInput(
        f"{requests} requests are too few: the interval needs at least {2 * MIN_HALF}, "
        f"{MIN_HALF} to calibrate and {MIN_HALF} to check"
    )
