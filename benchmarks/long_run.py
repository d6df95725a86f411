"""Thousands of requests of mixed traffic on one server, at 70, 90 and 110% of what stock vLLM can do.

Run it in the environment with vLLM: `.venv-vllm/bin/python benchmarks/long_run.py --output docs/results/serving`, some
hours with SmolLM2; `--model tiny --requests 200` tries it in minutes on a random model. First a stock server says how
many requests per second it can answer; then one server of the arm gets every load in turn, each with requests of its
own. Recorded are the latency of every request, and over time what runs and waits, the pool, licences and memory; at
the end no page may be in use.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

from jointkv.bench.environment import server_environment
from jointkv.bench.load_generator import drive, spec_of
from jointkv.bench.load_process import Answer
from jointkv.bench.long_run import LongRun, Moment, Phase
from jointkv.bench.requests import Limits, ServingRequest, from_traffic
from jointkv.bench.result import Load, RequestSample
from jointkv.bench.server import Server, ServerFailed, free_port, server_command
from jointkv.bench.watch import POOL_USAGE, read
from jointkv.system.files import replace_text
from jointkv.system.machine import allowed_cores, machine, versions
from soak import write_model
from soak_traffic import Traffic
from soak_watch import processes

ARMS: dict[str, dict[str, Any] | None] = {"reuse": {"reuse": "licensed"}, "fused": {}, "stock": None}
MIX = {"near_prefix": 0.4, "agent_turns_nonce": 0.3, "unrelated": 0.3}
"""Shares of the traffics in that of a real model; that of the random one is the soak's."""

BLOCK_SIZE, MAX_RUNNING = 32, 16
POLL_SECONDS, DRAIN_SECONDS = 2.0, 60.0

BATCH = 100
"""Requests of a traffic that are drawn at a time; the smallest has 156, of which some come again."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2", help="known name or folder; tiny: small and random")
    parser.add_argument("--arm", choices=ARMS, default="reuse")
    parser.add_argument("--requests", type=int, default=2000, help="of every load")
    parser.add_argument("--share", type=float, action="append", help="of stock's capacity; default 0.7, 0.9 and 1.1")
    parser.add_argument("--capacity-requests", type=int, default=100, help="by which stock's capacity is measured")
    parser.add_argument("--output-tokens", type=int, default=32)
    parser.add_argument("--pool-blocks", type=int, help="default 800; 96 for the random model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("out/serving"), help="folder for long_run_ARM.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = LongServer(arguments, Path(folder)).run()
    path = arguments.output / f"long_run_{arguments.arm}.json"
    replace_text(path, json.dumps(result.model_dump()) + "\n")
    for phase in result.phases:
        print(
            f"{phase.share:.0%}: {len(phase.samples)} answered, {phase.failed} failed, TTFT p50 "
            f"{phase.ttft('all', 50):.2f} s, {phase.pages_left} pages left, {phase.grown('rss_mib'):+.0f} MiB"
        )
    print(f"wrote {path}")
    sys.exit(result.pages_held or any(phase.pages_left or phase.failed for phase in result.phases))


class LongServer:
    """What is run on which server."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self.given, self.folder = arguments, folder
        self.tiny = arguments.model == "tiny"
        self.pool_blocks = arguments.pool_blocks or (96 if self.tiny else 800)
        self.model = write_model(folder / "model") if self.tiny else _fetched(arguments.model)
        shares = arguments.share or [0.7, 0.9, 1.1]
        self.shares = shares
        made = self._requests(arguments.capacity_requests + arguments.requests * len(shares))
        self.first, rest = made[: arguments.capacity_requests], made[arguments.capacity_requests :]
        self.parts = [rest[at : at + arguments.requests] for at in range(0, len(rest), arguments.requests)]

    def run(self) -> LongRun:
        """Stock's capacity, then every load."""
        capacity = self._capacity()
        phases = []
        with self._server(self.given.arm) as server:
            server.start()
            for number, (share, requests) in enumerate(zip(self.shares, self.parts, strict=True)):
                phases.append(self._phase(server, share, share * capacity, requests, number))
            held = False
            try:
                server.reset_prefix_cache()
            except ServerFailed:
                held = True
        return LongRun(
            command=" ".join(["long_run.py", *sys.argv[1:]]),
            machine=machine(),
            versions=versions(),
            model=self.given.model,
            traffic="the soak's" if self.tiny else ", ".join(f"{share:.0%} {name}" for name, share in MIX.items()),
            arm=self.given.arm,
            fusion=ARMS[self.given.arm],
            pool_blocks=self.pool_blocks,
            capacity=capacity,
            phases=phases,
            pages_held=held,
        )

    def _capacity(self) -> float:
        """Requests per second of a stock server with as many under way as may run."""
        with self._server("stock") as server:
            server.start()
            load = Load(kind="closed", concurrency=MAX_RUNNING)
            spec = spec_of(server.url, self.model, self.model, load, _without_turns(self.first), self.given.seed)
            found = drive(spec, _progress("stock's capacity", len(self.first)), nullcontext()).requests_per_s
        print(f"\nstock answers {found:.2f} requests per second", flush=True)
        return found

    def _phase(
        self, server: Server, share: float, rate: float, requests: Sequence[ServingRequest], number: int
    ) -> Phase:
        load = Load(kind="poisson", rate=rate)
        spec = spec_of(server.url, self.model, self.model, load, requests, self.given.seed + number)
        moments = Moments(server)
        outcome = drive(spec, _progress(f"{share:.0%}", len(requests)), moments)
        print(flush=True)
        server.require_alive(f"at {share:.0%} of the capacity")
        return Phase(
            share=share,
            rate=rate,
            seconds=outcome.seconds,
            failed=len(outcome.answers) - len(outcome.complete),
            samples=[_short(answer) for answer in outcome.complete],
            moments=moments.found,
            pages_left=round(_drained(server) * (self.pool_blocks - 1)),
        )

    def _server(self, arm: str) -> Server:
        length = 512 if self.tiny else 4096
        flags = f"--dtype float32 --enforce-eager --block-size {BLOCK_SIZE} --max-model-len {length}"
        flags += f" --num-gpu-blocks-override {self.pool_blocks} --max-num-seqs {MAX_RUNNING}"
        flags += f" --max-num-batched-tokens {256 if self.tiny else 2048}"
        environment = server_environment(os.environ, allowed_cores(), 2**31, local_model=True)
        environment |= {"VLLM_CPU_CI_ENV": "1"} if self.tiny else {}
        command = server_command(self.model, ARMS[arm], flags.split(), "cpu")
        return Server(command, environment, free_port(), self.folder / f"{arm}.log")

    def _requests(self, count: int) -> list[ServingRequest]:
        if self.tiny:
            made = (request for several in Traffic(self.given.seed) for request in several)
            return [
                ServingRequest(request.prompt, self.given.output_tokens, salt=request.salt)
                for request, _ in zip(made, range(count), strict=False)
            ]
        from jointkv.hf.models import load_tokenizer

        tokenizer = load_tokenizer(self.given.model)
        limits = Limits(4096, self.pool_blocks, BLOCK_SIZE)

        def endless(name: str) -> Iterator[ServingRequest]:
            """A traffic has so many different requests, and then others by another seed."""
            for batch in itertools.count():
                seed = self.given.seed + batch
                for one in from_traffic(name, tokenizer, BATCH, self.given.output_tokens, seed, limits).requests:
                    yield one if one.session is None else replace(one, session=f"{batch}-{one.session}")

        kinds, draw = [endless(name) for name in MIX], random.Random(self.given.seed)
        return [next(draw.choices(kinds, tuple(MIX.values()))[0]) for _ in range(count)]


