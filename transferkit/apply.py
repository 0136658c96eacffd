"""A saved classifier, put to use. The one idea: one function answers, whoever asks.

``python -m transferkit.apply predict MODEL TEXT …`` prints one line of JSON for each text (or for
each line of the standard input); for a model of images, each text is the name of a picture's file.
``python -m transferkit.apply serve MODEL`` serves a page with a form for texts, and the same
answers as JSON under ``/predict``. MODEL is a folder that ``Run.save`` wrote.

The server is for one person on one machine: it listens on 127.0.0.1 alone, answers one question at
a time, keeps nothing and writes no log. It has neither encryption nor accounts, so do not put it
on the open internet.
"""

from __future__ import annotations

import argparse
import contextlib
import html
import json
import sys
import threading
import traceback
import urllib.parse
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from torch import nn

from transferkit import checkpoint, data, evaluation, pictures
from transferkit.corpora import is_whole

LIMIT = 64 * 1024  # bytes of a request's body that are read
_PATIENCE = 10  # seconds that a silent browser is waited for
_LOCAL = ("127.0.0.1", "localhost")


@dataclass(frozen=True)
class Answer:
    """What a model says about one text, and what it did not see of it.

    Attributes:
        label: the name of the likeliest label.
        probability: the model's, of that label; not how often it is right.
        logits: one for each label, in the order of `model.labels`.
        read: tokens that the model read, special ones included.
        unknown: how many of these its vocabulary does not hold.
        cut: whether the end of the text was not read, being too long.
    """

    text: str
    label: str
    probability: float
    logits: list[float]
    read: int
    unknown: int
    cut: bool


def answer(model: nn.Module, texts: Sequence[str]) -> list[Answer]:
    """What a classifier of texts says about each of them, in float32.

    Args:
        model: of :func:`transferkit.models.load` with labels, or a saved one from `tk.load`.

    Raises:
        TypeError: the model has no label names or reads no texts, or `texts` is one string.
        ValueError: `texts` is empty, or one of them holds half a character (a lone surrogate).

    Example:
        >>> tk.apply.answer(nn.Linear(4, 2), ["很好"])
        Traceback (most recent call last):
            ...
        TypeError: the model Linear is no classifier of texts: ...
    """
    tokenizer = getattr(getattr(model, "prepare", None), "tokenizer", None)
    labels = getattr(model, "labels", None)
    if tokenizer is None or not labels:
        raise TypeError(
            f"the model {type(model).__name__} is no classifier of texts: give one that "
            "tk.models.load(name, labels=[...]) made for a text backbone"
        )
    if isinstance(texts, str):
        raise TypeError("texts is one string and a list is expected: pass [text]")
    if broken := [at for at, text in enumerate(texts) if not is_whole(text)]:
        raise ValueError(f"texts[{broken[0]}] holds half a character: decode it as UTF-8 first")
    asked = SimpleNamespace(kind="text", name="texts", inputs=list(texts), labels=None)
    source: Any = data.as_source(asked, model)  # of the class data.Texts
    said: Any = evaluation.predict(model, source, precision="fp32")  # one row a text
    best, shares = said.classes, said.probabilities
    whole = [len(row) for row in tokenizer(list(texts), verbose=False)["input_ids"]]
    rows = np.split(source.tokens.numpy(), np.cumsum(source.lengths)[:-1])
    unknown = [int(np.sum(row == tokenizer.unk_token_id)) for row in rows]
    return [
        Answer(
            text=text, label=labels[best[at]], logits=said.logits[at].tolist(),
            probability=float(shares[at].max()), read=len(rows[at]),
            unknown=unknown[at], cut=whole[at] > len(rows[at]),
        )
        for at, text in enumerate(texts)
    ]  # fmt: skip


