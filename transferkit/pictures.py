"""Pictures out of files that anybody may have made. The one idea: one safe way to open them.

Whatever a file holds, what :func:`decode` returns is upright, opaque and RGB, or an error names the
file. Few formats are tried, nothing is unpickled or run, and a small file that would unpack into a
huge picture is refused. :func:`read_folder` reads a folder with one sub-folder a class.
"""

from __future__ import annotations

import collections
import hashlib
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from transferkit.corpora import Table, is_whole

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
# Of file managers, beside names with a dot.
_LITTER = {"thumbs.db", "desktop.ini", "__macosx", "icon\r"}
_PARTS = {"train", "training", "val", "valid", "validation", "dev", "test", "testing"}


def decode(path: str | Path) -> Any:
    """The picture in a file, as a ``PIL.Image.Image`` of mode RGB, as a viewer would show it.

    It is turned as its camera noted (EXIF), what is transparent lies on white, grey becomes three
    equal channels, of 16 bits the upper 8 are kept, and of an animation the first picture counts.
    A colour profile is not applied.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no whole picture of one of `FORMATS`, or larger than Pillow's guard
            against decompression bombs allows (some 89 million pixels).
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {str(path)!r}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd notes in a file are no concern
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as image:
                image.load()
                return _opaque(ImageOps.exif_transpose(image))
    except UnidentifiedImageError as error:
        raise ValueError(f"{str(path)!r} cannot be read (no {', '.join(FORMATS)})") from error
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        most = f"more than {Image.MAX_IMAGE_PIXELS:,} pixels: save it smaller"
        raise ValueError(f"{str(path)!r} cannot be read ({most})") from error
    except Exception as error:  # decoders raise whatever they stumble over in a broken file
        raise ValueError(
            f"{str(path)!r} cannot be read ({error or type(error).__name__})"
        ) from error


def _opaque(image: Any) -> Any:
    from PIL import Image

    if image.mode.startswith("I;16"):  # a plain conversion would cut all above 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError("it has 32 bits a pixel: save it with 8")
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


@dataclass(frozen=True)
class Picture:
    """A picture that stays in its file: ``np.asarray(picture)`` decodes it, uint8 (h, w, 3)."""

    path: Path
    width: int
    height: int

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(decode(self.path), dtype=dtype)


def resized(pictures: Iterable[Picture], size: int) -> np.ndarray:
    """The pictures as uint8 (n, size, size, 3), one decoded at a time, squeezed into a square."""
    from PIL import Image

    square, how = (size, size), Image.Resampling.BILINEAR  # which averages where it shrinks
    found = [np.asarray(decode(one.path).resize(square, how)) for one in pictures]
    return np.array(found, np.uint8).reshape(-1, size, size, 3)


def read_folder(
    folder: Path, group: Callable[[Path], str] | None, skip_unreadable: bool
) -> tuple[Table, list[str]]:
    """The distinct pictures of a folder in the order of their names, and the names of its classes.

    Two files are the same picture where all pixels are equal once they are decoded.
    """
    labels, files = _classes(folder), _files(folder)
    if odd := [str(path) for path in files if not is_whole(str(path))]:
        what = f"names that are not UTF-8: {_some(odd)}"
        raise ValueError(f"{what}: rename them (`convmv -f GB18030 -t UTF-8 -r` can do it)")
    names = {path: path.relative_to(folder) for path in files}
    _check_places(folder, labels, list(names.values()))
    found: dict[str, list[Picture]] = collections.defaultdict(list)
    broken = {}
    for path in files:
        try:
            image = decode(path)
        except ValueError as error:
            broken[names[path].as_posix()] = error
            continue
        digest = hashlib.sha256(repr(image.size).encode() + image.tobytes()).hexdigest()
        found[digest].append(Picture(path, *image.size))
    if broken and not skip_unreadable:
        first = next(iter(broken.values()))
        what = f"{first}; unreadable in all: {_some(list(broken))}"
        raise ValueError(f"{what}: save as JPEG or PNG, delete, or pass skip_unreadable=True")
    return _table(found, names, labels, group, list(broken)), labels


def _table(
    found: Mapping[str, list[Picture]], names: Mapping[Path, Path], labels: list[str],
    group: Callable[[Path], str] | None, broken: Sequence[str],
) -> Table:  # fmt: skip
    """One row for each key of `found` whose pictures lie in one class, and what else there was."""
    classes = {key: {names[one.path].parts[0] for one in same} for key, same in found.items()}
    ids = [key for key, given in classes.items() if len(given) == 1]
    kept = [found[key][0] for key in ids]
    shown = [names[one.path] for one in kept]
    copies = [names[one.path].as_posix() for key in ids for one in found[key][1:]]
    torn = [
        names[one.path].as_posix() for key in found if len(classes[key]) > 1 for one in found[key]
    ]
    if not ids:
        what = f"no picture is left: unreadable {_some(broken)}, in two classes {_some(torn)}"
        raise ValueError(f"{what}: save them as JPEG or PNG, each in one class folder")
    sides = sorted((one.width * one.height, one.width, one.height) for one in kept)
    ends = (f"{width} × {height}" for _, width, height in (sides[0], sides[-1]))
    counts = {
        "repeated": _some(copies), "conflicts": _some(torn), "broken": _some(broken),
        "sizes": " to ".join(dict.fromkeys(ends)),
    }  # fmt: skip
    columns = {"image": kept, "file": [name.as_posix() for name in shown]}
    numbers = np.array([labels.index(name.parts[0]) for name in shown], dtype=np.int64)
    keys = ids if group is None else [_group(group, name) for name in shown]
    return Table(columns, numbers, keys, ids, "image", "image", counts)


def _some(names: Sequence[str]) -> str:
    """How many, and which: not more than three, as Python would write them."""
    if not names:
        return "none"
    return f"{len(names)} ({', '.join(map(repr, names[:3]))}{', …' if len(names) > 3 else ''})"


def _seen(name: str) -> bool:
    return not name.startswith(".") and name.lower() not in _LITTER


def _classes(folder: Path) -> list[str]:
    if not folder.is_dir():
        what = f"{str(folder)!r} is no folder"
        raise FileNotFoundError(
            f"{what}: give the one that holds a folder for each class, unpacked"
        )
    found = sorted(one.name for one in folder.iterdir() if one.is_dir() and _seen(one.name))
    if len(found) < 2:
        what = f"{str(folder)!r} holds {len(found)} folders and a classifier needs two classes"
        raise ValueError(f"{what}: give the folder above, or make a folder for each class in it")
    if sum(name.lower() in _PARTS for name in found) > 1:
        what = f"the folders {found} of {str(folder)!r} are called like splits, not like classes"
        raise ValueError(f"{what}: put all pictures of a class into one folder")
    return found


def _files(folder: Path) -> list[Path]:
    """All files below, in the order of their names; a link is an error, so none is followed."""
    found = []
    for place, inside, names in os.walk(folder, onerror=_stop):
        inside[:] = filter(_seen, inside)
        for path in (Path(place, name) for name in (*inside, *filter(_seen, names))):
            if path.is_symlink() or not (path.is_dir() or path.is_file()):
                what = f"{str(path)!r} is a link, or no file at all"
                raise ValueError(f"{what}: put the picture itself there")
        found += [Path(place, name) for name in names if _seen(name)]
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def _stop(error: OSError) -> None:
    raise error


def _check_places(folder: Path, labels: Sequence[str], names: Sequence[Path]) -> None:
    if loose := [name.name for name in names if len(name.parts) == 1]:
        what = f"beside the class folders of {str(folder)!r} there are files: {_some(loose)}"
        raise ValueError(
            f"{what}: put each picture into the folder of its class, the rest elsewhere"
        )
    held = {name.parts[0] for name in names}
    if empty := [label for label in labels if label not in held]:
        what = f"class folders of {str(folder)!r} without a picture: {_some(empty)}"
        raise ValueError(f"{what}: put pictures there, or delete them")


def _group(group: Callable[[Path], str], name: Path) -> str:
    try:
        found = group(name)
    except Exception as error:  # whatever a function of the reader's own raises
        error.add_note(f"group, a function, was given the path {name.as_posix()!r}")
        raise
    if not isinstance(found, str) or not found or not is_whole(found):
        what = f"group gave {found!r} for the picture {name.as_posix()!r}"
        raise ValueError(f"{what}: return the name of the group, a text")
    return found
