"""Data sets: distinct rows, honest splits that nothing can move, cards that say what is wrong."""

from __future__ import annotations

import collections
import functools
import hashlib
import itertools
import re
from pathlib import Path

import numpy as np
import pytest

from transferkit import assets, claims, corpora, datasets

# rows of train, validation and test, and the start of the SHA-256 of every row's part
SPLITS = {
    "zh-reviews": (12131, 2571, 2618, "7d4eff6f47c4e41b"),
    "film-reviews": (8925, 2103, 1724, "3af797d36ea5a595"),
    "peoples-daily": (13243, 2900, 2851, "9cad0f66ae7c7bc6"),
    "solar-cells": (1561, 388, 675, "7569450021e7460c"),
    "digits": (1052, 374, 371, "6ae0bd85a6eb0426"),
    "mnist-5k": (3465, 763, 772, "35f1138ec7891755"),
    "german-credit": (602, 208, 190, "6489b2d5308c6ce5"),
}
NAMES = list(SPLITS)


@functools.cache
def load(name: str) -> datasets.Dataset:
    return datasets.load(name)


@functools.cache
def parts(name: str) -> dict[str, datasets.Split]:
    """All three splits, without a note in the record that the test rows were opened."""
    return {part: load(name)._split(part) for part in ("train", "validation", "test")}


def ids(split: datasets.Split) -> list[str]:
    return [split._table.ids[i] for i in split._indices]


def content(split: datasets.Split) -> set[bytes | str]:
    rows = split.inputs
    if isinstance(rows, np.ndarray):
        return {row.tobytes() for row in rows}
    return {row if isinstance(row, str) else " ".join(row) for row in rows}


def test_every_named_data_set_has_a_row_in_these_tests():
    assert sorted(datasets.available()) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_row_is_where_it_was_when_the_book_was_written(name):
    lines = sorted(f"{i}\t{part}" for part, split in parts(name).items() for i in ids(split))
    found = hashlib.sha256("\n".join(lines).encode("utf-8")).hexdigest()[:16]
    assert (*(len(split) for split in parts(name).values()), found) == SPLITS[name]


@pytest.mark.parametrize("name", NAMES)
def test_neither_order_nor_company_moves_a_row(name):
    recipe, table = corpora.RECIPES[name], load(name)._table
    before = dict(zip(table.keys, datasets._parts(table.keys, recipe), strict=True))
    changed = [*reversed(table.keys[::3]), "a row that a new version brings"]
    after = dict(zip(changed, datasets._parts(changed, recipe), strict=True))
    assert all(before[key] == part for key, part in after.items() if key in before)


@pytest.mark.parametrize("name", NAMES)
def test_no_row_occurs_twice_and_no_group_is_in_two_splits(name):
    found = list(parts(name).values())
    everything = [i for split in found for i in ids(split)]
    assert len(set(everything)) == len(everything)
    assert sum(len(content(split)) for split in found) == len(everything)
    groups = [set(split.keys) for split in found]
    assert not groups[0] & groups[1] and not groups[0] & groups[2] and not groups[1] & groups[2]


@pytest.mark.parametrize("name", [name for name in NAMES if name != "peoples-daily"])
def test_class_shares_agree_between_the_splits_within_two_points(name):
    count = len(load(name).labels)
    shares = [
        100 * np.bincount(split.labels, minlength=count) / len(split)
        for split in parts(name).values()
    ]
    assert np.ptp(shares, axis=0).max() <= 2.0


@pytest.mark.parametrize("name, column", [("solar-cells", "type"), ("zh-reviews", "domain")])
def test_module_types_and_domains_agree_between_the_splits_within_two_points(name, column):
    for value in np.unique(parts(name)["train"][column]):
        shares = [100 * np.mean(split[column] == value) for split in parts(name).values()]
        assert np.ptp(shares) <= 2.0, value


@pytest.mark.parametrize("tag", ["nr", "ns", "nt", "t"])
def test_shares_of_names_agree_between_the_splits_within_a_fifth_of_a_point(tag):
    shares = []
    for split in parts("peoples-daily").values():
        tags = collections.Counter(found for row in split["tags"] for found in row)
        shares.append(100 * tags[tag] / tags.total())
    assert np.ptp(shares) <= 0.2


@pytest.mark.parametrize("name", NAMES)
def test_split_sizes_lie_within_two_points_of_what_the_card_says(name):
    sizes = np.array([len(split) for split in parts(name).values()])
    first, second = corpora.RECIPES[name].shares
    wanted = np.array([first, second, 1 - first - second])
    assert np.abs(sizes / sizes.sum() - wanted).max() <= 0.02