@dataclass(frozen=True)
class Sight:
    """What a model says about one picture.

    Attributes:
        picture: the name of its file.
        label, probability, logits: as those of an `Answer`.
        width, height: of the picture, in pixels, before it is squeezed into the model's square.
    """

    picture: str
    label: str
    probability: float
    logits: list[float]
    width: int
    height: int


def look(model: nn.Module, files: Iterable[str | Path]) -> list[Sight]:
    """What a classifier of images says about the picture in each file, in float32.

    Raises:
        TypeError: the model has no label names or reads no images, or `files` is one name.
        FileNotFoundError, ValueError: a file is missing, or no picture (see
            :func:`transferkit.pictures.decode`); or there are no files.
    """
    labels: Any = getattr(model, "labels", None)
    if not (_looks(model) and labels):
        raise TypeError(
            f"the model {type(model).__name__} is no classifier of images: give one that "
            "tk.models.load(name, labels=[...]) made for an image backbone"
        )
    if isinstance(files, str | Path):
        raise TypeError("files is one name and a list is expected: pass [file]")
    seen = [pictures.Picture(Path(file), *pictures.decode(file).size) for file in files]
    asked = SimpleNamespace(kind="image", name="files", inputs=seen, labels=None)
    said: Any = evaluation.predict(model, asked, precision="fp32")
    return [
        Sight(
            picture=str(one.path), label=labels[best], probability=float(shares.max()),
            logits=logits.tolist(), width=one.width, height=one.height,
        )
        for one, best, shares, logits in zip(
            seen, said.classes, said.probabilities, said.logits, strict=True
        )
    ]  # fmt: skip


def _looks(model: nn.Module) -> bool:
    return getattr(getattr(model, "prepare", None), "kind", "") == "image"


