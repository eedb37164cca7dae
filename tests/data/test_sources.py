"""Where images come from: every kind of source is read as it lies, and none leads out of itself."""

import csv
import gzip
import io
import json
import shutil
import struct
import tarfile
import tracemalloc
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageOps
from sklearn.datasets import load_digits

from opnp.data import decoding, generated, idx, parquet, sources
from opnp.data.imagesets import read_manifest
from opnp.data.splits import Split, Unreadable
from opnp.errors import InputError, MissingError, UnavailableError
from opnp.pipeline import parameters
from opnp.pipeline.parameters import Parameters
from opnp.pipeline.results import Run
from opnp.pipeline.stages import fetch
from tests.conftest import HERE

ROOT = Path(__file__).parents[2]
PRESETS = sorted((ROOT / "presets").glob("*.yaml"))
NAMES = ["nought", "one", "two"]  # in this order sorted, too

Pixels = list[tuple[bytes, int]]


@pytest.fixture(autouse=True)
def _workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def digits(count: int = 60) -> list[tuple[Image.Image, int]]:
    """Real scanned digits 0 to 2."""
    found = [(image, y) for image, y in generated.scanned_digits() if y < len(NAMES)]
    return found[:count]


def saved(
    folder: Path, count: int = 60, name: str = "{}", suffix: str = "png", negative: bool = False
) -> Path:
    """Digits, or their negatives, as files in folders named like their classes."""
    for row, (image, y) in enumerate(digits(count)):
        path = folder / name.format(NAMES[y]) / f"{row:03d}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        (ImageOps.invert(image) if negative else image).save(path)
    return folder


