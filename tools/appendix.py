"""The tables that the appendix pages show, made from what was executed and what is declared."""

from __future__ import annotations

import re
import tomllib
from collections import Counter
from collections.abc import Callable

from tools import api, benchmarks, equations, labs, peers


def claims_table(book: labs.Book) -> str:
    """Return all executed claims, a table for each lab, under a line about the run."""
    pieces = []
    for lab in book.labs():
        claims, run = lab.claims(), lab.run()
        if claims:
            pieces.append(f"**[](/notebooks/{lab.name}.ipynb)**, {_about(run)}")
            pieces.append(_rows("claim", claims))
    return "\n\n".join(pieces) or "No lab was executed: run `make book`."


def recorded_table(book: labs.Book) -> str:
    """Return all claims of the recorded full-size runs, as `claims_table` does."""
    pieces = []
    for lab in book.labs():
        claims = lab.recorded_claims()
        if claims:
            run = next(iter(claims.values()))["run"]
            pieces.append(f"**[](/notebooks/{lab.name}.ipynb)**, {_about(run)}")
            pieces.append(_rows("recorded", claims))
    return "\n\n".join(pieces) or "No full-size run is recorded yet."


def _about(run: dict) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    commit = f", commit {run['commit']}" if run.get("commit") else ""
    note = f" ({run['note']})" if run.get("note") else ""  # where a run was interrupted and resumed
    return (
        f"profile {run['profile']}, seed {run['seed']}: {run['seconds']:.0f} s{note} and "
        f"{run['peak_memory_mib']:,} MiB on {labs.machine(run)}; "
        f"{run['started'][:16].replace('T', ' ')} UTC; {versions}{commit}"
    )


def _rows(kind: str, claims: dict[str, dict]) -> str:
    rows = ["| claim | value | asserted interval | seeds | test split |", "|---|--:|---|--:|---|"]
    for name, claim in claims.items():
        anchor = f"{kind}-{name}".replace(".", "-")
        value = f"{claim['value']:.5g}" if claim["evaluated"] else "not evaluated"
        opened = ", ".join(claim.get("test_opened", [])) or "not opened"
        rows.append(
            f'| <span id="{anchor}">`{name}`</span> | {value} | '
            f"{claim['low']:g} to {claim['high']:g} | {claim['seeds']} | {opened} |"
        )
    return "\n".join(rows)


ERRATUM = re.compile(r"^\(err-(s\d)-[a-z0-9-]+\)=\n### .*\n% evidence: (\w+)", re.MULTILINE)
EVIDENCE = ("run", "argument", "reference")


def errata_counts(book: labs.Book) -> str:
    """Return how many errata of each article rest on which evidence, counted on their page."""
    page = (book.root / "book/appendix/errata.md").read_text("utf-8")
    found = Counter(ERRATUM.findall(page))
    articles = sorted({article for article, _ in found})
    rows = ["| Article | Run | Argument | Reference | All |", "|---|--:|--:|--:|--:|"]
    for article in articles:
        numbers = [found[article, kind] for kind in EVIDENCE]
        cells = [f"{{ref}}`{article.upper()} <errata-{article}>`", *numbers, sum(numbers)]
        rows.append(f"| {' | '.join(map(str, cells))} |")
    sums = [sum(found[article, kind] for article in articles) for kind in EVIDENCE]
    rows.append(f"| {' | '.join(f'**{cell}**' for cell in ('All', *sums, sum(sums)))} |")
    return "\n".join(rows)


def asset_cards(_book: labs.Book) -> str:
    """Return a section for each asset of the manifest: what it is, whose, and from where."""
    manifest = tomllib.loads((labs.ROOT / "transferkit" / "assets.toml").read_text("utf-8"))
    pieces = []
    for name, asset in manifest["assets"].items():
        lines = [
            f"(asset-{name})=",
            f"### `{name}`",
            "",
            f"{asset['title']} ({asset['type']}).",
            "",
        ]
        for key in ("origin", "licence", "citation"):
            if key in asset:
                lines.append(f"- {key.capitalize()}: {asset[key]}")
        archives = sorted({f["archive"] for f in asset["files"].values() if "archive" in f})
        for archive in archives:
            card = manifest["archives"][archive]
            lines.append(
                f"- From `{archive}=={card['version']}` ({card['kind']}, {card['size']} MiB; the "
                f"package declares {card['licence']})"
            )
        lines += [_file(file) for file in asset["files"].values()]
        pieces.append("\n".join(lines))
    return "\n\n".join(pieces)


def _file(file: dict) -> str:
    member = f"`{file['member']}`" if "member" in file else f"`{file['members']}`"
    if "sha256" in file:
        return f"- SHA-256 of {member}: `{file['sha256']}`"
    return f"- {member}, each with the SHA-256 that the archive's own record gives"


def api_reference(_book: labs.Book) -> str:
    """Return the reference of the library, from its docstrings."""
    return api.reference()


TABLES: dict[str, Callable[[labs.Book], str]] = {
    "claims-table": claims_table,
    "recorded-table": recorded_table,
    "equations-table": equations.table,
    "errata-counts": errata_counts,
    "asset-cards": asset_cards,
    "api-reference": api_reference,
    "peer-laws-table": peers.laws_table,
    "peer-settings-table": peers.settings_table,
    "peer-setups": peers.setups,
    **benchmarks.directives(),
}
