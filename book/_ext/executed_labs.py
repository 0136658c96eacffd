"""Sphinx extension: pages show what was executed.

Sphinx runs no notebook. When it reads a lab, this extension hands it the executed copy from
``_build/executed``; when it reads a page, it puts executed values in the place of marked numbers.
Chapter pages and labs end with a stamp that says when, where and with which versions.
"""

from __future__ import annotations

import hashlib
import html
import json
import sys
from datetime import datetime
from pathlib import Path

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools import api, appendix, benchmarks, claims, equations, keys, labs, peers, prose

logger = logging.getLogger(__name__)
CLAIMS_PAGE = "book/appendix/claims"
SECTIONED = ("asset-cards", "api-reference")  # these have headings, for the table of contents


def setup(app: Sphinx) -> dict:
    app.connect("config-inited", switch_repository)
    app.connect("config-inited", drop_thebe)
    app.connect("builder-inited", open_book)
    app.connect("source-read", read_source)
    app.connect("html-page-context", repair_lists)
    app.add_role("claim", claim_role)
    for name in appendix.TABLES:
        app.add_directive(name, Generated)
    made_by = (api, appendix, benchmarks, claims, equations, keys, labs, peers, prose)
    parts = [sys.modules[__name__], *made_by]
    digest = hashlib.sha256(b"".join(Path(part.__file__).read_bytes() for part in parts))
    return {
        "version": "1",
        "env_version": digest.hexdigest(),  # pages are read anew when this program changes
        "parallel_read_safe": True,
        "parallel_write_safe": True,
    }


# The one switch: repository.url ------------------------------------------------------------


def switch_repository(app: Sphinx, config) -> None:
    """Without a public address there is nothing to launch and no source to link to."""
    options = config.html_theme_options
    known = bool(options.get("repository_url"))
    if not known:
        options.pop("repository_url", None)
        options.pop("launch_buttons", None)
    options["use_source_button"] = known
    options["use_repository_button"] = known
    options["use_issues_button"] = False
    options["use_edit_page_button"] = False


def drop_thebe(app: Sphinx, _config) -> None:
    """Jupyter Book always loads sphinx-thebe, whose script fails on every page and is not used."""
    for event, listeners in app.events.listeners.items():
        app.events.listeners[event] = [
            li
            for li in listeners
            if not getattr(li.handler, "__module__", "").startswith("sphinx_thebe")
        ]
    styles = app.registry.css_files
    app.registry.css_files[:] = [s for s in styles if "thebe" not in s[0]]


def open_book(app: Sphinx) -> None:
    app.book = labs.Book(Path(app.srcdir))


def repair_lists(app: Sphinx, page: str, template: str, context: dict, doctree) -> None:
    """The bibliography calls itself a list but its entries are no list items: drop the role."""
    if "body" in context:
        context["body"] = context["body"].replace('role="list" class="citation-list"', "")


# Reading -----------------------------------------------------------------------------------


def read_source(app: Sphinx, document: str, source: list[str]) -> None:
    """Replace the text that Sphinx is about to parse."""
    if document.startswith("notebooks/"):
        source[0] = read_lab(app, document)
    else:
        source[0] = read_page(app, document, source[0])


def read_lab(app: Sphinx, document: str) -> str:
    """Return the executed copy of a lab, or its source with a note and a warning."""
    lab = labs.Lab(app.book, document.removeprefix("notebooks/"))
    app.env.note_dependency(str(lab.executed))
    result = lab.result()
    if result is None:
        logger.warning("this lab was not executed: run `make book`", location=document)
        notebook = json.loads(lab.source.read_text("utf-8"))
        note = ":::{warning}\nThis lab was not executed: run `make book`.\n:::"
        notebook["cells"].insert(1, markdown(note))
        return json.dumps(notebook)
    if lab.run().get("key") != keys.key(lab, lab.run().get("profile", "")):
        logger.warning("this lab changed after it was executed: run `make book`", location=document)
    notebook = json.loads(json.dumps(result))
    for cell in notebook["cells"]:
        dress(cell)
    notebook["cells"].append(markdown(stamp(lab)))
    return json.dumps(notebook)


def dress(cell: dict) -> None:
    """Give claims a readable receipt."""
    for output in cell.get("outputs", []):
        data = output.get("data", {})
        if labs.CLAIM_MIME in data:
            data["text/html"] = receipt(data[labs.CLAIM_MIME])