def encoded(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def exported(
    path: Path, examples: list[tuple[Image.Image, int]], image: str = "image", label: str = "label"
) -> None:
    """A Parquet file as Hugging Face's datasets writes it."""
    features = {image: {"_type": "Image"}, label: {"names": NAMES, "_type": "ClassLabel"}}
    table = pa.table(
        {
            image: [{"bytes": encoded(each), "path": None} for each, _ in examples],
            label: pa.array([y for _, y in examples], pa.int64()),
        }
    )
    table = table.replace_schema_metadata(
        {"huggingface": json.dumps({"info": {"features": features}})}
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=7)


def listed(path: Path, rows: Sequence[tuple[str, ...]], columns: tuple[str, ...]) -> Path:
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    return path


def contents(split: Split) -> Pixels:
    return [(image.tobytes(), y) for image, y in split.examples()]


def by_class(examples: list[tuple[Image.Image, int]]) -> Pixels:
    """What is found in folders: one class after the other."""
    return [(i.tobytes(), y) for i, y in sorted(examples, key=lambda pair: pair[1])]


def ood(spec: Path | str, unreadable: Unreadable | None = None) -> list[bytes]:
    found = list(sources.open_ood(str(spec), 8, 0, unreadable))
    assert {label for _, label in found} <= {-1}
    return sorted(image.tobytes() for image, _ in found)


def pixels(examples: list[tuple[Image.Image, int]]) -> list[bytes]:
    return sorted(image.tobytes() for image, _ in examples)


# Image folders


@pytest.mark.parametrize("held", ["test", "val", "validation"])
def test_an_image_folder_is_read_by_class_and_in_the_order_of_its_names(held: str) -> None:
    for part in ("train", held):
        saved(Path("mine") / part)
    Path("mine/README.md").write_text("no image")
    Path("mine/train/one/notes.txt").write_text("no image")
    Path("mine/train/one/.hidden.png").write_text("no image")
    classes, splits = sources.open_id("mine")
    assert classes == NAMES
    assert list(splits) == ["train", "test"]
    for split in splits.values():
        assert contents(split) == by_class(digits())


def test_an_undivided_image_folder_and_folders_in_its_folders() -> None:
    saved(Path("mine"), name="{}/more")
    classes, splits = sources.open_id("mine")
    assert classes == NAMES
    assert contents(splits["all"]) == by_class(digits())


def test_jpegs_are_read_too() -> None:
    saved(Path("mine"), 9, suffix="JPG")
    assert len(contents(sources.open_id("mine").splits["all"])) == 9


def test_any_tree_of_images_is_an_ood_set() -> None:
    saved(Path("mine"), name="a/{}")
    shutil.copy2("mine/a/one/001.png", "mine/alone.png")
    assert ood("mine") == sorted([*pixels(digits()), digits()[1][0].tobytes()])
    assert ood("mine/a/two") == pixels([pair for pair in digits() if pair[1] == 2])


def test_of_a_divided_source_the_test_split_is_the_ood_set() -> None:
    saved(Path("mine/train"), 60)
    saved(Path("mine/test"), 12)
    assert ood("mine") == pixels(digits(12))
    assert ood("mine/train") == pixels(digits(60))


def test_test_classes_that_are_not_trained_are_refused() -> None:
    saved(Path("mine/train"), 12)
    saved(Path("mine/test"), 12)
    Path("mine/test/two").rename("mine/test/Two")
    with pytest.raises(InputError, match=r"mine/test has a folder 'Two', and mine/train has none"):
        sources.open_id("mine")


@pytest.mark.parametrize("folder", ["empty", "files"])
def test_a_folder_of_nothing_is_refused_by_name(folder: str) -> None:
    Path("empty").mkdir()
    Path("files").mkdir()
    Path("files/notes.txt").write_text("no image")
    with pytest.raises(InputError, match=f"^{folder} holds no folders"):
        sources.open_id(folder)
    with pytest.raises(InputError, match=f"^{folder} holds no images"):
        ood(folder)


# Parquet, as Hugging Face's datasets exports it


@pytest.mark.parametrize("place", [".", "data"])
@pytest.mark.parametrize(
    ("image", "label"), [("image", "label"), ("img", "labels"), ("img", "fine_label")]
)
def test_an_export_of_several_files_is_read_in_their_order(
    place: str, image: str, label: str
) -> None:
    parts = [digits()[at : at + 20] for at in (0, 20, 40)]
    for index, part in enumerate(parts):
        path = Path("mine") / place / f"train-{index:05d}-of-00003.parquet"
        exported(path, part, image, label)
    exported(Path("mine") / place / "test-00000-of-00001.parquet", digits(8), image, label)
    classes, splits = sources.open_id("mine")
    assert classes == NAMES
    assert contents(splits["train"]) == [(i.tobytes(), y) for i, y in digits()]
    assert contents(splits["test"]) == [(i.tobytes(), y) for i, y in digits(8)]
    assert ood("mine") == pixels(digits(8))
    name = splits["train"].name(27)
    assert name == f"{Path('mine') / place}/train-00001-of-00003.parquet#7"


def test_one_file_is_a_source_too() -> None:
    exported(Path("mine/train.parquet"), digits())
    for spec in ("mine", "mine/train.parquet"):
        assert contents(sources.open_id(spec).splits["all"]) == [
            (i.tobytes(), y) for i, y in digits()
        ]


def test_an_export_that_lacks_a_file_is_refused() -> None:
    exported(Path("mine/train-00001-of-00003.parquet"), digits(4))
    with pytest.raises(InputError, match="holds 1 of the 3 Parquet files of train, such"):
        sources.open_id("mine")


def test_files_of_other_classes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    exported(Path("mine/train.parquet"), digits(9))
    monkeypatch.setitem(globals(), "NAMES", ["one", "nought", "two"])
    exported(Path("mine/test.parquet"), digits(9))
    with pytest.raises(InputError, match=r"test\.parquet names other classes than mine/train"):
        sources.open_id("mine")


def test_images_are_not_held_in_memory() -> None:
    """An export of 24 MB is opened, and all of it read, in an eighth of that."""
    rng = np.random.default_rng(0)
    noise = [(Image.fromarray(rng.integers(0, 256, (200, 200), np.uint8)), 0) for _ in range(600)]
    exported(Path("mine.parquet"), noise)
    assert Path("mine.parquet").stat().st_size > 24e6
    tracemalloc.start()
    split = sources.open_id("mine.parquet").splits["all"]
    assert sum(1 for _ in split.examples()) == len(noise)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak + pa.total_allocated_bytes() < 3e6
    rows = parquet.parquet_rows(Path("mine.parquet"), True)
    assert max(pa.total_allocated_bytes() for _ in rows) < 16e6  # those of 256 images


# Manifests


def manifest(kind: str, rows: Sequence[tuple[str, ...]], columns: tuple[str, ...]) -> Path:
    if kind == "csv":
        return listed(Path("mine/list.csv"), rows, columns)
    table = pa.table(dict(zip(columns, map(list, zip(*rows, strict=True)), strict=True)))
    pq.write_table(table, "mine/list.parquet")
    return Path("mine/list.parquet")


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_manifest_lists_images_beside_it(kind: str) -> None:
    saved(Path("mine/images"), name="")
    rows = [(f"images/{row:03d}.png", NAMES[y]) for row, (_, y) in enumerate(digits())]
    whole = sources.open_id(str(manifest(kind, rows, ("path", "label"))))
    assert whole.classes == NAMES
    assert contents(whole.splits["all"]) == [(i.tobytes(), y) for i, y in digits()]
    halves = [(*row, "train" if at % 2 else "test") for at, row in enumerate(rows)]
    path = manifest(kind, halves, ("path", "label", "split"))
    splits = sources.open_id(str(path)).splits
    assert contents(splits["train"]) == [(i.tobytes(), y) for i, y in digits()[1::2]]
    assert contents(splits["test"]) == [(i.tobytes(), y) for i, y in digits()[::2]]
    assert ood(path) == pixels(digits()[::2])
    assert ood(manifest(kind, [row[:1] for row in rows], ("path",))) == pixels(digits())


def test_numbers_are_classes_in_their_own_order() -> None:
    saved(Path("mine"), 4, name="")
    rows = [(f"{row:03d}.png", label) for row, label in enumerate(["10", "2", "2", "1"])]
    classes, splits = sources.open_id(str(listed(Path("mine/a.csv"), rows, ("path", "label"))))
    assert classes == ["1", "2", "10"]
    assert splits["all"].labels.tolist() == [2, 1, 1, 0]


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        ([("000.png", "a", "trial")], ("path", "label", "split"), "Row 0 .* is of split 'trial'"),
        ([("000.png", "a", "train"), ("001.png", "b", "test")], ("path", "label", "split"), "'b'"),
        ([("000.png",)], ("path",), "has no column label"),
        ([("000.png", "")], ("path", "label"), "Row 0 of mine/a.csv has no label"),
        ([("", "a")], ("path", "label"), "Row 0 of mine/a.csv has no path"),
        ([], ("path", "label"), "lists no images"),
    ],
)
def test_a_manifest_that_is_not_whole_is_refused(
    rows: Sequence[tuple[str, ...]], columns: tuple[str, ...], message: str
) -> None:
    saved(Path("mine"), 2, name="")
    with pytest.raises(InputError, match=message):
        sources.open_id(str(listed(Path("mine/a.csv"), rows, columns)))


