"""An error inside switches fusion off, see `Recovery`, and leaves serving as it is."""

from __future__ import annotations

import functools
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, TypeVar

from vllm.logger import init_logger

from jointkv.errors import IntegrityError
from jointkv.vllm_plugin.metrics import Statistics
from jointkv.vllm_plugin.scheduler.recovery import Recovery
from jointkv.vllm_plugin.settings import PluginSettings

logger = init_logger(f"vllm.{__name__}")

R = TypeVar("R")


def fail_safe(hook: Callable[..., R]) -> Callable[..., R | None]:
    """An error inside `hook` switches fusion off; the engine goes on."""

    @functools.wraps(hook)
    def guarded(self: FailSafe, *args: Any, **kwargs: Any) -> R | None:
        start = time.perf_counter()
        try:
            return hook(self, *args, **kwargs)
        except Exception as error:
            self._switch_off(f"{hook.__name__}: {type(error).__name__}: {error}", isinstance(error, IntegrityError))
            return None
        finally:
            self.statistics.add("schedule_seconds", time.perf_counter() - start)

    return guarded


class FailSafe(ABC):
    """What goes off after an error in one of its `fail_safe` hooks, and on again after a while.

    Args:
        settings: whether it is on at all, and how often and how soon it comes back.

    Attributes:
        enabled: whether anything is fused now.
        recovery: when it is on again.
        statistics: counts, errors among others.
    """

    def __init__(self, settings: PluginSettings) -> None:
        self.settings = settings
        self.enabled = settings.enabled
        self.recovery = Recovery(settings.retry_after, settings.max_faults)
        self.statistics = Statistics()

    @property
    def state(self) -> str:
        """One of `metrics.STATES`."""
        if self.recovery.off:
            return "disabled" if self.recovery.for_good else "recovering"
        if not self.settings.enabled:
            return "off"
        return "active" if self.statistics.totals()["blocks_considered"] else "inert"

    @abstractmethod
    def let_everybody_go(self) -> None:
        """Fuse nothing for requests that are known by now."""

    def resume(self) -> None:
        """Go on, if the wait after an error is over."""
        if self.recovery.resume():
            self.enabled = self.settings.enabled
            logger.info("jointkv is on again, for requests that arrive from now on")

    def _switch_off(self, fault: str, for_good: bool) -> None:
        """Fuse nothing for now. Logged and counted, unless it was off already; requests go on."""
        self.enabled = False
        self.let_everybody_go()
        if self.recovery.fault(fault, for_good):
            self.statistics.add("faults")
            logger.error("jointkv has switched itself off %s, requests go on unfused: %s", self.recovery.outlook, fault)
        logger.debug("where it happened", exc_info=True)