def receipt(claim: dict) -> str:
    name = html.escape(claim["name"])
    value = "not evaluated in this profile"
    if claim["evaluated"]:
        value = f"{claim['value']:.4g} within [{claim['low']:g}, {claim['high']:g}]"
    seeds = f" over {claim['seeds']} seeds" if claim["seeds"] > 1 else ""
    return (
        f'<p class="tk-receipt" id="{name}"><span class="tk-receipt-name">{name}</span> '
        f"{value}{seeds}</p>"
    )


def read_page(app: Sphinx, document: str, text: str) -> str:
    """Return a page with executed values, and a chapter's stamp at its end."""
    book = app.book
    known = {"claim": book.claims(), "recorded": book.recorded()}
    for mark in claims.marks(text):
        pool = known[mark.kind]
        if mark.name in pool:
            lab = book.lab(pool[mark.name]["lab"])
            app.env.note_dependency(str(lab.executed if mark.kind == "claim" else lab.record))
        message = claims.fault(mark, pool)
        if message:
            place = (document, prose.line_of(text, mark.start))
            logger.warning(message, location=place)
    text = claims.substitute(text, known, as_role)
    name = document.removeprefix("book/")
    beside = [lab for lab in book.labs() if lab.name == name]
    for lab in beside:
        app.env.note_dependency(str(lab.executed))
        text = text.rstrip() + "\n\n" + stamp(lab) + "\n"
    return text


def markdown(text: str) -> dict:
    return {"cell_type": "markdown", "metadata": {}, "source": text}


def stamp(lab: labs.Lab) -> str:
    """Return the line that says when, where and with what a lab was last executed."""
    run = lab.run()
    link = f"{{download}}`Download the lab </notebooks/{lab.name}.ipynb>`"
    if not run:
        return f":::{{container}} tk-stamp\n{link}\n:::"
    when = datetime.fromisoformat(run["started"])
    named = ("torch", "transformers", "timm", "scikit-learn")
    versions = ", ".join(f"{n} {v}" for n, v in run["versions"].items() if n in named)
    commit = f", commit {run['commit']}" if run.get("commit") else ""
    return (
        f":::{{container}} tk-stamp\nLast executed {when.day} {when:%B %Y, %H:%M} UTC in "
        f"{run['seconds']:.0f} s with {run['peak_memory_mib']:,} MiB on {labs.machine(run)}, "
        f"Python {run['versions']['python']}, {versions}; profile {run['profile']}, "
        f"seed {run['seed']}{commit}. {link}\n:::"
    )


# Numbers -----------------------------------------------------------------------------------


def as_role(mark: claims.Mark, printed: str) -> str:
    return f"{{claim}}`{printed};{mark.kind};{mark.name}`"


def claim_role(name, rawtext, text, lineno, inliner, options=None, content=None):
    """Show an executed number as a link to its evidence, with interval and seeds as its title."""
    printed, kind, claim_name = text.split(";")
    env = inliner.document.settings.env
    book = env.app.book
    claim = (book.claims() if kind == "claim" else book.recorded())[claim_name]
    title = explain(claim, kind)
    classes = ["tk-claim", f"tk-{kind}"]
    if CLAIMS_PAGE in env.found_docs and env.app.builder.format == "html":
        target = env.app.builder.get_relative_uri(env.docname, CLAIMS_PAGE)
        target += f"#{anchor(kind, claim_name)}"
        node = nodes.reference("", printed, refuri=target, internal=True, classes=classes)
        node["reftitle"] = title
    else:
        node = nodes.abbreviation("", printed, explanation=title, classes=classes)
    if kind == "recorded":
        return [node, nodes.superscript("", "recorded", classes=["tk-recorded-mark"])], []
    return [node], []


def explain(claim: dict, kind: str) -> str:
    seeds = f"{claim['seeds']} seeds" if claim["seeds"] > 1 else "one run"
    text = f"{claim['name']}: between {claim['low']:g} and {claim['high']:g}, {seeds}"
    if kind == "recorded":
        run = claim["run"]
        text += f"; recorded {run['started'][:10]} on {labs.machine(run)}"
        text += f", torch {run['versions']['torch']}"
    return text


def anchor(kind: str, name: str) -> str:
    return f"{kind}-{name}".replace(".", "-")


# Generated tables --------------------------------------------------------------------------


class Generated(SphinxDirective):
    """A table of the appendix, made from what was executed, recorded, tested or declared."""

    def run(self) -> list[nodes.Node]:
        self.env.note_reread()
        text = appendix.TABLES[self.name](self.env.app.book)
        source, _ = self.get_source_info()
        holder = nodes.container(classes=["tk-generated", self.name])
        self.state.nested_parse(StringList(text.split("\n"), source), 0, holder)
        return holder.children if self.name in SECTIONED else [holder]