# Nothing outside of its folder is read


@pytest.mark.parametrize("place", ["../secret.png", "a/../../secret.png", "absolute", "link.png"])
def test_a_manifest_cannot_lead_out_of_its_folder(place: str) -> None:
    digits()[0][0].save("secret.png")
    Path("mine").mkdir()
    Path("mine/link.png").symlink_to("../secret.png")
    place = str(Path("secret.png").resolve()) if place == "absolute" else place
    path = listed(Path("mine/a.csv"), [(place, "a")], ("path", "label"))
    for read in (sources.open_id, ood):
        with pytest.raises(InputError, match=r"Row 0 of mine/a\.csv is .* leads out of mine/"):
            read(str(path))


@pytest.mark.parametrize(
    ("link", "target"),
    [
        ("one/link.png", "../../secret.png"),
        ("one/link", "../../elsewhere"),
        ("one/link", ".."),
        ("link", "../elsewhere/two"),
    ],
)
def test_links_do_not_lead_out_of_an_image_folder(link: str, target: str) -> None:
    saved(Path("elsewhere"), 9)
    digits()[0][0].save("secret.png")
    saved(Path("mine"), 9)
    (Path("mine") / link).symlink_to(target)
    for read in (sources.open_id, ood):
        with pytest.raises(InputError, match=f"mine/{link} is a link that leads"):
            read("mine")