class Moments:
    """The server over time, while it is entered."""

    def __init__(self, server: Server) -> None:
        self.found: list[Moment] = []
        self._server, self._done = server, threading.Event()
        self._began = 0.0
        self._thread = threading.Thread(target=self._poll, daemon=True)

    def __enter__(self) -> Self:
        self._began = time.monotonic()
        self._note()
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._done.set()
        self._thread.join()
        self._note()

    def _poll(self) -> None:
        while not self._done.wait(POLL_SECONDS):
            self._note()

    def _note(self) -> None:
        with suppress(OSError):  # a busy server may answer late
            metrics = read(self._server.url)
            memory = processes(self._server)["rss_mib"]
            self.found.append(Moment.of(metrics, time.monotonic() - self._began, memory))


def _short(answer: Answer) -> RequestSample:
    """What is kept of an answer, to a tenth of a millisecond: there are thousands."""
    kept = answer.model_dump(include=set(RequestSample.model_fields))
    return RequestSample(**{name: round(value, 4) if value is not None else None for name, value in kept.items()})


def _drained(server: Server) -> float:
    """The part of the pool that is in use once nothing is, or when the time is over."""
    deadline = time.monotonic() + DRAIN_SECONDS
    while (used := read(server.url)[POOL_USAGE]) and time.monotonic() < deadline:
        time.sleep(0.5)
    return used


def _without_turns(requests: Sequence[ServingRequest]) -> list[ServingRequest]:
    """In a closed loop nobody thinks."""
    return [ServingRequest(each.prompt, each.output_tokens, salt=each.salt) for each in requests]


def _progress(what: str, count: int) -> Any:
    return lambda done: print(f"\r{what}: {done} of {count}", end="", flush=True)


def _fetched(model: str) -> str:
    from jointkv.hf.models import KNOWN_MODELS, fetch_model

    return str(fetch_model(model)) if model in KNOWN_MODELS else model


if __name__ == "__main__":
    main()
