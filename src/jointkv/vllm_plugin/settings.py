"""What a user may set of the plugin: one model, one place where it is checked."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from reprlib import repr as shown
from typing import Any, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from jointkv.errors import BadInput
from jointkv.policy import FusionPolicy
from jointkv.policy.paper import Paper
from jointkv.policy.profile import Profile
from jointkv.system.nearest import nearest

Bound = float | tuple[float, ...] | None
PAPER_SEARCH = {"candidates": "signature", "max_candidates": 8}
"""Text does not count, and of keys that are all alike many are looked at: on unrelated text all pairs find no more."""

SKIPPED_LAYERS = ("skip_first_layers", "skip_last_layers")


class PluginSettings(BaseModel):
    """The options in `kv_connector_extra_config`. Thresholds are one number, or one per layer group.

    Attributes:
        enabled: False starts the engine with the plugin attached and nothing fused.
        policy: `"safe"`: every block that is served is within the bounds. `"paper"`: as published, keys decide at a
            threshold and values follow, whatever the text, in all but the first and last two layers. There is no bound
            on the error, and the answers change: only with `accept_unbounded`. It sets the options below, of which
            those that are given win.
        accept_unbounded: blocks of other text may be served without any bound on the error.
        max_relative_error, max_token_error, similarity, key_threshold, value_threshold, across_layers,
            skip_first_layers, skip_last_layers: as in `FusionPolicy`.
        candidates: how resident blocks are found, to be compared. `"tokens"`: by equal text. `"signature"`: by their
            content, whatever the text. `"both"`: by content where no resident block has the same text.
        signature_size: numbers in a signature; more of them miss fewer candidates, and take longer to search.
        scope: `"batch"` compares requests at equal positions, `"chunk"` the chunks of one request, or both.
        chunk_tokens: length of a chunk in tokens, a multiple of the engine's block size.
        layer_groups: groups of consecutive full-attention layers, each with a block table of its own over the shared
            pool, for traffic where layers disagree on what is alike. It must divide the number of those layers. A page
            then holds the layers of one group: as many tokens fit as before, but `--num-gpu-blocks-override`, the
            pool and `blocks_merged` count these smaller pages, so the override must be multiplied by it. Every
            group costs the scheduler microseconds per running request and step: a few groups are cheap, 30 are not.
        max_candidates: resident blocks compared with a new block at the most.
        min_pool_usage: blocks are fused only while at least this fraction of the pool is in use, in [0, 1].
        max_blocks_per_step: blocks compared in one engine step at the most, but for those of requests that were drawn
            for an audit; the rest wait for the next.
        isolation: `"salt"`: blocks of requests with equal `cache_salt` (or both without) are compared.
            `"strict"`: a request without a salt is left alone.
        attention: what reads the pages. `"engine"`: vLLM's own kernels, which read a page for every request that
            uses it. `"shared"`: a kernel that reads it once for all of them; equal up to rounding. `"auto"`: that one
            wherever a measurement at start says that it is faster, on the CPU.
        directions: `"written"`: blocks that become full together at one place, are alike by `key_threshold` and find no
            resident page read the direction that they share, each with its own norms, from a page that is written for
            them; pages of other blocks are never written. Needs `own_norms`, and `candidates` other than `"tokens"`.
            It costs a product of all blocks of a batch with all, and within bounds saves no more than `"off"`.
        own_norms: a block that reads another's page keeps its own norms of K and V in every layer where that brings it
            nearer, so that more blocks are within a bound. It makes `attention` `"shared"`, and where that cannot be
            had, pages are read as they stand.
        reuse: text that is resident is not computed. `"off"`: it is, and fused after. `"licensed"`: only where audits
            have shown that of a request's reused blocks on average at most `reuse_miss_rate` are beyond the bounds;
            until then, and for ever at `reuse_audit_rate`, requests are computed and compared. `"probed"`: without that
            limit, by the entry blocks of runs and by witnesses alone. `"auto"`: `"licensed"` where options and engine
            leave room for it, else off, with a line in the log and in `/metrics`; the others are refused there. With
            `max_relative_error` 0 nothing is reused: that two blocks are equal is not known before they are computed.
        reuse_miss_rate: share of a request's reused blocks that may be beyond the bounds, on average over requests, in
            (0, 1).
        reuse_confidence: of the limit on that share, at all times together, for each licence, in (0, 1).
        reuse_audit_rate: share of requests that could reuse and are computed and compared all the same, in (0, 1].
        moved: text is also reused that is resident at another position, in pages of the request's own, written with
            its keys turned, or with `attention` `"shared"` where it is; under a licence of its own. Needs `reuse`.
        profile: what `jointkv calibrate` wrote, for this model and block size. Options given beside it win; a bound
            given beside it is the limit up to which the profile's bound is adapted, which else is the profile's own.
        store: a folder of pages that outlives the engine and is shared by engines: what is computed exactly is written
            to it in the background, without loss, and prompts whose beginning it has are loaded instead of computed.
            With `reuse`, runs are looked for behind that.
        store_bytes: of that folder at the most, beyond which pages unread for longest are evicted. None: no limit.
        adapt: with a profile, move its bounds when the live errors are not those that were calibrated.
        retry_after: seconds after an internal error until fusion is tried again, for requests that arrive from then on;
            each further error doubles them. None: never.
        max_faults: after so many internal errors it stays off until the engine is restarted.
        allow_untested: start on an engine or device that was never run with this plugin.
        check_integrity: check the block tables and reference counts at every step. For tests; slow.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    enabled: bool = True
    policy: Literal["safe", "paper"] = "safe"
    accept_unbounded: bool = False
    max_relative_error: Bound = 0.2
    max_token_error: Bound = 0.3
    similarity: Literal["key", "key_value"] = "key_value"
    key_threshold: Bound = None
    value_threshold: Bound = None
    across_layers: Literal["rms", "max"] = "rms"
    scope: Literal["batch", "chunk", "both"] = "batch"
    chunk_tokens: int = Field(default=512, ge=1)
    layer_groups: int = Field(default=1, ge=1)
    skip_first_layers: int = Field(default=0, ge=0)
    skip_last_layers: int = Field(default=0, ge=0)
    candidates: Literal["tokens", "signature", "both"] = "tokens"
    signature_size: int = Field(default=32, ge=8, le=1024)
    max_candidates: int = Field(default=2, ge=1)
    min_pool_usage: float = Field(default=0.5, ge=0.0, le=1.0)
    max_blocks_per_step: int = Field(default=256, ge=1)
    isolation: Literal["salt", "strict"] = "salt"
    attention: Literal["engine", "auto", "shared"] = "engine"
    directions: Literal["off", "written"] = "off"
    own_norms: bool = False
    reuse: Literal["off", "auto", "licensed", "probed"] = "off"
    reuse_miss_rate: float = Field(default=0.02, gt=0.0, lt=1.0)
    reuse_confidence: float = Field(default=0.95, gt=0.0, lt=1.0)
    reuse_audit_rate: float = Field(default=0.02, gt=0.0, le=1.0)
    moved: bool = False
    profile: Path | None = None
    store: Path | None = None
    store_bytes: int | None = Field(default=20_000_000_000, ge=1)
    adapt: bool = True
    retry_after: float | None = Field(default=60.0, ge=0.0, allow_inf_nan=False)
    max_faults: int = Field(default=3, ge=1, le=16)
    allow_untested: bool = False
    check_integrity: bool = False

    @classmethod
    def parse(cls, options: dict[str, Any]) -> Self:
        """Read and check `options`.

        Raises:
            BadInput: no mapping, an unknown option (the nearest valid one is named), a value of the wrong type or
                range, or a file that is no profile.
            InvalidPolicy: thresholds that make no sense together.
        """
        if not isinstance(options, Mapping):
            raise BadInput(f"jointkv: options have names, as in max_relative_error=0.2; got {shown(options)}")
        for name in ("profile", "store"):
            if options.get(name) == "":
                raise BadInput(f"jointkv: option {name}: an empty path; give one, or leave {name} out")
        if options.get("policy") == "paper":
            options = _with_paper(options)
        if options.get("profile") is not None:
            options = _with_profile(options)
        for name in options:
            if name not in cls.model_fields:
                near = nearest(str(name), cls.model_fields)
                what = f"known: {', '.join(cls.model_fields)}" if near is None else f"did you mean {near!r}?"
                raise BadInput(f"jointkv: there is no option {name!r}; {what}")
        try:
            settings = cls(**options)
        except ValidationError as error:
            problem = error.errors()[0]
            raise BadInput(
                f"jointkv: option {problem['loc'][0]}: {problem['msg']}, got {shown(problem['input'])}"
            ) from None
        settings.fusion_policy()
        refusal = settings._refusal(options)
        if refusal is not None:
            raise BadInput(f"jointkv: {refusal}")
        return settings

    def _refusal(self, given: Mapping[str, Any]) -> str | None:
        """Why the options that were `given` do not go together, and what to set instead; None if they go."""
        problems = {
            f"option store: {self.store} is a file, and a store is a folder": _is_file(self.store),
            "own_norms=true takes attention that knows them, and attention=engine is vLLM's own; leave attention out, "
            "or set own_norms=false": self.own_norms and given.get("attention") == "engine",
            f"directions=written does not go with {self.directions_obstacle}": self.directions == "written"
            and self.directions_obstacle is not None,
            f"{self.unbounded_by} has no bound on the error: K and V of one text stand for those of another, and "
            "answers change; set accept_unbounded=true to have that, or a max_relative_error": self.unbounded
            and not self.accept_unbounded,
            f"reuse={self.reuse} does not go with {self.reuse_obstacle}; set reuse=off": self.reuse
            not in ("off", "auto")
            and self.reuse_obstacle is not None,
            "store_bytes limits a store, and there is none; set store to a folder": self.store is None
            and given.get("store_bytes") is not None,
            "moved=true is about text that is reused, and reuse=off; set reuse=licensed": self.moved
            and self.reuse == "off",
        }
        return next((problem for problem, present in problems.items() if present), None)

    @property
    def reuses(self) -> bool:
        """Whether anything may be reused before it is computed."""
        return self.enabled and self.reuse != "off" and not self.only_equal and self.reuse_obstacle is None

    def with_reuse_decided(self, possible: bool) -> Self:
        """Without `"auto"`: where the engine leaves room for reuse, and where it does not."""
        if self.reuse != "auto":
            return self
        return self.model_copy(update={"reuse": "licensed" if possible and self.reuses else "off"})

    @property
    def moves(self) -> bool:
        """Whether text may be reused that is resident at another position."""
        return self.moved and self.reuses

    @property
    def reads_in_place(self) -> bool:
        """Whether such text is read where it is, rather than in pages that are written with it."""
        return self.moves and self.attention == "shared"

    @property
    def only_equal(self) -> bool:
        """Whether the bounds allow nothing but equal blocks."""
        return any(bound is not None and not np.any(bound) for bound in (self.max_relative_error, self.max_token_error))

    @property
    def finds_other_text(self) -> bool:
        """Whether blocks of other text may be served, and signatures of blocks are taken."""
        return self.enabled and self.candidates != "tokens"

    @property
    def writes_directions(self) -> bool:
        """Whether directions that blocks share are written to pages of their own."""
        return self.enabled and self.directions == "written"

    @property
    def signs(self) -> bool:
        """Whether signatures of blocks are taken; where directions are written, all of a batch are compared."""
        return self.finds_other_text and not self.writes_directions

    @property
    def directions_obstacle(self) -> str | None:
        """Which option directions do not go with, and what to set instead; None if they go."""
        problems = {
            "own_norms=false: a direction has no norm; set own_norms=true": not self.own_norms,
            "candidates=tokens: equal text needs none; set candidates=signature or both": self.candidates == "tokens",
            "a profile, which was calibrated without them; leave one of them out": self.profile is not None,
        }
        return next((problem for problem, present in problems.items() if present), None)

    @property
    def unbounded(self) -> bool:
        """Whether blocks of other text may be served whatever the error."""
        return self.finds_other_text and self.max_relative_error is None and self.max_token_error is None

    @property
    def unbounded_by(self) -> str:
        """The option that makes it so."""
        return "policy=paper" if self.policy == "paper" else "max_relative_error=null"

    @property
    def reuse_obstacle(self) -> str | None:
        """Why reuse cannot keep its promise, or was not written for the other options; None if it can."""
        problems = {
            f"layer_groups={self.layer_groups}; it works with one block table": self.layer_groups > 1,
            f"scope={self.scope}; text of the same request is never reused": self.scope == "chunk",
            "max_relative_error=null; without a bound there is nothing to promise": self.max_relative_error is None,
            "candidates=signature; what is reused is found by its text": self.candidates == "signature",
            "own_norms; a page that was not computed has no norms of its own": self.own_norms,
        }
        return next((problem for problem, present in problems.items() if present), None)

    @property
    def shares_reading(self) -> bool:
        """Whether pages are to be read once for all requests, always or where it is faster."""
        return self.own_norms or self.attention != "engine"

    @property
    def adapts(self) -> bool:
        """Whether bounds move; without a bound of a kind there is nothing to move."""
        return self.adapt and self.profile is not None and None not in (self.max_relative_error, self.max_token_error)

    def load_profile(self) -> Profile | None:
        """The profile, if one was given. Raises `BadInput`."""
        return None if self.profile is None else Profile.load(self.profile)

    def fusion_policy(self) -> FusionPolicy:
        """The decision rule these options stand for. Raises `InvalidPolicy`."""
        shared = {field.name for field in dataclasses.fields(FusionPolicy)} & type(self).model_fields.keys()
        representative = "direction" if self.directions == "written" else "resident"
        return FusionPolicy(**self.model_dump(include=shared), representative=representative)


