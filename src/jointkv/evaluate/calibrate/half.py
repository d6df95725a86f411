"""Half of the requests: unfused reference, and measurements under settings."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor
from transformers import PreTrainedModel

from jointkv.evaluate.calibrate.settings import CalibrationSettings
from jointkv.evaluate.calibrate.store import Store
from jointkv.evaluate.holding.fused import OFF, fused_logits
from jointkv.evaluate.holding.prefilled import Prefilled
from jointkv.evaluate.score.fidelity import score
from jointkv.evaluate.score.summary import summarize
from jointkv.policy.profile import Measurement
from jointkv.theory.calibrate import Setting, upper_mean


@dataclass
class Half:
    """Some of the requests: their unfused distributions, and the measurements made so far, now or by an earlier run.

    Attributes:
        name: under which `store` keeps the measurements.
        further: requests that the mean of these is to say something about.
    """

    name: str
    model: PreTrainedModel
    batch: Prefilled
    settings: CalibrationSettings
    further: int
    store: Store

    @cached_property
    def measured(self) -> dict[Setting, Measurement]:
        """Measurements by setting."""
        return self.store.measured(self.name)

    @cached_property
    def unfused(self) -> Tensor:
        """Logits over the true continuations, `[requests, n, vocab]`."""
        return fused_logits(self.model, self.batch, OFF)[1]

    def measure(self, setting: Setting) -> Measurement:
        """Fuse under `setting` and score. Raises `BadInput` when the result cannot be kept."""
        if setting not in self.measured:
            held, logits = fused_logits(self.model, self.batch, self.settings.policy(setting))
            sums = score(logits, self.unfused, [request.continuation for request in self.batch.requests])
            fidelity = summarize(sums)
            self.measured[setting] = Measurement(
                requests=len(sums),
                ratio=held.ratio,
                kl=fidelity.kl,
                kl_upper=upper_mean([row.kl / row.positions for row in sums], self.further),
                kl_worst_request=fidelity.kl_worst_request,
                top1=fidelity.top1,
                nll=fidelity.nll,
                nll_unfused=fidelity.nll_reference,
            )
            self.store.keep(self.name, self.measured)
        return self.measured[setting]