def test_opening_the_test_split_is_noted_in_the_record(monkeypatch):
    opened = []
    monkeypatch.setattr(claims, "note_test_opened", opened.append)
    data = load("digits")
    assert len(data.train) and len(data.validation) and data.folds(2)
    assert opened == []
    assert len(data.open_test()) == SPLITS["digits"][2]
    assert opened == ["digits"]


# ---- drawing rows -------------------------------------------------------------------------------


@pytest.mark.parametrize("stratify", [True, False])
def test_a_smaller_draw_is_part_of_a_larger_one(stratify):
    train = load("film-reviews").train
    draws = [ids(train.take(n, seed=3, stratify=stratify)) for n in (0, 16, 17, 32, 500)]
    for smaller, larger in itertools.pairwise(draws):
        assert set(smaller) < set(larger)
    assert [len(draw) for draw in draws] == [0, 16, 17, 32, 500]


def test_a_draw_depends_on_the_seed_and_on_nothing_else():
    train = load("film-reviews").train
    assert ids(train.take(64, seed=0)) == ids(train.take(64, seed=0))
    assert set(ids(train.take(64, seed=0))) != set(ids(train.take(64, seed=1)))
    shuffled = train.select(np.random.default_rng(0).permutation(len(train)))
    assert set(ids(shuffled.take(64, seed=5))) == set(ids(train.take(64, seed=5)))


@pytest.mark.parametrize("n", [16, 100, 1000])
def test_a_stratified_draw_keeps_class_shares_to_the_nearest_row(n):
    for name in ("film-reviews", "mnist-5k"):
        train = load(name).train
        count = len(load(name).labels)
        wanted = n * np.bincount(train.labels, minlength=count) / len(train)
        found = np.bincount(train.take(n, seed=1).labels, minlength=count)
        assert np.abs(found - wanted).max() <= 1.0


def test_drawing_more_rows_than_there_are_is_refused():
    train = load("digits").train
    with pytest.raises(ValueError, match="holds 1,052 rows and 1,053 were asked for"):
        train.take(1053)
    assert sorted(ids(train.take(1052))) == sorted(ids(train))


def test_select_takes_indices_and_masks():
    train = load("solar-cells").train
    mono = train.select(train["type"] == "mono")
    assert set(mono["type"]) == {"mono"}
    assert len(mono) == np.sum(train["type"] == "mono")
    assert ids(train.select([5, 2])) == [ids(train)[5], ids(train)[2]]
    assert len(train.select([])) == 0


@pytest.mark.parametrize("name", ["film-reviews", "solar-cells"])
def test_folds_cover_train_and_validation_once_and_never_the_test_rows(name):
    data = load(name)
    usable = set(ids(data.train)) | set(ids(data.validation))
    held_out = []
    for train, held in data.folds(4, seed=2):
        assert set(ids(train)) | set(ids(held)) == usable
        assert not set(train.keys) & set(held.keys), "a group is on both sides of a fold"
        held_out += ids(held)
    assert sorted(held_out) == sorted(usable)


def test_folds_depend_on_the_seed():
    first, again, other = (load("digits").folds(3, seed=seed)[0][1] for seed in (0, 0, 1))
    assert ids(first) == ids(again) != ids(other)


def test_an_unknown_column_is_answered_with_the_known_ones():
    with pytest.raises(KeyError, match=r"no column 'img'.*image.*probability"):
        load("solar-cells").train["img"]


# ---- each data set ------------------------------------------------------------------------------


def test_a_solar_cell_is_defective_from_probability_one_half_on():
    for split in parts("solar-cells").values():
        assert split["image"].shape[1:] == (300, 300) and split["image"].dtype == np.uint8
        assert np.array_equal(split.labels, (split["probability"] >= 0.5).astype(np.int64))
        assert set(np.round(3 * split["probability"])) == {0, 1, 2, 3}
    assert sum(len(split) for split in parts("solar-cells").values()) == 2624


def test_kept_solar_images_are_those_of_the_files():
    from PIL import Image

    train = load("solar-cells").train
    folder = assets.files("solar-cells")["images"]
    for i in range(0, len(train), 300):
        row = train.select([i])
        assert np.array_equal(row["image"][0], np.asarray(Image.open(folder / row["file"][0])))


def test_film_reviews_hold_no_plot_summaries_and_no_repetitions():
    found = list(parts("film-reviews").values())
    assert sum(len(split) for split in found) == 7403 + 5405 - 56
    assert max(len(text) for split in found for text in split["text"]) < 300
    fresh = sum(int(split.labels.sum()) for split in found)
    assert load("film-reviews").labels[1] == "fresh" and fresh == 7368


