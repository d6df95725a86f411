"""Long prompts with answers: LongBench and RULER."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, ClassVar

from pydantic import Field

from jointkv.errors import BadInput
from jointkv.evaluate.datasets.base import Dataset, Local
from jointkv.evaluate.datasets.hub import Hub
from jointkv.evaluate.datasets.rows import Record, Row
from jointkv.evaluate.jsonl import Text
from jointkv.system.nearest import not_known

_BRIEFLY = "Only give me the answer and do not output any other words."
PASSAGES_INSTRUCTION = f"Answer the question based on the given passages. {_BRIEFLY}"
_PASSAGE_QUESTION = (
    f"{PASSAGES_INSTRUCTION}\n\nThe following are given passages.\n{{context}}\n\n"
    f"{PASSAGES_INSTRUCTION}\n\nQuestion: {{input}}\nAnswer:"
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


class _Asked(Record):
    template: ClassVar[str]
    context: Text
    input: str
    answers: Answers

    def row(self) -> Row:
        return Row(self.template.format(context=self.context, input=self.input), self.answers)


class _Prompted(Record):
    """The prompt is as LongBench sends it."""

    prompt: Text
    answers: Answers

    def row(self) -> Row:
        return Row(self.prompt, self.answers)


class LongBench(Dataset):
    """Bai et al., arXiv 2308.14508; `task` is a key of `LONGBENCH_PROMPTS`."""

    local_record = _Prompted

    def __init__(self, task: str) -> None:
        if task not in LONGBENCH_PROMPTS:
            raise BadInput(f"unknown LongBench task {not_known(task, LONGBENCH_PROMPTS)}")
        self.task = task
        self.name = f"LongBench {task}"
        self.hub = Hub("THUDM/LongBench", archive="data.zip", archive_member=f"data/{task}.jsonl")
        self.copy = Local(f"longbench/{task}.jsonl", f"the rows of LongBench {task} that MiniLongBench keeps")
        self.record = type("_Asked", (_Asked,), {"template": LONGBENCH_PROMPTS[task], "__module__": __name__})


class _Needle(Record):
    context: Text
    question: Text
    answer_prefix: Text
    answer: Answers

    def row(self) -> Row:
        return Row((self.context + self.question + self.answer_prefix).rstrip(), self.answer)


class _NeedlePrompt(Record):
    """The input ends where the answer begins."""

    input: Text
    outputs: Answers

    def row(self) -> Row:
        return Row(self.input, self.outputs)


class RulerNeedle(Dataset):
    """Hsieh et al., arXiv 2404.06654: one of many keys in 4096 tokens has to be found (`niah_multikey_3`)."""

    task = "niah_multikey_3"
    name = "RULER niah_multikey_3"
    hub = Hub("simonjegou/ruler", folder="4096")
    copy = Local("ruler/niah_multikey_3_4k.jsonl", "RULER niah_multikey_3 of 4096 tokens, 50 rows")
    record, local_record = _Needle, _NeedlePrompt

    def _is_wanted(self, record: Mapping[str, Any]) -> bool:
        return record.get("task") == self.task
