"""Pages, index and policy that many `JointCache`s of one model share."""

from __future__ import annotations

import dataclasses
import logging
import threading
import weakref
from collections import Counter
from typing import TYPE_CHECKING, Any, NoReturn, SupportsIndex

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel

from jointkv.core.moved_text import check_block_size
from jointkv.core.plan import FusionPlan
from jointkv.core.pool import BlockPool
from jointkv.errors import InvalidPolicy, UnsupportedModel, UnsupportedUse
from jointkv.fusion.fuser import Fuser
from jointkv.hf.hooks import attach_hooks, attention_of
from jointkv.hf.identity import Weights, full_attention_layers, model_identity
from jointkv.hf.reuse import Reuse, ReuseOptions
from jointkv.hf.rotary import rotary_of
from jointkv.hf.states import check_states, widest_dtype
from jointkv.hf.threads import alone
from jointkv.policy import FusionPolicy, LayerGroups
from jointkv.policy.profile import Profile, ReuseEvidence
from jointkv.system.values import check_whole
from jointkv.theory.adapt import Adaptation
from jointkv.theory.calibrate import effective_error

logger = logging.getLogger("jointkv")


class JointPool:
    """KV memory of one model, shared by its caches, so that requests fuse across calls as well as in a batch.

    Creating it registers the `jointkv` attention function and adds two forward hooks, which tell a `JointCache` about
    padding and the end of a step. A model that uses `sdpa` is switched to `jointkv` for the time of a forward pass with
    a `JointCache`, and back. Other caches are not affected.

    Args:
        model: any decoder-only model of transformers with full-attention layers.
        policy: a `FusionPolicy`, the name of a preset, or a `Profile`, whose thresholds are adapted to what is seen.
        block_size: tokens per page.
        max_pages: pages at the most; None grows without limit.
        max_relative_error: with a profile, the user's bound: no adaptation exceeds it. None: the profile's thresholds.
        reuse: what `JointCache.prefill` may read before it is computed: `ReuseOptions`, or the name of a mode.

    Attributes:
        adaptation: the bounds in force, with a profile; else None.
        attention: lets the model read pages.
        blocks: the `BlockPool`, None until the first forward pass has shown the shapes.
        groups: how the full-attention layers are grouped.
        lock: held by the thread that reads or changes tables, pages or what is known of them.
        page_readers: full-attention layers, by number, whose K and V reach the attention function unchanged, so that
            it may read pages instead; the others are handed dense K and V.
        weights: those of the model, as they were when a cache was last begun.
        reuse: what is known for reuse; None where it is off, as it is at a bound of 0.

    Raises:
        UnsupportedUse: `model` is none of transformers.
        UnsupportedModel: an encoder, an encoder-decoder, no cache, no full-attention layer, layers that are neither
            full nor sliding-window attention, or, with reuse, that are not all full attention.
        ModelMismatch: the profile belongs to another model.
        BadInput: the profile was made for another block size.
        InvalidPolicy: the policy does not fit the model or the block size.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        policy: FusionPolicy | Profile | str = "safe",
        *,
        block_size: int = 16,
        max_pages: int | None = None,
        max_relative_error: float | None = None,
        reuse: ReuseOptions | str = "off",
    ) -> None:
        self.lock = threading.RLock()
        self.adaptation: Adaptation | None = None
        audits: ReuseEvidence | None = None
        for name, number in (("block_size", block_size), ("max_pages", 1 if max_pages is None else max_pages)):
            check_whole(name, number, error=InvalidPolicy)
        model = getattr(model, "_orig_mod", model)  # of a compiled one
        self.full_layers = full_attention_layers(model)
        if isinstance(policy, Profile):
            policy.check(model_identity(model), block_size)
            audits = policy.reuse if max_relative_error is None else None  # they are of the profile's own bounds
            self.adaptation = Adaptation(policy, max_relative_error)
            policy = policy.policy()
        elif max_relative_error is not None:
            raise InvalidPolicy("max_relative_error: the user's bound goes with a profile; set it in the policy")
        self.policy = FusionPolicy.preset(policy) if isinstance(policy, str) else policy
        if not isinstance(self.policy, FusionPolicy):
            raise InvalidPolicy(f"policy: {policy!r} is no FusionPolicy, no Profile and no name of a preset")
        if self.policy.scope != "batch" and self.policy.chunk_tokens % block_size:
            raise InvalidPolicy(
                f"chunk_tokens: {self.policy.chunk_tokens} is no multiple of the block size {block_size}"
            )
        self.block_size = block_size
        self.max_pages = max_pages
        self.groups = LayerGroups.of(self.policy, len(self.full_layers))
        self.config = model.config.get_text_config(decoder=True)
        self._model = weakref.ref(model)
        self.weights = Weights.of(model)
        self.dtype, self.device = model.dtype, model.device
        self.blocks: BlockPool | None = None
        self.fusers: dict[str, Fuser] = {}
        self._bound_in_force()
        self.reuse_faults = 0
        self.reuse = self._reuse(model, ReuseOptions.of(reuse), audits)
        self.faults = 0
        self.page_readers: set[int] = set()
        self._counters = Counter(blocks_considered=0, blocks_fused=0, pages_freed=0)
        self.seconds_fusing = 0.0
        self._next_sequence = 0
        self._said = False
        decoder = attach_hooks(model)
        self.attention = attention_of(decoder)
        self._decoder = weakref.ref(decoder)

    @property
    def fingerprint(self) -> str:
        """Identifies the model in saved caches."""
        return self.weights.fingerprint

    @property
    def reads_pages(self) -> bool:
        """Whether the model's attention reads pages; otherwise each layer is handed a dense copy."""
        return self.attention.reads_pages

    @property
    def reads_text(self) -> bool:
        """Whether blocks with equal tokens are looked for, so that caches keep their text."""
        return self.policy.enabled and self.policy.candidates != "signature"

    def prepare(self, key_states: Tensor, value_states: Tensor) -> BlockPool:
        """The block pool for states `[rows, h, n, d]`; made on first use.

        Pages have the model's dtype, or a wider one that the first states need. States of a narrower one, as of a model
        under `torch.autocast`, fit too: nothing of them is lost.

        Raises:
            LayoutError: states of a dtype that is not supported, or that do not fit the pool that exists.
        """
        dtype = widest_dtype(self.dtype, key_states, value_states)
        if self.blocks is None:
            key_shape, value_shape = ((states.shape[1], states.shape[3]) for states in (key_states, value_states))
            self.blocks = BlockPool(
                self.groups.layers,
                self.block_size,
                key_shape,
                value_shape,
                dtype=dtype,
                device=key_states.device,
                max_pages=self.max_pages,
            )
            scopes = ("batch", "chunk") if self.policy.scope == "both" else (self.policy.scope,)
            if self.policy.enabled:
                self.fusers = {scope: Fuser(self.blocks, self.policy) for scope in scopes}
            if self.reuse is not None:
                self.blocks.on_free(self.reuse.residents.forget)
        check_states(self.blocks.kv.keys[0], self.blocks.kv.values[0], key_states, value_states)
        return self.blocks

    def _reuse(self, model: PreTrainedModel, options: ReuseOptions, audits: ReuseEvidence | None) -> Reuse | None:
        if options.mode == "off":
            return None
        options.check(self.policy)
        if len(self.full_layers) < len(DynamicCache(config=self.config).layers):
            raise UnsupportedModel("reuse: the model has layers whose K and V are not in pages")
        # At a bound of 0 nothing but equal K and V may be read, and equality cannot be known before they are there.
        if not self.policy.rule(0).max_relative_error:
            return None
        rotary = None
        if options.moved:
            check_block_size(self.block_size)
            rotary = rotary_of(model, self.full_layers)
        return Reuse(options, self.block_size, audits, rotary)

    def forget(self, pages: Tensor) -> None:
        """Take `pages [n]`, which are free or about to be written, out of every index."""
        for fuser in self.fusers.values():
            fuser.forget(pages)
        if self.reuse is not None:
            self.reuse.residents.forget(pages)

    @alone
    def notice_weights(self) -> None:
        """Call `weights_changed` if they have, see `weights_mark`; every cache does when it begins."""
        model = self._model()
        if model is not None and not self.weights.are_of(model):
            self.weights_changed()

    @alone
    def weights_changed(self) -> None:
        """Forget what is resident, because the model computes other K and V than before.

        Caches that have begun go on as they are, without taking part in fusion; licences must be earned again. Changes
        of parameters are noticed when a cache begins. Call this after changes that are none of parameters, such as
        another active adapter.
        """
        model = self._model()
        self.weights = dataclasses.replace(self.weights) if model is None else Weights.of(model)
        if self.blocks is not None:
            self.forget(torch.arange(len(self.blocks.references)))
        if self.reuse is not None:
            self.reuse.forget_licences()
        if self.adaptation is not None:
            logger.warning("the model's weights have changed since the profile was made: calibrate anew")
        logger.info("the model's weights have changed: resident pages are forgotten")

    def new_sequences(self, count: int) -> Tensor:
        """Numbers for `count` sequences, unique in this pool: long `[count]`."""
        with self.lock:
            self._next_sequence += count
            return torch.arange(self._next_sequence - count, self._next_sequence)

    def observe(self, group: int, considered: int, plan: FusionPlan) -> None:
        """Compare what fusion did with the profile, if there is one, and move the bound when that is due."""
        if self.adaptation is None:
            return
        served = plan.page != plan.old_page
        errors = effective_error(plan.key_error[served], plan.value_error[served], plan.token_error[served])
        move = self.adaptation.observe(group, considered, errors.tolist())
        if move is not None:
            logger.info(self.adaptation.describe(group, move))
            self._bound_in_force()

    def _bound_in_force(self) -> None:
        if self.adaptation is None:
            return
        bounds = [self.adaptation.bounds(group) for group in range(self.groups.count)]
        self.policy = dataclasses.replace(
            self.policy,
            max_relative_error=tuple(block for block, _ in bounds),
            max_token_error=tuple(token for _, token in bounds),
        )
        for fuser in self.fusers.values():
            fuser.policy = self.policy

    def disable_fusion(self, error: Exception) -> None:
        """Switch fusion off after an internal fault: counted, logged once; caches go on unfused."""
        self.faults += 1
        if self.fusers:
            logger.error("fusion switched off after an internal fault: %s: %s", type(error).__name__, error)
        for fuser in self.fusers.values():
            self._counters.update(fuser.counters)
            fuser.close()
        self.fusers = {}

    def disable_reuse(self, error: Exception) -> None:
        """Switch reuse off after an internal fault: counted, logged once; prompts are computed."""
        if self.reuse is not None:
            logger.error("reuse switched off after an internal fault: %s: %s", type(error).__name__, error)
            if self.blocks is not None:
                self.blocks.off_free(self.reuse.residents.forget)
            self._counters.update(self.reuse.counters)
        self.reuse_faults, self.reuse = self.reuse_faults + 1, None

    def say_that_it_trains(self, part: str) -> None:
        """Say once why nothing is reused."""
        if self.reuse is not None and not self._said:
            logger.warning("nothing is reused while %s is in training mode, with dropout: call model.eval()", part)
            self._said = True

    @alone
    def stats(self) -> dict[str, Any]:
        """Pages and bytes at the allocator, and the counters of the search."""
        blocks = self.blocks
        counters = self._counters.copy()
        for fuser in self.fusers.values():
            counters.update(fuser.counters)
        return {
            "pages_used": blocks.num_used if blocks else 0,
            "pages_peak": blocks.peak_used if blocks else 0,
            "references": int(blocks.references.sum()) if blocks else 0,
            "bytes_used": blocks.nbytes if blocks else 0,
            "page_bytes": blocks.kv.page_nbytes if blocks else 0,
            "fusion": "off" if not self.policy.enabled else "faulted" if self.faults else "on",
            "faults": self.faults,
            "seconds_fusing": self.seconds_fusing,
            "bounds_moved": self.adaptation.moves if self.adaptation else {},
            **counters,
            **(self.reuse.stats() if self.reuse else {"reuse": "faulted" if self.reuse_faults else "off"}),
        }

    def check_decoder(self, module: nn.Module) -> None:
        """Raises UnsupportedUse if `module` is not the decoder of the model whose pages these are."""
        if module is not self._decoder():
            raise UnsupportedUse(
                f"this cache is one of another model than this {type(module).__name__}, whose K and V do not belong in "
                "its pages: make a JointPool for each model"
            )

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise UnsupportedUse(
            "a JointPool can be neither pickled nor copied: make one in each process, and move caches with "
            "JointCache.save and JointCache.load"
        )

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> NoReturn:
            if hasattr(Cache, name):
                raise UnsupportedUse("a JointPool is no cache: pass past_key_values=JointCache(pool)")
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @alone
    def check_integrity(self) -> None:
        """Raises IntegrityError when the pool or an index is inconsistent."""
        if self.adaptation is not None:
            self.adaptation.check_integrity()
        if self.blocks is not None:
            self.blocks.check_integrity()
        for fuser in self.fusers.values():
            fuser.check_integrity()
        if self.reuse is not None:
            self.reuse.check_integrity()
