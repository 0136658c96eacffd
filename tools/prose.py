"""Reading a MyST page as prose: what is sentence, and what is code, mathematics or markup.

``mask`` blanks everything that is not prose and keeps every character at its place, so that what
a check finds in the masked text has the line and column it has in the page.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

FENCE = re.compile(
    r"^(?P<indent>\s*)(?P<fence>`{3,}|~{3,}|:{3,})\s*(?:\{(?P<name>[^}]+)\})?(?P<rest>.*)$"
)
LITERAL = {"math", "code", "code-block", "code-cell", "literalinclude", "raw", "bibliography"}
PATHS = {"figure", "image", "include", "solution", "solution-start", "toctree", "container"}
COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
INLINE = [
    re.compile(r"(`+)(?!`).+?(?<!`)\1(?!`)", re.DOTALL),  # code, and the content of roles
    re.compile(r"\$\$.+?\$\$|(?<![\\$])\$(?![\s$]).+?(?<![\s\\])\$", re.DOTALL),
    re.compile(r"(?<=\])\([^)\s]*(?:\s\"[^\"]*\")?\)"),  # link targets
    re.compile(r"<https?://[^>]*>|https?://\S+"),
    re.compile(r"^%.*$", re.MULTILINE),  # comment lines of MyST
    re.compile(r"^\s*\([\w:.-]+\)=\s*$", re.MULTILINE),  # labels
]


@dataclass
class Block:
    """A fenced block: a directive, or code where `name` is empty."""

    name: str
    argument: str
    line: int
    parents: tuple[str, ...]
    end: int = 0
    options: dict[str, str] = field(default_factory=dict)
    body: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "\n".join(self.body)


def blocks(text: str) -> list[Block]:
    """Return all fenced blocks of a page in the order they begin, nested ones included."""
    found: list[Block] = []
    for _, _, closed in _scan(text):
        if closed is not None:
            found.append(closed)
    return sorted(found, key=lambda block: block.line)


def mask(text: str, comments: bool = True) -> str:
    """Blank what is not prose, character by character; `comments` too unless told otherwise."""
    scanned = list(_scan(text))[: text.count("\n") + 1]
    masked = "\n".join(line if prose else " " * len(line) for line, prose, _ in scanned)
    for pattern in INLINE + ([COMMENT] if comments else []):
        masked = pattern.sub(lambda match: blank(match[0]), masked)
    return masked


def line_of(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1


def heading_lines(text: str) -> list[tuple[int, int, str]]:
    """Return (line, level, title) of the headings."""
    masked = mask(text, comments=False).split("\n")
    raw = text.split("\n")
    found = []
    for number, line in enumerate(masked, 1):
        match = re.match(r"(#{1,6})\s+\S", line)
        if match:
            found.append((number, len(match[1]), raw[number - 1].lstrip("# ").strip()))
    return found


def section(text: str, title: str) -> str:
    """Return the body of the section with this heading, up to the next one of its level."""
    headings = heading_lines(text)
    lines = text.split("\n")
    for place, (line, level, name) in enumerate(headings):
        if name == title:
            later = [n for n, other, _ in headings[place + 1 :] if other <= level]
            return "\n".join(lines[line : later[0] - 1 if later else None])
    return ""


def blank(text: str) -> str:
    return re.sub(r"[^\n]", " ", text)


def _scan(text: str):
    """Yield (line, is prose, block that this line closes) for every line."""
    stack: list[tuple[str, Block]] = []
    front = text.startswith("---\n")
    options = False
    for number, line in enumerate(text.split("\n"), 1):
        if front:
            front = number == 1 or line.strip() != "---"
            yield line, False, None
            continue
        match = FENCE.match(line)
        fence, top = (match["fence"] if match else ""), (stack[-1] if stack else None)
        if top and _closes(top[0], fence, match):
            block = stack.pop()[1]
            block.end = number
            _feed(stack, line)
            yield line, False, block
            continue
        if match and not (top and _is_literal(top[1])) and _opens(match):
            _feed(stack, line)
            name = (match["name"] or "").strip()
            parents = tuple(b.name for _, b in stack)
            stack.append((fence, Block(name, match["rest"].strip(), number, parents)))
            options = True
            prose = bool(name) and name not in LITERAL | PATHS
            start = match.start("rest")
            yield (" " * start + line[start:] if prose else line), prose, None
            continue
        if stack and options and (option := re.match(r"\s*:([\w-]+):\s*(.*)$", line)):
            stack[-1][1].options[option[1]] = option[2].strip()
            _feed(stack[:-1], line)
            yield line, False, None
            continue
        options = False
        _feed(stack, line)
        yield line, not any(_is_literal(block) for _, block in stack), None
    for _, block in stack:  # never closed: the block reaches to the end of the page
        block.end = text.count("\n") + 1
        yield "", False, block


def _feed(stack: list[tuple[str, Block]], line: str) -> None:
    for _, block in stack:
        block.body.append(line)


def _opens(match: re.Match) -> bool:
    if match["fence"][0] == ":":
        return bool(match["name"])
    return "`" not in match["rest"]


def _closes(open_fence: str, fence: str, match: re.Match | None) -> bool:
    same = fence[:1] == open_fence[0] and len(fence) >= len(open_fence)
    return bool(same and not match["name"] and not match["rest"].strip())


def _is_literal(block: Block) -> bool:
    return not block.name or block.name in LITERAL
