"""Dialogues with an assistant: HelpSteer and Synthetic Therapy Conversations."""

from typing import Annotated

from pydantic import BaseModel, Field

from jointkv.evaluate.datasets.base import Dataset, Local
from jointkv.evaluate.datasets.hub import Hub
from jointkv.evaluate.datasets.rows import DialogueRow, Record, Turn
from jointkv.evaluate.jsonl import Text

_SPEAKERS = {"human": "User", "gpt": "Assistant"}


class _Reply(Record):
    prompt: Text
    response: Text

    def row(self) -> DialogueRow:
        return DialogueRow(self.prompt, (self.response,))


class _Said(BaseModel):
    content: Text


class _Preferred(Record):
    """A pair of UltraFeedback, of which the first message of `chosen` and the preferred reply are taken."""

    chosen: Annotated[list[_Said], Field(min_length=2)]

    def row(self) -> DialogueRow:
        return DialogueRow(self.chosen[0].content, (self.chosen[1].content,))


class HelpSteer(Dataset):
    """Wang et al., arXiv 2311.09528: prompts with rated replies."""

    name = "HelpSteer"
    hub = Hub("nvidia/HelpSteer", split="validation")
    stand_in = Local("helpful/ultrafeedback_test150.jsonl", "UltraFeedback test_prefs, 150 rows")
    record, local_record = _Reply, _Preferred


class _Message(BaseModel):
    speaker: Annotated[Text, Field(alias="from")]
    value: Text


class _Talk(Record):
    """The last reply of the therapist is the answer."""

    conversations: Annotated[list[_Message], Field(min_length=1)]

    def row(self) -> DialogueRow | None:
        said = [(message.speaker.strip(), message.value) for message in self.conversations]
        turns = [Turn(_SPEAKERS.get(speaker, speaker), text) for speaker, text in said]
        while turns and turns[-1].speaker != "Assistant":
            turns.pop()
        if len(turns) < 2 or turns[-2].speaker != "User":
            return None
        return DialogueRow(turns[-2].text, (turns[-1].text,), tuple(turns[:-2]))


class _Question(Record):
    """A question to a counsellor; it has no reply."""

    turns: Annotated[list[Text], Field(min_length=1)]

    def row(self) -> DialogueRow:
        return DialogueRow(self.turns[0], ())


class SyntheticTherapy(Dataset):
    """Generated talks between a therapist and a client; the published copy on the hub is NART-100k."""

    name = "Synthetic Therapy Conversations"
    hub = Hub("jerryjalapeno/nart-100k-synthetic", split="train")
    stand_in = Local("chat/counselling_bench_question.jsonl", "counselling_bench questions, 229 without replies")
    record, local_record = _Talk, _Question
