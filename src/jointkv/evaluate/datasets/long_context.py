"""Long prompts with answers: LongBench and RULER."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from jointkv.errors import BadInput
from jointkv.evaluate.datasets.base import Dataset, Local
from jointkv.evaluate.datasets.hub import Hub
from jointkv.evaluate.datasets.rows import Row, text_field, texts_field

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


class LongBench(Dataset):
    """Bai et al., arXiv 2308.14508; `task` is a key of `LONGBENCH_PROMPTS`."""

    def __init__(self, task: str) -> None:
        if task not in LONGBENCH_PROMPTS:
            raise BadInput(f"unknown LongBench task {task!r}; known: {', '.join(LONGBENCH_PROMPTS)}")
        self.task = task
        self.name = f"LongBench {task}"
        self.hub = Hub("THUDM/LongBench", archive="data.zip", archive_member=f"data/{task}.jsonl")
        self.copy = Local(f"longbench/{task}.jsonl", f"the rows of LongBench {task} that MiniLongBench keeps")

    def hub_row(self, record: Mapping[str, Any], where: str) -> Row:
        """Fields `context`, `input` (which some tasks leave empty) and `answers`."""
        context, asked = text_field(record, "context", where), record.get("input")
        if not isinstance(asked, str):
            raise BadInput(f"{where}: 'input' must be a string")
        prompt = LONGBENCH_PROMPTS[self.task].format(context=context, input=asked)
        return Row(prompt, texts_field(record, "answers", where))

    def local_row(self, record: Mapping[str, Any], where: str) -> Row:
        """Fields `prompt`, as LongBench sends it, and `answers`."""
        return Row(text_field(record, "prompt", where), texts_field(record, "answers", where))


class RulerNeedle(Dataset):
    """Hsieh et al., arXiv 2404.06654: one of many keys in 4096 tokens has to be found (`niah_multikey_3`)."""

    task = "niah_multikey_3"
    name = "RULER niah_multikey_3"
    hub = Hub("simonjegou/ruler", folder="4096")
    copy = Local("ruler/niah_multikey_3_4k.jsonl", "RULER niah_multikey_3 of 4096 tokens, 50 rows")

    def _is_wanted(self, record: Mapping[str, Any]) -> bool:
        return record.get("task") == self.task

    def hub_row(self, record: Mapping[str, Any], where: str) -> Row:
        """Fields `context`, `question`, `answer_prefix` and `answer`."""
        prompt = "".join(text_field(record, field, where) for field in ("context", "question", "answer_prefix"))
        return Row(prompt.rstrip(), texts_field(record, "answer", where))

    def local_row(self, record: Mapping[str, Any], where: str) -> Row:
        """Fields `input`, which ends where the answer begins, and `outputs`."""
        return Row(text_field(record, "input", where), texts_field(record, "outputs", where))
