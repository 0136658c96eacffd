"""Named data sets with cards and honest splits.

A row belongs to train, validation or test by the SHA-256 of its group key (the film a review is
about, the pixels of an image, the text itself) and by nothing else: neither the order of the rows
nor a new version of the archive can move an item to the other side, and rows that belong together
stay together. Duplicates are removed before anything is split. The test split is reached by
``open_test()`` alone, which the record of the run remembers.
"""

from __future__ import annotations

import hashlib
import html
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from transferkit import assets, claims, pictures
from transferkit.corpora import RECIPES, Column, Recipe, Table, read_csv


def fraction(text: str) -> float:
    """A number in [0, 1) that depends on ``text`` alone: the first 8 bytes of its SHA-256."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "big") / 2**64


def _pick(column: Column, indices: np.ndarray) -> Column:
    return column[indices] if isinstance(column, np.ndarray) else [column[i] for i in indices]


@dataclass(frozen=True)
class DataCard:
    """What a reader must know before using a data set; prints as text, shows as a table."""

    name: str
    title: str
    source: str
    licence: str
    declared: str
    origin: str
    citation: str
    size: str
    fields: Mapping[str, str]
    labels: Sequence[str]
    split: str
    problems: Sequence[str]

    def rows(self) -> list[tuple[str, list[str]]]:
        """Heading and lines of every entry, in the order in which they are shown."""
        return [
            ("data", [self.title]),
            ("source", [self.source]),
            ("licence", [self.licence]),
            ("declared by the package", [self.declared]),
            ("origin", [self.origin]),
            ("citation", [self.citation]),
            ("size", [self.size]),
            ("fields", [f"{name}: {text}" for name, text in self.fields.items()]),
            ("labels", [", ".join(self.labels) or "none"]),
            ("splits", [self.split]),
            ("known problems", list(self.problems)),
        ]

    def __str__(self) -> str:
        width = max(len(heading) for heading, _ in self.rows())
        lines = [self.name]
        for heading, texts in self.rows():
            for i, text in enumerate(texts):
                lines.append(f"  {'' if i else heading:{width}}  {text}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        body = "".join(
            f'<tr><th scope="row" style="text-align:left;vertical-align:top">{heading}</th>'
            f'<td style="text-align:left">{"<br>".join(html.escape(t) for t in texts)}</td></tr>'
            for heading, texts in self.rows()
        )
        caption = f"<caption>Data card: {html.escape(self.name)}</caption>"
        return f"<table>{caption}<tbody>{body}</tbody></table>"


class Split:
    """Rows of a data set: named columns, labels, and the keys whose hashes decided the split.

    ``split["text"]`` is a list, ``split["image"]`` an array uint8 (n, h, w), or a list where sizes
    may differ; ``split.labels`` is int64 (n,) or None; ``split.keys`` the group key of every row;
    ``split.kind`` is "text", "image", "features" or "tokens" and ``split.inputs`` the column a
    model reads.
    """

    def __init__(self, table: Table, indices: np.ndarray, name: str):
        self._table, self._indices, self.name = table, indices, name
        self.kind = table.kind
        self.labels = None if table.labels is None else table.labels[indices]
        self.keys: list[str] = _pick(table.keys, indices)

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, column: str) -> Column:
        known = self._table.columns
        if column not in known:
            raise KeyError(f"{self.name} has no column {column!r}: its columns are {list(known)}")
        return _pick(known[column], self._indices)

    def __repr__(self) -> str:
        return f"Split({self.name}: {len(self):,} rows of kind {self.kind!r})"

    @property
    def columns(self) -> list[str]:
        """Names of the columns."""
        return list(self._table.columns)

    @property
    def inputs(self) -> Column:
        """The column that a model reads."""
        return self[self._table.input]

    def select(self, indices: Sequence[int] | np.ndarray) -> Split:
        """The rows at ``indices`` (integers, or a boolean mask of the split's length).

        Raises:
            IndexError: an index or a mask that does not fit the split's length.
        """
        chosen = np.asarray(indices)
        if chosen.dtype != bool:
            chosen = chosen.astype(np.int64)
        return Split(self._table, self._indices[chosen], self.name)

    def take(self, n: int, seed: int = 0, stratify: bool = True) -> Split:
        """``n`` rows drawn by hash; for one seed the smaller draw is part of the larger.

        Args:
            n: how many rows, 0 to ``len(split)``.
            seed: another seed gives another draw.
            stratify: keep the classes' shares, to the nearest row, at every ``n``.

        Raises:
            ValueError: more rows asked for than there are.
        """
        if not 0 <= n <= len(self):
            raise ValueError(
                f"{self.name} holds {len(self):,} rows and {n:,} were asked for: ask for "
                f"0 to {len(self):,}"
            )
        ids = self._table.ids
        rank = np.array([fraction(f"{seed}\n{ids[i]}") for i in self._indices])
        if stratify and self.labels is not None:
            place = np.empty(len(self))
            for label in np.unique(self.labels):
                rows = np.flatnonzero(self.labels == label)
                place[rows[np.argsort(rank[rows], kind="stable")]] = (
                    np.arange(len(rows)) + 0.5
                ) / len(rows)
            order = np.lexsort((rank, place))
        else:
            order = np.argsort(rank, kind="stable")
        return self.select(order[:n])


class Dataset:
    """A data set with its card and its fixed splits."""

    def __init__(self, name: str, table: Table, recipe: Recipe, texts: Mapping):
        self.name, self.labels = name, list(recipe.labels)
        self.feature_names = list(table.feature_names)
        self._table, self._parts = table, _parts(table.keys, recipe, table.labels)
        self.card = _card(name, table, recipe, self._parts, texts)

    def _split(self, part: str) -> Split:
        return Split(self._table, np.flatnonzero(self._parts == part), f"{self.name}/{part}")

    @property
    def train(self) -> Split:
        """The rows to learn from."""
        return self._split("train")

    @property
    def validation(self) -> Split:
        """The rows to choose with."""
        return self._split("validation")

    def open_test(self) -> Split:
        """The rows to report on; the record of the run notes that they were opened."""
        claims.note_test_opened(self.name)
        return self._split("test")

    def folds(self, k: int, seed: int = 0) -> list[tuple[Split, Split]]:
        """``k`` pairs (train, held out) over train and validation together, never the test rows.

        The fold of a row is decided by the hash of its group key and the seed.

        Raises:
            ValueError: ``k`` below 2, or a class is missing on one side of a fold.
        """
        if k < 2:
            raise ValueError(f"folds needs k of at least 2 and was given {k}")
        rows = np.flatnonzero(self._parts != "test")
        fold = np.array([int(k * fraction(f"fold {seed}\n{self._table.keys[i]}")) for i in rows])
        if (labels := self._table.labels) is not None:
            for j, label in itertools.product(range(k), np.unique(labels)):
                held = fold[labels[rows] == label] == j
                if not held.any() or held.all():
                    raise ValueError(
                        f"fold {j + 1} of {k} has {'all' if held.any() else 'no'} rows labelled "
                        f"{self.labels[label]!r}, of {len(held)}: take a smaller k, another seed, "
                        "or more rows"
                    )
        return [
            (
                Split(self._table, rows[fold != j], f"{self.name}/fold {j + 1} of {k}, train"),
                Split(self._table, rows[fold == j], f"{self.name}/fold {j + 1} of {k}, held out"),
            )
            for j in range(k)
        ]

    def __repr__(self) -> str:
        sizes = ", ".join(f"{p} {np.sum(self._parts == p):,}" for p in _PARTS)
        return f"Dataset({self.name}: {sizes})"

    def _repr_html_(self) -> str:
        return self.card._repr_html_()


_PARTS = ("train", "validation", "test")


def _parts(keys: Sequence[str], recipe: Recipe, labels: np.ndarray | None = None) -> np.ndarray:
    """The part of every row: from the hash of salt and key alone, or from its rank in the class."""
    train, validation = recipe.shares
    places = np.array([fraction(recipe.salt + key) for key in keys])
    if recipe.stratified:
        places = _ranked(places, labels)
    return np.select([places < train, places < train + validation], _PARTS[:2], _PARTS[2])


def _ranked(places: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The share of a class's rows before the middle of each group, groups in order of `places`.

    Rows of one place are a group. It counts as one of the class that most of its rows have.
    """
    order, group, sizes = np.unique(places, return_inverse=True, return_counts=True)
    votes = np.zeros((len(order), labels.max() + 1))
    np.add.at(votes, (group, labels), 1)
    middle = np.empty(len(order))
    for label in np.unique(votes.argmax(1)):
        of = votes.argmax(1) == label
        middle[of] = (np.cumsum(sizes[of]) - sizes[of] / 2) / sizes[of].sum()
    return middle[group]


def available() -> list[str]:
    """Names that :func:`load` knows."""
    return list(RECIPES)


def load(name: str) -> Dataset:
    """Load a data set by name, fetching it first where it is not in the cache.

    Raises:
        ValueError: no data set has this name (the nearest is suggested), or its text is not UTF-8.
        transferkit.assets.AssetError: it could not be fetched; the message says why.
    """
    if name not in RECIPES:
        raise ValueError(f"no data set is called {name!r}: {assets.nearest(name, RECIPES)}")
    recipe = RECIPES[name]
    texts = dict(assets.manifest()["cards"][name])
    if name in assets.names("data set"):
        texts |= _provenance(name)
    return Dataset(name, recipe.read(), recipe, texts)


def from_csv(
    path: str | Path, text: str = "text", label: str = "label", group: str | None = None
) -> Dataset:
    """Your own labelled texts, with repetitions and contradictions removed, then split by hash.

    The file is UTF-8 with a line of column names; commas, semicolons or tabs separate the fields.
    Texts that differ in punctuation or case alone
    count as one; texts that stand there with two labels are dropped.

    Args:
        text, label: names of the columns.
        group: name of a column whose rows must stay on one side of the split, such as the writer.

    Returns:
        A data set as `load` returns it. The labels are sorted by name.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a column is missing or there twice, there is no row, a field is empty, a row has
            too many fields, a quotation mark is not closed, there is only one label, a label occurs
            only in some of train, validation and test, or the text is not UTF-8.

    Example:
        >>> from pathlib import Path
        >>> rows = [f"text {i},{'good' if i % 2 else 'bad'}" for i in range(60)]
        >>> _ = Path("mine.csv").write_text("\\n".join(["text,label", *rows, rows[0]]))
        >>> mine = tk.datasets.from_csv("mine.csv")
        >>> mine, mine.labels
        (Dataset(mine: train 39, validation 9, test 12), ['bad', 'good'])
    """
    path = Path(path)
    table, labels = read_csv(path, text, label, group)
    unit = "the text's letters and digits" if group is None else f"the column {group!r}"
    texts = {
        "title": "your own texts",
        "fields": {"text": f"the column {text!r}", "labels": f"the column {label!r}"},
        "problems": ["{repeated} rows repeat another, {conflicts} texts have two labels: removed."],
    }
    return _own(path, path.stem, table, Recipe(lambda: table, labels, unit), texts)


def from_folder(
    path: str | Path,
    group: Callable[[Path], str] | None = None,
    skip_unreadable: bool = False,
) -> Dataset:
    """Your own pictures, in one folder a class: copies and contradictions removed, then split.

    Each folder in `path` is a class and gives it its name; its pictures may lie in folders inside.
    Two pictures are the same if all their pixels are, however they were saved; what lies in two
    classes is dropped. Each class is split 70/15/15 in the order of the hashes of its pictures (or
    groups), so that five of a class are enough to begin with. Hidden files are passed over. Pixels
    are read again when they are asked for: see :func:`transferkit.pictures.decode`.

    Args:
        group: takes the picture's path below `path` and returns the name of its group, whose
            pictures stay on one side of the split, whatever their classes. For one folder an object
            inside each class: ``lambda picture: str(picture.parent)``; for files such as
            ``tom-1.jpg``: ``lambda picture: picture.stem.split("-")[0]``.
        skip_unreadable: leave out files that cannot be read, and name them on the card.

    Returns:
        A data set as `load` returns it. ``split["image"]`` is a list of pictures, of which
        ``np.asarray`` makes uint8 (h, w, 3), ``split["file"]`` their names.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it holds fewer than two class folders, or files beside them; a class folder is
            empty, or called like a split; there is a link, or a name that is not UTF-8; a file
            cannot be read; `group` returns no name; or a class is missing in train, validation or
            test.

    Example:
        >>> from pathlib import Path
        >>> from PIL import Image
        >>> for at in range(20):
        ...     folder = Path("photos", "dark" if at % 2 else "light")
        ...     folder.mkdir(parents=True, exist_ok=True)
        ...     Image.new("L", (8, 8), 100 + (-at if at % 2 else at)).save(folder / f"{at}.png")
        >>> mine = tk.datasets.from_folder("photos")
        >>> mine, mine.labels, mine.train["file"][0]
        (Dataset(photos: train 14, validation 2, test 4), ['dark', 'light'], 'dark/1.png')
    """
    path = Path(path)
    table, labels = pictures.read_folder(path.absolute(), group, skip_unreadable)
    unit = "the picture's pixels" if group is None else "the picture's group"
    texts = {
        "title": "your own pictures",
        "fields": {
            "image": f"decoded when asked for, upright, RGB; {table.counts['sizes']} pixels",
            "file": "the name below the folder",
        },
        "problems": [
            "copies with equal pixels, removed: {repeated}.",
            "the same picture in two classes, removed: {conflicts}.",
            "files that cannot be read, left out: {broken}.",
        ],
    }
    recipe = Recipe(lambda: table, labels, unit, stratified=True)
    return _own(path, path.resolve().name, table, recipe, texts)


def _own(path: Path, name: str, table: Table, recipe: Recipe, texts: Mapping) -> Dataset:
    """A data set of somebody's own.

    Raises:
        ValueError: a label occurs only in some of train, validation and test.
    """
    unknown = "yours to know"
    whose = {"source": str(path), "licence": unknown, "declared": "nothing", "origin": unknown}
    found = Dataset(name, table, recipe, {**texts, **whose, "citation": "none"})
    for part in _PARTS:
        held = np.bincount(table.labels[found._parts == part], minlength=len(recipe.labels))
        if not held.all():
            label = held.argmin()
            keys = [table.keys[at] for at in np.flatnonzero(table.labels == label)]
            raise ValueError(
                f"{path}: no row labelled {recipe.labels[label]!r} falls into {part}: it has "
                f"{len(keys)} rows in {len(set(keys))} groups; give more rows of this label, "
                "or leave it out"
            )
    return found


def _card(name: str, table: Table, recipe: Recipe, parts: np.ndarray, texts: Mapping) -> DataCard:
    texts = dict(texts)
    problems = [text.format(**table.counts) for text in texts.pop("problems")]
    sizes = ", ".join(f"{part} {np.sum(parts == part):,}" for part in _PARTS)
    shares = "/".join(f"{100 * s:.0f}" for s in (*recipe.shares, 1 - sum(recipe.shares)))
    salt = f" prefixed with {recipe.salt!r}" if recipe.salt else ""
    each = " of each class" if recipe.stratified else ""
    return DataCard(
        name=name,
        **texts,
        size=f"{len(table.keys):,} rows: {sizes}",
        labels=recipe.labels,
        split=f"{shares} %{each} by the SHA-256 of {recipe.group}{salt}",
        problems=problems,
    )


def _provenance(name: str) -> dict[str, str]:
    """Card entries that say where the data come from."""
    entry = assets.describe(name)
    archive = next(iter(entry["files"].values()))["archive"]
    package = assets.manifest()["archives"][archive]
    return {
        "title": entry["title"],
        "source": f"{archive} {package['version']} ({package['kind']}, {package['size']} MiB)",
        "licence": entry["licence"],
        "declared": package["licence"],
        "origin": entry["origin"],
        "citation": entry["citation"],
    }