def test_the_folder_itself_may_be_a_link_and_links_may_stay_in_it() -> None:
    saved(Path("elsewhere"), 9)
    Path("elsewhere/one/100.png").symlink_to("001.png")
    Path("mine").symlink_to("elsewhere")
    assert len(contents(sources.open_id("mine").splits["all"])) == 10


def test_an_archive_cannot_write_outside_its_folder() -> None:
    from torchvision.datasets.utils import extract_archive

    import opnp.data.libraries  # noqa: F401 (whose import makes it so, for any code that unpacks)

    with tarfile.open("bad.tar", "w") as archive:
        member = tarfile.TarInfo("../outside.txt")
        archive.addfile(member, io.BytesIO())
    with pytest.raises(tarfile.OutsideDestinationError):
        extract_archive("bad.tar", "inside")
    with tarfile.open("bad.tar") as archive, pytest.raises(tarfile.OutsideDestinationError):
        archive.extractall("inside")  # as pytorch-ood does in places
    assert not Path("outside.txt").exists()


@pytest.mark.parametrize("name", ["../x", "a/b", "/x", "a b", "x\n"])
@pytest.mark.parametrize("section", ["near", "far"])
def test_the_name_of_an_ood_set_is_no_path(section: str, name: str) -> None:
    values = parameters.load(ROOT / "params.yaml").model_dump()
    values["data"][section] = {name: "letters"}
    with pytest.raises(ValueError, match="String should match pattern"):
        Parameters.model_validate(values)


# Images that are too large, or none


