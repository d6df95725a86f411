"""What merging does to an attention row: bounds on logits, probabilities and output, from norms of q and of the error.

One row: query `q [d]`, keys `k_i`, values `v_i`, read instead as `k^_i`, `v^_i`. Probabilities are
`p = softmax(a)` with `a_i = scale q.k_i`, and `p^ = softmax(a + delta)`. Paper: Lemma 1 bounds the drift of `p`; the
statements here are derived in the docstrings and hold for whatever stands in for a block, since both kinds of
representative come down to the norm of an error: `relative_error * |k_i|`. All sizes are vectorised over leading
dimensions; computation is in float64, so that a bound is not broken by rounding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from jointkv.errors import LayoutError

SMALL_SHIFT = 0.05
"""Below this width the exact KL bound loses digits to cancellation; Hoeffding's is then larger by less than 1e-4."""

SMALL_LOGIT = 1e-3
"""The same for the shift of a single logit."""


@dataclass(frozen=True)
class Bound:
    """A bound and what happened, one entry per row.

    Attributes:
        bound, actual: float64 `[...]`.
    """

    bound: Tensor
    actual: Tensor

    @property
    def tightness(self) -> Tensor:
        """`actual / bound`, in [0, 1] as far as the bound holds; 1 where both are 0."""
        return torch.where(self.actual == self.bound, 1.0, self.actual / self.bound)

    def holds(self, slack: float = 1e-9) -> bool:
        """Whether no row exceeds its bound by more than rounding, `slack` relative to 1 + bound."""
        return bool((self.actual <= self.bound + slack * (1 + self.bound)).all())


@dataclass(frozen=True)
class AttentionDrift:
    """Drift of attention rows.

    Attributes:
        logit_shift: largest `|delta_i|` of a row.
        total_variation: `sum |p - p^| / 2`.
        kl: `KL(p || p^)` in nats.
        output: `|o - o^|`, Euclidean.
    """

    logit_shift: Bound
    total_variation: Bound
    kl: Bound
    output: Bound


def logit_shift_bound(query: Tensor, key_norm: Tensor, relative_error: Tensor, scale: float) -> Tensor:
    """Largest shift of each logit: `|scale q.(k_i - k^_i)| <= scale |q| |k_i| e_i` (Cauchy-Schwarz).

    With the relative error of a whole block, pass the norm of the whole block for each of its tokens: a token's
    error is at most the block's.

    Args:
        query: `[..., d]`.
        key_norm, relative_error: `[..., n]`, per token.

    Returns:
        float64 `[..., n]`.
    """
    length = torch.linalg.vector_norm(query.double(), dim=-1, keepdim=True)
    return abs(scale) * length * key_norm.double() * relative_error.double()


def kl_bound(shift: Tensor, log_probability: Tensor | None = None) -> Tensor:
    """Bound on `KL(p || p^)`, and by symmetry without `log_probability` on `KL(p^ || p)`, from `|delta_i| <= shift_i`.

    `KL = log E_p[e^delta] - E_p[delta]`. Given its mean, `E_p[e^delta]` is largest when delta sits at the ends of its
    range, because exp is convex (Hoeffding's lemma); with range `w <= 2 max shift` and share x at the upper end,
    `KL <= max_x log(1 - x + x e^w) - x w`. The derivative vanishes where `1 - x + x e^w = (e^w - 1) / w`, hence

        KL <= log((e^w - 1) / w) - 1 + w / (e^w - 1),

    attained by two tokens; below `w^2 / 8` (Hoeffding) and, for large w, below w.

    A large shift on a token that nobody attends to costs little. From `log Z <= Z - 1` with `Z = E_p[e^delta]`,
    `KL <= E_p[e^delta - 1 - delta]`, and `e^x - 1 - x` is larger at `|x|` than at `-|x|` and grows with it:

        KL <= sum_i p_i (e^shift_i - 1 - shift_i).

    Args:
        shift: `[..., n]`, not negative.
        log_probability: log p `[..., n]` (p itself underflows where a large shift could still lift it); with it, the
            smaller of the two bounds is returned.
    """
    shift = shift.double()
    width = 2 * shift.amax(-1)
    safe = width.clamp(min=SMALL_SHIFT)
    # log(e^w - 1) without overflow, and w / (e^w - 1) likewise.
    log_growth = safe + torch.log(-torch.expm1(-safe))
    exact = log_growth - safe.log() - 1 + safe * torch.exp(-log_growth)
    bound = torch.where(width < SMALL_SHIFT, width.square() / 8, exact)
    if log_probability is None:
        return bound
    # log(e^s - 1 - s); at small s its upper bound s^2 e^s / 2, because digits cancel.
    small = shift < SMALL_LOGIT
    large = shift.clamp(min=SMALL_LOGIT)
    growth = torch.where(small, 2 * shift.log() - math.log(2), torch.log1p(-(1 + large) * torch.exp(-large))) + shift
    return torch.minimum(bound, (log_probability.double() + growth).logsumexp(-1).exp())


