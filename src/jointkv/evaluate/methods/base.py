"""What every way of holding KV in less memory is made of, so that all can be compared on the same requests."""

from __future__ import annotations

from abc import ABC, abstractmethod
from importlib.metadata import PackageNotFoundError, version

from jointkv.errors import BadInput
from jointkv.evaluate.holding.batch import Batch, check_full_attention
from jointkv.evaluate.holding.held import HeldBatch
from jointkv.policy import Scope


class Method(ABC):
    """A way of holding the KV of a batch. Adding one: a file here and a line in `__init__.py`.

    Attributes:
        levels: settings to try, in the method's own unit, the most faithful first.
        level_means: what a level is, for tables.
        allowed: what a level may be, for messages.
        shares_across_requests: whether requests can share memory.
        frees_engine_memory: whether a paged engine such as vLLM gets blocks back, as it stands.
        packages: distributions that must be installed besides `torch` and `transformers`.
    """

    name: str
    description: str
    levels: tuple[float, ...]
    level_means: str
    allowed: str
    shares_across_requests: bool = False
    frees_engine_memory: bool = False
    packages: tuple[str, ...] = ()

    def hold(self, batch: Batch, level: float) -> HeldBatch:
        """What is held of `batch` at `level`.

        Raises:
            BadInput: see `check_level`.
            UnsupportedModel: see `check_full_attention`.
        """
        self.check_level(level)
        check_full_attention(batch.model)
        return self.compress(batch, level)

    @abstractmethod
    def compress(self, batch: Batch, level: float) -> HeldBatch:
        """Prefill `batch` and compress it, or compress what `batch` has prefilled; `hold` has checked both."""

    @abstractmethod
    def allows(self, level: float) -> bool:
        """Whether `level` is one that `allowed` describes."""

    def check_level(self, level: float) -> None:
        """Raises `BadInput` for a level that makes no sense for this method."""
        if not self.allows(level):
            raise BadInput(f"{self.name}: level {level:g} ({self.level_means}); allowed: {self.allowed}")

    def level_for_share(self, share: float) -> float | None:
        """The level that keeps `share` (0 to 1) of the unfused bytes; None if that cannot be chosen."""
        return None

    def in_scope(self, scope: Scope) -> Method:
        """This method for traffic whose likeness lies in `scope`; most methods do not care."""
        return self

    def missing_packages(self) -> tuple[str, ...]:
        """Those of `packages` that are not installed here."""
        return tuple(name for name in self.packages if not _is_installed(name))


def _is_installed(distribution: str) -> bool:
    try:
        version(distribution)
    except PackageNotFoundError:
        return False
    return True
