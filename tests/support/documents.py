"""The documents of the repository, as data: their code blocks, commands, headings and links."""

from __future__ import annotations

import re
import shlex
import unicodedata
from pathlib import Path
from typing import Final, final

import attrs

__all__ = [
    "DOCS",
    "DOCUMENTS",
    "ROOT",
    "Block",
    "anchors_of",
    "blocks",
    "commands_of",
    "links_of",
    "section_of",
    "words_of",
]

ROOT: Final = Path(__file__).parents[2]
DOCS: Final = ROOT / "docs"
DOCUMENTS: Final = [
    *sorted(DOCS.rglob("*.md")),
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")),
]

_FENCE: Final = re.compile(r"^( *)```([^\n]*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
_HEADING: Final = re.compile(r"^#+ (.*)$", re.MULTILINE)
_LINK: Final = re.compile(r"\]\(([^)\s]+)\)")


@final
@attrs.frozen
class Block:
    """A code block.

    Attributes:
        document: the file.
        line: the line of its first line in the file.
        language: what stands behind the fence, such as `python` or `{toctree}`.
        text: its content, without the indentation of the fence.
    """

    document: Path
    line: int
    language: str
    text: str = attrs.field(repr=False)

    @property
    def place(self) -> str:
        return f"{self.document.relative_to(ROOT)}:{self.line}"


def blocks(*documents: Path, language: str | None = None) -> list[Block]:
    """The code blocks of `documents` (default: all), or those of one language."""
    found = []
    for document in documents or DOCUMENTS:
        content = document.read_text()
        for match in _FENCE.finditer(content):
            line = content.count("\n", 0, match.start(3)) + 1
            text = re.sub(f"^{match[1]}", "", match[3], flags=re.MULTILINE)
            found.append(Block(document, line, match[2].strip(), text))
    return [block for block in found if language in (None, block.language)]


def commands_of(block: Block) -> list[str]:
    """The commands of a `console` block, without prompt, comment and output."""
    joined = re.sub(r"\\\n *", "", block.text)
    lines = [line[2:] for line in joined.splitlines() if line.startswith("$ ")]
    return [re.sub(r"\s+# .*", "", line) for line in lines]


def words_of(command: str) -> list[str]:
    """The words of a command, without what only a shell needs."""
    plain = re.sub(r"^\((?:umask \d+; )?|[|>&;].*", "", command)
    words = shlex.split(plain)
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        del words[0]  # a variable for the command
    return words


def section_of(document: Path, heading: str) -> str:
    """The text below a heading of the second level."""
    text = document.read_text()
    assert f"\n## {heading}\n" in text, f"{document} has no section {heading!r}"
    return text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]


def links_of(document: Path) -> list[str]:
    """The targets of the links, except in code."""
    return _LINK.findall(_FENCE.sub("", document.read_text()))


def anchors_of(document: Path) -> set[str]:
    """The anchors that GitHub and the site make of the headings."""
    prose = _FENCE.sub("", document.read_text())
    anchors = set()
    for heading in _HEADING.findall(prose):
        plain = unicodedata.normalize("NFC", re.sub(r"\[([^]]*)\]\([^)]*\)|[`*]", r"\1", heading)).lower()
        anchors.add(re.sub(r"[^\w\- ]", "", plain).strip().replace(" ", "-"))
    return anchors