def total_variation_bound(shift: Tensor, log_probability: Tensor | None = None) -> Tensor:
    """Bound on the total variation of p and p^ from `|delta_i| <= shift_i`.

    For any set A of tokens the odds `p(A) / p(not A)` change by a factor of at most `e^w`, w the range of delta: the
    weights inside and outside change by factors at most `e^w` apart. The logistic function rises most, over a
    length w, about its centre, from `-w/2` to `w/2`: `|p^(A) - p(A)| <= 2 sigmoid(w/2) - 1 = tanh(w/4)`. With
    `w <= 2 max shift`: `TV <= tanh(max shift / 2)`, attained by two tokens.

    With p known, two more: Pinsker's `TV <= sqrt(KL / 2)`; and with the weights `u_i = p_i e^delta_i`, `Z = sum u`,
    `TV = sum (p^ - p)+ <= sum (u - p)+` if Z >= 1, else `TV = sum (p - p^)+ <= sum (p - u)+`, so that
    `TV <= sum p_i (e^shift_i - 1)`: small where shifts are large on tokens of little weight.

    Args:
        shift, log_probability: see `kl_bound`.
    """
    even = torch.tanh(shift.double().amax(-1) / 2)
    bound = torch.minimum(even, (kl_bound(shift, log_probability) / 2).sqrt())
    if log_probability is None:
        return bound
    return torch.minimum(bound, _weighted(log_probability, shift, torch.ones_like(shift)))


def output_bound(
    shift: Tensor, log_probability: Tensor, values: Tensor, value_change: Tensor, mask: Tensor | None = None
) -> Tensor:
    """Bound on `|o - o^|`, `o = sum p_i v_i` and `o^ = sum p^_i v^_i`.

    `o - o^ = sum (p_i - p^_i) v_i + sum p^_i (v_i - v^_i)`. As `sum (p - p^) = 0`, the first sum may subtract any
    centre c from the values: `<= 2 TV max_i |v_i - c|`; c is 0 or the mean of the values, whichever is better. The
    second: `sum p^_i u_i <= sum p_i u_i + TV max_i u_i`, as `u_i = |v_i - v^_i|` lies in [0, max u], and
    at most `max_i u_i`. With relative errors, `u_i = |v_i| e_i`.

    Token by token: `Z = sum p_i e^delta_i` lies between `1 / G` and `G = sum p_i e^shift_i` (Cauchy-Schwarz), so
    `|p^_i - p_i| <= p_i (G e^shift_i - 1)`. Then the first sum is at most `sum p_i (G e^shift_i - 1) |v_i - c|`
    and the second at most `sum p_i u_i` plus the same with u. Each sum takes its least bound.

    Args:
        shift, log_probability, value_change: bounds on delta, log p, and u, `[..., n]`.
        values: `[..., n, dv]`.
        mask: bool `[..., n]`, True where a token is attended; the others' values play no part.
    """
    shift, log_p, values, change = (part.double() for part in (shift, log_probability, values, value_change))
    present = torch.ones_like(log_p, dtype=torch.bool) if mask is None else mask
    change = torch.where(present, change, 0.0)
    variation = total_variation_bound(shift, log_p)
    reach = shift + (log_p + shift).logsumexp(-1, keepdim=True).clamp(min=0)
    weight = (present / present.sum(-1, keepdim=True)).double()[..., None]
    first = torch.full_like(variation, torch.inf)
    for centre in (torch.zeros_like(values[..., :1, :]), (weight * values).sum(-2, keepdim=True)):
        radius = torch.where(present, torch.linalg.vector_norm(values - centre, dim=-1), 0.0)
        first = torch.minimum(first, 2 * variation * radius.amax(-1))
        first = torch.minimum(first, _weighted(log_p, reach, radius))
    largest = change.amax(-1)
    moved = torch.minimum(variation * largest, _weighted(log_p, reach, change))
    return first + torch.minimum(largest, (log_p.exp() * change).sum(-1) + moved)


