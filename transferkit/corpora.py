"""The readers: from verified files to tables of distinct rows, and how these are split.

Each reader returns a :class:`Table` with exact duplicates removed and contradictions dropped; each
:class:`Recipe` says how its rows are grouped and split. Nothing here trains or chooses.
"""

from __future__ import annotations

import bz2
import collections
import contextlib
import csv
import gzip
import hashlib
import io
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from transferkit import assets

Column = np.ndarray | list


@dataclass
class Table:
    """All rows of a data set in memory, de-duplicated, before any split.

    ``ids`` identify single rows and ``keys`` the groups that stay together; ``counts`` are figures
    that the card's texts ask for.
    """

    columns: dict[str, Column]
    labels: np.ndarray | None
    keys: list[str]
    ids: list[str]
    kind: str
    input: str
    counts: dict[str, int] | dict[str, str] = field(default_factory=dict)
    feature_names: Sequence[str] = ()


@dataclass(frozen=True)
class Recipe:
    """How a data set is read and split; what its card says stands in ``assets.toml``.

    ``shares`` are those of train and validation. The salt is prefixed to the key before hashing.
    Without one, the shares of the classes differ by several points between small splits; so salts
    were counted up from "1 " to the first with which they agree as noted beside it and the sizes
    lie within two points of ``shares``. Nothing but these shares was looked at: no model was.

    Where ``stratified``, each class's groups stand in the order of their hashes, and its first rows
    are for training: few rows suffice, but a new one can move another across the border.
    """

    read: Callable[[], Table]
    labels: Sequence[str]
    group: str
    shares: tuple[float, float] = (0.70, 0.15)
    salt: str = ""
    stratified: bool = False


def decode(raw: bytes, path: Path) -> str:
    """Text of a file that must be UTF-8.

    Raises:
        ValueError: it is not; the message gives the line, the bytes and the remedy.
    """
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}, line {line}: the bytes {raw[error.start : error.end].hex(' ')} are not valid "
            "UTF-8: run `python -m transferkit.assets verify`, or save the file as UTF-8 "
            "(`iconv -f GB18030 -t UTF-8` for many older Chinese files)"
        ) from error


