"""The tables of the page on other libraries, made from what `make peers` recorded."""

from __future__ import annotations

import json

from tools import labs

MISSING = "Nothing is recorded yet: run `make peers`."


def record(book: labs.Book) -> dict:
    """Return the record of the laws, {} where there is none."""
    path = book.root / "book" / "recorded" / "peer-laws.json"
    return json.loads(path.read_text("utf-8")) if path.exists() else {}


def laws_table(book: labs.Book) -> str:
    """Return law by system, a table for each law, under a line about the run."""
    found = record(book)
    if not found:
        return MISSING
    pieces, numbers = [_about(found)], {law["number"]: [] for law in found["laws"].values()}
    for key, law in found["laws"].items():
        numbers[law["number"]].append(key)
    for number, keys in numbers.items():
        figures = dict.fromkeys(_figure(found["laws"][key]) for key in keys)
        pieces.append(f"**Law {number}.** Figures: {'; '.join(figures)}.")
        pieces.append(_answers(found, keys))
    return "\n\n".join(pieces)


def _answers(found: dict, keys: list[str]) -> str:
    systems = found["systems"]
    rows = [_row("law", *(system["title"] for system in systems.values()))]
    rows.append("|---|" + "---|" * len(systems))
    for key in keys:
        answers = [_cell(found["results"][key][system][0]) for system in systems]
        rows.append(_row(found["laws"][key]["asks"], *answers))
    return "\n".join(rows)


def settings_table(book: labs.Book) -> str:
    """Return what a setting changes where it decides, a table for each system.

    Systems that answer alike share a row.
    """
    found = record(book)
    if not found:
        return MISSING
    rows: dict[tuple[str, ...], list[str]] = {}
    for key, law in found["laws"].items():
        for system, about in found["systems"].items():
            first, *others = answers = found["results"][key][system]
            if others and any(answer["outcome"] != "holds" for answer in answers):
                with_it = "<br>".join(f"{row['setting']}: {_cell(row)}" for row in others)
                asks = f"{law['number']}: {_whole(found['laws'], key)}"
                rows.setdefault((asks, _cell(first), with_it), []).append(about["title"])
    tables: dict[str, list[str]] = {}
    for cells, titles in rows.items():
        tables.setdefault("; ".join(titles), []).append(_row(*cells))
    head = [_row("law", "as documented", "with a setting"), "|---|---|---|"]
    return "\n\n".join(
        f"**{titles}**\n\n" + "\n".join(head + lines) for titles, lines in sorted(tables.items())
    )


def setups(book: labs.Book) -> str:
    """Return how each system was set up, and what was set for single laws."""
    found = record(book)
    if not found:
        return MISSING
    pieces = []
    for about in found["systems"].values():
        versions = ", ".join(f"{name} {found['versions'][name]}" for name in about["packages"])
        pieces.append(f"**{about['title']}** ({versions}). {about['setup']}")
        for key, note in about["notes"].items():
            pieces[-1] += f"\n- {_subject(found['laws'], key)}: {note}"
    head = [f"{times:.3f} times at {steps}" for steps, times in found["library_head"].items()]
    pieces.append(
        "**A check of the first HF set-up** with one of the library's own heads, a small "
        "`BertForSequenceClassification`: the first update against the gradient of one batch is "
        f"{' and '.join(head)} steps of accumulation."
    )
    return "\n\n".join(piece.replace("\n- ", "\n\n- ", 1) for piece in pieces)


def _about(found: dict) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    when = found["recorded"][:16].replace("T", " ")
    return f"Recorded {when} UTC on {labs.machine(found['machine'])}; {versions}"


def _row(*cells: object) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"


def _cell(answer: dict) -> str:
    shown = answer["shown"].replace(" %", "\u00a0%").replace("× ", "×\u00a0")
    if answer["outcome"] != "holds":
        return f"*{answer['outcome']}*: {shown}"
    return "holds" if shown.startswith("below") else f"holds: {shown}"


def _figure(law: dict) -> str:
    return law["figure"] + (f", at most {law['limit']}" if law["limit"] else "")


def _whole(laws: dict, key: str) -> str:
    # A law that goes on from another starts with dots: put the one it goes on from before it.
    names = list(laws)
    start = at = names.index(key)
    while laws[names[start]]["asks"].startswith("…"):
        start -= 1
    return " ".join(laws[names[i]]["asks"] for i in {start: 0, at: 0})


def _subject(laws: dict, key: str) -> str:
    if key in laws:
        return f"law {laws[key]['number']}, “{_whole(laws, key)}”"
    number = next(law["number"] for name, law in laws.items() if name.startswith(f"{key}."))
    return f"law {number}"
