"""Whatever is read from disk: whole files round-trip, broken ones are refused by name."""

import gzip
import json
import pickle
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from opnp.backbones import encoding
from opnp.backbones import shards as shards_module
from opnp.backbones.backbone import Backbone, Classifier, build, load_backbone, save_backbone
from opnp.backbones.checkpoints import read_weights
from opnp.backbones.matching import load_state
from opnp.backbones.networks import NETWORKS
from opnp.backbones.shards import Encoded, Shard
from opnp.data import idx as formats
from opnp.data import imagesets, parquet, sources
from opnp.data.preprocessing import Preprocessing
from opnp.errors import InputError
from opnp.runtime.files import atomic, digest, read_json, write_json
from tests.conftest import HERE

Array = NDArray[Any]


def refused(read: Callable[[], Any], path: Path) -> bool:
    """Whether reading ends in an `InputError` that names the file; others pass through."""
    try:
        read()
    except InputError as error:
        return str(path) in str(error)
    return False


def flipped(data: bytes, position: int) -> bytes:
    return data[:position] + bytes([data[position] ^ 0x10]) + data[position + 1 :]


def names(folder: Path = Path()) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(autouse=True)
def _workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


# Atomic writes and JSON


def test_an_atomic_write_replaces_the_file_and_makes_its_folder() -> None:
    path = Path("new/folder/file.txt")
    for text in ("first", "second"):
        with atomic(path) as temporary:
            temporary.write_text(text)
        assert path.read_text() == text
    assert names(path.parent) == ["file.txt"]


def write_half(path: Path) -> None:
    with atomic(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError("half-way")


@pytest.mark.parametrize("existing", [True, False])
def test_an_exception_leaves_the_old_file_and_no_litter(existing: bool) -> None:
    path = Path("file.txt")
    if existing:
        path.write_text("old")
    with pytest.raises(RuntimeError, match="half-way"):
        write_half(path)
    assert names() == (["file.txt"] if existing else [])
    assert not existing or path.read_text() == "old"


def test_the_old_file_is_there_until_the_new_one_is_whole() -> None:
    path = Path("file.txt")
    path.write_text("old")
    with atomic(path) as temporary:
        temporary.write_text("half")
        assert path.read_text() == "old"


def test_json_round_trips_and_refuses_nan() -> None:
    path, value = Path("a/b.json"), {"x": [1, 2.5, None, "ρ"], "y": {"z": True}}
    write_json(path, value)
    assert read_json(path, "") == value
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"x": float("nan")})
    assert read_json(path, "") == value


@pytest.mark.parametrize("content", [None, b"", b'{"x": 1', b"\xff\xfe"])
def test_broken_json_is_refused_with_what_makes_it(content: bytes | None) -> None:
    path = Path("a.json")
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"a\.json is ") as error:
        read_json(path, "stage:search")
    assert error.value.about == "stage:search"


# Image sets


CLASSES = ["zero", "one", "two"]


def drawn_images(count: int, mode: str = "L") -> list[tuple[Image.Image, int]]:
    rng = np.random.default_rng(0)
    shape = (8, 8) if mode == "L" else (8, 8, 3)
    return [
        (Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)), row % len(CLASSES))
        for row in range(count)
    ]


def written(count: int = 7, mode: str = "L") -> Path:
    imagesets.write(
        HERE.images("set"),
        "train",
        "drawn",
        drawn_images(count, mode),
        8,
        mode,
        CLASSES,
    )
    return HERE.images("set")


@pytest.fixture
def _small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(imagesets, "ROW_GROUP", 3)


@pytest.mark.usefixtures("_small_groups")
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_any_rows_of_an_image_set_are_read_as_they_were_written(mode: str) -> None:
    path, examples = written(7, mode), drawn_images(7, mode)
    assert pq.ParquetFile(path).num_row_groups == 3
    images = np.stack([np.asarray(image).reshape(8, 8, -1) for image, _ in examples])
    for start in range(7):
        for stop in [*range(start + 1, 8), None]:
            found, labels = imagesets.read(path, mode, 8, start, stop)
            assert np.array_equal(found, images[start:stop])
            assert labels.tolist() == [label for _, label in examples[start:stop]]
    assert found.dtype == np.uint8
    assert labels.dtype == np.int64


