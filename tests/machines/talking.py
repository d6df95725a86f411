"""Random operations on caches of a pool, by the public interface alone, and what is true after each."""

from __future__ import annotations

import contextlib
import copy
import gc
import itertools
import random
from collections import Counter
from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jointkv.errors import PoolFull, UnsupportedUse
from jointkv.hf import JointCache, JointPool
from jointkv.hf.reuse import ReuseOptions
from jointkv.policy import FusionPolicy
from jointkv.policy.reuse import ReuseRule
from tests.hf.reusing import padded, text
from tests.hf.tiny_models import BLOCK
from tests.machines.answers import FIXED, KINDS, MIXED, Distance, Talk, compare_states, positions_of

ROUNDING = {
    "logits": {torch.float32: 1e-4, torch.bfloat16: 0.2},
    "states": {torch.float32: 1e-5, torch.bfloat16: 0.02},
}
"""How far from the true numbers, over the largest of them: in logits transformers' own cache, token by token, is up to
3e-5 and 0.08 from a whole prompt. What was measured here is in the table of hazards."""

DOCUMENTS = [text(10 * BLOCK, seed) for seed in (1, 2)]
KEYS: tuple[Hashable, ...] = (*[""] * 6, "one", ("two", 3))
MOST_TALKS, LONGEST = 6, 110
MODES = (torch.no_grad, torch.inference_mode, torch.enable_grad)

POLICIES: dict[str, dict[str, Any]] = {
    "signatures": {},
    "tokens": {"candidates": "tokens"},
    "both": {"candidates": "both", "across_layers": "max"},
    "per layer": {"layer_groups": "per_layer"},
    "chunks too": {"scope": "both", "chunk_tokens": 2 * BLOCK},
    "directions": {"representative": "direction", "similarity": "key"},
}
REUSING = ("signatures", "tokens", "both")


class Broken(Exception):
    """What the model fails with."""


