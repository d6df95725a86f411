"""Long prompts with answers: LongBench and RULER."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any

from pydantic import BaseModel, Field

from jointkv.errors import BadInput
from jointkv.evaluate.datasets.base import Dataset, Local
from jointkv.evaluate.datasets.hub import Hub
from jointkv.evaluate.datasets.rows import Row
from jointkv.evaluate.jsonl import Text, validated

_BRIEFLY = "Only give me the answer and do not output any other words."
_PASSAGES = f"Answer the question based on the given passages. {_BRIEFLY}"
_PASSAGE_QUESTION = (
    f"{_PASSAGES}\n\nThe following are given passages.\n{{context}}\n\n{_PASSAGES}\n\nQuestion: {{input}}\nAnswer:"
)
_MEETING_QUERY = (
    "You are given a meeting transcript and a query containing a question or instruction."
    " Answer the query in one or more sentences.\n\nTranscript:\n{context}\n\nNow, answer the query"
    " based on the above meeting transcript in one or more sentences.\n\nQuery: {input}\nAnswer:"
)
_CODE = "Please complete the code given below. \n{context}"

# The prompts of LongBench's own `config/dataset2prompt.json` (MIT).
LONGBENCH_PROMPTS: Mapping[str, str] = MappingProxyType(
    {
        "qmsum": _MEETING_QUERY,
        "lcc": f"{_CODE}Next line of code:\n",
        "repobench-p": f"{_CODE}{{input}}Next line of code:\n",
        "hotpotqa": _PASSAGE_QUESTION,
        "2wikimqa": _PASSAGE_QUESTION,
    }
)


Answers = Annotated[tuple[Text, ...], Field(min_length=1)]


class _Asked(BaseModel):
    context: Text
    input: str
    answers: Answers


class _Prompted(BaseModel):
    prompt: Text
    answers: Answers


class _Needle(BaseModel):
    context: Text
    question: Text
    answer_prefix: Text
    answer: Answers


class _NeedlePrompt(BaseModel):
    input: Text
    outputs: Answers


class LongBench(Dataset):
    """Bai et al., arXiv 2308.14508; `task` is a key of `LONGBENCH_PROMPTS`."""

    def __init__(self, task: str) -> None:
        if task not in LONGBENCH_PROMPTS:
            raise BadInput(f"unknown LongBench task {task!r}; known: {', '.join(LONGBENCH_PROMPTS)}")
        self.task = task
        self.name = f"LongBench {task}"
        self.hub = Hub("THUDM/LongBench", archive="data.zip", archive_member=f"data/{task}.jsonl")
        self.copy = Local(f"longbench/{task}.jsonl", f"the rows of LongBench {task} that MiniLongBench keeps")

    def hub_row(self, record: Mapping[str, Any]) -> Row:
        """Some tasks leave `input` empty."""
        found = validated(_Asked.model_validate, record)
        return Row(LONGBENCH_PROMPTS[self.task].format(context=found.context, input=found.input), found.answers)

    def local_row(self, record: Mapping[str, Any]) -> Row:
        """The prompt is as LongBench sends it."""
        found = validated(_Prompted.model_validate, record)
        return Row(found.prompt, found.answers)


class RulerNeedle(Dataset):
    """Hsieh et al., arXiv 2404.06654: one of many keys in 4096 tokens has to be found (`niah_multikey_3`)."""

    task = "niah_multikey_3"
    name = "RULER niah_multikey_3"
    hub = Hub("simonjegou/ruler", folder="4096")
    copy = Local("ruler/niah_multikey_3_4k.jsonl", "RULER niah_multikey_3 of 4096 tokens, 50 rows")

    def _is_wanted(self, record: Mapping[str, Any]) -> bool:
        return record.get("task") == self.task

    def hub_row(self, record: Mapping[str, Any]) -> Row:
        found = validated(_Needle.model_validate, record)
        return Row((found.context + found.question + found.answer_prefix).rstrip(), found.answer)

    def local_row(self, record: Mapping[str, Any]) -> Row:
        """The input ends where the answer begins."""
        found = validated(_NeedlePrompt.model_validate, record)
        return Row(found.input, found.outputs)