def _digest(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()


# ---- solar cells --------------------------------------------------------------------------------


def read_solar_cells() -> Table:
    """2,624 electroluminescence images uint8 (n, 300, 300) with probability and module type."""
    paths = assets.files("solar-cells")
    lines = decode(paths["labels"].read_bytes(), paths["labels"]).splitlines()
    rows = [line.split() for line in lines if line.strip()]
    images = _solar_images(paths["images"], [Path(row[0]).name for row in rows])
    ids = [_digest(image.tobytes()) for image in images]
    if len(set(ids)) != len(ids):
        raise ValueError(f"{len(ids) - len(set(ids))} images of solar-cells occur twice")
    probability = np.array([float(row[1]) for row in rows])
    columns = {
        "image": images,
        "probability": probability,
        "type": np.array([row[2] for row in rows]),
        "file": [Path(row[0]).name for row in rows],
    }
    labels = (probability >= 0.5).astype(np.int64)
    counts = {
        "cells": len(rows),
        "defective": int(labels.sum()),
        "unsure": int(np.sum((probability > 0) & (probability < 1))),
    }
    return Table(columns, labels, ids, ids, "image", "image", counts)


def _solar_images(folder: Path, names: list[str]) -> np.ndarray:
    """The decoded images, kept beside the cache as one memory-mapped array after the first call."""
    from PIL import Image

    kept = assets.cache_directory() / "converted" / "solar-cells-1.0.0.post1.npy"
    if kept.is_file():
        return np.load(kept, mmap_mode="r", allow_pickle=False)
    images = np.stack([np.asarray(Image.open(folder / name)) for name in names])
    with contextlib.suppress(OSError):  # a cache that cannot be written to costs time alone
        assets.keep(kept, lambda path: np.save(path, images))
    return images


_SOLAR = Recipe(
    read=read_solar_cells,
    labels=("functional", "defective"),
    group="the image's pixels",
    salt="44 ",  # classes and module types within 1.5 points
    shares=(0.60, 0.15),
)


# ---- film reviews -------------------------------------------------------------------------------


def read_film_reviews() -> Table:
    """Review snippets with label 1 for fresh, 0 for rotten; plot summaries are left out."""
    path = assets.files("film-reviews")["table"]
    rows = list(csv.DictReader(io.StringIO(decode(bz2.decompress(path.read_bytes()), path))))
    reviews = [row for row in rows if row["category"] in ("fresh", "rotten")]
    film = _merged_films([(row["text"].strip(), row["movie_name"]) for row in reviews])
    kept: dict[str, dict] = {}
    for row in sorted(reviews, key=lambda row: row["movie_name"]):
        kept.setdefault(row["text"].strip(), row)
    chosen = list(kept.values())
    texts = list(kept)
    keys = [film[row["movie_name"]] for row in chosen]
    columns = {"text": texts, "film": [row["movie_name"] for row in chosen]}
    labels = np.array([int(row["category"] == "fresh") for row in chosen], dtype=np.int64)
    names = {row["movie_name"] for row in reviews}
    counts = {
        "rows": len(rows),
        "plots": len(rows) - len(reviews),
        "repeated": len(reviews) - len(chosen),
        "films": len(names),
        "groups": len(set(keys)),
    }
    return Table(columns, labels, keys, texts, "text", "text", counts)


def _merged_films(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """The group of every film: films that share a snippet word for word are one group.

    The group is named by its alphabetically first film.
    """
    pairs = list(pairs)
    group = {film: film for _, film in pairs}

    def root(film: str) -> str:
        return film if group[film] == film else root(group[film])

    first: dict[str, str] = {}
    for text, film in pairs:
        a, b = sorted((root(film), root(first.setdefault(text, film))))
        group[b] = a
    return {film: root(film) for film in group}


_FILM = Recipe(
    read=read_film_reviews,
    labels=("rotten", "fresh"),
    group="the film's name",
    salt="49 ",  # classes within 1 point
)

# ---- Chinese reviews ----------------------------------------------------------------------------

# First lines (counted from 0) of the blocks in which the two files list their domains, in the order
# books, hotels, books, hotels, laptops. Found as the likeliest change points of the rates of words
# such as 书, 酒店 and 电脑, then read line by line around each cut: none is uncertain by a line.
_ZH_BLOCKS = {
    "positive": (2000, 5376, 7376, 10760),
    "negative": (2000, 6382, 8382, 12787),
}
_ZH_DOMAINS = ("books", "hotels", "books", "hotels", "laptops")
_PHONE = re.compile(r"(?<!\d)1[3-9]\d{9}(?!\d)")


def read_zh_reviews() -> Table:
    """Chinese review lines with label 1 for positive, 0 for negative, and a domain each."""
    paths = assets.files("zh-reviews")
    lines = 0
    seen: dict[str, set[int]] = collections.defaultdict(set)
    kept: dict[str, tuple[str, str]] = {}
    exact: list[set[str]] = []
    for label, side in enumerate(("negative", "positive")):
        texts = decode(paths[side].read_bytes(), paths[side]).split("\n")
        exact.append({text.strip() for text in texts} - {""})
        for number, text in enumerate(map(str.strip, texts)):
            key = _letters(text)
            lines += bool(text)
            if key:
                seen[key].add(label)
                domain = _ZH_DOMAINS[sum(number >= cut for cut in _ZH_BLOCKS[side])]
                kept[key] = min(kept.get(key, (text, domain)), (text, domain), key=_shorter)
    keys = sorted(key for key, labels in seen.items() if len(labels) == 1)
    texts = [_PHONE.sub("1**********", kept[key][0]) for key in keys]
    columns = {"text": texts, "domain": np.array([kept[key][1] for key in keys])}
    labels = np.array([int(1 in seen[key]) for key in keys], dtype=np.int64)
    on_books = columns["domain"] == "books"
    lengths = np.array([len(text) for text in texts])[on_books]
    longer = lengths > np.median(lengths)
    counts = {
        "lines": lines,
        "books": int(on_books.sum()),
        "longer": int(np.sum(longer == labels[on_books])),
        "negative": len(exact[0]),
        "positive": len(exact[1]),
        "both": len(exact[0] & exact[1]),
        "conflicts": len(seen) - len(keys),
        "distinct": len(keys),
        "phones": sum("1**********" in text for text in texts),
    }
    return Table(columns, labels, keys, keys, "text", "text", counts)


def is_whole(text: str) -> bool:
    """Whether UTF-8 can hold the text: it has no half characters, as odd file names may have."""
    return not any("\ud800" <= char <= "\udfff" for char in text)


def _letters(text: str) -> str:
    """What identifies a text: its letters with their signs, and its digits, in one form and case.

    Many scripts write vowels as marks beside a letter (कि and की), so marks count. Those that only
    choose how the character before them is drawn do not.
    """
    whole = unicodedata.normalize("NFKC", text).lower()
    return "".join(
        c for c in whole
        if c.isalnum()
        or (unicodedata.category(c) in ("Mc", "Mn") and not "\ufe00" <= c <= "\ufe0f")
    )  # fmt: skip


def _shorter(entry: tuple[str, str]) -> tuple[int, str]:
    return len(entry[0]), entry[0]


_ZH = Recipe(
    read=read_zh_reviews,
    labels=("negative", "positive"),
    group="the text's letters and digits",
    salt="12 ",  # classes and domains within 1.5 points
)


# ---- a table of one's own -----------------------------------------------------------------------


def read_csv(path: Path, text: str, label: str, group: str | None) -> tuple[Table, list[str]]:
    """The distinct texts of a CSV file, and the names of its labels."""
    wanted = [text, label] if group is None else [text, label, group]
    found: dict[str, list[dict]] = collections.defaultdict(list)
    for place, given in _csv_rows(path, wanted):
        if None in given:
            what = f"{place}: there are more fields than columns"
            raise ValueError(f"{what}: put texts that hold the separator in quotation marks")
        row = {name: (given[name] or "").strip() for name in wanted}
        if empty := [name for name in wanted if not row[name]]:
            raise ValueError(f"{place}: {empty[0]!r} is empty: fill or delete the row")
        found[_letters(row[text]) or row[text]].append(row)
    if not found:
        raise ValueError(f"{path} holds no row below the names of its columns: add your texts")
    ids = sorted(key for key, same in found.items() if len({row[label] for row in same}) == 1)
    kept = [found[key][0] for key in ids]
    names = sorted({row[label] for row in kept})
    if len(names) < 2:
        what = f"{path}: without contradictions there are the labels {names}"
        raise ValueError(f"{what}, but a classifier needs two: is {label!r} the column of labels?")
    counts = {
        "repeated": sum(len(found[key]) - 1 for key in ids),
        "conflicts": len(found) - len(ids),
    }
    labels = np.array([names.index(row[label]) for row in kept], dtype=np.int64)
    keys = ids if group is None else [row[group] for row in kept]
    texts = [row[text] for row in kept]
    return Table({"text": texts}, labels, keys, ids, "text", "text", counts), names


def _csv_rows(path: Path, wanted: Sequence[str]) -> Iterable[tuple[str, dict]]:
    """Place and fields of every row."""
    whole = _own_text(path)
    # strict: a stray quotation mark is an error, and does not swallow the rows after it
    separator = _separator(path, whole, wanted)
    reader = csv.DictReader(io.StringIO(whole, newline=""), delimiter=separator, strict=True)
    try:
        for number, row in enumerate(reader, 1):
            yield f"{path}, row {number} below the names (line {reader.line_num})", row
    except csv.Error as error:
        what = f"{path}, line {reader.line_num + 1}: {error}: is there a quotation mark"
        raise ValueError(f"{what} that never ends, or is not doubled in a quoted text?") from error


def _separator(path: Path, whole: str, wanted: Sequence[str]) -> str:
    """The comma, semicolon or tab by which the first line names all wanted columns."""
    most: list[str] = []
    for separator in ",;\t":
        names = next(csv.reader(io.StringIO(whole, newline=""), delimiter=separator), [])
        if twice := [name for name in wanted if names.count(name) > 1]:
            raise ValueError(f"{path} has two columns {twice[0]!r}: rename one of them")
        if set(wanted) <= set(names):
            return separator
        most = max(most, names, key=len)
    missing = next((name for name in wanted if name not in most), wanted[0])
    what = f"{path} has no column {missing!r}: its columns are {most}"
    raise ValueError(f"{what}: rename one in the first line, or pass its name")


def _own_text(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {str(path)!r}: check its name and folder")
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}, line {line}: this is not UTF-8: save the table as “CSV UTF-8” from the "
            "spreadsheet (.xlsx and “Unicode text” are none), or change the encoding: "
            f"`iconv -f GB18030 -t UTF-8 {path.name}` for many older Chinese files"
        ) from error


# ---- People's Daily -----------------------------------------------------------------------------

_PD_TAGS = (
    *("Ag", "Bg", "Dg", "Mg", "Ng", "Rg", "Tg", "Vg", "Yg", "a", "ad", "an", "b", "c", "d", "e"),
    *("f", "h", "i", "j", "k", "l", "m", "n", "na", "nr", "ns", "nt", "nx", "nz", "o", "p", "q"),
    *("r", "s", "t", "u", "v", "vd", "vn", "vvn", "w", "y", "z"),
)


def read_peoples_daily() -> Table:
    """Segmented and tagged lines: columns ``tokens`` and ``tags``, lists of equal length."""
    path = assets.files("peoples-daily")["text"]
    readings: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    lines = 0
    for line in decode(path.read_bytes(), path).split("\n"):
        pairs = tuple(tuple(word.rsplit("/", 1)) for word in line.split())
        if pairs:
            lines += 1
            readings["".join(word for word, _ in pairs)][pairs] += 1
    texts = sorted(readings)
    best = [min(readings[t], key=lambda pairs: (-readings[t][pairs], pairs)) for t in texts]
    columns = {
        "tokens": [[word for word, _ in pairs] for pairs in best],
        "tags": [[tag for _, tag in pairs] for pairs in best],
        "text": texts,
    }
    counts = {
        "lines": lines,
        "repeated": lines - len(texts),
        "ambiguous": sum(len(found) > 1 for found in readings.values()),
    }
    return Table(columns, None, texts, texts, "tokens", "tokens", counts)


_PD = Recipe(
    read=read_peoples_daily,
    labels=_PD_TAGS,
    group="the line's text",
    salt="4 ",  # shares of nr, ns, nt and t among the words within 0.2 points
)


# ---- digits -------------------------------------------------------------------------------------


def read_digits() -> Table:
    """1,797 digits, uint8 (n, 8, 8); grey levels 0 to 16 are stretched to 0 to 255."""
    from sklearn.datasets import load_digits

    found = load_digits()
    return _digit_table(np.rint(found.images * (255 / 16)).astype(np.uint8), found.target)


def read_mnist() -> Table:
    """5,000 digits, uint8 (n, 28, 28)."""
    path = assets.files("mnist-5k")["table"]
    text = decode(gzip.decompress(path.read_bytes()), path)
    table = np.array([line.split(",") for line in text.split()], dtype=np.float64).astype(np.uint8)
    return _digit_table(table[:, :-1].reshape(-1, 28, 28), table[:, -1])


def _digit_table(images: np.ndarray, labels: np.ndarray) -> Table:
    """Images without repetitions, keyed by their pixels."""
    ids = [_digest(image.tobytes()) for image in images]
    first = np.array(sorted({key: i for i, key in reversed(list(enumerate(ids)))}.values()))
    keys = [ids[i] for i in first]
    counts = {"repeated": len(ids) - len(keys)}
    columns = {"image": images[first]}
    return Table(columns, labels[first].astype(np.int64), keys, keys, "image", "image", counts)


_TEN = tuple("0123456789")
_DIGITS = Recipe(
    read=read_digits,
    labels=_TEN,
    group="the image's pixels",
    shares=(0.60, 0.20),
    salt="212 ",  # ten classes within 2 points
)
_MNIST = Recipe(
    read=read_mnist,
    labels=_TEN,
    group="the image's pixels",
    salt="27 ",  # ten classes within 2 points
)


# ---- German credit ------------------------------------------------------------------------------


def read_german_credit() -> Table:
    """1,000 loans: the 20 attributes as columns, and ``features`` float32 (n, d) made of them.

    Numbers stand as they are; a text attribute gives one column of 0 and 1 for each of its values.
    """
    path = assets.files("german-credit")["table"]
    rows = list(csv.DictReader(io.StringIO(decode(path.read_bytes(), path))))
    target = "creditability"
    ids = ["\n".join(row.values()) for row in rows]
    if len(set(ids)) != len(ids):
        raise ValueError(f"{len(ids) - len(set(ids))} rows of german-credit occur twice")
    columns: dict[str, Column] = {}
    names, features = [], []
    for name in (name for name in rows[0] if name != target):
        values = [row[name] for row in rows]
        if all(value.isdigit() for value in values):
            columns[name] = np.array([int(value) for value in values])
            names.append(name)
            features.append(columns[name])
        else:
            columns[name] = np.array(values)
            for value in sorted(set(values)):
                names.append(f"{name}: {value}")
                features.append(columns[name] == value)
    columns["features"] = np.stack(features, axis=1).astype(np.float32)
    labels = np.array([int(row[target] == "bad") for row in rows], dtype=np.int64)
    return Table(columns, labels, ids, ids, "features", "features", {}, names)


_CREDIT = Recipe(
    read=read_german_credit,
    labels=("good", "bad"),
    group="the row",
    shares=(0.60, 0.20),
    salt="42 ",  # classes within 1.5 points
)

RECIPES: dict[str, Recipe] = {
    "zh-reviews": _ZH,
    "film-reviews": _FILM,
    "peoples-daily": _PD,
    "solar-cells": _SOLAR,
    "digits": _DIGITS,
    "mnist-5k": _MNIST,
    "german-credit": _CREDIT,
}
