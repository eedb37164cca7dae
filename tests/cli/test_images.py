"""The command line's images: of every kind of source, they are the same images."""

import csv
import json
import os
import shutil
import struct
import sys
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

import opnp
from opnp.backbones.shards import read_shard
from opnp.cli import app
from opnp.data import decoding, images, imagesets, sources, splits
from opnp.data.images import Images
from opnp.deployment import fit, mlflow_model, score
from opnp.deployment.detector import SavedDetector
from opnp.errors import InputError
from tests.helpers import own_model
from tests.helpers.own_model import CLASSES

Files = list[Path]


@pytest.fixture(autouse=True)
def _workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])


@pytest.fixture(scope="module")
def detector(detector_folder: Path) -> SavedDetector:
    return opnp.load(detector_folder, trust=own_model.SPEC)


@pytest.fixture
def files(own: Path) -> Files:
    """Images of every class, copied to `images/CLASS`."""
    found = images.find(own / "images" / "test")
    return copied(found.select(range(0, len(found), 9)), Path("images"))


def copied(found: Images, folder: Path) -> Files:
    paths = [folder / path.parent.name / path.name for path in found.paths]
    for path, original in zip(paths, found.paths, strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(original, path)
    return paths


def number(path: Path) -> int:
    return CLASSES.index(path.parent.name)


# The same images as every kind of source


def parquet(
    files: Files, path: str = "export/test.parquet", names: Sequence[str] | None = CLASSES
) -> str:
    """As Hugging Face's datasets writes it; without names labels are numbers only."""
    table = pa.table(
        {
            "image": [{"bytes": file.read_bytes(), "path": file.name} for file in files],
            "label": [number(file) for file in files],
        }
    )
    kind = {"names": list(names), "_type": "ClassLabel"} if names else {"_type": "Value"}
    features = {"info": {"features": {"image": {"_type": "Image"}, "label": kind}}}
    Path(path).parent.mkdir(exist_ok=True)
    table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
    pq.write_table(table, path, row_group_size=7)
    return path


def unnamed(files: Files) -> str:
    return parquet(files, names=None)


def unlabelled(files: Files) -> str:
    table = pa.table({"img": [{"bytes": file.read_bytes()} for file in files]})
    pq.write_table(table, "bare.parquet")
    return "bare.parquet"


def manifest(files: Files, columns: Sequence[str] = ("path", "label")) -> str:
    with open("list.csv", "w", newline="") as file:
        rows = [(path, path.parent.name, "test") for path in files]
        csv.writer(file).writerows([columns, *(row[: len(columns)] for row in rows)])
    return "list.csv"


def paths_only(files: Files) -> str:
    return manifest(files, ("path",))


def parquet_manifest(files: Files) -> str:
    labels = [str(number(path)) for path in files]
    pq.write_table(pa.table({"path": [str(path) for path in files], "label": labels}), "l.parquet")
    return "l.parquet"


def idx(files: Files, folder: str = "idx", parts: Sequence[str] = ("t10k",)) -> str:
    pixels = np.stack([np.asarray(Image.open(path)) for path in files])
    labels = np.array([number(path) for path in files], np.uint8)
    Path(folder).mkdir(parents=True, exist_ok=True)
    for part in parts:
        for name, array in ((f"{part}-images-idx3", pixels), (f"{part}-labels-idx1", labels)):
            head = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
            (Path(folder) / f"{name}-ubyte").write_bytes(head + array.tobytes())
    return folder


def mnist(files: Files) -> str:
    idx(files, "downloads/MNIST/raw", ("train", "t10k"))
    return "torchvision:MNIST"


def eurosat(files: Files) -> str:
    for path in files:
        place = Path("downloads/eurosat/2750") / path.parent.name / path.name
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, place)
    return "torchvision:EuroSAT"


def pytorch_ood(files: Files) -> str:
    folder = Path("downloads/pytorch-ood/iNaturalist/images")
    folder.mkdir(parents=True)
    for path in files:
        shutil.copy2(path, folder)
    Path("downloads/pytorch-ood/iNaturalist.zip").touch()
    return "pytorch-ood:iNaturalist"


def divided(files: Files) -> str:
    for part, chosen in (("train", files[:7]), ("test", files)):
        for path in chosen:
            place = Path("mine", part, *path.parts[1:])
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, place)
    return "mine"


