"""Half of the requests: unfused reference, and measurements under settings."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from jointkv.evaluate.calibrate.settings import CalibrationSettings, policy_of
from jointkv.evaluate.holding.held import Held, Prefilled, hold
from jointkv.evaluate.score.fidelity import Scorer
from jointkv.policy import FusionPolicy
from jointkv.policy.profile import Measurement
from jointkv.theory.calibrate import Setting, upper_mean

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class Half:
    """Some of the requests: their unfused distributions, and the measurements made so far."""

    model: PreTrainedModel
    batch: Prefilled
    settings: CalibrationSettings
    further: int
    measured: dict[Setting, Measurement] = field(default_factory=dict)

    @cached_property
    def unfused(self) -> Held:
        return hold(self.model, self.batch, FusionPolicy.preset("off"), block_size=self.settings.block_size)

    def measure(self, setting: Setting) -> Measurement:
        """Fuse under `setting` and score."""
        if setting not in self.measured:
            held = hold(self.model, self.batch, policy_of(setting, self.settings), block_size=self.settings.block_size)
            self.measured[setting] = self._score(held)
        return self.measured[setting]

    def _score(self, held: Held) -> Measurement:
        whole, kls = Scorer(), []
        for logits, reference, request in zip(held.logits, self.unfused.logits, self.batch.requests, strict=True):
            alone = Scorer()
            for scorer in (whole, alone):
                scorer.add(logits, reference, torch.tensor(request.continuation))
            kls.append(alone.result().kl)
        fidelity = whole.result()
        return Measurement(
            requests=len(kls),
            ratio=held.pages_before / held.pages_after,
            kl=fidelity.kl,
            kl_upper=upper_mean(kls, self.further),
            kl_worst_request=fidelity.kl_worst_request,
            top1=fidelity.top1,
            nll=fidelity.nll,
            nll_unfused=fidelity.nll_reference,
        )