def read_value(text: str) -> Any:
    """The value of an option as it stands on a command line: JSON, or else the text itself."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _is_file(path: Path | None) -> bool:
    try:
        return path is not None and path.expanduser().is_file()
    except (OSError, RuntimeError, ValueError):  # no name of a file at all, or of no user: whoever opens it says so
        return False


def _with_paper(options: dict[str, Any]) -> dict[str, Any]:
    """`options` with those of the paper's method, but for groups of layers, which depend on the model.

    Raises:
        BadInput: options that it does not go with.
    """
    if options.get("profile") is not None:
        raise BadInput("jointkv: policy=paper has no bounds, and a profile has nothing else; leave one of them out")
    skipped = any(options.get(name, Paper.defaults[name]) for name in SKIPPED_LAYERS)
    if skipped and options.get("layer_groups", 1) == 1:
        raise BadInput(
            "jointkv: policy=paper leaves out the first and last two layers, which takes block tables of their own: "
            "set layer_groups to half the number of the model's layers, or skip_first_layers and skip_last_layers to 0"
        )
    preset = {name: value for name, value in Paper.defaults.items() if name != "layer_groups"}
    return {**preset, **PAPER_SEARCH, **options}


def _with_profile(options: dict[str, Any]) -> dict[str, Any]:
    """`options` with those of their profile. Raises `BadInput` for one that changes what the bounds were chosen for."""
    path = str(options["profile"])
    if any(options.get(name) for name in SKIPPED_LAYERS):
        raise BadInput(f"jointkv: {path} was calibrated with all layers; leave {' and '.join(SKIPPED_LAYERS)} out")
    calibrated = Profile.load(path).options()
    for name in ("layer_groups", "scope", "chunk_tokens", "across_layers"):
        if name in options and options[name] != calibrated[name]:
            raise BadInput(f"jointkv: {path} was calibrated with {name}={calibrated[name]}, not {options[name]}")
    return {**calibrated, **options}
