"""Bad input ends in one sentence, a non-zero exit code, and nothing written over."""

import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace as replaced
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from flows import pipeline as whole
from flows.evaluate import evaluate
from flows.features import features
from flows.fetch import fetch
from flows.report import report
from flows.search import search
from flows.sensitivity import sensitivity
from flows.train import train
from opnp.backbones.backbone import build, load_backbone, save_backbone
from opnp.data.imagesets import read_manifest
from opnp.errors import InputError
from opnp.pipeline import parameters
from opnp.runtime import tensors
from opnp.runtime.files import read_json, write_json
from tests.conftest import HERE, run_program, set_parameters
from tests.flows.test_pipeline import contents

Call = Callable[[object], str]


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def files(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*.*")}


def test_a_program_says_it_in_one_line_and_fails(workspace: Path) -> None:
    replace(workspace / "params.yaml", "max_accuracy_drop", "max_acuracy_drop")
    before = contents(workspace)
    done = run_program("python", "-m", "flows.pipeline", cwd=workspace)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.strip().count("\n") == 0
    assert "`search.max_acuracy_drop`" in done.stderr
    assert "`search.max_accuracy_drop`" in done.stderr
    assert contents(workspace) == before


@pytest.mark.parametrize(
    ("name", "value", "named"),
    [
        ("train.epochs", "many", "train.epochs"),
        ("train.spcp", 100, "`train.spcp`"),
        ("search.weights_low", [0, 98], "`search.weights_low` 98"),
        ("search.clip", [80, 90], "`search.clip` must begin with no clipping"),
        ("search.outliers", {"more": "letters"}, "more is letters, which is a test set"),
        ("search.outliers", {"more": "digits"}, "more is digits, which is a test set"),
        ("search.outliers", {"blobs": "digits"}, "blobs is a proxy's name"),
        ("search.outliers", {"more": "leters"}, "leters"),
        ("evaluate.detectors", ["opnp", "oddin"], "no detector 'oddin'; did you mean odin?"),
        ("evaluate.budget", 0, "`evaluate.budget`"),
        ("data.held_out", [7, 8, 12], "data.held_out"),
        ("data.held_out", [1, 2, 3, 4, 5, 6, 7, 8, 9], "at least 2"),
        ("data.far", {"letters": "leters"}, "leters"),
        ("data.id", "/nowhere", "/nowhere"),
    ],
)
def test_parameters(workspace: Path, call: Call, name: str, value: Any, named: str) -> None:
    set_parameters(workspace, {name: value})
    before = contents(workspace), files(workspace / "data")
    message = call(fetch)
    assert named in message
    assert "\n" not in message
    assert (contents(workspace), files(workspace / "data")) == before


def test_missing_data(workspace: Path, call: Call) -> None:
    (workspace / "data/validation.parquet").unlink()
    assert "data/validation.parquet is missing" in call(train)


def test_truncated_data(workspace: Path, call: Call) -> None:
    path = workspace / "data/train.parquet"
    os.truncate(path, path.stat().st_size // 2)
    assert "data/train.parquet is damaged" in call(train)


def test_empty_split(workspace: Path, call: Call) -> None:
    path = workspace / "data/train.parquet"
    pq.write_table(pq.read_table(path).slice(0, 0), path)
    before = contents(workspace)
    assert "data/train.parquet holds no images" in call(train)
    assert contents(workspace) == before


def test_checkpoint_of_another_shape(workspace: Path, call: Call) -> None:
    other = build("resnet", 1, 7, width=16)
    torch.save(other.state_dict(), workspace / "other.pt")
    set_parameters(workspace, {"train.checkpoint": "other.pt"})
    message = call(train)
    assert re.search(r"The weights in .*/other\.pt do not fit the model", message)
    assert "(16, 1, 3, 3)" in message


def test_checkpoint_with_another_class_count(workspace: Path, call: Call) -> None:
    other = build("resnet", 1, 10)
    save_file(other.state_dict(), workspace / "ten.safetensors")
    set_parameters(workspace, {"train.checkpoint": "ten.safetensors"})
    message = call(train)
    assert "`head.weight` is (10, 128) in the weights and (7, 128) in the model" in message


def test_truncated_checkpoint(workspace: Path, call: Call) -> None:
    other = build("resnet", 1, 7)
    torch.save(other.state_dict(), workspace / "cut.pt")
    os.truncate(workspace / "cut.pt", 5000)
    set_parameters(workspace, {"train.checkpoint": "cut.pt"})
    assert "cut.pt cannot be read" in call(train)


def test_a_good_checkpoint_is_taken_as_it_is(workspace: Path, prefect_api: str) -> None:
    state = load_file(workspace / HERE.backbone)
    torch.save(state, workspace / "good.pt")
    set_parameters(workspace, {"train.checkpoint": "good.pt"})
    (workspace / HERE.backbone).unlink()
    train(HERE, parameters.load())
    loaded = load_file(workspace / HERE.backbone)
    assert all(torch.equal(loaded[name], state[name]) for name in state)


def test_data_with_other_classes_than_the_backbone(workspace: Path, call: Call) -> None:
    replace(workspace / HERE.manifest, '    "6"\n', '    "six"\n')
    assert "python -m flows.train" in call(features)


def test_features_that_are_not_finite(workspace: Path, call: Call) -> None:
    path = workspace / HERE.backbone
    state, metadata = tensors.load(path)
    state["encoder.0.weight"][0] = float("inf")
    tensors.save(path, state, metadata)
    message = call(features)
    assert "NaN or infinite" in message
    assert "train" in message


def test_missing_truncated_and_foreign_shards(workspace: Path, call: Call) -> None:
    path = workspace / "artifacts/features/train/00001.arrow"
    whole = path.read_bytes()
    path.unlink()
    assert re.search(r"Rows 256 to 512 before shard .*/train/00002.arrow are", call(sensitivity))
    path.write_bytes(whole[: len(whole) // 2])
    assert "train/00001.arrow is damaged" in call(sensitivity)
    path.write_bytes(whole[:3000] + bytes([whole[3000] ^ 1]) + whole[3001:])
    assert "train/00001.arrow is damaged (its checksum differs)" in call(sensitivity)
    with pa.ipc.open_file(pa.BufferReader(whole)) as reader:
        table = reader.read_all()
    foreign = {**table.schema.metadata, b"backbone": b"another"}
    with pa.ipc.new_file(path, table.schema.with_metadata(foreign)) as writer:
        writer.write_table(table.replace_schema_metadata(foreign))
    assert "train/00001.arrow was made with another backbone" in call(sensitivity)


def test_a_search_of_another_backbone(workspace: Path, call: Call) -> None:
    before = (workspace / HERE.metrics).read_bytes()
    found = read_json(HERE.search)
    write_json(HERE.search, found | {"backbone": "another"})
    assert "search.json was made with another backbone: run `python -m" in call(evaluate)
    (workspace / HERE.search).write_text("{")
    assert "search.json" in call(evaluate)
    assert (workspace / HERE.metrics).read_bytes() == before


def test_a_search_of_other_parameters(workspace: Path, call: Call) -> None:
    set_parameters(workspace, {"search.neurons_high": [0, 5]})
    message = call(evaluate)
    assert "search.json was made with other parameters of the search: run `python -m" in message


def test_a_sensitivity_of_another_backbone(workspace: Path, call: Call) -> None:
    path = workspace / HERE.sensitivity
    found, metadata = tensors.load(path)
    tensors.save(path, found, {**metadata, "backbone": "another"})
    assert "sensitivity.safetensors was made with another backbone" in call(search)


def test_a_sensitivity_of_another_clip_or_temperature(workspace: Path, call: Call) -> None:
    set_parameters(workspace, {"search.temperature": [5.0]})
    message = call(search)
    assert "was made with other clips or temperatures" in message
    assert "run `python -m flows.sensitivity`" in message
    set_parameters(workspace, {"search.temperature": [1.0], "search.clip": [None, 80]})
    message = call(search)
    assert "clips.json was made with other percentiles to clip at: run `python" in message


def test_clips_that_are_not_those_of_the_sensitivity(workspace: Path, call: Call) -> None:
    write_json(HERE.clips, {"90.0": 0.5})
    assert "was made with other clips or temperatures" in call(search)
    (workspace / HERE.clips).write_text("{")
    assert "clips.json" in call(search)
    (workspace / HERE.clips).unlink()
    assert "run `python -m flows.sensitivity`" in call(search)


@pytest.mark.parametrize("lacking", ["a tensor", "counts", "everything"])
def test_a_sensitivity_that_is_not_whole(workspace: Path, call: Call, lacking: str) -> None:
    path = workspace / HERE.sensitivity
    found, metadata = tensors.load(path)
    if lacking == "a tensor":
        del found["1/0/weights"]
    elif lacking == "counts":
        del metadata["counts"]
    if lacking == "everything":
        os.truncate(path, 100)
    else:
        tensors.save(path, found, metadata)
    message = call(search)
    assert "sensitivity.safetensors" in message
    assert "run `python -m flows.sensitivity`" in message


def test_an_image_that_is_none(workspace: Path, call: Call) -> None:
    path = workspace / "data/validation.parquet"
    table = pq.read_table(path)
    rows = table.to_pylist()
    rows[3]["image"]["bytes"] = b"no image"
    pq.write_table(pa.Table.from_pylist(rows, table.schema), path)
    assert re.search(r"Image 3 of .*/data/validation.parquet is not a whole", call(train))


def photographs(path: Path, count: int, bad: set[int]) -> None:
    """A Parquet file of JPEGs of noise, some of them cut off in the middle."""
    rng = np.random.default_rng(0)
    rows = []
    for index in range(count):
        buffer = BytesIO()
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(buffer, "JPEG")
        data = buffer.getvalue()
        rows.append({"image": {"bytes": data[: len(data) // 2] if index in bad else data}})
    pq.write_table(pa.Table.from_pylist(rows), path)


def test_a_few_images_that_cannot_be_read_are_left_out_and_named(
    workspace: Path, prefect_api: str, call: Call, caplog: pytest.LogCaptureFixture
) -> None:
    photographs(workspace / "mine.parquet", 300, {7, 123})
    others = {"letters": "letters", "mine": "mine.parquet"}
    set_parameters(workspace, {"data.far": others, "data.max_unreadable": 2})
    fetch(HERE, parameters.load())
    entry = read_manifest(HERE.data).sets["ood/mine"]
    assert entry.count == 298
    assert sorted(entry.unreadable) == ["mine.parquet#123", "mine.parquet#7"]
    assert read_manifest(HERE.data).sets["ood/letters"].unreadable == []
    assert "2 image(s) of mine.parquet cannot be read and are left out" in caplog.text
    before = files(workspace / "data")
    set_parameters(workspace, {"data.max_unreadable": 1})
    message = call(fetch)
    assert "2 images cannot be read, more than the 1 that may be left out" in message
    assert files(workspace / "data") == before
    set_parameters(workspace, {"data.max_unreadable": 0})
    message = call(fetch)  # images of an OOD set are read in an order of their own
    assert re.search(r"mine.parquet#(7|123) is not a whole image", message)


def test_a_bad_image_of_the_training_set_is_left_out(workspace: Path, prefect_api: str) -> None:
    folder = workspace / "mine"
    folder.mkdir()
    table = pq.read_table(workspace / "data/train.parquet")
    rows = table.to_pylist()
    rows[3]["image"]["bytes"] = rows[3]["image"]["bytes"][:50]
    pq.write_table(pa.Table.from_pylist(rows, table.schema), folder / "train.parquet")
    shutil.copy2(workspace / "data/test.parquet", folder / "test.parquet")
    set_parameters(workspace, {"data.id": "mine", "data.held_out": [6]})
    fetch(HERE, parameters.load())
    sets = read_manifest(HERE.data).sets
    assert sets["train"].unreadable == ["mine/train.parquet#3"]
    known = sum(row["label"] != 6 for index, row in enumerate(rows) if index != 3)
    assert sets["train"].count + sets["validation"].count == known


def test_data_fetched_with_other_parameters(workspace: Path, call: Call) -> None:
    """As `dvc exp run -S data.ood_count=50` would otherwise go on with the data that are there."""
    set_parameters(workspace, {"data.ood_count": 50})
    before = contents(workspace)
    for flow in (train, features, search, evaluate, report):
        assert "data was made with other data parameters" in call(flow)
    assert contents(workspace) == before


def test_features_of_other_images(workspace: Path, call: Call) -> None:
    manifest = workspace / HERE.manifest
    sha256 = read_manifest(HERE.data).sets["train"].sha256
    replace(manifest, sha256, "0" * 64)
    assert "train/00000.arrow was made with another images" in call(sensitivity)


def test_a_source_that_fetch_would_remove(workspace: Path, call: Call) -> None:
    mine = workspace / "data" / "mine.parquet"
    shutil.copy2(workspace / "data/test.parquet", mine)
    set_parameters(workspace, {"data.far": {"letters": "data/mine.parquet"}})
    assert "data/mine.parquet lies in" in call(fetch)
    assert mine.is_file()


def test_outliers_that_are_no_longer_what_they_were(
    workspace: Path, prefect_api: str, call: Call
) -> None:
    shutil.copy2(workspace / "data/ood/letters.parquet", "mine.parquet")
    set_parameters(workspace, {"search.outliers": {"mine": "mine.parquet"}})
    fetch(HERE, parameters.load())
    before = files(workspace / "data")
    shutil.copy2(workspace / "data/ood/noise.parquet", "mine.parquet")
    assert "data/outliers/mine.parquet has SHA-256" in call(fetch)
    assert files(workspace / "data") == before
    shutil.copy2(workspace / "data/test.parquet", "mine.parquet")
    os.truncate("mine.parquet", 1000)
    assert "mine.parquet" in call(fetch)
    assert files(workspace / "data") == before
    os.truncate(workspace / "data/outliers/mine.parquet", 1000)
    assert "data/outliers/mine.parquet is damaged" in call(features)


def test_labels_out_of_range(workspace: Path, call: Call) -> None:
    folder = workspace / "mine"
    folder.mkdir()
    table = pq.read_table(workspace / "data/train.parquet")
    pq.write_table(table, folder / "train.parquet")
    labels = pa.array([9, *table["label"].to_pylist()[1:]], pa.int64())
    pq.write_table(table.set_column(1, table.schema.field(1), labels), folder / "test.parquet")
    set_parameters(workspace, {"data.id": "mine", "data.held_out": [6]})
    assert "Image 0 of the test split of mine has label 9" in call(fetch)


def test_a_checkpoint_of_other_classes(workspace: Path, call: Call) -> None:
    backbone = load_backbone(workspace / HERE.backbone)
    path = workspace / "reversed.safetensors"
    save_backbone(path, replaced(backbone, classes=backbone.classes[::-1]))
    set_parameters(workspace, {"train.checkpoint": "reversed.safetensors"})
    assert "states the classes ['6', '5', '4', '3', '2', '1', '0'], not ['0', '1'" in call(train)


def test_a_prefect_server_that_is_not_there(workspace: Path) -> None:
    done = run_program(
        "python",
        "-m",
        "flows.train",
        cwd=workspace,
        env={"PREFECT_API_URL": "http://127.0.0.1:9/api"},
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: No Prefect server answers at http://127.0.0.1:9/api")


def test_parameters_changed_during_a_run_are_not_recorded(
    workspace: Path, prefect_api: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = parameters.load()
    set_parameters(workspace, {"train.epochs": 14})
    lock = (workspace / "dvc.lock").read_bytes()
    (workspace / HERE.report).unlink()
    monkeypatch.setattr(whole, "outdated", lambda _, stage, chosen: stage == "report")
    with pytest.raises(InputError, match=r"params\.yaml was changed during the run"):
        whole.run_stages(HERE, chosen)
    assert (workspace / "dvc.lock").read_bytes() == lock
