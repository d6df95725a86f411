"""Dialogues with an assistant: HelpSteer and Synthetic Therapy Conversations."""

from collections.abc import Mapping
from typing import Any

from jointkv.evaluate.datasets.base import Dataset, Local
from jointkv.evaluate.datasets.hub import Hub
from jointkv.evaluate.datasets.rows import DialogueRow, Turn, list_field, message_text, text_field, texts_field

_SPEAKERS = {"human": "User", "gpt": "Assistant"}


class HelpSteer(Dataset):
    """Wang et al., arXiv 2311.09528: prompts with rated replies."""

    name = "HelpSteer"
    hub = Hub("nvidia/HelpSteer", split="validation")
    stand_in = Local("helpful/ultrafeedback_test150.jsonl", "UltraFeedback test_prefs, 150 rows")

    def hub_row(self, record: Mapping[str, Any], where: str) -> DialogueRow:
        """Fields `prompt` and `response`."""
        return DialogueRow(text_field(record, "prompt", where), (text_field(record, "response", where),))

    def local_row(self, record: Mapping[str, Any], where: str) -> DialogueRow:
        """A pair of UltraFeedback, of which the first message of `chosen` and the preferred reply are taken."""
        chosen = list_field(record, "chosen", where)
        return DialogueRow(message_text(chosen, 0, "content", where), (message_text(chosen, 1, "content", where),))


class SyntheticTherapy(Dataset):
    """Generated talks between a therapist and a client; the published copy on the hub is NART-100k."""

    name = "Synthetic Therapy Conversations"
    hub = Hub("jerryjalapeno/nart-100k-synthetic", split="train")
    stand_in = Local("chat/counselling_bench_question.jsonl", "counselling_bench questions, 229 without replies")

    def hub_row(self, record: Mapping[str, Any], where: str) -> DialogueRow | None:
        """Field `conversations` with messages `from` and `value`; the last reply of the therapist is the answer."""
        messages = list_field(record, "conversations", where)
        turns = []
        for index in range(len(messages)):
            speaker = message_text(messages, index, "from", where).strip()
            turns.append(Turn(_SPEAKERS.get(speaker, speaker), message_text(messages, index, "value", where)))
        while turns and turns[-1].speaker != "Assistant":
            turns.pop()
        if len(turns) < 2 or turns[-2].speaker != "User":
            return None
        return DialogueRow(turns[-2].text, (turns[-1].text,), tuple(turns[:-2]))

    def local_row(self, record: Mapping[str, Any], where: str) -> DialogueRow:
        """A question to a counsellor, in `turns`; it has no reply."""
        return DialogueRow(texts_field(record, "turns", where)[0], ())
