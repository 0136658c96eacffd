"""Draw the diagrams: ``python -m tools.diagrams`` turns ``book/_diagrams/*.mmd`` into SVG.

Only diagrams whose source changed are drawn. The SVG lies in git beside its source and carries the
source's hash, which a gate compares; so the book itself needs no script and no browser. Drawing
needs npm, for the pinned mermaid, and Chromium.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tools.labs import Book, Finding

MERMAID = "mermaid@11.4.1"
SETTINGS = {
    "startOnLoad": False,
    "theme": "base",
    "htmlLabels": False,
    "flowchart": {"htmlLabels": False, "padding": 14, "useMaxWidth": True},
    "themeVariables": {
        "fontFamily": "system-ui, 'Segoe UI', Roboto, 'Noto Sans', Arial, sans-serif",
        "fontSize": "15px",
        "primaryColor": "#e8f1f8",
        "primaryBorderColor": "#0072b2",
        "primaryTextColor": "#1c2733",
        "lineColor": "#4a5a68",
        "secondaryColor": "#fdf1dc",
        "tertiaryColor": "#f6f8fa",
        "clusterBkg": "#f6f8fa",
        "clusterBorder": "#b8c4ce",
        "titleColor": "#1c2733",
        "edgeLabelBackground": "#ffffff",
    },
}
DRAW = """async ([source, settings, name]) => {
  mermaid.initialize(settings);
  return (await mermaid.render(name, source)).svg;
}"""


def sources(book: Book) -> list[Path]:
    return sorted((book.root / "book" / "_diagrams").glob("*.mmd"))


def fingerprint(source: Path) -> str:
    return hashlib.sha256(source.read_bytes()).hexdigest()


def check(book: Book) -> Iterator[Finding]:
    """Every diagram is drawn from its present source."""
    for source in sources(book):
        drawn = source.with_suffix(".svg")
        if not drawn.exists() or fingerprint(source) not in drawn.read_text("utf-8"):
            yield Finding(book.relative(source), 0, "is not drawn as it stands: make diagrams")


def draw(sources: list[Path]) -> None:
    """Draw diagrams in a headless Chromium that has no network.

    Raises:
        RuntimeError: Chromium or npm is missing, or a source does not parse.
    """
    from playwright.sync_api import Error, sync_playwright

    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if not browser:
        raise RuntimeError("drawing needs Chromium on the PATH: apt install chromium")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as play:
        script = fetch_mermaid(Path(folder))
        chrome = play.chromium.launch(
            executable_path=browser, args=["--no-sandbox", "--disable-gpu"]
        )
        page = chrome.new_page()
        page.set_content("<body></body>")
        page.add_script_tag(path=script)
        for source in sources:
            name = f"diagram-{source.stem}"
            try:
                svg = page.evaluate(DRAW, [source.read_text("utf-8"), SETTINGS, name])
            except Error as error:
                raise RuntimeError(f"{source.name} cannot be drawn: {error}") from error
            source.with_suffix(".svg").write_text(finished(svg, source), "utf-8")
            print(f"drew {source.with_suffix('.svg').name}")
        chrome.close()


def fetch_mermaid(folder: Path) -> Path:
    """Install the pinned mermaid into `folder` and return its script."""
    npm = shutil.which("npm")
    if not npm:
        raise RuntimeError("drawing needs npm on the PATH: apt install npm")
    command = [npm, "install", "--silent", "--no-audit", "--no-fund", "--ignore-scripts", MERMAID]
    subprocess.run(command, cwd=folder, check=True)
    return folder / "node_modules" / "mermaid" / "dist" / "mermaid.min.js"


def finished(svg: str, source: Path) -> str:
    """Give a drawing its size, its source's hash and a light card to read on in dark mode."""
    box = re.search(r'viewBox="([\d.\s-]+)"', svg)
    left, top, width, height = (float(x) for x in box[1].split())
    left, top, width, height = left - 8, top - 8, width + 16, height + 16
    svg = svg.replace(box[0], f'viewBox="{left} {top} {width} {height}"', 1)
    svg = re.sub(r'(<svg\b[^>]*?)\swidth="[^"]*"', rf'\1 width="{width:.0f}"', svg, count=1)
    svg = re.sub(r'\sstyle="max-width:[^"]*"', f' height="{height:.0f}"', svg, count=1)
    card = f'<rect x="{left}" y="{top}" width="{width}" height="{height}" fill="#ffffff" rx="6"/>'
    start = svg.index(">") + 1
    head = f"<!-- drawn from {source.name} {fingerprint(source)} by {MERMAID} -->\n"
    return head + svg[:start] + card + svg[start:] + "\n"


def main() -> int:
    book = Book()
    changed = [book.root / finding.path for finding in check(book)]
    if not changed:
        print("diagrams: all drawn")
        return 0
    try:
        draw(changed)
    except (RuntimeError, subprocess.CalledProcessError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