def test_an_image_set_is_described_as_it_is() -> None:
    entry = imagesets.write(
        HERE.images("ood/a"),
        "near",
        "s",
        iter(drawn_images(9)),
        8,
        "L",
        CLASSES,
        limit=4,
    )
    assert (entry.role, entry.source, entry.count) == ("near", "s", 4)
    assert entry.classes == {"zero": 2, "one": 1, "two": 1}
    assert entry.sha256 == digest(Path("data/ood/a.parquet"))


def test_images_of_another_size_and_mode_are_fitted_when_written() -> None:
    wide = Image.new("RGB", (40, 20), (255, 0, 0))
    imagesets.write(HERE.images("set"), "far", "s", [(wide, -1)], 8, "L", [])
    found, labels = imagesets.read(HERE.images("set"), "L", 8)
    assert found.shape == (1, 8, 8, 1)
    assert np.unique(found).tolist() == [76]  # ITU-R 601 luma of pure red
    assert labels.tolist() == [-1]


def test_the_schema_says_image_and_class_label_to_hugging_face() -> None:
    metadata = pq.read_schema(written()).metadata
    described = json.loads(metadata[b"huggingface"])["info"]["features"]
    assert described["image"] == {"_type": "Image"}
    assert described["label"] == {"names": CLASSES, "_type": "ClassLabel"}
    assert parquet.class_names(HERE.images("set")) == CLASSES


def test_an_image_set_without_images_is_refused_and_leaves_no_file() -> None:
    with pytest.raises(InputError, match="set is empty"):
        imagesets.write(HERE.images("set"), "far", "s", [], 8, "L", [])
    assert names(Path("data")) == []


def test_a_truncated_parquet_file_is_refused_by_name() -> None:
    path = written(2)
    whole = path.read_bytes()
    for size in range(0, len(whole), 13):
        path.write_bytes(whole[:size])
        assert refused(lambda: imagesets.read(path, "L", 8), path), size


@pytest.mark.usefixtures("_small_groups")
def test_a_flipped_bit_of_a_parquet_file_is_refused_by_name_or_changes_nothing() -> None:
    path = written(4)
    whole, (images, labels) = path.read_bytes(), imagesets.read(path, "L", 8)
    harmful = 0
    for position in range(len(whole)):
        path.write_bytes(flipped(whole, position))
        if refused(lambda: imagesets.read(path, "L", 8), path):
            harmful += 1
            continue
        found = imagesets.read(path, "L", 8)
        assert np.array_equal(found[0], images), position
        assert np.array_equal(found[1], labels), position
    assert harmful > 500


def test_a_missing_parquet_file_is_refused_by_name() -> None:
    path = Path("data/absent.parquet")
    assert refused(lambda: imagesets.read(path, "L", 8), path)
    assert refused(lambda: parquet.class_names(path), path)


def test_more_rows_than_there_are_are_refused() -> None:
    path = written(5)
    with pytest.raises(InputError, match=rf"{path} holds 5 images.* 6"):
        imagesets.read(path, "L", 8, 2, 6)


FOREIGN = [
    {"label": [1, 2]},
    {"image": ["a", "b"], "label": [1, 2]},
    {"image": [{"bytes": b"", "path": ""}], "label": [1]},
    {"image": [{"bytes": b"not a PNG", "path": ""}], "label": [1]},
    {"image": [{"bytes": None, "path": "a.png"}], "label": [1]},
    {"image": [None], "label": [1]},
]


@pytest.mark.parametrize(
    "columns", FOREIGN, ids=["no image", "names", "empty", "no PNG", "path only", "null"]
)
def test_a_parquet_file_of_something_else_is_refused_by_name(columns: dict[str, Any]) -> None:
    path = Path("foreign.parquet")
    pq.write_table(pa.table(columns), path)
    assert refused(lambda: imagesets.read(path, "L", 8), path)
    assert refused(lambda: list(sources.open_ood(str(path), 8, seed=0)), path)
    assert refused(lambda: parquet.class_names(path), path)


def test_a_parquet_file_without_its_labels_is_refused_by_name() -> None:
    path = Path("foreign.parquet")
    pq.write_table(pq.read_table(written(2), columns=["image"]), path)
    assert refused(lambda: imagesets.read(path, "L", 8), path)


