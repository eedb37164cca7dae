"""Splits are known by the names that exporters write; what is unclear is refused, not guessed."""

import csv
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from opnp.data import images, sources
from opnp.data.parts import split_named, splits_named
from opnp.errors import InputError

CLASSES = ("daisy", "tulip")


@pytest.fixture(autouse=True)
def _workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def drawn(path: Path, number: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (9, 9), (number, 255 - number, 0)).save(path)
    return path


def folder(*parts: str, count: int = 2) -> None:
    """Images of every class in `mine/PART`."""
    for number, part in enumerate(parts):
        for row, name in enumerate(CLASSES):
            for each in range(count + number):
                drawn(Path("mine", part, name, f"{each}.png"), 20 * number + 10 * row + each)


def table(path: str, count: int) -> None:
    file = drawn(Path("one.png"), count)
    rows = [{"bytes": file.read_bytes(), "path": None}] * count
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"image": rows, "label": [row % 2 for row in range(count)]}), path)


def listing(splits: Sequence[str]) -> None:
    Path("mine").mkdir(exist_ok=True)
    with open("mine/list.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("path", "label", "split"))
        for number, split in enumerate(splits):
            for row in range(2 * (2 + number)):
                path = drawn(Path(f"mine/{split}-{row}.png"), row)
                rows.writerow((path.name, CLASSES[row % 2], split))


# Names


@pytest.mark.parametrize(
    ("split", "names"),
    [
        ("train", "train Train TRAIN training Training_Set train2017 train-images trainset"),
        ("train", "trainval train_val images_train"),
        ("validation", "val Val valid validation Validation dev development val2017 valid_set"),
        ("test", "test Test testing test-images test1 eval evaluation holdout hold-out HoldOut"),
    ],
)
def test_names_of_splits(split: str, names: str) -> None:
    for name in names.split():
        assert split_named(name) == split, name


@pytest.mark.parametrize(
    "name",
    [
        *("daisy", "trainer", "valley", "tester", "images", "data", "", "0", "set", "pretrain"),
        *("test_tube", "train_station", "extra", "unlabeled", "devil", "evaluate", "trial"),
    ],
)
def test_names_that_are_none(name: str) -> None:
    assert split_named(name) is None


def test_words_that_all_names_share_are_ignored() -> None:
    names = ("cats_train", "cats_test", "cats_dev")
    assert list(splits_named(names).values()) == ["train", "test", "validation"]
    assert set(splits_named(["test_a", "test_b"]).values()) == {None}


# Sources with splits


@pytest.mark.parametrize(
    ("train", "validation", "test"),
    [
        ("train", "val", "test"),
        ("training", "valid", "testing"),
        ("Train", "Validation", "Test"),
        ("train", "dev", "eval"),
        ("train2017", "val2017", "test2017"),
        ("seg_train", "seg_dev", "seg_test"),
        ("training_set", "validation_set", "holdout_set"),
    ],
)
@pytest.mark.parametrize("kind", ["folder", "nested", "parquet", "shards", "folders", "manifest"])
def test_each_split_is_found(kind: str, train: str, validation: str, test: str) -> None:
    names = (train, validation, test)
    spec = "mine/list.csv" if kind == "manifest" else "mine"
    match kind:
        case "folder":
            folder(*names)
        case "nested":
            folder(*(f"images/{name}" for name in names))
        case "manifest":
            listing(names)
        case _:
            form = {"parquet": "{}.parquet", "shards": "data/{}-00000-of-00001.parquet"}
            for number, name in enumerate(names):
                path = form.get(kind, "{}/0000.parquet").format(name)
                table(f"mine/{path}", 2 * (2 + number))
    for number, part in enumerate(("train", "validation", "test")):
        found = images.find(spec, part=part)
        assert len(found) == 2 * (2 + number)
        assert found.source == f"the {part} split of {spec}"
    if kind in ("folder", "nested", "manifest"):
        classes, splits = sources.open_id(spec)
        assert classes == list(CLASSES)
        assert {name: len(split) for name, split in splits.items()} == {"train": 4, "test": 8}


@pytest.mark.parametrize("kind", ["folder", "parquet", "manifest"])
def test_a_lone_split_says_what_it_is(kind: str) -> None:
    """So that training images are not taken for others without a word."""
    spec = "mine"
    if kind == "folder":
        folder("train")
        assert sources.open_id("mine").classes == list(CLASSES)  # and not one class, train
    elif kind == "parquet":
        table("mine/train-00000-of-00001.parquet", 4)
    else:
        listing(["train"])
        spec = "mine/list.csv"
    for part in ("train", "validation", "test"):
        found = images.find(spec, part=part)
        assert (len(found), found.source) == (4, f"the train split of {spec}")


@pytest.mark.parametrize("kind", ["folder", "parquet"])
@pytest.mark.parametrize(
    ("names", "seen"),
    [
        (("train", "test", "extra"), r"named like splits \(test, train\) beside others \(extra\)"),
        (("test", "daisies", "tulips"), r"splits \(test\) beside others \(daisies, tulips\)"),
        (("train", "unlabelled"), r"splits \(train\) beside others \(unlabelled\)"),
        (("train", "val", "validation"), "two .* for its validation split, val and validation"),
        (("test", "testing"), "two .* for its test split, test and testing"),
    ],
)
def test_what_is_unclear_is_refused_with_what_was_seen(
    names: tuple[str, ...], seen: str, kind: str
) -> None:
    if kind == "folder":
        folder(*names)
    else:
        for name in names:
            table(f"mine/{name}-00000-of-00001.parquet", 4)
    for opened in (
        lambda: sources.open_id("mine"),
        lambda: images.find("mine"),
        lambda: images.find("mine", part="train"),
        lambda: list(sources.open_ood("mine", 8, 0)),
    ):
        with pytest.raises(InputError, match=rf"^mine has .*{seen}"):
            opened()


def test_parquet_files_of_unknown_splits_are_refused() -> None:
    for name in ("v4", "v6"):
        table(f"mine/{name}-00000-of-00001.parquet", 4)
    with pytest.raises(InputError, match=r"mine has Parquet files of unknown splits \(v4, v6\)"):
        images.find("mine")
    Path("mine/v6-00000-of-00001.parquet").unlink()
    assert images.find("mine").source == "mine"
    for name in ("0000", "0001"):
        table(f"parts/{name}.parquet", 4)
    assert (len(images.find("parts")), images.find("parts").source) == (8, "parts")


def test_a_manifest_of_unknown_splits_is_refused() -> None:
    listing(["train", "trial"])
    with pytest.raises(InputError, match=r"Row 4 of mine/list\.csv is of split 'trial'"):
        images.find("mine/list.csv")


def test_held_out_splits_without_one_to_train_on_are_refused() -> None:
    folder("val", "test")
    with pytest.raises(InputError, match="mine has the splits test and validation, and none for"):
        sources.open_id("mine")
    assert len(images.find("mine", part="validation")) == 4


def test_folders_without_images_are_neither_splits_nor_others() -> None:
    folder("train", "test")
    Path("mine/annotations").mkdir()
    Path("mine/annotations/boxes.json").write_text("{}")
    assert list(sources.open_id("mine").splits) == ["train", "test"]


def test_a_class_may_be_called_train() -> None:
    for number, name in enumerate(("aeroplane", "train", "tulip")):
        drawn(Path("mine", name, "0.png"), number)
    assert sources.open_id("mine").classes == ["aeroplane", "train", "tulip"]
    assert len(images.find("mine", part="train")) == 3
    shutil.move("mine", "inner")
    shutil.copytree("inner", "mine/train")
    shutil.copytree("inner", "mine/val")
    assert sources.open_id("mine").classes == ["aeroplane", "train", "tulip"]


def test_images_beside_one_split_are_unclear(caplog: pytest.LogCaptureFixture) -> None:
    folder("test")
    drawn(Path("mine/0.png"), 3)
    with pytest.raises(InputError, match=r"mine holds images \(1\) beside a folder named like a"):
        images.find("mine")
    folder("train", "test")
    assert len(images.find("mine")) == 6
    assert "mine: files passed over: 1 images beside the splits" in caplog.text


# What is passed over


def test_what_is_passed_over_is_counted_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    folder(".")
    for name in ("a.txt", "b.txt", "daisy/c.GIF", "notes", ".hidden", "tulip/.DS_Store"):
        Path("mine", name).write_text("no image")
    os.mkfifo("mine/daisy/pipe.png")
    drawn(Path("mine/loose.png"), 3)
    assert len(images.find("mine")) == 5
    [record] = caplog.records
    told = record.getMessage()
    assert told.startswith("mine: files passed over: 2 .txt, ")
    for each in ("1 .gif", "1 without a suffix", "1 pipes or devices named .png"):
        assert each in told
    caplog.clear()
    assert len(sources.open_id("mine").splits["all"]) == 4
    assert "1 in no folder of a class" in caplog.text
    caplog.clear()
    images.find("mine/tulip")
    assert not caplog.records


def test_links_to_themselves_and_to_nowhere_are_images_that_cannot_be_read() -> None:
    folder(".")
    Path("mine/daisy/loop.png").symlink_to("loop.png")
    Path("mine/daisy/gone.png").symlink_to("absent.png")
    Path("mine/daisy/loop").symlink_to("loop")
    found = images.find("mine")
    assert len(found) == 6
    lost = []
    for row in range(len(found)):
        try:
            found.split.load(row)
        except InputError as error:
            lost.append(str(error))
    assert [each.partition(" is ")[0] for each in lost] == [
        "mine/daisy/gone.png",
        "mine/daisy/loop.png",
    ]


def test_a_row_of_a_manifest_that_cannot_be_a_file_is_left_out() -> None:
    listing(["test"])
    Path("mine/loop.png").symlink_to("loop.png")
    os.mkfifo("mine/pipe.png")
    with open("mine/list.csv", "a") as file:
        file.write(f"loop.png,daisy,test\npipe.png,daisy,test\n{'a' * 300}.png,daisy,test\n")
    found = images.find("mine/list.csv")
    assert len(found) == 7
    for row in range(4, 7):
        with pytest.raises(InputError, match=r"^mine/"):
            found.split.load(row)
    assert found.also_in(found) == [0, 1, 2, 3]
    assert found.digests()[4:6] == ["mine/loop.png", "mine/pipe.png"]
