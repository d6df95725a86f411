"""From a log of one's own to a bound that fits it: advice first, then a calibrated profile, then a pool with it.

    python examples/calibrate_own_log.py [LOG.jsonl [MODEL]]

Every line of the log has `prompt` (or `messages`) and `answer`. Without a log one is made of packaged requests.
"""

import json
import sys
import tempfile
from pathlib import Path

from jointkv.evaluate.advise.run import Settings, advise
from jointkv.evaluate.calibrate.run import Calibration, TargetUnmet
from jointkv.evaluate.calibrate.settings import CalibrationSettings
from jointkv.evaluate.request_files import prompt_tokens, read_requests
from jointkv.evaluate.traffic import Request
from jointkv.evaluate.traffic.gsm8k import load_problems
from jointkv.hf import JointPool
from jointkv.hf.identity import model_identity
from jointkv.hf.models import load_model
from jointkv.policy.profile import Profile, Target
from jointkv.system.machine import versions

REQUESTS, SCORED_TOKENS = 16, 8


def main(log: str | None = None, model_name: str = "smollm2", target: str = "kl=0.01") -> Profile | None:
    """Advise, calibrate, use; returns the profile, or None where the target cannot be met."""
    model, tokenizer = load_model(model_name, dtype="float32")
    log = log or sample()

    advice = advise(log, model_name, tokenizer, Settings(), lambda done: None)
    print(f"{advice.share(advice.exact_tokens):.0%} exact, {advice.share(advice.same_tokens):.0%} at the same position")
    for found in advice.breaks:
        print(f"{found.says} at token {found.token}: {found.advice} (+{found.gain_share:.0%})")

    requests = []
    for row in read_requests(log, REQUESTS):
        answer = tokenizer(row.answer, add_special_tokens=False)["input_ids"][:SCORED_TOKENS]
        requests.append(Request(prompt_tokens(tokenizer, row), tuple(answer), row.prompt or ""))
    calibration = Calibration(model, requests, CalibrationSettings(Target.parse(target)))
    try:
        profile = calibration.run(model_identity(model), log, versions())
    except TargetUnmet as unmet:
        print(unmet)
        return None
    file = Path(tempfile.gettempdir()) / "my-profile.json"
    file.write_text(profile.to_json())
    pool = JointPool(model, Profile.load(file))
    print(f"{file}: predicted ratio {profile.predicted.ratio:.2f}, a pool of blocks of {pool.block_size} uses it")
    return profile


def sample() -> str:
    """A log of requests that share two worked examples behind a line of their own."""
    problems = load_problems()
    shared = "\n\n".join(problem.worked for problem in problems[:2])
    rows = [
        {
            "prompt": f"Ticket {7919 * (number + 13)}.\n{shared}\n\nQuestion: {problem.question}\nAnswer:",
            "answer": problem.answer,
        }
        for number, problem in enumerate(problems[2 : 2 + REQUESTS])
    ]
    file = Path(tempfile.mkdtemp()) / "log.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


if __name__ == "__main__":
    main(*sys.argv[1:3])
