"""A folder of somebody's own pictures: read safely, without copies, split class by class."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import transferkit as tk
from transferkit import apply, claims, pictures

PIXELS = np.random.default_rng(0).integers(0, 256, (60, 12, 16, 3), dtype=np.uint8)


def write(folder: Path, counts: dict[str, int], start: int = 0) -> Path:
    """A folder with so many distinct pictures a class."""
    at = start
    for name, count in counts.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            Image.fromarray(PIXELS[at]).save(folder / name / f"{number:02}.png")
            at += 1
    return folder


@pytest.fixture
def photos(tmp_path):
    return write(tmp_path / "photos", {"dog": 20, "cat": 20})


def parts(dataset) -> dict[str, list[str]]:
    return {part: dataset._split(part)["file"] for part in ("train", "validation", "test")}


def all_files(dataset) -> list[str]:
    return [name for names in parts(dataset).values() for name in names]


# ---- one picture --------------------------------------------------------------------------------


def saved(path: Path, image: Image.Image, **options) -> np.ndarray:
    image.save(path, **options)
    found = np.asarray(pictures.decode(path))
    assert found.dtype == np.uint8 and found.ndim == 3 and found.shape[2] == 3
    return found


def test_grey_becomes_three_equal_channels(tmp_path):
    found = saved(tmp_path / "a.png", Image.fromarray(PIXELS[0, :, :, 0]))
    assert (found == PIXELS[0, :, :, :1]).all()


def test_black_and_white_of_one_bit_is_read(tmp_path):
    found = saved(tmp_path / "a.png", Image.fromarray(PIXELS[0, :, :, 0] > 127))
    assert set(np.unique(found)) == {0, 255}


def test_a_palette_gives_its_colours(tmp_path):
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    for name in ("a.png", "a.gif"):
        assert (saved(tmp_path / name, image) == (10, 20, 30)).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_lies_on_white(tmp_path, mode):
    image, options = Image.new(mode, (4, 4)), {}
    if mode == "P":
        image.putpalette([0, 0, 0])
        options = {"transparency": 0}
    assert (saved(tmp_path / "a.png", image, **options) == 255).all()


def test_half_transparent_black_on_white_is_grey(tmp_path):
    found = saved(tmp_path / "a.png", Image.new("RGBA", (4, 4), (0, 0, 0, 128)))
    assert (abs(found.astype(int) - 127) <= 1).all()


def test_sixteen_bits_become_eight_by_their_upper_half(tmp_path):
    levels = np.array([[0, 255, 256, 65535]], dtype=np.uint16)
    found = saved(tmp_path / "a.png", Image.fromarray(levels))
    assert found[0, :, 0].tolist() == [0, 0, 1, 255]


@pytest.mark.parametrize("kind", ["gif", "png", "tif", "webp", "mpo"])
def test_of_several_pictures_in_a_file_the_first_counts(tmp_path, kind):
    one, *rest = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    path = tmp_path / ("a.jpg" if kind == "mpo" else f"a.{kind}")  # telephones call an MPO .jpg
    lossless = {"lossless": True} if kind == "webp" else {}
    one.save(path, "MPO" if kind == "mpo" else None, save_all=True, append_images=rest, **lossless)
    found = np.asarray(pictures.decode(path))
    assert found[..., 0].min() > 250 and found[..., 1:].max() < 5


def test_two_colours_a_bit_each_become_black_and_white(tmp_path):
    bits = PIXELS[0, :, :, 0] > 127
    assert (saved(tmp_path / "a.png", Image.fromarray(bits)) == 255 * bits[..., None]).all()


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB"])
def test_the_colour_that_a_file_calls_transparent_is_white(tmp_path, mode):
    black = Image.new("RGB", (4, 4)).convert(mode)
    hidden = (0, 0, 0) if mode == "RGB" else black.getpixel((0, 0))
    assert (saved(tmp_path / "a.png", black, transparency=hidden) == 255).all()


def test_thirty_two_bits_are_refused_with_the_remedy(tmp_path):
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match=r"a\.tif.* 32 bits a pixel: save it with 8"):
        pictures.decode(tmp_path / "a.tif")


def test_a_picture_is_turned_as_its_camera_noted(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held on its side: turn by a quarter, clockwise
    found = saved(tmp_path / "a.png", Image.fromarray(PIXELS[0]), exif=exif)
    assert (found == np.rot90(PIXELS[0], -1)).all()
    source = pictures.resized([pictures.Picture(tmp_path / "a.png", 12, 16)], 8)
    straight = saved(tmp_path / "b.png", Image.fromarray(np.rot90(PIXELS[0], -1).copy()))
    assert source.shape == (1, 8, 8, 3) and straight.shape == found.shape


def test_inks_are_turned_into_light(tmp_path):
    found = saved(tmp_path / "a.jpg", Image.new("CMYK", (8, 8), (0, 255, 255, 0)), quality=95)
    assert found[..., 0].min() > 200 and found[..., 1:].max() < 60  # red


def bomb(path: Path, side: int) -> Path:
    """A PNG of a few hundred bytes that says it has side × side pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    return path


