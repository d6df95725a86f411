"""An agent whose prompts begin with a request number: its tools and history are read again, not computed again.

    python examples/agent_behind_a_nonce.py [MODEL]

No prefix of two prompts is equal, so a prefix cache finds nothing. The tools stand at the same place behind another
number, and so does the history: both are resident, and all but the gaps is skipped.
"""

import random
import sys

import torch

from jointkv.hf import JointCache, JointPool
from jointkv.hf.models import load_model

TOOLS = """You are an assistant with tools. Answer with one call as JSON, or in one sentence.
{"name": "get_weather", "description": "The weather of a city", "parameters": {"city": "string", "day": "date"}}
{"name": "find_trains", "description": "Trains between two stations", "parameters": {"from": "string", "to": "string"}}
{"name": "book_seat", "description": "Books one seat in a train", "parameters": {"train": "string", "class": "integer"}}
{"name": "send_email", "description": "Sends an email to a person", "parameters": {"to": "string", "text": "string"}}
{"name": "create_note", "description": "Keeps a note for later", "parameters": {"title": "string", "text": "string"}}
"""
QUESTIONS = ("Which trains go from Bern to Basel?", "And back in the evening?", "Send that to Ada, please.")


def main(model_name: str = "smollm2", turns: int = 3, tokens: int = 12) -> list[tuple[int, int]]:
    """Answer in so many tokens each; returns prompt tokens and tokens skipped of each turn."""
    model, tokenizer = load_model(model_name, dtype="float32")
    pool = JointPool(model, reuse="probed")
    history, done = "", []
    kept = []  # a cache keeps its pages resident as long as it lives
    for question in QUESTIONS[:turns]:
        history += f"User: {question}\nAssistant:"
        prompt = f"Request {random.randrange(10**11, 10**12)}.\n{TOOLS}{history}"
        inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
        cache = JointCache(pool, isolation_key="my-agent")
        skipped = cache.prefill(model, inputs.input_ids, inputs.attention_mask).skipped
        with torch.no_grad():
            output = model.generate(**inputs, past_key_values=cache, max_new_tokens=tokens, do_sample=False)
        answer = tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
        history += f"{answer}\n"
        kept.append(cache)
        done.append((inputs.input_ids.shape[1], skipped))
        print(f"{done[-1][0]} prompt tokens, {skipped} of them read instead of computed: {answer.strip()!r}")
    return done


if __name__ == "__main__":
    main(*sys.argv[1:2])