def _weighted(log_probability: Tensor, shift: Tensor, size: Tensor) -> Tensor:
    """`sum p_i (e^shift_i - 1) size_i`, also where p underflows or the exponential overflows."""
    # log(e^s - 1) = s + log(1 - e^-s), minus infinity at 0.
    growth = shift + torch.log(-torch.expm1(-shift))
    return (log_probability.double() + growth + size.log()).logsumexp(-1).exp()


def attention_drift(
    query: Tensor,
    keys: Tensor,
    keys_read: Tensor,
    values: Tensor,
    values_read: Tensor,
    scale: float,
    mask: Tensor | None = None,
) -> AttentionDrift:
    """Bounds and what happens, for rows that read `keys_read` and `values_read` in place of `keys` and `values`.

    Bounds use the norms of q, of the errors and of the values, and the unmerged attention p.

    Args:
        query: `[..., d]`.
        keys, keys_read: `[..., n, d]`; leading dimensions broadcast against those of `query`.
        values, values_read: `[..., n, dv]`.
        mask: bool `[..., n]`, True where a token is attended; at least one per row.

    Raises:
        LayoutError: shapes that do not fit, or a row without tokens.
    """
    if keys.shape != keys_read.shape or values.shape != values_read.shape or keys.shape[-2] != values.shape[-2]:
        raise LayoutError("keys or values differ in shape from what is read in their place")
    if query.shape[-1] != keys.shape[-1] or keys.shape[-2] == 0:
        raise LayoutError(f"queries {list(query.shape)} do not fit keys {list(keys.shape)}")
    query, keys, keys_read, values, values_read = (
        tensor.double() for tensor in (query, keys, keys_read, values, values_read)
    )
    logits, logits_read = (scale * (keys_in @ query[..., None]).squeeze(-1) for keys_in in (keys, keys_read))
    key_change = torch.linalg.vector_norm(keys - keys_read, dim=-1)
    shift = logit_shift_bound(query, torch.ones_like(key_change), key_change, scale)
    moved = (logits_read - logits).abs()
    if mask is not None:
        if not mask.any(-1).all():
            raise LayoutError("a row attends to no token")
        logits, logits_read = (row.masked_fill(~mask, -torch.inf) for row in (logits, logits_read))
        shift, moved = (row.masked_fill(~mask, 0.0) for row in (shift, moved))
    log_p, log_read = logits.log_softmax(-1), logits_read.log_softmax(-1)
    p, read = log_p.exp(), log_read.exp()
    # Masked tokens add nothing; 0 times an infinite log ratio would be NaN.
    divergence = torch.where(p > 0, p * (log_p - log_read), 0.0).sum(-1).clamp(min=0)
    output = ((p - read)[..., None] * values + read[..., None] * (values - values_read)).sum(-2)
    value_change = torch.linalg.vector_norm(values - values_read, dim=-1)
    return AttentionDrift(
        logit_shift=Bound(shift.amax(-1), moved.amax(-1)),
        total_variation=Bound(total_variation_bound(shift, log_p), (p - read).abs().sum(-1) / 2),
        kl=Bound(kl_bound(shift, log_p), divergence),
        output=Bound(output_bound(shift, log_p, values, value_change, mask), torch.linalg.vector_norm(output, dim=-1)),
    )
