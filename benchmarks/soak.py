"""Soak: a served engine at a full pool under random load for a long time; whatever an operator would mind is counted.

Run it in the environment with vLLM: `.venv-vllm/bin/python benchmarks/soak.py --minutes 20`. The server is a process
of its own, as started by `jointkv serve`, with a small random model: what is tested is bookkeeping, and a small model
brings a hundred times as many requests, merges and preemptions in the same time as SmolLM2. `--model` takes another.

Two arms: `lossy` has the default bounds; `exact` fuses equal blocks only (four layer groups, of which the first one
finds many), and every answer must be the one the same prompt gets alone and unfused. A third one, `stock`, is the
engine without the plugin: the control for memory. Exits with 1 on any violation.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from jointkv.bench.environment import server_environment
from jointkv.bench.server import Server, free_port, get, server_command
from jointkv.bench.watch import read
from jointkv.system.files import replace_text
from jointkv.system.machine import allowed_cores, machine, versions
from soak_server import WITNESS
from soak_traffic import Client, Request, Tally, Traffic, load
from soak_watch import drained, keep_samples, memory_verdict, processes

ARMS: dict[str, dict[str, Any] | None] = {
    "lossy": {"check_integrity": True},
    "exact": {"check_integrity": True, "layer_groups": 4, "max_relative_error": 0.0, "max_token_error": 0.0},
    "reuse": {"check_integrity": True, "reuse": "probed", "reuse_audit_rate": 0.05},
    "stock": None,
}
POOL_TOKENS, BLOCK_SIZE, MAX_MODEL_LEN, MAX_NUM_SEQS, IN_FLIGHT = 3072, 32, 512, 24, 40
CONTEXT = 0.05
"""What attention adds to a token of the random model: little, so that near-equal prompts have near-equal K and V."""

WARM_UP = 0.25
"""Part of the time before memory is looked at."""

REUSE = ("prompt_tokens_skipped", "reuse_runs", "reuse_helpers", "reuse_audits")
"""Counters of reuse before compute."""

NEAR_TIE = 1e-3
"""Where the first differing token had nearly the log-probability of the best one, rounding in another batch decides."""

Violations = dict[str, int]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=20.0, help="of load on every arm")
    parser.add_argument("--arm", choices=ARMS, action="append", help="may be repeated; default: lossy and exact")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", help="a folder with a model of at least 512 words; default: small and random")
    parser.add_argument("--output", type=Path, default=Path("out/soak.json"), help="file for the result, as JSON")
    arguments = parser.parse_args()
    result: dict[str, Any] = {
        "benchmark": "soak",
        "command": " ".join(["soak.py", *sys.argv[1:]]),
        "machine": machine(),
        "versions": versions(),
        "minutes": arguments.minutes,
        "seed": arguments.seed,
        "model": arguments.model or "random Llama",
        "arms": {},
    }
    for arm in arguments.arm or ("lossy", "exact"):
        with tempfile.TemporaryDirectory() as folder:
            found = soak(arm, 60 * arguments.minutes, arguments.seed, Path(folder), arguments.model, progress)
        result["arms"][arm] = found
        replace_text(arguments.output, json.dumps(result, indent=1) + "\n")
        print(f"\n{arm}: {json.dumps(found['counts'])}\n  violations: {found['violations']}", flush=True)
    sys.exit(any(sum(found["violations"].values()) for found in result["arms"].values()))


def progress(sample: dict[str, Any]) -> None:
    print(
        f"\r{sample['seconds']:6.0f} s: {sample['running']:.0f} running, {sample['waiting']:.0f} waiting, pool "
        f"{sample['pool_usage']:.0%}, {sample['merged']:.0f} merged, {sample['own_mib']:.0f} MiB ",
        end="",
        flush=True,
    )


def write_model(folder: Path) -> str:
    """The doctor's tiny random model, calmer, with a tokenizer of words w0 to w511."""
    from safetensors.torch import load_file, save_file
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from jointkv.vllm_plugin.doctor.trial import TINY_MODEL, write_tiny_model

    write_tiny_model(folder)
    file = folder / "model.safetensors"
    weights = load_file(file)
    for name, weight in weights.items():
        if "o_proj" in name:
            weight.mul_(CONTEXT)
    save_file(weights, file, {"format": "pt"})
    words = {f"w{number}": number for number in range(TINY_MODEL["vocab_size"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0", eos_token="w1").save_pretrained(folder)
    return str(folder)


def soak(
    arm: str, seconds: float, seed: int, folder: Path, model: str | None, say: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """One arm for `seconds` of load: settings, counts, violations and the timeline."""
    model = model or write_model(folder / "model")
    command = server_command(model, ARMS[arm], engine_flags(arm), "cpu")
    module = command.index("-m")
    command[module : module + 2] = [str(Path(__file__).with_name("soak_server.py"))]
    environment = server_environment(os.environ, {max(allowed_cores())}, 2**30, local_model=True)
    environment |= {WITNESS: str(folder), "VLLM_CPU_CI_ENV": "1", "OMP_NUM_THREADS": "1"}
    with Server(command, environment, free_port(), folder / "server.log") as server:
        server.start()
        found = asyncio.run(Soak(server, arm, model, seconds, seed, folder, say).run())
        running = server.processes()
        server.stop()
        _, left = psutil.wait_procs(running, timeout=10)
    found["violations"]["processes_left"] = sum(process.status() != psutil.STATUS_ZOMBIE for process in left)
    found["settings"] = {"fusion": ARMS[arm], "flags": engine_flags(arm), "in_flight": IN_FLIGHT, "seconds": seconds}
    return found


def engine_flags(arm: str) -> list[str]:
    """Flags of `vllm serve`: a pool that holds a handful of requests, and prompts that come in chunks."""
    pages = POOL_TOKENS // BLOCK_SIZE * (ARMS[arm] or {}).get("layer_groups", 1)
    flags = f"--dtype float32 --enforce-eager --block-size {BLOCK_SIZE} --num-gpu-blocks-override {pages}"
    flags += " --enable-scale-out"  # where the endpoint for aborts is
    flags += f" --max-model-len {MAX_MODEL_LEN} --max-num-seqs {MAX_NUM_SEQS} --max-num-batched-tokens 256"
    return flags.split()


class Soak:
    """One arm on a running server."""

    def __init__(
        self,
        server: Server,
        arm: str,
        model: str,
        seconds: float,
        seed: int,
        witness: Path,
        say: Callable[[dict[str, Any]], None],
    ) -> None:
        self.server, self.arm, self.model, self.seconds, self.say = server, arm, model, seconds, say
        self.seed, self.witness = seed, witness
        self.traffic, self.tally = Traffic(seed), Tally(seed, max(24, min(200, int(seconds / 6))))
        self.draw = random.Random(seed + 1)
        self.resets = 0

    async def run(self) -> dict[str, Any]:
        connections = aiohttp.TCPConnector(limit=0, force_close=True)
        async with aiohttp.ClientSession(connector=connections, timeout=aiohttp.ClientTimeout()) as session:
            client = Client(self.server.url, self.model, session)
            await load(client, self.traffic, self.tally, WARM_UP * self.seconds, IN_FLIGHT, self.draw)
            await drained(self.server)
            at_rest = processes(self.server)
            samples = await self._load(client)
            await drained(self.server)
            rest_again = processes(self.server)
            # Steps of these bring the last counts into the metrics.
            compared = await self._compare(client)
            emptied = await self._emptied(client)
        metrics = read(self.server.url)
        witness: Counter[str] = Counter()
        for file in sorted(self.witness.glob("*.json")):
            witness.update(json.loads(file.read_text()))
        memory = memory_verdict(samples)
        violations = {
            "faults": int(metrics.get("jointkv_faults_total", 0)),
            "lost_requests": self.tally.ended["lost"],
            "cross_salt": witness["cross_salt"] + witness["readers_of_two_salts"],
            "opted_out_shared": witness["opted_out"],
            "beyond_bound": witness["beyond_bound"],
            "unseen_merges": abs(int(metrics.get("jointkv_blocks_merged_total", 0)) - witness["merges"]),
            "unequal_answers": compared["unequal"] if self.arm != "lossy" else 0,
            "not_drained": int(not emptied),
            "memory_grows": int(memory["judged"] and not memory["flat"]),
            "more_files": max(0, rest_again["files"] - at_rest["files"]),
            "more_threads": max(0, rest_again["threads"] - at_rest["threads"]),
            **self._said(),
        }
        return {
            "violations": violations,
            "counts": self._counts(metrics, witness, samples),
            "compared": compared,
            "memory": {**memory, "at_rest_before": at_rest, "at_rest_after": rest_again},
            "lost": self.tally.lost[:20],
            "samples": samples,
        }

    async def _load(self, client: Client) -> list[dict[str, Any]]:
        samples: list[dict[str, Any]] = []
        every = max(0.5, self.seconds / 240)
        beside = [
            asyncio.create_task(keep_samples(self.server, every, samples, self.say)),
            asyncio.create_task(self._reset_now_and_then(client)),
        ]
        await load(client, self.traffic, self.tally, (1 - WARM_UP) * self.seconds, IN_FLIGHT, self.draw)
        for task in beside:
            task.cancel()
        ended = await asyncio.gather(*beside, return_exceptions=True)
        for error in ended:
            if not isinstance(error, asyncio.CancelledError):
                raise RuntimeError("the soak itself failed") from (error if isinstance(error, Exception) else None)
        return samples

    async def _reset_now_and_then(self, client: Client) -> None:
        """Empty the prefix cache, half of the times with all that runs being preempted; else it may be refused."""
        gap = min(15.0, max(4.0, self.seconds / 8))
        while True:
            await asyncio.sleep(self.draw.expovariate(1 / gap))
            running = str(self.draw.random() < 0.5).lower()
            answer = await client.post(f"/reset_prefix_cache?reset_external=true&reset_running_requests={running}")
            self.resets += answer["success"]

    async def _compare(self, client: Client) -> dict[str, Any]:
        """Sampled requests again, alone, unfused and under a salt of their own."""
        found = {"requests": 0, "equal": 0, "near_ties": 0, "unequal": 0, "tokens": 0, "tokens_before_a_difference": 0}
        for number, (request, answer) in enumerate(self.tally.finished):
            alone = Request(f"alone-{number}", "", request.prompt, request.out, f"alone-{number}", True, "whole", 1)
            body = {**alone.body(self.model), "logprobs": 2, "return_tokens_as_token_ids": True}
            (choice,) = (await client.post("/v1/completions", body))["choices"]
            pairs = enumerate(zip(answer, choice["token_ids"], strict=True))
            place = next((place for place, (served, own) in pairs if served != own), None)
            kind = "equal" if place is None else "unequal"
            if place is not None and near_tie(choice["logprobs"]["top_logprobs"][place], answer[place]):
                kind = "near_ties"
            found[kind] += 1
            found["requests"] += 1
            found["tokens"] += len(answer)
            found["tokens_before_a_difference"] += len(answer) if place is None else place
        return found

    async def _emptied(self, client: Client) -> bool:
        """Whether no page is held: then vLLM empties its prefix cache, which it refuses otherwise."""
        await drained(self.server)
        return bool((await client.post("/reset_prefix_cache?reset_external=true"))["success"])

    def _said(self) -> Violations:
        """Salts and prompts in the log and in the metrics, and errors in the log."""
        log = self.server.log_file.read_text(errors="replace")
        written = log + get(f"{self.server.url}/metrics").decode()
        prompts = [request.prompt[:4] for request, _ in self.tally.finished if len(request.prompt) > 3]
        texts = [" ".join(f"w{token}" for token in start) for start in prompts] + [
            str(start)[1:-1] for start in prompts
        ]
        secrets = [salt for salt in self.traffic.salts if salt is not None] + texts
        # The command line is logged at the start, before anybody has asked anything.
        return {
            "secrets_told": sum(secret in written for secret in secrets),
            "errors_logged": len(re.findall(r"^\S* ?ERROR |^Traceback", log, re.MULTILINE)),
        }

    def _counts(
        self, metrics: dict[str, float], witness: dict[str, float], samples: list[dict[str, Any]]
    ) -> dict[str, Any]:
        full = [one["pool_usage"] >= 0.9 or one["waiting"] > 0 for one in samples]
        return {
            "requests": sum(self.tally.sent.values()),
            "tokens_received": self.tally.tokens,
            "sent": dict(self.tally.sent),
            "ended": dict(self.tally.ended),
            "preemptions": int(metrics["vllm:num_preemptions_total"]),
            "prefix_hit_tokens": int(metrics.get("vllm:prefix_cache_hits_total", 0)),
            "prefix_resets": self.resets,
            "pool_full": round(sum(full) / max(1, len(full)), 3),
            "considered": int(metrics.get("jointkv_blocks_considered_total", 0)),
            "rejected": {
                name.partition(".")[2]: int(value)
                for name, value in metrics.items()
                if name.startswith("jointkv_blocks_rejected_total.")
            },
            "reuse": {name: int(metrics.get(f"jointkv_{name}_total", 0)) for name in REUSE},
            "witness": witness,
        }


def near_tie(best: dict[str, float], served: int) -> bool:
    """Whether `served` was nearly as likely as the best; `best` are log-probabilities by `token_id:N`."""
    return max(best.values()) - best.get(f"token_id:{served}", -float("inf")) < NEAR_TIE


if __name__ == "__main__":
    main()