def png_of(width: int, height: int) -> bytes:
    """A PNG whose header claims a size, with next to no pixels behind it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        size, check = struct.pack(">I", len(data)), zlib.crc32(kind + data)
        return size + kind + data + struct.pack(">I", check)

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("default")  # with Pillow's warning as it comes, too
@pytest.mark.parametrize("size", [(10_000, 9_000), (100_000, 100_000)])
def test_an_image_of_absurd_dimensions_is_refused_before_it_is_decoded(
    size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL.PngImagePlugin import PngImageFile

    monkeypatch.setattr(PngImageFile, "load", lambda _: pytest.fail("it was decoded"))
    Path("large.png").write_bytes(png_of(*size))
    for data in (png_of(*size), Path("large.png")):
        with pytest.raises(InputError, match=r"^large\.png (has|is) .*(pixels|bomb)"):
            decoding.decode(data, "large.png")


def test_one_image_below_the_limit_is_decoded() -> None:
    Image.new("1", (9_000, 9_900)).save("large.png")
    assert decoding.decode(Path("large.png"), "it").size == (9_000, 9_900)


def test_a_packed_idx_file_is_unpacked_no_further_than_its_header_says() -> None:
    head = bytes([0, 0, 8, 1]) + struct.pack(">I", 1000)
    Path("a.gz").write_bytes(gzip.compress(head + bytes(64 << 20)))  # 64 kB of 64 MiB
    tracemalloc.start()
    with pytest.raises(InputError, match="a is not a whole IDX file"):
        idx.read_idx(Path("a"))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 << 20
    head = bytes([0, 0, 8, 3]) + struct.pack(">III", 2**31, 2**31, 2**31)
    Path("a.gz").write_bytes(gzip.compress(head + bytes(1000)))
    with pytest.raises(InputError, match="a is not a whole IDX file"):
        idx.read_idx(Path("a"))


@pytest.mark.parametrize("kind", ["folder", "manifest", "shards", "missing"])
def test_images_that_cannot_be_read_are_left_out_named_and_counted(kind: str) -> None:
    saved(Path("mine"), 12)
    paths = sorted(map(str, Path("mine").rglob("*.png")))
    spec = Path("mine")
    bad = [paths[2], paths[7]]
    if kind == "shards":
        spec = Path("shards")
        for part in (0, 1):
            file = spec / f"train-{part:05d}-of-00002.parquet"
            exported(file, digits(12)[6 * part : 6 * part + 6])
            rows = pq.read_table(file)
            cut = rows.to_pylist()
            cut[part]["image"]["bytes"] = cut[part]["image"]["bytes"][:60]
            pq.write_table(pa.Table.from_pylist(cut, rows.schema), file)
        bad = [f"{spec}/train-{part:05d}-of-00002.parquet#{part}" for part in (0, 1)]
    for path in bad if kind != "shards" else []:
        Path(path).write_bytes(Path(path).read_bytes()[:60])
        if kind == "missing":
            Path(path).unlink()
    if kind in ("manifest", "missing"):
        rows = [(str(Path(path).relative_to("mine")),) for path in paths]
        spec = listed(Path("mine/a.csv"), rows, ("path",))
    unreadable = Unreadable(2)
    assert len(ood(spec, unreadable)) == 10
    assert sorted(unreadable.images) == sorted(bad)
    with pytest.raises(InputError, match="2 images cannot be read, more than the 1 that"):
        ood(spec, Unreadable(1))
    with pytest.raises(InputError, match="is missing" if kind == "missing" else "not a whole"):
        ood(spec)


# Data sets of torchvision and pytorch-ood, from files as they keep them


def test_a_data_set_that_is_there_is_read_without_a_download(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import urllib.request

    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: pytest.fail("a download"))
    raw = Path("downloads/MNIST/raw")
    raw.mkdir(parents=True)
    images = np.stack([np.asarray(image) for image, _ in digits()])
    labels = np.array([y for _, y in digits()], np.uint8)
    for part in ("train", "t10k"):
        for name, array in ((f"{part}-images-idx3", images), (f"{part}-labels-idx1", labels)):
            head = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
            (raw / f"{name}-ubyte").write_bytes(head + array.tobytes())
    classes, splits = sources.open_id("torchvision:MNIST")
    assert classes[:2] == ["0 - zero", "1 - one"]
    assert contents(splits["train"]) == [(i.tobytes(), y) for i, y in digits()]
    assert list(splits) == ["train", "test"]
    assert ood("torchvision:MNIST") == pixels(digits())

    saved(Path("downloads/eurosat/2750"), suffix="png")
    classes, splits = sources.open_id("torchvision:EuroSAT")  # which is not divided
    assert classes == NAMES
    assert splits["all"].labels.tolist() == [y for _, y in by_class(digits())]

    saved(Path("downloads/dtd/dtd/images"), suffix="jpg")
    places = sorted(Path("downloads/dtd/dtd/images").rglob("*.jpg"))
    Path("downloads/dtd/dtd/labels").mkdir()
    for part in ("train", "test"):
        text = "\n".join(f"{path.parent.name}/{path.name}" for path in places)
        Path(f"downloads/dtd/dtd/labels/{part}1.txt").write_text(text)
    assert len(ood("torchvision:DTD")) == 60
    assert sources.open_id("torchvision:DTD").splits["test"].labels.tolist() == [
        y for _, y in by_class(digits())
    ]
    places[5].write_bytes(places[5].read_bytes()[:200])
    unreadable = Unreadable(1)
    assert len(ood("torchvision:DTD", unreadable)) == 59
    assert unreadable.images == ["torchvision:DTD/test#5"]


def test_collections_of_pytorch_ood_are_ood_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    saved(Path("downloads/pytorch-ood/iNaturalist/images"), 12, name="", suffix="jpg")
    Path("downloads/pytorch-ood/iNaturalist.zip").touch()
    assert len(ood("pytorch-ood:iNaturalist")) == 12
    with pytest.raises(InputError, match=r"pytorch-ood has no data set 'LSUNCrops'.*:LSUNCrop`"):
        ood("pytorch-ood:LSUNCrops")
    with pytest.raises(InputError, match="has no labels"):
        sources.open_id("pytorch-ood:LSUNCrop")
    from pytorch_ood.dataset.img import LSUNCrop

    monkeypatch.setattr(LSUNCrop, "url", "http://127.0.0.1:9/LSUN.tar.gz")
    with pytest.raises(
        UnavailableError, match=r"could not be downloaded from http://127\.0\.0\.1:9/"
    ):
        ood("pytorch-ood:LSUNCrop")


# OOD sets that are not there


def parameters_with(**data: Any) -> Parameters:
    chosen = parameters.load(ROOT / "params.yaml")
    return Parameters.model_validate(
        chosen.model_dump() | {"data": chosen.data.model_dump() | data}
    )


def test_sets_whose_files_are_missing_are_refused_or_left_out_and_recorded(
    caplog: pytest.LogCaptureFixture,
) -> None:
    far = {"letters": "letters", "isun": "downloads/isun", "mine": "absent.csv"}
    with pytest.raises(MissingError, match=r"OOD set isun, downloads/isun .*github\.com/facebook"):
        fetch.run(HERE, parameters_with(far=far))
    assert not Path("data").exists()
    skipping = parameters_with(far=far, missing="skip")
    fetch.run(HERE, skipping)
    assert read_manifest(HERE.data).missing == {"isun": "downloads/isun", "mine": "absent.csv"}
    assert list(read_manifest(HERE.data).ood) == ["held-out-digits", "letters"]
    assert "The OOD set mine is left out: " in caplog.text
    assert Run(HERE, skipping).manifest == read_manifest(HERE.data)
    saved(Path("downloads/isun"), 5, negative=True)
    fetch.run(HERE, skipping)
    assert read_manifest(HERE.data).missing == {"mine": "absent.csv"}
    assert read_manifest(HERE.data).ood["isun"].count == 5


def test_a_run_needs_one_ood_set_and_the_id_set(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = {"far": {"isun": "downloads/isun"}, "near": {}, "missing": "skip"}
    with pytest.raises(MissingError, match="None of the OOD sets is there"):
        fetch.run(HERE, parameters_with(**absent))
    with pytest.raises(MissingError, match=r"ID source downloads/imagenet .*https://image-net"):
        fetch.run(HERE, parameters_with(id="downloads/imagenet"))
    # Files that are there and broken are no missing ones, nor is a misspelt name.
    Path("mine.parquet").write_text("broken")
    for spec in ("mine.parquet", "leters"):
        with pytest.raises(InputError, match=spec):
            fetch.run(HERE, parameters_with(far={"mine": spec}, missing="skip"))
    from torchvision.datasets import MNIST

    monkeypatch.setattr(MNIST, "mirrors", ["http://127.0.0.1:9/"])
    unavailable = {"far": {"mnist": "torchvision:MNIST"}, "near": {}, "missing": "skip"}
    with pytest.raises(MissingError, match=r"None of the OOD sets is there \(mnist\)"):
        fetch.run(HERE, parameters_with(**unavailable))


def test_a_folder_is_divided_like_the_digits_it_holds() -> None:
    """The split of the pipeline: by class, whole, and without overlap."""
    saved(Path("mine"), 100)
    fetch.run(HERE, parameters_with(id="mine", held_out=[2], near={"two": "held-out"}, far={}))
    found = read_manifest(HERE.data)
    assert found.classes == ["nought", "one"]
    kept = [y for _, y in digits(100) if y != 2]
    assert sum(found.sets[s].count for s in ("train", "validation", "test")) == len(kept)
    for label, name in enumerate(found.classes):
        count = kept.count(label)
        assert found.sets["test"].classes[name] == round(0.3 * count)
        assert found.sets["validation"].classes[name] == round(0.2 * count)
    assert found.ood["two"].count == 100 - len(kept)


def test_images_that_cannot_be_prepared_are_left_out_of_a_fetch() -> None:
    saved(Path("mine"), 40)
    Image.fromarray(np.full((8, 8), 70_000, np.int32)).save("mine/one/deep.tif")
    saved(Path("far"), 10, name="")
    Image.fromarray(np.full((8, 8), 3.5, np.float32)).save("far/deep.tif")
    values = {"id": "mine", "held_out": [2], "near": {"two": "held-out"}, "far": {"others": "far"}}
    fetch.run(HERE, parameters_with(**values, ood_count=10, mode="RGB"))
    sets = read_manifest(HERE.data).sets
    assert sets["train"].unreadable == ["mine/one/deep.tif"]
    assert sets["ood/others"].unreadable == ["far/deep.tif"]
    assert sets["ood/others"].count == 10
    with pytest.raises(InputError, match=r"^(mine/one|far)/deep\.tif holds"):
        fetch.run(HERE, parameters_with(**values, max_unreadable=0))


def test_id_images_in_an_ood_set_are_counted_or_refused(caplog: pytest.LogCaptureFixture) -> None:
    saved(Path("mine"), 60)
    saved(Path("far"), 6, suffix="bmp")  # the same pictures in other files
    rng = np.random.default_rng(0)
    for row in range(5):
        Image.fromarray(rng.integers(0, 256, (8, 8), np.uint8)).save(f"far/{row}.png")
    values = {"id": "mine", "held_out": [2], "near": {"two": "held-out"}}
    fetch.run(HERE, parameters_with(**values, far={"others": "far"}))
    entry = read_manifest(HERE.data).sets["ood/others"]
    known = sum(y != 2 for _, y in digits(6))
    assert (entry.count, entry.also_id) == (11, known)
    said = f"{known} of the 11 images of the OOD set others (far) are ID images as well"
    assert said in caplog.text
    assert read_manifest(HERE.data).sets["ood/two"].also_id == 0
    assert "also_id" not in read_manifest(HERE.data).as_json()["sets"]["ood/two"]
    with pytest.raises(
        InputError, match=r"^All \d+ images of the OOD set others \(far/one\) are ID"
    ):
        fetch.run(HERE, parameters_with(**values, far={"others": "far/one"}))


def test_test_images_that_are_training_images_are_told_or_refused(
    caplog: pytest.LogCaptureFixture,
) -> None:
    saved(Path("mine/train"), 60)
    Path("mine/test").symlink_to("train")
    values: dict[str, Any] = {"id": "mine", "test": None, "held_out": [], "near": {}}
    with pytest.raises(InputError, match=r"^All 60 test images \(mine\) are images of another ID"):
        fetch.run(HERE, parameters_with(**values, far={"letters": "letters"}))
    Path("mine/test").unlink()
    rng = np.random.default_rng(0)
    for label, name in enumerate(NAMES):
        Path("mine/test", name).mkdir(parents=True)
        for row in range(4):
            image = Image.fromarray(rng.integers(0, 256, (8, 8), np.uint8))
            image.save(f"mine/test/{name}/{row}.png")
        digits()[label][0].save(f"mine/test/{name}/again.png")
    fetch.run(HERE, parameters_with(**values, far={"letters": "letters"}))
    assert "3 of the 15 test images (mine) are images of another ID split as well" in caplog.text
    assert all(entry.also_id == 0 for entry in read_manifest(HERE.data).sets.values())


def test_outliers_that_are_test_images_are_told(caplog: pytest.LogCaptureFixture) -> None:
    saved(Path("mine"), 60)
    saved(Path("weeds"), 9, negative=True)
    shutil.copytree("weeds/one", "known")
    chosen = parameters_with(id="mine", held_out=[], near={}, far={"weeds": "weeds"})
    search = chosen.search.model_copy(update={"outliers": {"known": "known"}})
    fetch.run(HERE, chosen.model_copy(update={"search": search}))
    count = sum(y == 1 for _, y in digits(9))
    said = f"All {count} images of the outlier set known (known) are OOD test images"
    assert said in caplog.text
    assert read_manifest(HERE.data).sets["outliers/known"].also_id == 0


@pytest.mark.parametrize("spec", ["a" * 300, "a\0b", "loop"])
def test_names_that_no_file_can_have_do_not_exist(spec: str) -> None:
    Path("loop").symlink_to("loop")
    for opened in (sources.open_id, lambda name: sources.open_part(name, "test"), ood):
        with pytest.raises(InputError, match="neither"):
            opened(spec)


def test_parquet_is_turned_and_folders_are_not() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = Image.fromarray(np.tile(np.arange(0, 240, 10, dtype=np.uint8), (24, 1)))
    Path("mine").mkdir()
    picture.save("mine/a.jpg", exif=exif)
    rows = [{"bytes": Path("mine/a.jpg").read_bytes(), "path": None}]
    pq.write_table(pa.table({"image": rows}), "mine.parquet")
    listed(Path("list.csv"), [("mine/a.jpg",)], ("path",))
    plain = np.asarray(Image.open("mine/a.jpg"))
    for spec in ("mine", "list.csv", "mine/a.jpg"):
        [(found, _)] = sources.open_ood(spec, 8, 0)
        assert np.array_equal(np.asarray(found), plain)
    [(found, _)] = sources.open_ood("mine.parquet", 8, 0)
    assert np.array_equal(np.asarray(found), np.rot90(plain, 3))


# Presets


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_a_preset_is_valid_and_says_where_its_files_are_had(
    preset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = parameters.load(preset)
    text = preset.read_text()
    for spec in (chosen.data.id, *chosen.data.near.values(), *chosen.data.far.values()):
        if spec.startswith("downloads/"):
            with pytest.raises(MissingError, match="get it from") as stop:
                sources.require(spec, "The source")
            home = str(stop.value).rsplit(" ", 1)[1].rstrip(".")
            assert home in text, spec
        elif ":" in spec:
            from opnp.data.libraries import named

            named(*spec.split(":"))


def test_a_preset_runs_on_what_is_there(caplog: pytest.LogCaptureFixture) -> None:
    """ImageNet's protocol in OpenOOD's folders, with scans for photographs."""
    chosen = parameters.load(ROOT / "presets/openood-imagenet.yaml")
    chosen = chosen.model_copy(update={"data": chosen.data.model_copy(update={"image_size": 8})})
    with pytest.raises(MissingError, match=r"ID source downloads/imagenet .*https://image-net"):
        fetch.run(HERE, chosen)
    saved(Path("downloads/imagenet/train"), 300)
    saved(Path("downloads/imagenet/val"), 30)
    for path in Path("downloads/imagenet/val").rglob("*.png"):
        ImageOps.mirror(Image.open(path)).save(path)
    with pytest.raises(MissingError, match="None of the OOD sets is there"):
        fetch.run(HERE, chosen)
    saved(Path("elsewhere/images_largescale/ninco"), 20, negative=True)
    Path("downloads/openood").symlink_to("../elsewhere")
    fetch.run(HERE, chosen)
    found = read_manifest(HERE.data)
    assert {name: entry.count for name, entry in found.ood.items()} == {"ninco": 20}
    assert sorted(found.missing) == ["inaturalist", "openimage-o", "ssb-hard", "textures"]
    told = [record.getMessage() for record in caplog.records]
    assert len([line for line in told if "get it from https://github.com/Jingkang50" in line]) == 4


def test_the_digits_of_scikit_learn_are_those_it_ships() -> None:
    found = contents(sources.open_id("digits").splits["all"])
    scans = np.rint(load_digits().images * (255 / 16)).astype(np.uint8)
    assert [data for data, _ in found] == [scan.tobytes() for scan in scans]