def test_a_damaged_parquet_file_is_refused_as_an_ood_source() -> None:
    path = Path("damaged.parquet")
    path.write_bytes(written(2).read_bytes()[:-9])
    assert refused(lambda: list(sources.open_ood(str(path), 8, seed=0)), path)


def test_a_parquet_file_is_an_ood_source_in_an_order_of_its_own() -> None:
    path = written(7)
    found = list(sources.open_ood(str(path), 8, seed=0))
    assert [label for _, label in found] == [-1] * 7
    expected = [image.tobytes() for image, _ in drawn_images(7)]
    assert sorted(image.tobytes() for image, _ in found) == sorted(expected)
    assert [image.tobytes() for image, _ in found] != expected


@pytest.mark.parametrize("spec", ["absent.parquet", "lettres", "absent/folder"])
def test_a_source_that_does_not_exist_is_refused_by_name(spec: str) -> None:
    with pytest.raises(InputError, match=spec):
        list(sources.open_ood(spec, 8, seed=0))
    with pytest.raises(InputError, match=spec):
        sources.open_id(spec)


# IDX files


def idx(array: NDArray[np.uint8]) -> bytes:
    sizes = struct.pack(f">{array.ndim}I", *array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes()


PIXELS = np.random.default_rng(0).integers(0, 256, (3, 2, 4), dtype=np.uint8)


@pytest.mark.parametrize("packed", [False, True])
def test_idx_files_are_read_plain_or_packed(packed: bool) -> None:
    path = Path("a-idx3-ubyte")
    if packed:
        Path("a-idx3-ubyte.gz").write_bytes(gzip.compress(idx(PIXELS)))
    else:
        path.write_bytes(idx(PIXELS))
    assert np.array_equal(formats.read_idx(path), PIXELS)


@pytest.mark.parametrize("packed", [False, True])
def test_a_truncated_idx_file_is_refused_by_name(packed: bool) -> None:
    path = Path("a-idx3-ubyte.gz" if packed else "a-idx3-ubyte")
    whole = gzip.compress(idx(PIXELS)) if packed else idx(PIXELS)
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        assert refused(lambda: formats.read_idx(Path("a-idx3-ubyte")), Path("a-idx3-ubyte")), size


@pytest.mark.parametrize(
    "content",
    [
        b"\1" + idx(PIXELS)[1:],
        idx(PIXELS)[:2] + b"\x0d" + idx(PIXELS)[3:],  # floats
        idx(PIXELS)[:3] + b"\0" + idx(PIXELS)[4:],
        idx(PIXELS) + b"\0",
        b"not an IDX file at all",
    ],
    ids=["magic", "type", "dimensions", "longer", "text"],
)
def test_an_idx_file_of_another_format_is_refused_by_name(content: bytes) -> None:
    path = Path("a-idx3-ubyte")
    path.write_bytes(content)
    assert refused(lambda: formats.read_idx(path), path)


def test_a_missing_idx_file_is_refused_by_name() -> None:
    assert refused(lambda: formats.read_idx(Path("absent")), Path("absent"))


def test_a_folder_of_idx_files_is_a_source_with_both_its_splits() -> None:
    for part, labels in (("train", [2, 0, 1]), ("t10k", [1, 2, 0])):
        Path(f"{part}-images-idx3-ubyte").write_bytes(idx(PIXELS))
        Path(f"{part}-labels-idx1-ubyte").write_bytes(idx(np.array(labels, np.uint8)))
    classes, splits = sources.open_id(".")
    assert classes == ["0", "1", "2"]
    assert [label for _, label in splits["train"].examples()] == [2, 0, 1]
    images = [np.asarray(image) for image, _ in splits["test"].examples()]
    assert np.array_equal(images, PIXELS)


def test_as_many_labels_as_images_are_needed() -> None:
    Path("t10k-images-idx3-ubyte").write_bytes(idx(PIXELS))
    Path("t10k-labels-idx1-ubyte").write_bytes(idx(np.array([1, 2], np.uint8)))
    with pytest.raises(InputError, match="3 t10k images but 2 labels"):
        list(sources.open_ood(".", 8, seed=0))


# Shards of features


FEATURES = HERE.features
ORIGIN = {"backbone": "abc", "images": "def", "dtype": "float32"}


def drawn_features(rows: int) -> Tensor:
    return torch.randn(rows, 3, generator=torch.Generator().manual_seed(0))


def write_split(count: int = 5, size: int = 2, dtype: str = "float32") -> list[Shard]:
    shards, everything = shards_module.divide("train", count, size), drawn_features(count)
    for shard in shards:
        labels = np.arange(shard.start, shard.stop, dtype=np.int64) % 3
        values = everything[shard.start : shard.stop]
        shards_module.write_shard(
            shard.path(FEATURES), shard, Encoded(values, labels), ORIGIN, dtype
        )
    return shards


def test_shards_cover_a_split_once_and_in_order() -> None:
    shards = shards_module.divide("test", 5, 2)
    assert [(s.index, s.start, s.stop, s.count) for s in shards] == [
        (0, 0, 2, 5), (1, 2, 4, 5), (2, 4, 5, 5)
    ]  # fmt: skip
    assert len({s.path(FEATURES) for s in shards}) == 3


@pytest.mark.parametrize("size", [1, 2, 5, 9])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_features_are_loaded_as_they_were_written(dtype: str, size: int) -> None:
    write_split(5, size, dtype)
    found, labels = shards_module.load(FEATURES / "train", ORIGIN)
    assert found.dtype == torch.float32
    expected = drawn_features(5)
    assert torch.equal(found, expected if dtype == "float32" else expected.half().float())
    assert labels.tolist() == [0, 1, 2, 0, 1]


def test_a_shard_is_whole_only_if_it_is_of_exactly_that_origin() -> None:
    shard = write_split()[1]
    path = shard.path(FEATURES)
    assert shards_module.is_whole(path, shard, ORIGIN)
    for key in ORIGIN:
        assert not shards_module.is_whole(path, shard, {**ORIGIN, key: "other"})
    assert not shards_module.is_whole(path, shard, {**ORIGIN, "seed": "0"})
    assert not shards_module.is_whole(path, replace(shard, start=1), ORIGIN)
    assert not shards_module.is_whole(path, replace(shard, count=9), ORIGIN)
    path.unlink()
    assert not shards_module.is_whole(path, shard, ORIGIN)


def test_a_flipped_bit_of_a_shard_is_refused_by_name_or_changes_nothing() -> None:
    path = write_split()[1].path(FEATURES)
    whole, (values, labels, *_) = path.read_bytes(), shards_module.read_shard(path)
    harmful = 0
    for position in range(len(whole)):
        path.unlink()  # a mapped file must not change under its readers
        path.write_bytes(flipped(whole, position))
        if refused(lambda: shards_module.read_shard(path), path):
            harmful += 1
            continue
        found = shards_module.read_shard(path)
        assert found[0].equal(values), position
        assert np.array_equal(found[1], labels), position
        assert found[1].dtype == labels.dtype, position
    assert harmful > 200


@pytest.mark.parametrize("values", [drawn_features(5), torch.zeros(5, 3)])
def test_a_flipped_feature_is_caught_by_the_checksum(values: Tensor) -> None:
    shard = Shard("train", 0, 0, 5, 5)
    path = shard.path(FEATURES)
    shards_module.write_shard(path, shard, Encoded(values, np.arange(5)), ORIGIN, "float32")
    whole, column = path.read_bytes(), values.numpy().tobytes()
    start = whole.index(column)
    path.unlink()
    path.write_bytes(flipped(whole, start + len(column) - 1))
    with pytest.raises(InputError, match=r"00000\.arrow is damaged \(its checksum differs\)"):
        shards_module.read_shard(path)


def test_a_truncated_shard_is_refused_by_name() -> None:
    path = write_split()[1].path(FEATURES)
    whole = path.read_bytes()
    for size in range(0, len(whole), 7):
        path.unlink()
        path.write_bytes(whole[:size])
        assert refused(lambda: shards_module.read_shard(path), path), size
        assert refused(lambda: shards_module.load(FEATURES / "train", ORIGIN), path), size


def test_an_arrow_file_of_something_else_is_refused_by_name() -> None:
    path, table = Path("foreign.arrow"), pa.table({"x": [1.0, 2.0]})
    with pa.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table)
    assert refused(lambda: shards_module.read_shard(path), path)