def limits(folder: str | Path, labels: Iterable[str]) -> list[str]:
    """What whoever uses the model should know: what holds of every classifier, and its own card."""
    try:
        about = json.loads((Path(folder) / "model.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        about = {}
    own = about.get("notes", {}).get("Limitations")
    return [
        f"It knows the labels {', '.join(labels)} and gives one of them to every text, also to "
        "one about something else, in another language, or without meaning.",
        "A probability says how sure the model is. It does not say how often it is right.",
        *([own] if own else []),
    ]


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{lead}{title}</title>
<style>
:root {{ color-scheme: light dark }}
body {{ font: 1.1rem/1.5 system-ui, sans-serif; max-width: 40rem; padding: 0 1rem }}
body {{ margin: 2rem auto; overflow-wrap: anywhere }}
textarea {{ width: 100%; box-sizing: border-box; font: inherit }}
button {{ font: inherit; padding: .3rem 1.2rem; margin-top: .5rem }}
td, th {{ text-align: left; padding-right: 1.5rem }}
blockquote {{ margin: 1rem 0 }}
</style></head><body><main>
<h1>{title}</h1>
<form method="post" action="/" accept-charset="utf-8">
<label for="text">A text</label>
<textarea id="text" name="text" rows="5" autofocus></textarea>
<button>Classify</button>
</form>
{result}
<h2>What this model does not know</h2>
<ul>{limits}</ul>
</main></body></html>
"""


def _result(found: Answer, labels: Sequence[str], shares: Sequence[float]) -> str:
    rows = "".join(
        f'<tr><th scope="row">{html.escape(name)}</th><td>{share:.1%}</td></tr>'
        for name, share in zip(labels, shares, strict=True)
    )
    notes = [f"{found.read} tokens were read."]
    if found.unknown:
        notes.append(f"{found.unknown} of them the model does not know.")
    if found.cut:
        notes.append("The text was too long: its end was not read.")
    shown = found.text if len(found.text) <= 300 else found.text[:300] + " …"
    return (
        f'<section aria-live="polite"><h2>Answer: <output>{html.escape(found.label)}</output></h2>'
        f"<blockquote>{html.escape(shown)}</blockquote>"
        f"<table><caption>Probabilities</caption>{rows}</table><p>{' '.join(notes)}</p></section>"
    )


class _Handler(BaseHTTPRequestHandler):
    """One request: the form, its answer as a page, or an answer as JSON."""

    server: Server
    timeout = _PATIENCE
    server_version, sys_version = "transferkit", ""

    def log_message(self, *_: object) -> None:
        """Texts are nobody's business: nothing is logged."""

    def do_GET(self) -> None:
        if self._is_local():
            if self.path == "/":
                self._send(HTTPStatus.OK, self.server.page(), "html")
            else:
                self._refuse("There is only one page here: /", HTTPStatus.NOT_FOUND)

    def do_POST(self) -> None:
        if not self._is_local():
            return
        body = self._body()
        if body is None:
            what = f"The text is too long: at most {LIMIT:,} bytes are taken."
            self._refuse(what, HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
        elif self.path == "/predict":
            self._predict(body)
        elif self.path == "/":
            fields = urllib.parse.parse_qs(body.decode("utf-8", "replace"))
            if text := fields.get("text", [""])[0].strip():
                self._answer(self.server.page_answer, text, "html")
            else:
                self._refuse("Type a text first.", HTTPStatus.OK)
        else:
            self._refuse("Questions go to / or to /predict.", HTTPStatus.NOT_FOUND)

    def _is_local(self) -> bool:
        # another site's page in the same browser may know the port, but not name this machine
        name = self.headers.get("Host", "").rsplit(":", 1)[0]
        if name not in _LOCAL:
            self._refuse(f"This is {_LOCAL[0]}, not {name!r}.", HTTPStatus.MISDIRECTED_REQUEST)
        return name in _LOCAL

    def _body(self) -> bytes | None:
        """The body, or None if it is too long; what is too long is read and dropped, to 16 MiB."""
        size = self.headers.get("Content-Length", "0")
        size = int(size[:12]) if size.isascii() and size.isdigit() else 0  # 12 digits are enough
        if size <= LIMIT:
            return self.rfile.read(size)
        for _ in range(min(size, 256 * LIMIT) // LIMIT + 1):
            if not (part := self.rfile.read(min(LIMIT, size))):
                break
            size -= len(part)
        return None

    def _predict(self, body: bytes) -> None:
        try:
            text = json.loads(body)["text"]
            if not (isinstance(text, str) and text.strip() and is_whole(text)):
                raise ValueError
        except (ValueError, KeyError, TypeError, RecursionError):  # the last: [[[[… without end
            what = {"error": 'send {"text": "…"} with a text that is not empty'}
            self._send(HTTPStatus.BAD_REQUEST, json.dumps(what, ensure_ascii=False), "json")
        else:
            self._answer(lambda text: _line(self.server.answer(text)), text, "json")

    def _answer(self, said: Callable[[str], str], text: str, kind: str) -> None:
        # Whatever the model raises: whoever serves it sees where, and the asker that it was so.
        try:
            answer = said(text)
        except Exception:
            traceback.print_exc()
            what = "The model could not answer. The terminal that serves it shows why."
            if kind == "html":
                self._refuse(what, HTTPStatus.INTERNAL_SERVER_ERROR)
            else:
                self._send(HTTPStatus.INTERNAL_SERVER_ERROR, json.dumps({"error": what}), kind)
        else:
            self._send(HTTPStatus.OK, answer, kind)

    def _refuse(self, what: str, status: HTTPStatus) -> None:
        alert = f'<p role="alert"><strong>{html.escape(what)}</strong></p>'
        self._send(status, self.server.page(alert, what), "html")

    def _send(self, status: HTTPStatus, text: str, kind: str) -> None:
        raw = text.encode("utf-8")
        self.send_response(status)
        self.send_header("Content-Type", {"html": "text/html", "json": "application/json"}[kind]
                         + "; charset=utf-8")  # fmt: skip
        self.send_header("Content-Length", str(len(raw)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Content-Security-Policy", "default-src 'none'; img-src data:; "
                         "style-src 'unsafe-inline'; form-action 'self'; frame-ancestors 'none'; "
                         "base-uri 'none'")  # fmt: skip
        self.end_headers()
        self.wfile.write(raw)


class Server(ThreadingHTTPServer):
    """A page for one model on this machine; `serve_forever()` runs it, `server_port` is its port.

    Args:
        folder: what `Run.save` wrote.
        port: 0 takes any that is free.

    Raises:
        FileNotFoundError: the folder holds no model.
        TypeError: the model is no classifier of texts.
        OSError: the port is taken, or no port.
    """

    daemon_threads = True

    def __init__(self, folder: str | Path, port: int = 8000):
        self.model = checkpoint.load(folder)
        if _looks(self.model):
            what = f"the model in {str(folder)!r} reads pictures"
            raise TypeError(f"{what}: ask it with `predict`, as the page takes texts alone")
        answer(self.model, ["?"])  # what cannot work should not begin
        self._labels: list[str] = list(self.model.labels)  # type: ignore[arg-type]
        self._title = f"{' or '.join(self._labels)}?"
        self._limits = limits(folder, self._labels)
        self._turn = threading.Lock()
        try:
            super().__init__((_LOCAL[0], port), _Handler)
        except (OSError, OverflowError) as error:
            remedy = "give another, or 0 for any that is free"
            raise OSError(f"port {port} cannot be used ({error}): {remedy}") from error

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Show what went wrong; that a browser left before its answer came is nothing wrong."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    def answer(self, text: str) -> Answer:
        """The model's answer, one question at a time."""
        with self._turn:
            return answer(self.model, [text])[0]

    def page_answer(self, text: str) -> str:
        """The page with the answer."""
        found = self.answer(text)
        shares = np.exp(np.array(found.logits) - max(found.logits))
        return self.page(_result(found, self._labels, shares / shares.sum()), found.label)

    def page(self, result: str = "", news: str = "") -> str:
        """The page; the news, in plain text, begin its title, which a screen reader reads first."""
        items = "".join(f"<li>{html.escape(text)}</li>" for text in self._limits)
        lead = f"{html.escape(news)} – " if news else ""
        title = html.escape(self._title)
        return _PAGE.format(lead=lead, title=title, result=result, limits=items)


def _line(found: Answer | Sight) -> str:
    line = json.dumps(asdict(found), ensure_ascii=False)
    return line if is_whole(line) else json.dumps(asdict(found))  # a file's name may be odd


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 1 if there is nothing to answer, or no such model."""
    parser = argparse.ArgumentParser("python -m transferkit.apply", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    commands = parser.add_subparsers(dest="command", required=True)
    predict = commands.add_parser("predict", help="print one line of JSON for each text or picture")
    predict.add_argument("model", help="folder that Run.save wrote")
    told = "or files of pictures; without any: each line of the standard input"
    predict.add_argument("text", nargs="*", help=told)
    serve = commands.add_parser("serve", help="serve a page to this machine")
    serve.add_argument("model", help="folder that Run.save wrote")
    serve.add_argument("--port", type=int, default=8000, help="0 takes any that is free")
    given = parser.parse_args(arguments)
    try:
        if given.command == "serve":
            return _serve(given.model, given.port)
        texts = [text for text in given.text or map(str.strip, sys.stdin) if text.strip()]
        if not texts:
            raise ValueError("there is no text: give some, or lines on the standard input")
        model = checkpoint.load(given.model)
        for found in (look if _looks(model) else answer)(model, texts):
            print(_line(found))
    except (OSError, ValueError, TypeError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _serve(folder: str, port: int) -> int:
    with contextlib.suppress(KeyboardInterrupt), Server(folder, port) as server:
        print(f"For this machine only: http://{_LOCAL[0]}:{server.server_port}/", flush=True)
        print("Ctrl-C stops.", flush=True)
        server.serve_forever()
    return 0


if __name__ == "__main__":
    sys.exit(main())