NAMED = [parquet, manifest, eurosat, divided]
NUMBERED = [unnamed, parquet_manifest, idx]
WITHOUT = [unlabelled, paths_only, mnist, pytorch_ood]  # MNIST's classes are called `0 - zero`
Kind = Callable[[Files], str]


@pytest.mark.parametrize("kind", [*NAMED, *NUMBERED, *WITHOUT], ids=lambda kind: kind.__name__)
def test_the_same_images_have_the_same_scores_and_labels(
    kind: Kind, files: Files, detector: SavedDetector
) -> None:
    found, out = images.find(kind(files)), Path("scores.parquet")
    score.score(detector, found, out, batch_size=16)
    rows = pq.read_table(out).to_pylist()
    order = np.array(
        [
            [path.name for path in files].index(Path(row["file"]).name)
            if row["file"].endswith(".png")
            else int(row["file"].rpartition("#")[2])
            for row in rows
        ]
    )
    if kind is pytorch_ood or kind is eurosat:  # in orders of their own
        order = np.argsort([path.name if kind is pytorch_ood else str(path) for path in files])
    expected = detector.score([files[row] for row in order])
    assert sorted(order) == list(range(len(files)))
    np.testing.assert_allclose([row["score"] for row in rows], expected.score, atol=1e-5)
    assert [row["predicted"] for row in rows] == expected.predicted
    labels = found.labels(CLASSES)
    if kind in WITHOUT:
        assert labels is None
    else:
        assert labels is not None
        assert labels.tolist() == [number(files[row]) for row in order]


def test_rows_are_named_by_their_file(files: Files) -> None:
    parquet(files[:5], "export/test-00000-of-00002.parquet")
    parquet(files[5:], "export/test-00001-of-00002.parquet")
    found = images.find("export", files[0], idx(files), mnist(files))
    assert found.name(6) == "export/test-00001-of-00002.parquet#1"
    assert found.name(len(files)) == str(files[0])
    assert found.name(len(files) + 3) == "idx/t10k-images-idx3-ubyte#2"
    assert found.name(2 * len(files) + 3) == "torchvision:MNIST/test#2"
    assert len(found) == 3 * len(files) + 1
    with pytest.raises(InputError, match=r"of-00002\.parquet#0 is not an image file"):
        _ = found.paths


def test_numbers_are_the_models_classes_only_if_there_are_as_many(files: Files) -> None:
    found = images.find(idx(files))
    assert found.labels([*CLASSES, "seven"]) is None
    with pytest.raises(InputError, match="but also one of the class"):  # names come first
        found.labels(["0", *CLASSES[1:]])


def test_classes_that_fit_in_part_are_refused(files: Files) -> None:
    found = images.find(parquet(files))
    with pytest.raises(
        InputError, match=r"also one of the class 'six' \(export/test\.parquet#\d+\)"
    ):
        found.labels([*CLASSES[:6], "seven"])
    assert found.labels(["cat", "dog"]) is None
    shutil.copy2(files[0], "images/alone.png")
    with pytest.raises(InputError, match=r"but also one of no class \(images/alone\.png\)"):
        images.find("images").labels(CLASSES)


# Which split


@pytest.mark.parametrize("kind", ["folder", "parquet", "manifest"])
def test_a_part_of_what_is_divided(kind: str, files: Files) -> None:
    """Validation images are of the split validation, or else of test."""
    parts = {"train": files[:6], "validation": files[6:11], "test": files[11:14]}
    for names in (("train", "validation", "test"), ("train", "test")):
        shutil.rmtree("mine", ignore_errors=True)
        for name in names:
            for path in parts[name]:
                place = Path("mine", name, path.parent.name, path.name)
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(path, place)
        spec = "mine"
        if kind == "parquet":
            for name in names:
                parquet(parts[name], f"mine/{name}.parquet")
        elif kind == "manifest":
            rows = [(path, name) for name in names for path in parts[name]]
            spec = "list.csv"
            with open(spec, "w", newline="") as file:
                csv.writer(file).writerows([("path", "split"), *rows])
        held = "validation" if "validation" in names else "test"
        for part, name in (("train", "train"), ("validation", held), ("test", "test")):
            found = images.find(spec, part=part)
            assert len(found) == len(parts[name])
            assert found.source == f"the {name} split of {spec}"


