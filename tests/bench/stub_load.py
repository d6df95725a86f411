"""Stands in for `jointkv.bench.load_process`: really sends, one request after the other, without vLLM."""

import json
import sys
import time
import urllib.request


def send(spec, prompt, tokens):
    body = {"prompt": prompt, "max_tokens": tokens, "stream": True}
    arrivals, text = [time.perf_counter()], ""
    asked = urllib.request.Request(
        f"{spec['url']}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(asked, timeout=30) as response:
        for line in response:
            if line.startswith(b"data: {") and (choices := json.loads(line[6:])["choices"]):
                arrivals.append(time.perf_counter())
                text += choices[0]["text"]
    start, first, *rest = arrivals
    itls = [later - earlier for earlier, later in zip([first, *rest], rest, strict=False)]
    return {
        **{"start": start, "prompt_tokens": len(prompt), "output_tokens": tokens, "text": text, "error": None},
        **{"ttft": first - start, "itls": itls, "itl": sum(itls) / len(itls) if itls else None},
        "e2el": arrivals[-1] - start,
    }


def say(**message):
    print(json.dumps(message), flush=True)


spec = json.loads(sys.stdin.readline())
say(ready=True)
assert sys.stdin.readline() == "go\n"
began, answers = time.perf_counter(), []
for prompt, tokens, _ in spec["requests"]:
    answers.append(send(spec, prompt, tokens))
    say(finished=len(answers))
seconds, made = time.perf_counter() - began, sum(answer["output_tokens"] for answer in answers)
for answer in answers:
    answer["start"] -= began
rates = {"requests_per_s": len(answers) / seconds, "total_tokens_per_s": made / seconds}
rates |= {"output_tokens_per_s": made / seconds}
say(outcome={"began": began, "seconds": seconds, "answers": answers, "cpu_seconds": 0.0, **rates})
