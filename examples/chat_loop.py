"""A chat in which every answer goes on from the pages of the turns before, and two chats share what is the same.

    python examples/chat_loop.py [MODEL]

Lines come from stdin; without a terminal there, two chats of two lines each are held.
"""

import sys

import torch

from jointkv.hf import JointCache, JointPool
from jointkv.hf.models import load_model

SYSTEM = (
    "You help the visitors of a small museum of clocks. It is open from ten to five, but not on Mondays. A ticket is "
    "four francs, and children pay nothing. The oldest clock is from 1530 and still runs. Be friendly and brief."
)
LINES = ("Hello! When do you open?", "What does it cost?")


class Chat:
    """One conversation."""

    def __init__(self, pool: JointPool, model, tokenizer, tenant: str) -> None:
        self.cache, self.model, self.tokenizer = JointCache(pool, isolation_key=tenant), model, tokenizer
        self.text = f"System: {SYSTEM}\n"

    def say(self, line: str, tokens: int = 16) -> str:
        """The answer to a line; only what is new is computed."""
        self.text += f"User: {line}\nAssistant:"
        inputs = self.tokenizer(self.text, return_tensors="pt", add_special_tokens=False)
        with torch.no_grad():
            output = self.model.generate(**inputs, past_key_values=self.cache, max_new_tokens=tokens, do_sample=False)
        answer = self.tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
        # What was generated is tokenized again as part of the text; drop it from the cache if that gives other tokens.
        self.text += f"{answer.splitlines()[0] if answer.strip() else ''}\n"
        again = self.tokenizer(self.text, return_tensors="pt", add_special_tokens=False).input_ids[0]
        held = min(self.cache.get_seq_length(), len(again))
        differ = (again[:held] != output[0, :held]).nonzero()
        keep = int(differ[0]) if len(differ) else held
        self.cache.crop(keep - self.cache.get_seq_length())
        return answer.strip()


def main(model_name: str = "smollm2") -> dict:
    """Hold the chats; returns what the pool says of its pages."""
    model, tokenizer = load_model(model_name, dtype="float32")
    pool = JointPool(model, policy="safe")
    if sys.stdin.isatty():
        chat = Chat(pool, model, tokenizer, "visitors")
        while line := input("> "):
            print(chat.say(line, tokens=64))
    else:
        chats = [Chat(pool, model, tokenizer, "visitors") for _ in range(2)]
        for line in LINES:
            for number, chat in enumerate(chats, 1):
                print(f"chat {number}: {line} -> {chat.say(line)!r}")
    print(pool.stats())
    return pool.stats()


if __name__ == "__main__":
    main(*sys.argv[1:2])