def test_features_of_another_backbone_are_refused_by_name() -> None:
    path = write_split()[0].path(FEATURES)
    with pytest.raises(InputError, match=f"{path} was made with another backbone"):
        shards_module.load(FEATURES / "train", {"backbone": "xyz"})


@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_split_that_lacks_a_shard_is_refused(index: int) -> None:
    write_split()[index].path(FEATURES).unlink()
    with pytest.raises(InputError, match=r"features.train"):
        shards_module.load(FEATURES / "train", ORIGIN)


def test_a_split_without_shards_is_refused() -> None:
    with pytest.raises(InputError, match=r"features/train holds no shards"):
        shards_module.load(FEATURES / "train", ORIGIN)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_features_that_are_not_finite_are_not_written_and_their_row_is_named(value: float) -> None:
    values, shard = drawn_features(5), Shard("test", 2, 40, 45, 45)
    path = shard.path(FEATURES)
    values[3, 1] = value
    with pytest.raises(InputError, match=r"of test hold NaN or infinite.*row 43"):
        shards_module.write_shard(path, shard, Encoded(values, np.arange(5)), ORIGIN, "float32")
    assert not path.exists()


@pytest.mark.filterwarnings("ignore:overflow")
def test_features_too_large_for_float16_are_not_written() -> None:
    values, shard = drawn_features(5), Shard("test", 0, 0, 5, 5)
    path = shard.path(FEATURES)
    values[2, 0] = 65520  # rounds to infinity
    with pytest.raises(InputError, match=r"as float16 \(first in row 2\).*or store float32"):
        shards_module.write_shard(path, shard, Encoded(values, np.arange(5)), ORIGIN, "float16")
    assert not path.exists()
    shards_module.write_shard(path, shard, Encoded(values, np.arange(5)), ORIGIN, "float32")