def test_films_that_share_a_snippet_are_on_one_side():
    film = {}
    for part, split in parts("film-reviews").items():
        film |= {name: (part, key) for name, key in zip(split["film"], split.keys, strict=True)}
    assert film["hell_house"] == film["shanghai_ghetto"] == film["strange_fruit"]
    assert len({key for _, key in film.values()}) == 504


def test_films_are_grouped_through_any_chain_of_shared_snippets():
    pairs = [("1", "c"), ("1", "b"), ("2", "b"), ("2", "a"), ("3", "d"), ("4", "d")]
    assert corpora._merged_films(pairs) == {"a": "a", "b": "a", "c": "a", "d": "d"}
    assert corpora._merged_films(reversed(pairs)) == {"a": "a", "b": "a", "c": "a", "d": "d"}


def test_chinese_reviews_are_counted_as_the_card_says():
    counts = load("zh-reviews")._table.counts
    wanted = {"lines": 35123, "positive": 8379, "negative": 9078, "both": 47}
    assert wanted.items() <= counts.items()
    card = str(load("zh-reviews").card)
    assert all(f"{number:,}" in card for number in wanted.values())


def test_the_length_of_a_chinese_review_says_as_much_as_the_card_says():
    counts, right = load("zh-reviews")._table.counts, {}
    for name in ("books", "hotels", "laptops"):
        found = [part.select(part["domain"] == name) for part in parts("zh-reviews").values()]
        labels = np.concatenate([part.labels for part in found])
        lengths = np.array([len(text) for part in found for text in part["text"]])
        right[name] = (labels == (lengths > np.median(lengths))).sum() / len(labels)
        if name == "books":
            assert counts["books"] == len(labels)
            assert counts["longer"] == round(right[name] * len(labels))
    assert right["books"] > 0.85 and abs(right["hotels"] - 0.5) < 0.03 > abs(right["laptops"] - 0.5)
    assert f"{counts['longer']:,} of the {counts['books']:,}" in str(load("zh-reviews").card)


def test_contradictions_are_dropped_from_the_chinese_reviews():
    texts = {text for split in parts("zh-reviews").values() for text in split["text"]}
    assert "只有3个USB" not in texts, "this line stands in both files"
    assert len(texts) == sum(SPLITS["zh-reviews"][:3])


@pytest.mark.parametrize(
    "domain, words",
    [
        ("books", "书|作者|读|故事|小说"),
        ("hotels", "酒店|房间|宾馆|入住"),
        ("laptops", "电脑|屏幕|键盘|系统"),
    ],
)
def test_words_of_a_domain_are_ten_times_as_frequent_in_its_block(domain, words):
    pattern = re.compile(words)
    rate = {}
    for name in ("books", "hotels", "laptops"):
        found = [
            split.select(split["domain"] == name)["text"] for split in parts("zh-reviews").values()
        ]
        texts = [text for part in found for text in part]
        rate[name] = np.mean([bool(pattern.search(text)) for text in texts])
    assert all(rate[domain] > 10 * rate[other] for other in rate if other != domain), rate


def test_no_mobile_telephone_number_is_left_in_the_chinese_reviews():
    texts = [text for split in parts("zh-reviews").values() for text in split["text"]]
    assert not [text for text in texts if re.search(r"(?<!\d)1[3-9]\d{9}(?!\d)", text)]
    assert sum("1**********" in text for text in texts) == 5


def test_every_word_of_peoples_daily_has_a_tag_of_the_label_list():
    data, seen = load("peoples-daily"), collections.Counter()
    for split in parts("peoples-daily").values():
        for tokens, tags, text in zip(split["tokens"], split["tags"], split["text"], strict=True):
            assert len(tokens) == len(tags) > 0 and "".join(tokens) == text
            seen.update(tags)
    assert sorted(seen) == sorted(data.labels)
    assert seen["nr"] > 34000 and seen["ns"] > 27000 and seen["nt"] > 3400 and seen["t"] > 20000
    assert data.train.labels is None and data.train.kind == "tokens"


def test_digits_use_the_whole_range_of_grey_levels():
    for name, side in (("digits", 8), ("mnist-5k", 28)):
        image = load(name).train["image"]
        assert image.dtype == np.uint8 and image.shape[1:] == (side, side)
        assert image.min() == 0 and image.max() == 255


