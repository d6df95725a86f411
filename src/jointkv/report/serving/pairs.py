"""Which arms are compared, and their ratios round by round."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from jointkv.bench.arms import cache_width
from jointkv.bench.result import Arm, Load, ServingResult
from jointkv.bench.statistics import sign_flip_p, smallest_p
from jointkv.report.markdown import NOT_MEASURED, words
from jointkv.report.serving.metrics import Metric


@dataclass(frozen=True)
class Pair:
    """An arm with fusion and the arm without it that is otherwise the same, or nearest to that.

    Attributes:
        differences: what else differs, in words; such a pair measures more than fusion.
    """

    upper: Arm
    lower: Arm
    differences: tuple[str, ...] = ()


@dataclass(frozen=True)
class Ratio:
    """One metric of two arms under one load, upper over lower.

    Attributes:
        rounds: the ratio of each round that has both, in their order.
    """

    metric: Metric
    rounds: tuple[float, ...]

    @property
    def median(self) -> float | None:
        """Over the rounds; None without any."""
        return median(self.rounds) if self.rounds else None

    @property
    def p(self) -> float | None:
        """Two-sided, see `sign_flip_p`; None without a round."""
        return sign_flip_p(self.rounds) if self.rounds else None

    @property
    def smallest_p(self) -> float:
        """What `p` is at best with so many rounds."""
        return smallest_p(len(self.rounds))

    @property
    def written(self) -> str:
        """The median with the range over rounds and p."""
        if not self.rounds:
            return NOT_MEASURED
        ends = f"{min(self.rounds):.2f} to {max(self.rounds):.2f}; p {self.p:.2g}"
        return f"{self.median:.2f} ({ends if len(self.rounds) > 1 else 'one round'})"


def called(arm: Arm) -> str:
    """The arm's name as a sentence has it."""
    return arm.name.replace("_", " ")


def heading(result: ServingResult) -> str:
    """Traffic and pool, short."""
    return f"{words(result.traffic)}, pool {baseline(result).pool_blocks:,}"


def pool_bytes(result: ServingResult, arm: Arm) -> int:
    """Bytes of the arm's pool; a block of one of n layer groups holds an n-th of the layers."""
    groups = int((arm.fusion or {}).get("layer_groups") or 1)
    width = cache_width([*result.common_flags, *arm.flags], result.dtype)
    return arm.pool_blocks * result.block_bytes * width // cache_width(result.common_flags, result.dtype) // groups


def fusion_pairs(result: ServingResult) -> list[Pair]:
    """Every arm with fusion beside its counterpart; none for a result without an arm that has no fusion.

    The counterpart has the same flags if any arm has, then the same bytes of pool if any has.
    """
    plain = [arm for arm in result.arms if arm.fusion is None]
    pairs = []
    for upper in result.arms:
        if upper.fusion is None or not plain:
            continue
        pool = pool_bytes(result, upper)
        lower = min(plain, key=lambda arm: (arm.flags != upper.flags, abs(pool_bytes(result, arm) - pool)))
        differences = []
        if lower.flags != upper.flags:
            differences.append(f"flags ({' '.join(upper.flags) or 'none'} and {' '.join(lower.flags) or 'none'})")
        if pool_bytes(result, lower) != pool:
            differences.append(f"pool ({upper.pool_blocks} and {lower.pool_blocks} blocks)")
        pairs.append(Pair(upper, lower, tuple(differences)))
    return pairs


def baseline(result: ServingResult) -> Arm:
    """The arm that the others are shown against: the first pair's without fusion, else the first."""
    pairs = fusion_pairs(result)
    return pairs[0].lower if pairs else next((arm for arm in result.arms if arm.fusion is None), result.arms[0])


def large_pool(result: ServingResult, lower: Arm) -> Arm | None:
    """The arm like `lower` with the largest pool above its own: what memory alone could give."""
    alike = [arm for arm in result.arms if arm.fusion is None and arm.flags == lower.flags]
    largest = max(alike, key=lambda arm: arm.pool_blocks, default=lower)
    return largest if largest.pool_blocks > lower.pool_blocks else None


def ratio(result: ServingResult, upper: Arm, lower: Arm, load: Load, metric: Metric) -> Ratio:
    """The metric of two arms under one load. Rounds in which it is 0 or missing on a side are left out."""
    above = {run.round: metric.value(run) for run in result.of(upper.name, load.label)}
    below = {run.round: metric.value(run) for run in result.of(lower.name, load.label)}
    rounds = [(above[number], below[number]) for number in sorted(above.keys() & below.keys())]
    return Ratio(metric, tuple(high / low for high, low in rounds if high and low))


def arms_run(result: ServingResult, load: Load) -> list[Arm]:
    """The arms that have a run under `load`."""
    return [arm for arm in result.arms if result.of(arm.name, load.label)]


def pairs_run(result: ServingResult, load: Load) -> list[Pair]:
    """The pairs of which both arms have."""
    arms: Sequence[Arm] = arms_run(result, load)
    return [pair for pair in fusion_pairs(result) if pair.upper in arms and pair.lower in arms]