def test_an_encoder_that_gives_maps_is_refused() -> None:
    with pytest.raises(InputError, match=r"\(4, 2, 3, 3\)"):
        encoding.encode(torch.nn.Identity(), [torch.zeros(4, 2, 3, 3)], torch.device("cpu"))


# Backbones


PREPROCESSING = Preprocessing(8, "L", (0.25,), (0.5,))


def drawn_classifier(classes: int = 3, kind: str = "resnet") -> Classifier:
    torch.manual_seed(0)
    return build(kind, channels=1, classes=classes, width=2, depth=1, size=8)


def same_weights(one: Classifier, other: Classifier) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def saved(path: Path, kind: str = "resnet") -> Classifier:
    model = drawn_classifier(kind=kind)
    spec: dict[str, object] = {"name": kind, "width": 2, "depth": 1}
    save_backbone(path, Backbone(model, PREPROCESSING, CLASSES, spec))
    return model


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_backbone_is_loaded_as_it_was_saved(kind: str) -> None:
    path = Path("a/backbone.safetensors")
    model = saved(path, kind)
    backbone = load_backbone(path)
    found = backbone.classifier
    assert (backbone.preprocessing, backbone.classes) == (PREPROCESSING, CLASSES)
    assert backbone.spec == {"name": kind, "width": 2, "depth": 1}
    assert same_weights(found, model)
    assert not found.training
    images = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(found(images), model.eval()(images))


@pytest.mark.parametrize("content", [None, b"", b"text", "truncated", "no metadata"])
def test_a_file_that_is_no_whole_backbone_is_refused_by_name(content: bytes | str | None) -> None:
    path = Path("backbone.safetensors")
    saved(path)
    if content is None:
        path.unlink()
    elif content == "truncated":
        path.write_bytes(path.read_bytes()[:-1])
    elif content == "no metadata":
        save_file(load_file(path), path)
    else:
        path.write_bytes(content)  # type: ignore[arg-type]
    assert refused(lambda: load_backbone(path), path)


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth"])
def test_a_checkpoint_of_either_format_is_loaded(suffix: str, kind: str) -> None:
    trained, fresh = drawn_classifier(kind=kind), drawn_classifier(kind=kind)
    path = Path(f"checkpoint{suffix}")
    with torch.no_grad():
        trained.head.weight.add_(1)
    write_checkpoint(trained.state_dict(), path)
    load_weights(fresh, path)
    assert same_weights(fresh, trained)