@pytest.mark.parametrize("side", [10_000, 30_000])  # Pillow warns of one and refuses the other
def test_a_decompression_bomb_is_an_error_and_takes_no_memory(tmp_path, side):
    with pytest.raises(ValueError, match="more than 89,478,485 pixels: save it smaller"):
        pictures.decode(bomb(tmp_path / "a.png", side))


@pytest.mark.parametrize(
    "raw", [b"", b"not a picture", b"\x89PNG\r\n\x1a\n", b"%!PS-Adobe-3.0 EPSF-3.0\n"]
)
def test_what_is_no_picture_is_refused_by_name(tmp_path, raw):
    (tmp_path / "strange.png").write_bytes(raw)
    with pytest.raises(ValueError, match=r"strange\.png' cannot be read"):
        pictures.decode(tmp_path / "strange.png")


def test_half_a_picture_is_no_picture(tmp_path):
    Image.fromarray(PIXELS[0]).resize((200, 200)).save(tmp_path / "a.jpg")
    raw = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(raw[: len(raw) // 2])
    with pytest.raises(ValueError, match="truncated"):
        pictures.decode(tmp_path / "a.jpg")


# ---- a folder -----------------------------------------------------------------------------------


def test_classes_are_the_folders_in_order_and_pixels_stay_in_their_files(photos):
    mine = tk.datasets.from_folder(photos)
    assert mine.labels == ["cat", "dog"] and mine.name == "photos"
    train = mine.train
    assert len(train) == 28 and np.bincount(train.labels).tolist() == [14, 14]
    at = train["file"].index("dog/03.png") if "dog/03.png" in train["file"] else 0
    assert mine.labels[train.labels[at]] == train["file"][at].split("/")[0]
    number = int(train["file"][at][-6:-4])
    expected = PIXELS[number if train["file"][at].startswith("dog") else 20 + number]
    assert (np.asarray(train["image"][at]) == expected).all()


def test_pictures_are_found_again_from_another_place(photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mine = tk.datasets.from_folder("photos")
    monkeypatch.chdir(photos)
    assert np.asarray(mine.train["image"][0]).shape == (12, 16, 3)
    assert "source                   photos\n" in str(mine.card)


def test_the_split_depends_on_the_pixels_alone(photos, tmp_path):
    before = tk.datasets.from_folder(photos)
    ids = {part: set(before._split(part).keys) for part in ("train", "validation", "test")}
    for at, path in enumerate(sorted(photos.rglob("*.png"), reverse=True)):
        Image.open(path).save(path.with_name(f"{at}.bmp"))
        path.unlink()
    after = tk.datasets.from_folder(photos)
    assert {part: set(after._split(part).keys) for part in ids} == ids


def test_each_class_is_split_in_the_same_shares(tmp_path):
    mine = tk.datasets.from_folder(write(tmp_path / "photos", {"a": 40, "b": 10, "c": 5}))
    counts = [
        np.bincount(mine._split(part).labels).tolist() for part in ("train", "validation", "test")
    ]
    assert counts == [[28, 7, 3], [6, 1, 1], [6, 2, 1]]


def test_copies_and_contradictions_leave_before_the_split_and_are_named(photos):
    Image.open(photos / "dog/03.png").save(photos / "dog/copy.bmp")
    Image.open(photos / "dog/04.png").save(photos / "cat/again.png")
    mine = tk.datasets.from_folder(photos)
    kept = all_files(mine)
    assert len(kept) == 39 and not {"dog/copy.bmp", "dog/04.png", "cat/again.png"} & set(kept)
    assert "removed: 1 ('dog/copy.bmp')" in str(mine.card)
    assert "removed: 2 ('cat/again.png', 'dog/04.png')" in str(mine.card)
    assert "RGB; 16 × 12 pixels" in str(mine.card)
    assert "70/15/15 % of each class by the SHA-256 of the picture's pixels" in str(mine.card)


def test_pictures_of_one_group_stay_on_one_side(tmp_path):
    folder = tmp_path / "photos"
    for number in range(6):
        write(folder, {f"cat/{number}": 5, f"dog/{number}": 5}, start=0 if number else 30)
    for at, path in enumerate(sorted(folder.rglob("*.png"))):  # all distinct
        Image.fromarray(PIXELS[0] ^ np.uint8(at)).save(path)
    mine = tk.datasets.from_folder(folder, group=lambda picture: "/".join(picture.parts[:2]))
    sides = [set(part.keys) for part in (mine.train, mine.validation, mine._split("test"))]
    assert not (sides[0] & sides[1] or sides[0] & sides[2] or sides[1] & sides[2])
    assert sorted(set.union(*sides))[0] == "cat/0" and len(set.union(*sides)) == 12
    assert "by the SHA-256 of the picture's group" in str(mine.card)


def test_a_group_of_two_classes_is_not_torn(tmp_path):
    folder = write(tmp_path / "photos", {"a": 30, "b": 30})
    mine = tk.datasets.from_folder(folder, group=lambda picture: f"day {int(picture.stem) // 2}")
    sides = [set(part.keys) for part in (mine.train, mine.validation, mine._split("test"))]
    assert len(set.union(*sides)) == sum(map(len, sides)) == 15


def test_an_unreadable_file_is_named_and_left_out_on_request_only(photos):
    (photos / "cat/notes.txt").write_text("seen at noon")
    (photos / "cat/empty.png").touch()
    with pytest.raises(
        ValueError, match=r"in all: 2 \('cat/empty.png', 'cat/notes.txt'\): .*skip_"
    ):
        tk.datasets.from_folder(photos)
    mine = tk.datasets.from_folder(photos, skip_unreadable=True)
    assert "left out: 2 ('cat/empty.png', 'cat/notes.txt')" in str(mine.card)
    assert len(all_files(mine)) == 40


def test_odd_names_endings_and_folders_inside_are_no_concern(tmp_path):
    folder = write(tmp_path / "photos", {"a b": 8, "ä\n☃": 8})
    for at, path in enumerate(sorted(folder.rglob("*.png"))):
        inside = path.parent / f"x {at}\n'☃\""
        inside.mkdir()
        path.rename(inside / ("IMG.PNG" if at % 2 else "no ending"))
    mine = tk.datasets.from_folder(folder, group=lambda picture: str(picture.parent))
    assert len(set(all_files(mine))) == 16 and mine.labels == ["a b", "ä\n☃"]
    assert np.asarray(mine.train["image"][0]).shape == (12, 16, 3)


@pytest.mark.parametrize(("count", "enough"), [(1, False), (4, False), (5, True), (6, True)])
def test_five_of_a_class_are_enough_to_begin_with(tmp_path, count, enough):
    folder = write(tmp_path / "photos", {"a": 8, "b": count})
    if enough:
        assert len(all_files(tk.datasets.from_folder(folder))) == 8 + count
    else:
        with pytest.raises(ValueError, match=f"no row labelled 'b'.* {count} rows in {count} g"):
            tk.datasets.from_folder(folder)


def test_a_class_that_cannot_be_read_is_not_forgotten(photos):
    for path in (photos / "cat").iterdir():
        path.write_bytes(b"?")
    with pytest.raises(ValueError, match="no row labelled 'cat' falls into train: it has 0 rows"):
        tk.datasets.from_folder(photos, skip_unreadable=True)


def test_what_file_managers_leave_behind_is_passed_over(photos):
    litter = ("Thumbs.db", "thumbs.db", "Desktop.ini", "Icon\r", ".hidden.png")
    for name in (".DS_Store", *(f"cat/{name}" for name in litter)):
        (photos / name).write_bytes(b"?")
    (photos / ".ipynb_checkpoints").mkdir()
    assert tk.datasets.from_folder(photos).labels == ["cat", "dog"]


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("kind", ["file", "folder", "class"])
def test_no_link_is_followed(photos, tmp_path, kind, inside):
    away = photos / "dog" if inside else write(tmp_path / "away", {"x": 1}) / "x"
    link = photos / ("bird" if kind == "class" else "cat/link.png")
    link.symlink_to(away / "00.png" if kind == "file" else away)
    with pytest.raises(ValueError, match="is a link"):
        tk.datasets.from_folder(photos)


def test_a_pipe_is_refused_and_not_waited_for(photos):
    os.mkfifo(photos / "cat/pipe.png")
    with pytest.raises(ValueError, match=r"pipe\.png' is a link, or no file"):
        tk.datasets.from_folder(photos)


def loose(photos):
    Image.fromarray(PIXELS[50]).save(photos / "lost.png")


def one_class(photos):
    for path in (photos / "cat").iterdir():
        path.unlink()
    (photos / "cat").rmdir()


def empty_class(photos):
    (photos / "bird" / "inside").mkdir(parents=True)


def like_splits(photos):
    (photos / "cat").rename(photos / "Train")
    (photos / "dog").rename(photos / "val")


def two_of_each(photos):
    for path in (photos / "dog").iterdir():
        (photos / "cat" / path.name).write_bytes(path.read_bytes())


def too_few(photos):
    write(photos, {"bird": 3}, start=50)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (loose, r"there are files: 1 \('lost.png'\): put each picture into"),
        (one_class, "holds 1 folders and a classifier needs two classes: give the folder above"),
        (empty_class, r"without a picture: 1 \('bird'\): put pictures there"),
        (like_splits, r"\['Train', 'val'\].*called like splits"),
        (two_of_each, r"no picture is left: unreadable none, in two classes 40 \('cat/00.png', "),
        (too_few, "no row labelled 'bird' falls into test: it has 3 rows in 3 groups"),
    ],
)
def test_a_folder_that_does_not_fit_says_why(photos, damage, message):
    damage(photos)
    with pytest.raises(ValueError, match=message):
        tk.datasets.from_folder(photos)


@pytest.mark.parametrize("name", ["nowhere", "photos.zip"])
def test_a_folder_that_is_none_is_refused(tmp_path, name):
    if "." in name:
        (tmp_path / name).touch()
    with pytest.raises(FileNotFoundError, match="is no folder: give the one that holds"):
        tk.datasets.from_folder(tmp_path / name)


@pytest.mark.parametrize("answer", [None, "", 3])
def test_a_group_without_a_name_is_refused(photos, answer):
    with pytest.raises(ValueError, match=r"group gave .* for the picture 'cat/00.png'"):
        tk.datasets.from_folder(photos, group=lambda picture: answer)


@pytest.mark.parametrize("name", [b"dog/\xb9\xb7.png", b"dog/\xb9\xb7/1.png", b"\xb9\xb7/1.png"])
def test_a_name_that_is_not_utf8_is_refused_with_the_remedy(photos, name):
    path = Path(os.fsdecode(os.fsencode(photos) + b"/" + name))
    path.parent.mkdir(exist_ok=True)
    try:
        path.write_bytes((photos / "cat/00.png").read_bytes())
    except OSError:
        pytest.skip("this file system keeps no such names")
    with pytest.raises(ValueError, match=r"not UTF-8: 1 \('.*dcb9.*convmv") as error:
        tk.datasets.from_folder(photos)
    str(error.value).encode()


def test_a_group_that_utf8_cannot_hold_is_refused(photos):
    with pytest.raises(ValueError, match=r"group gave '.udcb9' for the picture"):
        tk.datasets.from_folder(photos, group=lambda picture: "\udcb9")


def test_where_group_itself_fails_the_picture_is_named(photos):
    with pytest.raises(IndexError) as error:
        tk.datasets.from_folder(photos, group=lambda picture: picture.stem.split("-")[1])
    assert error.value.__notes__ == ["group, a function, was given the path 'cat/00.png'"]


def test_one_group_for_all_cannot_be_split(photos):
    with pytest.raises(ValueError, match="20 rows in 1 groups"):
        tk.datasets.from_folder(photos, group=lambda picture: picture.parent.name)


def test_names_cannot_become_markup_or_figures_of_the_card(tmp_path):
    folder = write(tmp_path / "photos", {"a <b>": 10, "{repeated}": 10})
    Image.open(folder / "a <b>/00.png").save(folder / "a <b>/{x}.png")
    card = tk.datasets.from_folder(folder).card
    assert "{x}.png" in str(card) and "{repeated}" in str(card)
    assert "<b>" not in card._repr_html_()


def test_opening_the_test_pictures_is_noted(photos, monkeypatch):
    noted = []
    monkeypatch.setattr(claims, "note_test_opened", noted.append)
    assert len(tk.datasets.from_folder(photos).open_test()) == 6
    assert noted == ["photos"]


# ---- with a model -------------------------------------------------------------------------------


def test_pictures_of_any_size_and_kind_become_one_source(photos):
    Image.fromarray(PIXELS[50, :, :, 0]).resize((40, 9)).save(photos / "cat/grey.png")
    Image.new("RGBA", (30, 50), (9, 9, 9, 90)).save(photos / "dog/clear.png")
    mine = tk.datasets.from_folder(photos)
    model = tk.models.load("efficientnet-lite0", labels=mine.labels, pretrained=False, size=32)
    everything = mine.train.select(np.arange(len(mine.train)))
    source = model.prepare(everything)
    batch = source.fetch(range(len(everything)), None, 0)
    assert batch.inputs.shape == (len(everything), 3, 32, 32)
    assert batch.labels.tolist() == everything.labels.tolist()
    with pytest.raises(ValueError, match="the data are empty"):
        model.prepare(mine.train.take(0))


def test_squeezing_agrees_with_the_library_s_own(photos):
    picture = tk.datasets.from_folder(photos).train["image"][0]
    ours = pictures.resized([picture], 8)[0].astype(int)
    theirs = tk.data.images(np.asarray(picture)[None], None, 8, [0.0] * 3, [1.0] * 3)
    assert abs(ours - theirs.pixels[0].permute(1, 2, 0).numpy()).max() <= 2


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A saved image model that tells light from dark, and two pictures."""
    folder = tmp_path_factory.mktemp("pictures")
    for at in range(24):
        name = ("dark", "light")[at % 2]
        (folder / "mine" / name).mkdir(parents=True, exist_ok=True)
        level = PIXELS[at] // 4 + (at % 2) * 190
        Image.fromarray(level).save(folder / "mine" / name / f"{at}.png")
    mine = tk.datasets.from_folder(folder / "mine")
    model = tk.models.load("efficientnet-lite0", labels=mine.labels, size=32, layers=2)
    run = tk.fit(
        model, tk.classification(), mine.train, mine.validation, plan=tk.linear_probe(60, lr=1e-2),
        metrics=[tk.accuracy], precision="fp32", device="cpu",
    )  # fmt: skip
    assert run.evaluate(mine._split("test"))["accuracy"] == 1
    run.save(folder / "model")
    night = Image.fromarray(PIXELS[50] // 4).resize((90, 40), Image.Resampling.NEAREST)
    night.convert("RGBA").save(folder / "night.png")
    Image.fromarray(PIXELS[51] // 4 + 190).resize((50, 70)).save(folder / "day.jpg")
    return folder


def test_a_fresh_process_reads_pictures_from_the_command_line(classifier):
    files = [str(classifier / name) for name in ("night.png", "day.jpg")]
    command = [sys.executable, "-m", "transferkit.apply", "predict", str(classifier / "model")]
    done = subprocess.run([*command, *files], capture_output=True, text=True, timeout=120)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["label"] for line in lines] == ["dark", "light"], done.stderr
    assert [(line["width"], line["height"]) for line in lines] == [(90, 40), (50, 70)]
    here = apply.look(tk.load(classifier / "model"), files)
    assert np.allclose([line["logits"] for line in lines], [one.logits for one in here], atol=1e-5)
    assert [line["picture"] for line in lines] == files


def test_pictures_may_come_one_by_one_and_alone_or_together(classifier):
    model, files = tk.load(classifier / "model"), [classifier / "day.jpg", classifier / "night.png"]
    together = apply.look(model, (file for file in files))  # as Path.glob gives them
    assert [one.picture for one in together] == list(map(str, files))
    alone = [apply.look(model, [file])[0].logits for file in files]
    assert np.allclose([one.logits for one in together], alone, atol=1e-5)
    with pytest.raises(ValueError, match="the data are empty"):
        apply.look(model, [])


def test_a_missing_or_broken_picture_ends_with_a_message(classifier, capsys):
    assert apply.main(["predict", str(classifier / "model"), "nowhere.png"]) == 1
    assert "there is no file 'nowhere.png'" in capsys.readouterr().err
    assert apply.main(["predict", str(classifier / "model"), __file__]) == 1
    assert "cannot be read" in capsys.readouterr().err


def test_a_name_that_is_not_utf8_is_answered_in_escapes(classifier, tmp_path, capsys):
    path = tmp_path / os.fsdecode(b"\xb9\xb7.png")
    try:
        Image.fromarray(PIXELS[0]).save(path)
    except OSError:
        pytest.skip("this file system keeps no such names")
    assert apply.main(["predict", str(classifier / "model"), str(path)]) == 0
    assert json.loads(capsys.readouterr().out)["picture"] == str(path)


def test_what_reads_no_images_and_one_name_are_refused(classifier):
    with pytest.raises(TypeError, match="no classifier of images"):
        apply.look(tk.models.load("minilm-l6", ["a", "b"], layers=1, pretrained=False), ["a.png"])
    with pytest.raises(TypeError, match=r"pass \[file\]"):
        apply.look(tk.load(classifier / "model"), "day.jpg")


def test_no_page_is_served_for_a_model_of_images(classifier):
    with pytest.raises(TypeError, match="reads pictures: ask it with `predict`"):
        apply.Server(classifier / "model", port=0)