def test_credit_features_hold_numbers_and_one_column_a_value():
    data = load("german-credit")
    features, names = data.train["features"], data.feature_names
    assert features.dtype == np.float32 and features.shape == (602, len(names))
    age = features[:, names.index("age_in_years")]
    assert np.array_equal(age, data.train["age_in_years"])
    housing = [i for i, name in enumerate(names) if name.startswith("housing: ")]
    assert np.array_equal(features[:, housing].sum(1), np.ones(602))
    own = features[:, names.index("housing: own")] == 1
    assert np.array_equal(own, data.train["housing"] == "own")


# ---- cards and errors ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_card_says_everything_in_text_and_in_html(name):
    card = load(name).card
    headings = [heading for heading, _ in card.rows()]
    assert headings == [
        *("data", "source", "licence", "declared by the package", "origin", "citation"),
        *("size", "fields", "labels", "splits", "known problems"),
    ]
    for heading, texts in card.rows():
        assert texts and all(texts), heading
        assert heading in str(card) and heading in card._repr_html_()
    assert "{" not in str(card), "a figure was not filled in"
    assert f"{sum(SPLITS[name][:3]):,} rows" in str(card)


def test_a_card_escapes_what_html_would_read_as_markup():
    card = load("digits").card
    sharp = datasets.DataCard(**(vars(card) | {"title": "a < b & <script>"}))
    assert "a &lt; b &amp; &lt;script&gt;" in sharp._repr_html_()


@pytest.mark.parametrize("wrong, right", [("zh-review", "zh-reviews"), ("solar", "solar-cells")])
def test_an_unknown_data_set_is_answered_with_the_nearest(wrong, right):
    with pytest.raises(
        ValueError, match=f"no data set is called '{wrong}': did you mean '{right}'"
    ):
        datasets.load(wrong)


def test_text_that_is_not_utf8_is_refused_with_file_line_and_remedy(tmp_path, monkeypatch):
    good, bad = tmp_path / "pos.txt", tmp_path / "neg.txt"
    good.write_text("好\n", encoding="utf-8")
    bad.write_bytes("好\n".encode() + "房间很小".encode("gb18030"))
    found: dict[str, Path] = {"positive": good, "negative": bad}
    monkeypatch.setattr(assets, "files", lambda _: found)
    with pytest.raises(ValueError, match=r"neg\.txt, line 2: .* not valid UTF-8.*GB18030"):
        datasets.load("zh-reviews")


# ---- a table of one's own -----------------------------------------------------------------------


def table(path: Path, rows: list[str], header: str = "text,label") -> Path:
    path.write_text("\n".join([header, *rows]), encoding="utf-8")
    return path


MANY = [f"{word} number {i},{label}" for i in range(60) for word, label in (("a", "x"), ("b", "y"))]


def test_copies_and_contradictions_leave_before_the_split(tmp_path):
    rows = [*MANY, "A number 3!,x", "b number 4,x"]  # a copy, and a text with two labels
    mine = datasets.from_csv(table(tmp_path / "mine.csv", rows))
    kept = [
        text for part in (mine.train, mine.validation, mine._split("test")) for text in part["text"]
    ]
    assert len(kept) == len(set(kept)) == len(MANY) - 1
    assert "b number 4" not in kept
    assert "1 rows repeat another, 1 texts have two labels" in str(mine.card)


def test_texts_that_differ_in_a_vowel_sign_or_a_tone_mark_are_two(tmp_path):
    words = "की कि कु के को", "ทั ที่ ที้ ที ทุ"
    rows = [
        f"{word} {i},{'xy'[i % 2]}" for i in range(20) for line in words for word in line.split()
    ]
    mine = datasets.from_csv(table(tmp_path / "mine.csv", rows))
    assert sum(map(len, (mine.train, mine.validation, mine._split("test")))) == len(rows)
    assert "0 rows repeat another, 0 texts have two labels" in str(mine.card)


def test_how_a_character_is_drawn_makes_no_other_text(tmp_path):
    rows = [*MANY, "a number 3 \u263a\ufe0f,x", "\uff41 number 3 \u263a,x"]
    mine = datasets.from_csv(table(tmp_path / "mine.csv", rows))
    assert "2 rows repeat another, 0 texts have two labels" in str(mine.card)


def test_rows_of_one_group_stay_on_one_side_and_labels_are_sorted_by_name(tmp_path):
    rows = [f"{row},{i % 30}" for i, row in enumerate(MANY)]
    path = table(tmp_path / "mine.csv", rows, "text,label,writer")
    mine = datasets.from_csv(path, group="writer")
    sides = [set(part.keys) for part in (mine.train, mine.validation, mine._split("test"))]
    assert not (sides[0] & sides[1] or sides[0] & sides[2] or sides[1] & sides[2])
    assert mine.labels == ["x", "y"]


