"""All requests that wait until what they need not compute is decided, and how they stop waiting before that."""

from __future__ import annotations

from jointkv.vllm_plugin.scheduler.helpers import Helpers
from jointkv.vllm_plugin.scheduler.in_place import InPlace
from jointkv.vllm_plugin.scheduler.intake import Intake
from jointkv.vllm_plugin.scheduler.sharing import Sharing


class Intakes(dict[str, Intake]):
    """They, by name.

    Args:
        sent: helpers.
        in_place: who reads text where it is.
        sharing: what requests were led to.
    """

    def __init__(self, sent: Helpers, in_place: InPlace, sharing: Sharing) -> None:
        super().__init__()
        self._sent, self._in_place, self._sharing = sent, in_place, sharing

    def let_go(self, request_id: str) -> None:
        """The request computes what it has not found."""
        intake = self.pop(request_id, None)
        if intake is not None:
            self._in_place.withdraw(intake)
            intake.tracked.planned = intake.tracked.request.num_preemptions
        self._sent.let_go(request_id)

    def look_up_anew(self, intake: Intake) -> None:
        """At its next turn; what helpers have computed is found then as any other exact prefix."""
        del self[intake.tracked.request.request_id]
        intake.tracked.helped = intake.helped
        self._sharing.let_go(intake.tracked)
