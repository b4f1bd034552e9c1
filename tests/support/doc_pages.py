"""The pages of the documentation, their code blocks and links. CONTRIBUTING.md tells what an info string means."""

from __future__ import annotations

import re
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

_FENCE = re.compile(r"^(?P<indent> *)```(?P<info>.*)$")
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#{1,6} +(.+?) *$", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """One fenced block.

    line:  of its first line of content, counted from 1.
    flags: the words of the info string after the language.
    """

    page: Path
    line: int
    language: str
    flags: tuple[str, ...]
    text: str

    @property
    def place(self) -> str:
        return f"{name_of(self.page)}:{self.line}"

    @property
    def file_name(self) -> str | None:
        """The name under which the page's commands find a YAML block."""
        return next((flag for flag in self.flags if flag.endswith(".yaml")), None)


@dataclass(frozen=True)
class Command:
    """A line that starts with ``$``, joined with those it continues on, and the output that the page shows below it."""

    text: str
    output: tuple[str, ...]


def pages() -> list[Path]:
    """Every page: those at the root of the repository, then docs/."""
    return [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> list[Block]:
    """The page's fenced blocks, in order. Raises ValueError for one that never ends."""
    found: list[Block] = []
    lines = page.read_text(encoding="utf-8").splitlines()
    at = 0
    while at < len(lines):
        match = _FENCE.match(lines[at])
        at += 1
        if not match:
            continue
        start, indent = at, len(match["indent"])
        while at < len(lines) and lines[at].strip() != "```":
            at += 1
        if at == len(lines):
            raise ValueError(f"{name_of(page)}:{start}: the block never ends")
        language, *flags = match["info"].split() or [""]
        text = "".join(f"{line[indent:]}\n" for line in lines[start:at])
        found.append(Block(page, start + 1, language, tuple(flags), text))
        at += 1
    return found


def all_blocks(*languages: str) -> list[Block]:
    return [block for page in pages() for block in blocks(page) if block.language in languages]


def commands(block: Block) -> list[Command]:
    """The commands of a console block. Raises ValueError for output that no command stands before."""
    found: list[tuple[str, list[str]]] = []
    lines = iter(block.text.splitlines())
    for line in lines:
        if line.startswith("$ "):
            text = line[2:]
            while text.endswith("\\"):
                text = text[:-1].rstrip() + " " + next(lines).strip()
            found.append((text, []))
        elif found:
            found[-1][1].append(line)
        elif line.strip():
            raise ValueError(f"{block.place}: output before the first command: {line}")
    return [Command(text, tuple(output)) for text, output in found]


def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    kept, is_inside = [], False
    for line in page.read_text(encoding="utf-8").splitlines():
        if _FENCE.match(line):
            is_inside = not is_inside
        elif not is_inside:
            kept.append(line)
    return "\n".join(kept)


def links(page: Path) -> Iterator[tuple[str, str]]:
    """Target and fragment of every link that leads to a file or heading of this repository."""
    for target in _LINK.findall(prose(page)):
        if "://" not in target and not target.startswith("mailto:"):
            path, _, fragment = target.partition("#")
            yield path, fragment


def anchors(page: Path) -> set[str]:
    """What a link can name after ``#``: headings in lower case, punctuation gone, spaces as hyphens."""
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in _HEADING.findall(prose(page))}


def paths_named(page: Path) -> set[str]:
    """What stands in backticks and looks like a path of this repository; ``path::test`` and ``{a,b}`` included."""
    top = "core|plugins|backends|kernels|tests|docs"
    return {
        name
        for name in re.findall(r"`([^`\s]+)`", prose(page))
        if re.match(rf"^(?:{top})/", name) and not re.search(r"[*<>]|\.\.\.|KIND|NAME", name)
    }


def run_blocks(found: list[tuple[str, int, str]]) -> None:
    """Run blocks, of these pages and lines, as one module."""
    page = sys.modules["page"] = types.ModuleType("page")
    for path, line, text in found:
        exec(compile("\n" * (line - 1) + text, path, "exec"), vars(page))