def test_a_new_row_moves_no_other_row(tmp_path):
    before = datasets.from_csv(table(tmp_path / "mine.csv", MANY))
    after = datasets.from_csv(table(tmp_path / "mine.csv", ["new one,x", *MANY]))
    assert set(before.train["text"]) <= set(after.train["text"]) | {"new one"}
    assert set(before.validation["text"]) <= set(after.validation["text"])


def test_blanks_around_a_label_make_no_other_label(tmp_path):
    rows = [row.replace(",", ", ") if i % 3 else row for i, row in enumerate(MANY)]
    assert datasets.from_csv(table(tmp_path / "mine.csv", rows)).labels == ["x", "y"]


@pytest.mark.parametrize("separator", [";", "\t"])
@pytest.mark.parametrize("quote", ["", '"'])
def test_spreadsheets_separate_by_semicolons_or_tabs_too(tmp_path, separator, quote):
    rows = ["text,label", *MANY]
    rows = [separator.join(f"{quote}{cell}{quote}" for cell in row.split(",")) for row in rows]
    path = tmp_path / "mine.csv"
    path.write_bytes("\r\n".join(rows).encode("utf-8-sig"))
    plain = datasets.from_csv(table(tmp_path / "plain.csv", MANY))
    assert datasets.from_csv(path).train["text"] == plain.train["text"]


def test_a_table_that_is_not_utf8_or_not_there_is_refused_with_the_remedy(tmp_path):
    with pytest.raises(FileNotFoundError, match="check its name"):
        datasets.from_csv(tmp_path / "mine.csv")
    (tmp_path / "mine.csv").write_bytes("text,label\n房间很好,好\n".encode("gbk"))
    with pytest.raises(ValueError, match=r"line 2: this is not UTF-8.*iconv -f GB18030"):
        datasets.from_csv(tmp_path / "mine.csv")


def test_a_fold_without_a_class_is_refused_with_the_remedy(tmp_path):
    rows = [*MANY, *(f"rare {i},z" for i in range(20))]
    mine = datasets.from_csv(table(tmp_path / "mine.csv", rows))
    assert all(set(held.labels) == {0, 1, 2} for _, held in mine.folds(2))
    with pytest.raises(ValueError, match=r"has no rows labelled 'z', of .*: take a smaller k"):
        mine.folds(19)


def test_a_class_of_one_group_has_no_folds(tmp_path):
    rows = [f"{word},{part}" for part in range(40) for word in (f"a {part},x", f"b {part},y")]
    mine = datasets.from_csv(
        table(tmp_path / "mine.csv", rows, "text,label,writer"), group="writer"
    )
    lone = np.flatnonzero(mine._parts != "test")
    mine._table.labels[lone] = 0
    mine._table.labels[lone[0]] = 1
    with pytest.raises(ValueError, match="rows labelled 'y', of 1: take"):
        mine.folds(2)


@pytest.mark.parametrize(
    ("rows", "header", "message"),
    [
        (MANY, "review,label", "no column 'text'"),
        ([], "text,label", "no row below the names"),
        ([], "", "no column 'text': its columns are .*: rename one .* or pass its name"),
        (MANY, "text,text,label", "two columns 'text'"),
        ([*MANY, " ,x"], "text,label", r"row 121 below .* \(line 122\): 'text' is empty"),
        ([*MANY, "alone"], "text,label", "row 121 .*: 'label' is empty"),
        ([*MANY, "alone,z"], "text,label", "no row labelled 'z' falls into"),
        ([*MANY, "well, a comma,x"], "text,label", "row 121 .* quotation marks"),
        ([*MANY, '"never ended,x', *MANY[:5]], "text,label", "quotation mark that never ends"),
        ([*MANY, '"a,x', '"b, c",y', *MANY[:5]], "text,label", "line 122: .* not doubled"),
        ([*MANY, '"never ended' + "a" * 200_000], "text,label", "quotation mark that never ends"),
        (MANY[::2], "text,label", "the labels .* but a classifier needs two"),
        ([f"same,{i}" for i in range(9)], "text,label", "the labels .*, but"),
    ],
)
def test_a_table_that_does_not_fit_says_where(tmp_path, rows, header, message):
    with pytest.raises(ValueError, match=message):
        datasets.from_csv(table(tmp_path / "mine.csv", rows, header))
