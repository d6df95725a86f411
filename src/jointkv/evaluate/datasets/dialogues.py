"""Dialogues with an assistant: HelpSteer and Synthetic Therapy Conversations."""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, Field

from jointkv.evaluate.datasets.base import Dataset, Local
from jointkv.evaluate.datasets.hub import Hub
from jointkv.evaluate.datasets.rows import DialogueRow, Turn
from jointkv.evaluate.jsonl import Text, validated

_SPEAKERS = {"human": "User", "gpt": "Assistant"}


class _Reply(BaseModel):
    prompt: Text
    response: Text


class _Said(BaseModel):
    content: Text


class _Pair(BaseModel):
    chosen: list[_Said] = Field(min_length=2)


class _Message(BaseModel):
    speaker: Text = Field(alias="from")
    value: Text


class _Talk(BaseModel):
    conversations: list[_Message] = Field(min_length=1)


class _Question(BaseModel):
    turns: list[Text] = Field(min_length=1)


class HelpSteer(Dataset):
    """Wang et al., arXiv 2311.09528: prompts with rated replies."""

    name = "HelpSteer"
    hub = Hub("nvidia/HelpSteer", split="validation")
    stand_in = Local("helpful/ultrafeedback_test150.jsonl", "UltraFeedback test_prefs, 150 rows")

    def hub_row(self, record: Mapping[str, Any]) -> DialogueRow:
        found = validated(_Reply.model_validate, record)
        return DialogueRow(found.prompt, (found.response,))

    def local_row(self, record: Mapping[str, Any]) -> DialogueRow:
        """A pair of UltraFeedback, of which the first message of `chosen` and the preferred reply are taken."""
        prompt, reply = validated(_Pair.model_validate, record).chosen[:2]
        return DialogueRow(prompt.content, (reply.content,))


class SyntheticTherapy(Dataset):
    """Generated talks between a therapist and a client; the published copy on the hub is NART-100k."""

    name = "Synthetic Therapy Conversations"
    hub = Hub("jerryjalapeno/nart-100k-synthetic", split="train")
    stand_in = Local("chat/counselling_bench_question.jsonl", "counselling_bench questions, 229 without replies")

    def hub_row(self, record: Mapping[str, Any]) -> DialogueRow | None:
        """The last reply of the therapist is the answer."""
        messages = validated(_Talk.model_validate, record).conversations
        turns = [Turn(_SPEAKERS.get(said.speaker.strip(), said.speaker.strip()), said.value) for said in messages]
        while turns and turns[-1].speaker != "Assistant":
            turns.pop()
        if len(turns) < 2 or turns[-2].speaker != "User":
            return None
        return DialogueRow(turns[-2].text, (turns[-1].text,), tuple(turns[:-2]))

    def local_row(self, record: Mapping[str, Any]) -> DialogueRow:
        """A question to a counsellor; it has no reply."""
        return DialogueRow(validated(_Question.model_validate, record).turns[0], ())
