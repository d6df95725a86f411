"""`jointkv` as a model of EleutherAI's lm-evaluation-harness: Hugging Face models on fused KV pages.

    python -m jointkv.evaluate.tasks.lm_eval_model run --model jointkv \
        --model_args pretrained=NAME,policy=safe,max_relative_error=0.1 --tasks gsm8k --batch_size 8

The harness finds a model by name only once its module is imported, hence this entry instead of `lm_eval`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from jointkv.errors import BadInput
from jointkv.evaluate.holding.prefilled import left_padded
from jointkv.hf.cache import JointCache
from jointkv.hf.pool import JointPool
from jointkv.policy import FusionPolicy

_POLICY_FIELDS = frozenset(field.name for field in dataclasses.fields(FusionPolicy))
LikelihoodRequest = tuple[tuple[str, str] | None, list[int], list[int]]


@register_model("jointkv")
class JointKVLM(HFLM):
    """A causal model whose batches share KV pages under a policy.

    Requests are answered in batches of `batch_size`, and only requests of one batch share pages, so the batch size is
    part of the result. Arguments not named here go to `HFLM`.

    Args:
        policy: preset `safe`, `paper` or `off`; any field of `FusionPolicy` may be given beside it.
        block_size: tokens per block.
        max_pages: pages of the pool; without it the pool grows.

    Attributes:
        prompt_references, prompt_pages: blocks of all prompts so far, and the pages that held them; what is decoded
            does not count, and a context that is asked for several times in a batch, such as for each choice, counts
            once.

    Raises:
        BadInput: a batch size that is no number.
        InvalidPolicy, UnsupportedModel: see `FusionPolicy.preset` and `JointPool`.
    """

    def __init__(
        self,
        pretrained: Any,
        *,
        policy: str = "safe",
        block_size: int = 16,
        max_pages: int | None = None,
        batch_size: int | str = 1,
        **options: Any,
    ) -> None:
        if str(batch_size).startswith("auto"):
            raise BadInput("batch_size: give a number; requests share pages inside a batch, so it changes results")
        changes = {name: options.pop(name) for name in _POLICY_FIELDS & options.keys()}
        fusion = FusionPolicy.preset(policy, **changes)
        super().__init__(pretrained, batch_size=int(batch_size), **options)
        self.pool = JointPool(self.model, fusion, block_size=block_size, max_pages=max_pages)
        self.prompt_references = self.prompt_pages = 0

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **options: Any) -> Tensor:
        cache = JointCache(self.pool)
        written = super()._model_generate(context, max_length, stop, past_key_values=cache, **options)
        lengths = context.shape[1] - cache.padding
        for table in cache.tables:
            table.truncate(-(-lengths // self.pool.block_size))
        # Beams of a context follow each other, and no beam nor repeated context counts as sharing.
        beams = len(cache.padding) // len(context)
        distinct = {tuple(row): index * beams for index, row in enumerate(context.tolist())}
        cache.batch_select_indices(torch.tensor(sorted(distinct.values())))
        self._count(cache)
        return written

    def _loglikelihood_tokens(
        self, requests: Sequence[LikelihoodRequest], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Sum of log-probabilities of each continuation, and whether greedy decoding would give it."""
        size = override_bs or self.batch_size
        scores: list[tuple[float, bool]] = []
        for first in range(0, len(requests), size):
            part = requests[first : first + size]
            scores += self._continuations([(context, continuation) for _, context, continuation in part])
            for (texts, _, _), score in zip(part, scores[first:], strict=True):
                if texts is not None:
                    self.cache_hook.add_partial("loglikelihood", texts, score)
        return scores

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Not offered: it scores whole texts without anything before them, so no fused block would be read."""
        raise NotImplementedError(
            "rolling log-likelihood has no prompt whose KV could be fused; use `jointkv evaluate` with --traffic"
        )

    @torch.inference_mode()
    def _continuations(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """Prefill and fuse all but the last token of each distinct context, then feed it and the continuations."""
        prompts = [tuple((context + given)[-(self.max_length + 1) :][: -len(given)]) for context, given in pairs]
        if not all(prompts):
            raise BadInput(f"a continuation of {self.max_length} tokens or more leaves no room for its context")
        cache = JointCache(self.pool)
        distinct = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
        ids, mask = left_padded([prompt[:-1] for prompt in distinct], pad=0)
        if ids.shape[1]:
            self._forward(cache, ids, mask, (mask.cumsum(1) - 1).clamp(min=0), logits_to_keep=1)
            self._count(cache)
        asked = torch.tensor([distinct[prompt] for prompt in prompts])
        cache.batch_select_indices(asked)
        mask = mask[asked]
        rows = [[prompt[-1], *given[:-1]] for prompt, (_, given) in zip(prompts, pairs, strict=True)]
        width = max(map(len, rows))
        # Padding on the right is read by nothing that is scored.
        fed = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        places = mask.sum(1, keepdim=True) + torch.arange(width)
        logits = self._forward(cache, fed, torch.cat((mask, torch.ones_like(fed)), 1), places)
        scores = []
        for row, (_, given) in zip(logits.float().log_softmax(-1), pairs, strict=True):
            row, target = row[: len(given)], torch.tensor(given, device=row.device)
            true = row.gather(1, target[:, None])
            scores.append((float(true.sum()), bool((row.argmax(-1) == target).all())))
        return scores

    def _forward(self, cache: JointCache, ids: Tensor, mask: Tensor, positions: Tensor, **options: Any) -> Tensor:
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        moved = {name: tensor.to(self.device) for name, tensor in inputs.items()}
        return self.model(**moved, past_key_values=cache, use_cache=True, **options).logits

    def _count(self, cache: JointCache) -> None:
        self.prompt_references += cache.references
        self.prompt_pages += cache.pages

    def get_model_info(self) -> dict[str, Any]:
        """What `HFLM` says, and the policy with the pages that prompts took under it."""
        held = {"prompt_references": self.prompt_references, "prompt_pages": self.prompt_pages}
        fused = {"policy": dataclasses.asdict(self.pool.policy), "block_size": self.pool.block_size, **held}
        return {**super().get_model_info(), "jointkv": {**fused, "fusion": self.pool.stats()["fusion"]}}


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