def test_a_part_of_other_sources(files: Files) -> None:
    idx(files[:5], parts=("train",))
    idx(files[5:8])
    assert [len(images.find("idx", part=p)) for p in ("train", "validation", "test")] == [5, 3, 3]
    idx(files[:5], "downloads/MNIST/raw", ("train",))
    idx(files[5:8], "downloads/MNIST/raw")
    found = [images.find("torchvision:MNIST", part=p) for p in ("train", "validation", "test")]
    assert [len(each) for each in found] == [5, 3, 3]
    assert found[1].source == "the test split of torchvision:MNIST"
    assert len(images.find("images", part="train")) == len(files)


# Fit, evaluate


def opnp_says(*words: str, patch: pytest.MonkeyPatch) -> int | str:
    patch.setattr(sys, "argv", ["opnp", *words])
    with pytest.raises(SystemExit) as stop:
        app.main()
    return stop.value.code or 0


def test_a_detector_of_one_export(
    own: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fitted to a divided export and evaluated on it: as to, and on, the same images in folders."""
    for part, step in (("train", 20), ("validation", 10), ("test", 10)):
        found = images.find(own / "images" / part)
        parquet(
            copied(found.select(range(0, len(found), step)), Path("all", part)), f"e/{part}.parquet"
        )
    model = [
        *("--model", own_model.SPEC, "--weights", str(own / "weights.pt")),
        *("--preprocessing", str(own / "preprocessing.json"), "--clip", "none"),
        *("--classes", str(own / "classes.txt"), "--temperature", "1", "--json"),
        *("--weights-low", "0,30", "--weights-high", "0,2", "--neurons-low", "0"),
        *("--neurons-high", "0,5"),
    ]
    trust = ("--trust", own_model.SPEC)
    made, evaluated = [], []
    for spec in ("e", "all"):
        words = ["fit", *model, "--id-train", spec, "--id-val", spec, "--out", f"of-{spec}"]
        assert opnp_says(*words, patch=monkeypatch) == 0
        made.append(json.loads(capsys.readouterr().out))
        words = ["evaluate", "--detector", f"of-{spec}", *trust, "--id", spec, "--json", "e.json"]
        others = str(own / "images" / "others")
        assert opnp_says(*words, "--ood", f"digits={others}", patch=monkeypatch) == 0
        capsys.readouterr()
        evaluated.append(json.loads(Path("e.json").read_text()))
    for about, spec in zip(made, ("e", "all"), strict=True):
        assert about["made"]["train"]["source"] == f"the train split of {spec}"
        assert about["made"]["validation"]["source"] == f"the validation split of {spec}"
        assert about["made"]["validation"]["labels"] == "given"
    assert made[0]["threshold"] == pytest.approx(made[1]["threshold"])
    assert made[0]["mask"] == made[1]["mask"]
    assert evaluated[0]["id"]["source"] == "the test split of e"
    assert evaluated[0]["id"]["accuracy"] == evaluated[1]["id"]["accuracy"] > 80
    for metric in ("flagged", "fpr95", "auroc"):
        assert evaluated[0]["mean"][metric] == pytest.approx(evaluated[1]["mean"][metric])


# A fit that goes on


@pytest.mark.parametrize("kind", [parquet, manifest, idx, mnist], ids=lambda kind: kind.__name__)
def test_features_of_other_images_are_not_taken(
    kind: Kind, files: Files, own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit, "SHARD", 12)
    spec, encoded = kind(files), []
    encode = fit.Features.encode

    def counted(
        self: fit.Features, found: Images, part: Sequence[int], advance: Callable[[int], None]
    ) -> object:
        encoded.append(part)
        return encode(self, found, part, advance)

    monkeypatch.setattr(fit.Features, "encode", counted)

    def features() -> torch.Tensor:
        encoded.clear()
        backbone, cpu = own_model.backbone(own), torch.device("cpu")
        shards = fit.Features(Path("features"), backbone, cpu, own_model.QUICK)
        paths = shards.of_images("train", images.find(spec))
        return torch.cat([read_shard(path).features for path in paths])

    before = features()
    assert len(encoded) == -(-len(files) // 12)
    torch.testing.assert_close(features(), before)
    assert not encoded

    files[0].write_bytes(files[-1].read_bytes())
    kind(files)
    after = features()
    assert len(encoded) in (1, -(-len(files) // 12))
    torch.testing.assert_close(after[0], before[-1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(after[1:], before[1:], atol=1e-5, rtol=1e-5)


# What cannot be read, and mistakes


def test_rows_that_cannot_be_read_are_named_and_left_out(
    files: Files, detector: SavedDetector
) -> None:
    parquet(files)
    rows = pq.read_table("export/test.parquet")
    cut = rows.to_pylist()
    cut[3]["image"]["bytes"] = cut[3]["image"]["bytes"][:60]
    pq.write_table(pa.Table.from_pylist(cut, rows.schema), "export/test.parquet")
    summary = score.score(detector, images.find("export"), Path("scores.parquet"))
    assert summary.images == len(files) - 1
    assert summary.unreadable[0].startswith("export/test.parquet#3 is not a whole image")
    Path(files[2]).unlink()
    manifest([*files[:2], *files[3:]])
    with open("list.csv", "a") as file:
        file.write(f"{files[2]},zero\n")
    summary = score.score(detector, images.find("list.csv"), Path("scores.parquet"))
    [told] = summary.unreadable
    assert told.endswith(f"{files[2]} is missing: put it back, or leave it out.")


def test_a_table_of_scores_among_the_images_is_none_of_them(
    files: Files, detector: SavedDetector
) -> None:
    for _ in range(2):
        summary = score.score(detector, images.find("images"), Path("images/scores.parquet"))
        assert summary.images == len(files)


def test_names_that_are_not_utf_8_are_escaped(files: Files, detector: SavedDetector) -> None:
    odd = os.fsdecode(b"images/caf\xe9.png")
    shutil.copy2(files[0], odd)
    Path(os.fsdecode(b"images/cut\xe9.png")).write_bytes(files[0].read_bytes()[:60])
    summary = score.score(detector, images.find("images"), Path("scores.parquet"))
    assert "images/caf\\xe9.png" in pq.read_table("scores.parquet")["file"].to_pylist()
    [told] = summary.unreadable
    assert told.startswith("images/cut\\xe9.png is not a whole image")
    assert len(images.find(odd)) == 1


@pytest.mark.parametrize(
    "fault", [MemoryError(), RecursionError("deep"), struct.error("short"), OverflowError("long")]
)
def test_an_image_whose_decoder_fails_oddly_is_left_out(
    fault: Exception, files: Files, detector: SavedDetector, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = PngImageFile.load

    def odd(self: PngImageFile) -> object:
        if str(getattr(self.fp, "name", "")) == str(files[3]):
            raise fault
        return load(self)

    monkeypatch.setattr(PngImageFile, "load", odd)
    found = images.find("images")
    summary = score.score(detector, found, Path("scores.parquet"))
    assert (summary.images, len(summary.unreadable)) == (len(files) - 1, 1)
    assert summary.unreadable[0].startswith(f"{files[3]} is not a whole image")
    judged = score.judge(detector, found, 16, "images")
    assert (len(judged.rows), judged.unreadable) == (len(files) - 1, summary.unreadable)


def test_images_that_vanish_during_a_fit_are_left_out(
    own: Path, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = images.find(own / "images" / "train")
    validation, search = images.find("images"), fit.search

    def vanished(*given: Any) -> object:
        files[4].unlink()
        return search(*given)

    monkeypatch.setattr(fit, "search", vanished)
    made = fit.fit(
        own_model.backbone(own), train, validation, Path("features"), own_model.QUICK
    ).made
    assert made["unreadable"] == [f"{files[4]} is missing: put it back, or leave it out."]


def test_images_are_freed_before_the_next_are_decoded(
    files: Files, detector: SavedDetector, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a request, in a fetch, and in what `batches` gives to its threads."""
    alive: list[int] = []
    most = 0

    def counted(*given: Any, **options: Any) -> Image.Image:
        nonlocal most
        image = decoding.decode(*given, **options)
        alive.append(1)
        most = max(most, len(alive))
        weakref.finalize(image, alive.pop)
        return image

    monkeypatch.setattr(mlflow_model, "decode", counted)
    monkeypatch.setattr(splits, "decode", counted)
    request = pd.DataFrame({"image": [path.read_bytes() for path in files]})
    served = mlflow_model.Served(detector, mlflow_model.Limits())
    assert len(served.predict(request)) == len(files)
    assert most == 1
    examples = sources.open_ood("images", 8, 0)
    written = imagesets.write(Path("set.parquet"), "far", "images", examples, 8, "L", [])
    assert written.count == len(files)
    assert most == 1
    found = images.find("images")
    batches = found.batches(detector.backbone.preprocessing, range(len(found)), 4)
    assert sum(len(batch.rows) for batch in batches) == len(files)
    assert most <= images.DECODERS


# The same images


def same(kind: str, files: Files) -> str:
    """Those of `images`, by another path or in another way."""
    match kind:
        case "path":
            return "./images/"
        case "link":
            Path("link").symlink_to("images")
            return "link"
        case "copy":
            shutil.copytree("images", "copy")
        case "other names":
            for number, path in enumerate(files):
                place = Path("other names", path.parent.name, f"{number}.png")
                place.parent.mkdir(parents=True, exist_ok=True)
                os.link(path, place)
        case "parquet":
            return parquet(files)
        case "manifest":
            return manifest(files)
    return kind


@pytest.mark.parametrize("kind", ["path", "link", "copy", "other names", "parquet", "manifest"])
def test_training_images_are_no_validation_images(
    kind: str, own: Path, files: Files, tmp_path: Path
) -> None:
    train = images.find("images", part="train")
    validation = images.find(same(kind, files), part="validation")
    assert validation.also_in(train) == list(range(len(files)))
    with pytest.raises(InputError, match=f"^All {len(files)} validation images .* are training"):
        fit.fit(own_model.backbone(own), train, validation, tmp_path / "f", own_model.QUICK)
    assert not (tmp_path / "f").exists()


def test_images_in_both_are_counted(files: Files, caplog: pytest.LogCaptureFixture) -> None:
    some = [parquet(files[2:5]), same("copy", files[2:5])]
    shutil.rmtree("copy/zero")
    train, others = images.find(*some), images.find("images")
    expected = [row for row, path in enumerate(files) if row in (2, 3, 4)]
    assert expected
    assert images.find(some[0]).also_in(others) == [0, 1, 2]
    assert others.also_in(images.find(some[0])) == expected
    assert fit.check_apart(train, others) == len(others.also_in(train))
    assert f"of the {len(files)} validation images (images) are training images" in caplog.text
    caplog.clear()
    assert fit.check_apart(images.find(files[0]), images.find(*map(str, files[1:4]))) == 0
    assert not caplog.records


def test_an_evaluation_tells_of_id_images_among_ood_images(
    files: Files, detector: SavedDetector, caplog: pytest.LogCaptureFixture
) -> None:
    inside, parts = images.find("images"), images.find(*map(str, files[:3]), parquet(files[3:9]))
    with pytest.raises(InputError, match=r"^All 9 images of the OOD set same .* are ID images"):
        score.evaluate(detector, inside, {"same": parts})
    Image.effect_noise((8, 8), 50).save("noise.png")
    score.evaluate(detector, inside, {"mixed": images.find("noise.png", *map(str, files[:3]))})
    assert "3 of the 4 images of the OOD set mixed" in caplog.text


def test_rows_of_idx_files_are_compared(files: Files) -> None:
    first, second = images.find(idx(files[:6], "a")), images.find(idx(files[3:9], "b"))
    assert first.also_in(second) == [3, 4, 5]
    assert second.also_in(first) == [0, 1, 2]
    assert first.also_in(images.find("images")) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--id", "absent"), "--id absent is neither a file nor a folder, `torchvision:NAME` nor"),
        (("--id", "images", "--ood", "b=absent"), "--ood b absent is neither a file nor a folder"),
        (("--id", "torchvision:MNITS"), "did you mean `torchvision:MNIST`"),
        (("--id", "out.csv"), "Row 0 of out.csv is ../a.png, which leads out of"),
        (("--id", "links"), "links/a.png is a link that leads"),
        (("--id", "empty"), "empty holds no images, Parquet or IDX files"),
        (("--id", "broken.parquet"), "broken.parquet is not a whole Parquet file"),
        (("--id", "bare.csv"), "bare.csv has no column path: add it."),
    ],
)
def test_mistakes_are_told_in_a_sentence(
    words: tuple[str, ...], said: str, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("links", "empty"):
        Path(folder).mkdir()
    Path("links/a.png").symlink_to(files[0].absolute())
    Path("out.csv").write_text("path\n../a.png\n")
    Path("bare.csv").write_text("image\na.png\n")
    Path("broken.parquet").write_text("broken")
    given = ("evaluate", "--detector", ".", "--ood", "a=images")
    message = str(opnp_says(*given, *words, patch=monkeypatch))
    assert message.startswith("error: ")
    assert said in message
    assert "\n" not in message
    assert "params.yaml" not in message