def load_weights(model: nn.Module, path: Path) -> None:
    load_state(model, read_weights(path)[0], f"The weights in {path}")


def write_checkpoint(state: Any, path: Path) -> None:
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)


class Malicious:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("executed"),)


def test_code_in_a_checkpoint_is_refused_and_not_run() -> None:
    path, state = Path("checkpoint.pt"), drawn_classifier().state_dict()
    torch.save({**state, "head.bias": Malicious()}, path)
    assert refused(lambda: load_weights(drawn_classifier(), path), path)
    path.write_bytes(pickle.dumps(Malicious(), protocol=2))
    assert refused(lambda: load_weights(drawn_classifier(), path), path)
    assert not Path("executed").exists()


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"head.weight": torch.zeros(4, 8)}, "head.weight"),  # another number of classes
        ({"encoder.0.weight": torch.zeros(2, 3, 3, 3)}, "encoder.0.weight"),
        ({"head.bias": None}, "head.bias"),
        ({"fc.weight": torch.zeros(1)}, "fc.weight"),
    ],
    ids=["classes", "channels", "absent", "extra"],
)
def test_a_checkpoint_for_another_model_is_refused_by_file_and_tensor(
    change: dict[str, Tensor | None], named: str, suffix: str
) -> None:
    path, model = Path(f"checkpoint{suffix}"), drawn_classifier()
    changed = {**model.state_dict(), **change}
    write_checkpoint({name: x for name, x in changed.items() if x is not None}, path)
    with pytest.raises(InputError, match=rf"{path}.*`{named}`"):
        load_weights(model, path)
    assert same_weights(model, drawn_classifier())


@pytest.mark.parametrize(
    "content",
    [[1, 2], None, torch.zeros(3), {"head.bias": 3}],
    ids=["list", "none", "tensor", "number for a tensor"],
)
def test_a_checkpoint_that_holds_no_tensors_by_name_is_refused(content: Any) -> None:
    path = Path("checkpoint.pt")
    state = drawn_classifier().state_dict()
    torch.save({**state, **content} if isinstance(content, dict) else content, path)
    assert refused(lambda: load_weights(drawn_classifier(), path), path)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("keep", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_checkpoint_is_refused_by_name(suffix: str, keep: float) -> None:
    path = Path(f"checkpoint{suffix}")
    write_checkpoint(drawn_classifier().state_dict(), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep * len(whole))])
    assert refused(lambda: load_weights(drawn_classifier(), path), path)


@pytest.mark.parametrize("name", ["absent.pt", "absent.safetensors", "model.onnx"])
def test_a_missing_or_unknown_checkpoint_is_refused_by_name(name: str) -> None:
    Path("model.onnx").write_bytes(b"onnx")
    assert refused(lambda: load_weights(drawn_classifier(), Path(name)), Path(name))


@pytest.mark.parametrize(("name", "classes"), [("vgg", 3), ("resnet", 1)])
def test_a_backbone_that_cannot_be_built_is_refused(name: str, classes: int) -> None:
    with pytest.raises(InputError, match="vgg" if name == "vgg" else "2 classes"):
        build(name, channels=1, classes=classes, width=2, depth=1)


@pytest.mark.parametrize("kind", ["convnext", "vit"])
def test_images_too_small_for_a_backbone_are_refused(kind: str) -> None:
    with pytest.raises(InputError, match=f"'{kind}' needs images of at least 8 × 8 pixels, not 7"):
        build(kind, channels=1, classes=3, width=8, depth=1, size=7)


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("size", [8, 13, 28, 32])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_backbone_gives_features_for_images_of_any_size(
    kind: str, size: int, channels: int
) -> None:
    model = build(kind, channels, 3, width=8, depth=2, size=size).eval()
    images = torch.rand(2, channels, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert model.encoder(images).shape == (2, 32)
        assert model(images).shape == (2, 3)


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_checkpoint_of_another_backbone_is_refused(kind: str) -> None:
    path = Path("checkpoint.pt")
    other = {"resnet": "vit", "convnext": "resnet", "vit": "convnext"}[kind]
    write_checkpoint(drawn_classifier(kind=other).state_dict(), path)
    with pytest.raises(InputError, match=rf"{path} do not fit the model"):
        load_weights(drawn_classifier(kind=kind), path)
