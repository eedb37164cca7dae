"""Models of torchvision and timm are built as the libraries build them for published weights."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torchvision import models
from torchvision.models import WeightsEnum

from opnp.backbones import libraries
from opnp.backbones.backbone import build, from_spec, load_backbone, save_backbone
from opnp.data.preprocessing import Preprocessing
from opnp.errors import InputError

PREPROCESSING = Preprocessing(96, "RGB", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), resize=110)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def settings_of(model: nn.Module) -> dict[str, Any]:
    """Every number, word and flag in every module."""
    plain = (bool, int, float, str, tuple)
    return {
        name: (
            type(module).__name__,
            {k: v for k, v in vars(module).items() if isinstance(v, plain) and k != "training"},
        )
        for name, module in model.named_modules()
    }


# RegNets cannot be built on a meta device; the settings of one are enough.
NAMES = [n for n in models.list_models(module=models) if not n.startswith("regnet")]


QUICK = {"googlenet", "inception_v3", "mobilenet_v3_small", "mnasnet0_5", "swin_t", "vit_b_32"}
SWEEP = [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in NAMES]


@pytest.mark.parametrize("name", [*SWEEP, "regnet_y_400mf"])
def test_a_model_of_torchvision_has_the_settings_of_its_published_weights(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As torchvision's own builder sets them, which downloads the weights, if it may."""
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda *_, **__: {})
    with torch.device("cpu" if name.startswith("regnet") else "meta"):
        for weights in models.get_model_weights(name):
            with monkeypatch.context() as patch:
                patch.setattr(nn.Module, "load_state_dict", lambda *_, **__: None)
                theirs = models.get_model_builder(name)(weights=weights)
            size = weights.transforms().crop_size[0]
            options = libraries.assumed(f"torchvision:{name}", theirs.state_dict(), {}, None)
            ours = libraries.architecture(f"torchvision:{name}", 3, size, None, options)
            assert settings_of(ours) == settings_of(theirs)


def test_no_tag_of_timms_changes_how_a_model_is_built() -> None:
    """So that a file needs to name the model alone."""
    timm = pytest.importorskip("timm", reason="timm is not installed: pip install 'opnp[timm]'")
    for name in ("resnet18", "vit_tiny_patch16_224", "convnext_atto", "efficientnet_b0"):
        plain = libraries.architecture(f"timm:{name}", 3, 224, 1000, {})
        for tag in timm.list_pretrained(f"{name}.*"):
            tagged = libraries.architecture(f"timm:{tag}", 3, 224, 1000, {})
            assert settings_of(tagged) == settings_of(plain), tag


def googlenet(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = models.googlenet(num_classes=3, init_weights=False, **options)
    return model.eval()


@pytest.mark.parametrize("auxiliary", [True, False])
def test_a_model_trained_from_published_weights_computes_the_same(
    auxiliary: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """torchvision sets ``transform_input`` with them, and takes GoogLeNet's other heads away."""
    model = googlenet(transform_input=True, aux_logits=auxiliary)
    torch.save(model.state_dict(), "tuned.pth")
    found = from_spec("torchvision:googlenet", "tuned.pth", PREPROCESSING)
    images = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(found.classifier(images), model(images))
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    told = record.getMessage()
    assert "tuned.pth does not say whether its googlenet normalizes images once more" in told
    assert "torchvision:googlenet?transform_input=false" in told
    # What was assumed is kept with the weights, and not assumed again.
    assert found.spec == {
        "name": "torchvision:googlenet",
        "transform_input": True,
        "aux_logits": auxiliary,
    }
    caplog.clear()
    save_backbone(Path("saved.safetensors"), found)
    again = load_backbone(Path("saved.safetensors"))
    assert torch.equal(again.classifier(images), found.classifier(images))
    assert not caplog.records


def test_a_setting_that_the_user_states_is_taken(caplog: pytest.LogCaptureFixture) -> None:
    model = googlenet(transform_input=False, aux_logits=False)
    torch.save(model.state_dict(), "own.pth")
    spec = "torchvision:googlenet?transform_input=false"
    found = from_spec(spec, "own.pth", PREPROCESSING, list("abc"))
    images = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(found.classifier(images), model(images))
    assert not caplog.records
    save_backbone(Path("saved.safetensors"), found)
    for each in (spec, "torchvision:googlenet"):
        again = from_spec(each, "saved.safetensors")
        assert torch.equal(again.classifier(images), found.classifier(images))
    with pytest.raises(InputError, match=r"saved\.safetensors states the backbone"):
        from_spec("torchvision:googlenet?transform_input=true", "saved.safetensors")


def test_a_model_trained_here_is_built_as_the_library_builds_it() -> None:
    """Without weights there is nothing to be like."""
    model = build("torchvision:googlenet", 3, 3, size=96)
    assert vars(model.encoder.get_submodule("model"))["transform_input"] is False


def test_options_of_timms_models() -> None:
    pytest.importorskip("timm", reason="timm is not installed: pip install 'opnp[timm]'")
    own = libraries.architecture("timm:resnet10t", 3, 32, 4, {"global_pool": "max"}).eval()
    torch.save(own.state_dict(), "own.pt")
    small = Preprocessing(32, "RGB", (0.5,) * 3, (0.2,) * 3)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    found = from_spec("timm:resnet10t?global_pool=max", "own.pt", small)
    torch.testing.assert_close(found.classifier(images), own(images))
    save_backbone(Path("saved.safetensors"), found)
    again = load_backbone(Path("saved.safetensors"))
    assert again.spec == {"name": "timm:resnet10t", "global_pool": "max"}
    assert torch.equal(again.classifier(images), found.classifier(images))


@pytest.mark.parametrize(
    ("spec", "option"),
    [
        ("torchvision:resnet18", {"weights": "DEFAULT"}),
        ("torchvision:resnet18", {"weights": None}),
        ("torchvision:resnet18", {"pretrained": True}),
        ("torchvision:resnet18", {"norm_layer": "os.system"}),
        ("torchvision:resnet18", {"progress": {"a": 1}}),
        ("timm:resnet10t", {"pretrained": True}),
        ("timm:resnet10t", {"checkpoint_path": "elsewhere"}),
        ("timm:resnet10t", {"pretrained_cfg": "hf_hub:someone/model"}),
        ("timm:resnet10t", {"pretrained_cfg_overlay": 1}),
        ("timm:resnet10t", {"cache_dir": "elsewhere"}),
        ("timm:resnet10t", {"act_layer": "../elsewhere"}),
    ],
)
def test_no_option_decides_where_weights_come_from(spec: str, option: dict[str, Any]) -> None:
    if spec.startswith("timm"):
        pytest.importorskip("timm", reason="timm is not installed: pip install 'opnp[timm]'")
    [key] = option
    with pytest.raises(InputError, match=f"{spec} does not take the option {key}="):
        build(spec, 3, 4, size=32, **option)


def test_classes_of_the_same_name_are_told_apart() -> None:
    """ImageNet's names have two cranes, of which only their numbers are unlike."""
    timm = pytest.importorskip("timm", reason="timm is not installed: pip install 'opnp[timm]'")
    names = libraries.timm_classes(timm.get_pretrained_cfg("resnet18"))
    assert names is not None
    assert (names[134], names[517]) == ("crane (134)", "crane (517)")
    assert len(set(names)) == 1000
    for model in NAMES:
        for weights in models.get_model_weights(model):
            own = weights.meta["categories"]
            assert own is None or len(set(own)) == len(own)