class Talking:
    """Talks on one pool, or on two of one model.

    Attributes:
        model, plain: alike; the plain one knows nothing of pools.
        near: how far from the truth answers and states have been.
        tally: what has happened.
        done: every operation, for whoever reads of a failure.
    """

    def __init__(self, seed: int, kind: str, folder: Path, tally: Counter[str]) -> None:
        self.random, self.folder, self.tally = random.Random(seed), folder, tally
        torch.manual_seed(seed)
        self.kind, self.model, self.plain = kind, KINDS[kind](), KINDS[kind]()
        self.near = {name: Distance(allowed[self.model.dtype]) for name, allowed in ROUNDING.items()}
        self.done: list[str] = []
        self.described: list[Any] = []
        self.pools = [self._pool() for _ in range(self.random.choice([1, 1, 2]))]
        self.talks: list[Talk] = []
        self._names = itertools.count()

    def _pool(self) -> JointPool:
        """A pool whose bounds nothing but equal text is within; a few audits earn its licence."""
        any_of = self.random.choice
        close = 1e-3 if self.model.dtype == torch.float32 else 0.03
        mode = "off" if self.kind in MIXED else any_of(["probed", "probed", "licensed", "off"])
        name = any_of([*POLICIES] if mode == "off" else REUSING)
        cosine = {"key_threshold": 1 - close**2} if name == "directions" else {}
        policy = FusionPolicy(max_relative_error=close, max_token_error=close, **POLICIES[name], **cosine)
        rule = ReuseRule(
            least=any_of([1, 2, 3]),
            sources=any_of([1, 4]),
            witnesses=any_of([0, 1, 2]),
            near=any_of([0.5, 1.0]),
            echoes=any_of([False, False, True]),
        )
        options = ReuseOptions(
            mode,
            audit_rate=any_of([1e-9, 0.2, 0.2, 1.0]),
            rule=rule,
            moved=self.kind not in FIXED and any_of([True, True, False]),
            miss_rate=0.9,
            confidence=0.5,
            seed=self.random.randrange(100),
        )
        most = any_of([None, None, None, None, 60, 25])
        self.described.append((name, most, options))
        return JointPool(self.model, policy, block_size=BLOCK, max_pages=most, reuse=options)

    def step(self) -> None:
        """One operation, and what must hold after all of them."""
        self.tally["steps"] += 1
        ways = (self.begin, self.say, self.read, self.crop, self.copy, self.select, self.save, self.leave, self.look)
        way = self.random.choices(ways, weights=(10, 4, 4, 3, 2, 2, 2, 3, 1))[0]
        if way == self.begin or not self.talks:
            self.done.append("begin")
            self.begin()
        else:
            talk = self.random.choice(self.talks)
            self.done.append(f"{way.__name__} {self.talks.index(talk)}")
            if talk.ids.shape[1] > LONGEST:
                self.talks.remove(talk)
            else:
                way(talk)
        for pool in self.pools:
            pool.check_integrity()
            assert not pool.faults and pool.stats()["reuse"] != "faulted"

    def end(self) -> None:
        """Nobody holds a page any more when all are gone."""
        for each in self.talks:
            self.check(each)
            del each
        self.talks.clear()
        gc.collect()
        for pool in self.pools:
            pool.check_integrity()
            assert pool.stats()["pages_used"] == 0

    def note(self, **what: object) -> None:
        self.done[-1] += "".join(f", {name} {value}" for name, value in what.items())

    # Beginning.

    def prompt(self) -> Tensor:
        """A header, a part of a document that others have too, and an end; or the beginning of a talk, and an end."""
        any_of = self.random.choice
        if self.talks and any_of([True, False, False]):
            talk = any_of(self.talks)
            row = self.random.randrange(len(talk.ids))
            said = talk.ids[row][talk.mask[row].bool()][: LONGEST // 2]
            return torch.cat((said[: self.random.randint(0, len(said))], text(any_of([1, 2, BLOCK, 9]), 90)))
        header, end = any_of([0, 0, 1, BLOCK, BLOCK, BLOCK + 1, 2 * BLOCK]), any_of([1, 2, BLOCK, 2 * BLOCK])
        start, length = any_of([0, 0, 0, BLOCK, 5]), any_of([3, 5 * BLOCK, 6 * BLOCK + 1, 8 * BLOCK, 10 * BLOCK])
        return torch.cat(
            (
                text(header, 50 + any_of([0, 1, 2, 3])),
                any_of(DOCUMENTS)[start : start + length],
                text(end, 80 + any_of([0, 1, 2, 3])),
            )
        )

    def begin(self) -> None:
        """A cache of new prompts, mostly read before they are computed; perhaps something is generated."""
        any_of = self.random.choice
        while len(self.talks) >= MOST_TALKS:
            del self.talks[self.random.randrange(MOST_TALKS)]
        ids, mask = padded(*(self.prompt() for _ in range(any_of([1, 1, 2, 3]))))
        each = any_of([False, False, False, True])
        key: Any = [any_of(KEYS) for _ in ids] if each else any_of(KEYS)
        pool = any_of(self.pools)
        talk = Talk(JointCache(pool, key), ids, mask, key)
        prefills, mode = any_of([True, True, True, False]), any_of(MODES)
        self.note(pool=self.pools.index(pool), key=key, mode=mode.__name__, prefills=prefills)
        self.note(ids=ids.tolist(), padding=(1 - mask).sum(1).tolist())
        if prefills and not self.prefill(talk, mode):
            return
        self.talks.append(talk)
        self.check(talk)
        if any_of([True, False]):
            self.generate(talk)

    def prefill(self, talk: Talk, mode: Any) -> bool:
        """Whether it went well."""
        pool = talk.cache.pool
        try:
            with self.happening(talk), mode():
                done = talk.cache.prefill(self.model, talk.ids, talk.mask)
        except (PoolFull, Broken, KeyboardInterrupt) as error:
            self.went_wrong(error, pool)
            assert talk.cache.get_seq_length() == 0
            return False
        talk.held = talk.cache.get_seq_length()
        assert talk.held == (0 if pool.stats()["reuse"] == "off" else talk.ids.shape[1] - 1)
        self.tally.update(exact=done.exact > 0, skipped=done.skipped > 0, moved=done.moved > 0)
        self.tally["audited"] += done.audited_blocks > 0
        assert done.missed_blocks == 0, "equal text was beyond the bounds"
        return True

    # Going on.

    def say(self, talk: Talk) -> None:
        """A turn of a chat: something is said, and an answer generated."""
        said = self.prompt()[: self.random.randrange(2 * BLOCK)]
        if talk.ids.shape[1] + len(said) == talk.held:
            said = text(1, 7)
        talk.add(said.expand(len(talk.ids), -1))
        self.generate(talk)

    def generate(self, talk: Talk) -> None:
        """Answers of the cache are given to the plain model, whatever it would have chosen itself."""
        start, new = talk.ids.shape[1], self.random.randint(1, 2 * BLOCK)
        self.note(generates=new)
        try:
            with recording(self.model) as given:
                answer = self.model.generate(
                    input_ids=talk.ids,
                    attention_mask=talk.mask,
                    past_key_values=talk.cache,
                    max_new_tokens=new,
                    do_sample=self.random.random() < 0.3,
                    return_dict_in_generate=True,
                    output_logits=True,
                )
        except PoolFull as error:
            self.went_wrong(error, talk.cache.pool)
            talk.add(torch.cat([talk.ids[:, :0], *given[1:]], 1))  # what it had generated before
            talk.cut(talk.cache.get_seq_length())
            talk.held = talk.ids.shape[1]
            self.check(talk)
            return
        assert torch.equal(answer.sequences[:, :start], talk.ids)
        talk.add(answer.sequences[:, start:])
        talk.held = talk.cache.get_seq_length()
        assert talk.held == talk.ids.shape[1] - 1
        self.tally["generated"] += new
        self.compare(talk, torch.stack(answer.logits, 1), start - 1)
        self.check(talk)

    def read(self, talk: Talk) -> None:
        """Forward passes without `generate`; perhaps with tokens that are not to be attended."""
        any_of, rows = self.random.choice, len(talk.ids)
        chunks = [self.random.randint(1, 7) for _ in range(any_of([1, 2, 3]))]
        seed, new = self.random.randrange(6), sum(chunks)
        ids = text(new, seed).repeat(rows, 1) if seed % 2 else text(rows * new, seed).view(rows, new)
        mask = torch.ones_like(ids)
        if any_of([True, False, False]):
            first = self.random.randrange(new)
            mask[self.random.randrange(rows), first : first + any_of([1, 4])] = 0
        talk.add(ids, mask)
        embedded, mode = any_of([True, False, False]), any_of(MODES)
        self.note(seed=seed, chunks=chunks, mask=mask.tolist(), embedded=embedded, mode=mode.__name__)
        ends = [talk.held, *(talk.ids.shape[1] - sum(chunks[i + 1 :]) for i in range(len(chunks)))]
        with self.happening(talk):
            for start, end in itertools.pairwise(ends):
                if not self.forward(talk, start, end, embedded, mode):
                    return

    def forward(self, talk: Talk, start: int, end: int, embedded: bool, mode: Any) -> bool:
        """Give the columns `start` to `end` to the model; whether the pool had room. What broke off is repeated."""
        new, mask = talk.ids[:, start:end], talk.mask[:, :end]
        inputs = {"inputs_embeds": self.model.get_input_embeddings()(new)} if embedded else {"input_ids": new}
        inputs.update(attention_mask=mask, position_ids=positions_of(mask)[:, start:])
        for _ in range(3):
            try:
                with mode():
                    logits = self.model(**inputs, past_key_values=talk.cache).logits
                break
            except (PoolFull, Broken, KeyboardInterrupt) as error:
                self.went_wrong(error, talk.cache.pool)
                assert isinstance(error, KeyboardInterrupt) or talk.cache.get_seq_length() == start
                if isinstance(error, PoolFull):
                    talk.cut(start)
                    return False
            except UnsupportedUse as error:  # asks for the tokens that the interrupt has cost
                assert "interrupted" in str(error) and talk.cache.get_seq_length() == start
        talk.held = end
        self.compare(talk, logits, start)
        self.check(talk)
        return True

    # Operations on whole caches.

    def crop(self, talk: Talk) -> None:
        """The last tokens go from the cache, and from the text too, or are read again."""
        tokens = self.random.choice([0, 1, 2, 3, 5, 8, *[self.random.randint(0, talk.held)] * 5])
        keep = max(0, talk.held - tokens)
        positive = keep > 0 and self.random.random() < 0.5
        self.note(keep=keep, positive=positive)
        try:
            talk.cache.crop(keep if positive else keep - talk.held)
        except RuntimeError as error:  # what has left the window is nowhere any more
            assert "sliding window" in str(error) and self.kind in MIXED and talk.cache.get_seq_length() == talk.held
            return
        assert talk.cache.get_seq_length() == keep
        talk.held = keep
        if self.random.random() < 0.5:
            talk.cut(keep)
        self.tally["cropped"] += 1
        self.check(talk)

    def copy(self, talk: Talk) -> None:
        if len(self.talks) < MOST_TALKS:
            self.talks.append(talk.twin(copy.deepcopy(talk.cache)))
            self.tally["copied"] += 1
            self.check(self.talks[-1])

    def select(self, talk: Talk) -> None:
        """Rows go, are repeated, or change places."""
        if not talk.held:
            return
        count, way = len(talk.ids), self.random.choice(["select", "reorder", "repeat"])
        rows = [self.random.randrange(count) for _ in range(self.random.randint(1, 4))]
        if way == "select":
            talk.cache.batch_select_indices(torch.tensor(rows))
        elif way == "reorder":
            rows = (rows * count)[:count]
            talk.cache.reorder_cache(torch.tensor(rows))
        else:
            repeats = 1 + (count <= 2)
            rows = [row for row in range(count) for _ in range(repeats)]
            talk.cache.batch_repeat_interleave(repeats)
        self.note(way=way, rows=rows)
        talk.select(rows)
        self.tally["selected"] += 1
        self.check(talk)

    def save(self, talk: Talk) -> None:
        """A loaded one goes on beside the saved one, under the same key or another, in the same pool or another."""
        pool, key = self.random.choice(self.pools), self.random.choice([None, *KEYS])
        if not talk.held or talk.old or len(self.talks) == MOST_TALKS or pool.groups != talk.cache.pool.groups:
            return
        path = self.folder / f"{next(self._names)}.safetensors"
        talk.cache.save(path)
        self.note(pool=self.pools.index(pool), key=key)
        try:
            cache = JointCache.load(path, pool, *([] if key is None else [key]))
        except PoolFull as error:
            self.went_wrong(error, pool)
            return
        finally:
            path.unlink()
        other = talk.twin(cache)
        self.talks.append(other)
        self.tally["loaded"] += 1
        self.check(other)

    def leave(self, talk: Talk) -> None:
        """Talks end, one way or another."""
        how = self.random.choice(["dropped", "dropped", "dropped", "left to the collector", "reset", "other weights"])
        if how == "other weights" and self.random.random() < 0.7:
            how = "dropped"
        self.note(how=how)
        if how == "other weights":
            self.change_weights(stay=self.random.random() < 0.5)
        elif how == "reset":
            talk.cache.reset()
            talk.held, talk.old = 0, False
            assert talk.cache.get_seq_length() == 0
        if how in ("dropped", "left to the collector") or (how == "reset" and isinstance(talk.keys, list)):
            self.talks.remove(talk)
        if how == "left to the collector":
            talk.cache.circle = talk
        self.tally[how] += 1

    def look(self, _talk: Talk) -> None:
        if self.random.random() < 0.5:
            gc.collect()
        for talk in self.talks:
            self.check(talk)

    @torch.no_grad()
    def change_weights(self, stay: bool) -> None:
        """What began before is known by nobody any more, and must serve nobody else."""
        for model in (self.model, self.plain):
            model.get_input_embeddings().weight[2::2] *= -1  # a norm would take out the size
        for talk in self.talks:
            talk.forget()
            talk.old = talk.old or talk.held > 0
        if not stay:
            self.talks = [talk for talk in self.talks if not talk.old]

    # What happens meanwhile, and what is looked at afterwards.

    @contextlib.contextmanager
    def happening(self, talk: Talk) -> Iterator[None]:
        """In the middle of forward passes: another talk goes, and the model fails, by an error or an interrupt."""
        any_of = self.random.choice
        dropped, fails = any_of([None, None, 0, 1, 2]), any_of([None, None, None, None, 0, 1, 2])
        error, calls = any_of([KeyboardInterrupt, Broken]), itertools.count()
        self.note(dropped=dropped, fails=fails, error=error.__name__)

        def before(*_: object) -> None:
            call = next(calls)
            others = [other for other in self.talks if other is not talk]
            if call == dropped and others:
                self.talks.remove(any_of(others))
                self.tally["dropped meanwhile"] += 1
            others.clear()
            if call == fails:
                raise error

        attention = next(part for name, part in self.model.named_modules() if name.endswith(("self_attn", ".attn")))
        hook = attention.register_forward_pre_hook(before)
        try:
            yield
        finally:
            hook.remove()

    def went_wrong(self, error: BaseException, pool: JointPool) -> None:
        assert not isinstance(error, PoolFull) or pool.max_pages is not None
        names = {PoolFull: "full", KeyboardInterrupt: "interrupted", Broken: "broke off"}
        self.tally[names[type(error)]] += 1

    def compare(self, talk: Talk, logits: Tensor, start: int) -> None:
        """`logits [rows, n, vocabulary]` of the columns from `start` on."""
        if not talk.old:
            true, end = talk.true(self.plain)[0], start + logits.shape[1]
            self.near["logits"].compare(logits.detach(), true[:, start:end], talk.mask[:, start:end].bool(), "logits")

    def check(self, talk: Talk) -> None:
        if talk.held and not talk.old:
            compare_states(talk, self.plain, self.near["states"])


@contextlib.contextmanager
def recording(model: torch.nn.Module) -> Iterator[list[Tensor]]:
    """What the model is given in each forward pass."""
    given: list[Tensor] = []
    hook = model.register_forward_pre_hook(lambda _, __, inputs: given.append(inputs["input_ids"]), with_kwargs=True)
    try:
        yield given
    finally:
        hook.remove()
