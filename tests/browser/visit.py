"""Look at a built page as a reader does: in a browser, from a file, with the network off."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path

from axe_playwright_python.sync_playwright import Axe

LEFT_OUT = (
    "no Chromium on the PATH; left out: console errors, foreign requests, drawn formulas and "
    "figures, sideways scrolling on desktop and phone, accessibility by axe in light and dark, "
    "keyboard, search from a file"
)
QUIET = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-default-apps",
    "--disable-sync",
    "--no-first-run",
)
DESKTOP, PHONE = (1280, 900), (375, 800)
OURS = ("file:", "data:", "blob:", "about:")
DRAWN = """async () => {
  if (window.MathJax && MathJax.startup) await MathJax.startup.promise;
  await Promise.all([...document.images].map(image => image.decode().catch(() => null)));
  const faults = [];
  for (const math of document.querySelectorAll("span.math, div.math")) {
    if (math.querySelector("[data-mml-node=merror], [data-mml-node=mtext][fill=red]"))
      faults.push("formula with an error: " + math.textContent.trim().slice(0, 60));
    else if (!math.querySelector("mjx-container svg"))
      faults.push("formula not drawn: " + math.textContent.trim().slice(0, 60));
  }
  for (const image of document.images) {
    const name = image.getAttribute("src").slice(0, 80);
    if (!image.naturalWidth) faults.push("image not drawn: " + name);
    if (!(image.getAttribute("alt") || "").trim())
      faults.push("image without alternative text: " + name);
  }
  return faults;
}"""
SIDEWAYS = """() => {
  const page = document.scrollingElement, width = document.documentElement.clientWidth;
  if (page.scrollWidth <= width + 1) return [];
  const scrolls = node => {
    for (let up = node; up && up !== document.body; up = up.parentElement)
      if (["auto", "scroll", "hidden"].includes(getComputedStyle(up).overflowX)) return true;
    return false;
  };
  const wide = [...document.querySelectorAll("body *")].filter(
    node => node.getBoundingClientRect().right > width + 1 && !scrolls(node));
  return wide.slice(0, 3).map(node => node.outerHTML.slice(0, 120)).concat(["the page"]);
}"""


def chromium() -> str | None:
    names = ("chromium", "chromium-browser", "google-chrome")
    return next((path for name in names if (path := shutil.which(name))), None)


@dataclass
class Visit:
    """One page in one size and theme; `faults` gathers what a reader would stumble on."""

    browser: object
    path: Path
    size: tuple[int, int] = DESKTOP
    dark: bool = False
    faults: list[str] = field(default_factory=list)

    def __enter__(self) -> Visit:
        self.context = self.browser.new_context(
            viewport={"width": self.size[0], "height": self.size[1]},
            color_scheme="dark" if self.dark else "light",
            reduced_motion="reduce",
            offline=True,
        )
        self.page = self.context.new_page()
        self.page.on("console", self._heard)
        self.page.on("pageerror", lambda error: self.faults.append(f"JavaScript error: {error}"))
        self.page.on("request", self._asked)
        self.page.goto(self.path if "://" in str(self.path) else self.path.as_uri())
        return self

    def __exit__(self, *_) -> None:
        self.context.close()

    def _heard(self, message) -> None:
        if message.type == "error":
            self.faults.append(f"console error: {message.text}")

    def _asked(self, request) -> None:
        if not request.url.startswith(OURS):
            self.faults.append(f"foreign request: {request.url}")

    def look(self) -> None:
        """Note formulas and images that are not drawn, and sideways scrolling."""
        self.faults += self.page.evaluate(DRAWN)
        sideways = self.page.evaluate(SIDEWAYS)
        self.faults += [f"scrolls sideways at {self.size[0]} px: {what}" for what in sideways]

    def audit(self) -> None:
        """Note what axe calls serious or critical; in the dark only colours can differ."""
        options = {"resultTypes": ["violations"], "preload": False}
        if self.dark:
            options["runOnly"] = ["color-contrast", "link-in-text-block"]
        found = Axe().run(self.page, options=options).response["violations"]
        theme = "dark" if self.dark else "light" if self.size == DESKTOP else "phone"
        for rule in found:
            if rule["impact"] in ("serious", "critical"):
                places = "; ".join(node["html"][:150] for node in rule["nodes"][:4])
                count = len(rule["nodes"])
                self.faults.append(f"axe ({theme}) {rule['id']} at {count} places: {places}")


def inspect(browser, path: Path) -> list[str]:
    """Return all faults of a page: at desktop width, in the dark, and on a phone."""
    faults = []
    for size, dark in ((DESKTOP, False), (DESKTOP, True), (PHONE, False)):
        with Visit(browser, path, size, dark) as visit:
            visit.look()
            visit.audit()
            faults += visit.faults
    return list(dict.fromkeys(faults))
