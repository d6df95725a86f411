"""What README.md, CONTRIBUTING.md and the pages below docs/ say: blocks of code, commands, inline code, links."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
VLLM_FLAGS = {
    "--no-scheduler-reserve-full-isl",
    "--max-num-batched-tokens",
    "--watermark",
    "--attention-backend",
    "--block-size",
    "--dtype",
    "--max-num-seqs",
    "--num-gpu-blocks-override",
    "--kv-cache-dtype",
    "--port",
    "--no-enable-prefix-caching",
    "--enforce-eager",
    "--logits-processors",
    "--kv-transfer-config",
    "--max-model-len",
    "--scheduler-cls",
}
"""Flags of vLLM's that the pages name; tests/docs/test_vllm_flags.py asks vLLM for them."""
FENCE = re.compile(r"^```(?P<info>[^`\n]*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block. `needs`: the words behind `needs=` in its first line; `unknown`: the rest of that line."""

    page: Path
    line: int
    language: str
    needs: frozenset[str]
    unknown: str
    text: str


@dataclass(frozen=True)
class Command:
    """One command line, continuation lines joined."""

    page: Path
    line: int
    text: str
    needs: frozenset[str]

    @property
    def words(self) -> list[str]:
        """Split as a shell does, without comments."""
        return shlex.split(self.text, comments=True)

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}: {self.text}"


def blocks(page: Path) -> Iterator[Block]:
    content = page.read_text(encoding="utf-8")
    for found in FENCE.finditer(content):
        language, *options = found["info"].split() or [""]
        needs = [option.removeprefix("needs=") for option in options if option.startswith("needs=")]
        unknown = " ".join(option for option in options if not option.startswith("needs="))
        words = frozenset(word for group in needs for word in group.split(","))
        yield Block(page, content[: found.start()].count("\n") + 2, language, words, unknown, found["text"])


def commands(page: Path) -> Iterator[Command]:
    """The command lines in blocks of language `sh`."""
    for block in blocks(page):
        if block.language == "sh":
            yield from _commands(block)


def _commands(block: Block) -> Iterator[Command]:
    pending = ""
    for number, line in enumerate(block.text.splitlines(), start=block.line):
        pending = f"{pending}{line}\n"
        if line.endswith("\\") or _open_quote(pending):
            continue
        if shlex.split(pending, comments=True):
            yield Command(block.page, number, pending.replace("\\\n", " ").strip(), block.needs)
        pending = ""
    assert not pending, f"{block.page.name}:{block.line}: a command without an end"


def _open_quote(text: str) -> bool:
    try:
        shlex.split(text, comments=True)
    except ValueError:
        return True
    return False


def inline_code(page: Path) -> Iterator[str]:
    """What stands between single backticks, on one line or over two."""
    content = FENCE.sub("", page.read_text(encoding="utf-8"))
    for found in re.finditer(r"`([^`]+)`", content):
        yield " ".join(found[1].split())


def links(page: Path) -> Iterator[str]:
    """Targets of links and pictures, those to other sites left out."""
    content = FENCE.sub("", page.read_text(encoding="utf-8"))
    for found in re.finditer(r"\]\(([^)\s]+)\)", content):
        if not re.match(r"https?://|mailto:", found[1]):
            yield found[1]
