"""Files of weights as people have them: read, and put into a model, or refused in a sentence."""

import argparse
import collections
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision import models

from opnp.backbones.backbone import Backbone, from_spec
from opnp.backbones.checkpoints import file_of, read_weights
from opnp.backbones.matching import align, load_state
from opnp.data.preprocessing import Preprocessing
from opnp.errors import InputError

SMALL = Preprocessing(8, "RGB", (0.5,) * 3, (0.2,) * 3)
SPEC = "tests.backbones.test_checkpoints:Net"


class Net(nn.Module):
    """A user's model."""

    def __init__(self, num_classes: int = 4, width: int = 6):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.AdaptiveAvgPool2d(1)
        )
        self.fc = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.features(x).flatten(1))
        return logits


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def trained(**options: Any) -> Net:
    torch.manual_seed(1)
    net = Net(**options)
    statistics = net.features[1]
    assert isinstance(statistics, nn.BatchNorm2d)
    nn.init.uniform_(statistics.running_mean, -1, 1)  # type: ignore[arg-type]
    nn.init.uniform_(statistics.running_var, 0.5, 2)  # type: ignore[arg-type]
    return net.eval()


def images() -> Tensor:
    return torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(2))


def loaded(weights: str | Path) -> Backbone:
    return from_spec(SPEC, weights, SMALL)


def same(found: Backbone, net: nn.Module) -> bool:
    return torch.allclose(found.classifier(images()), net(images()), atol=1e-6)


def state(prefix: str = "") -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in trained().state_dict().items()}


def infixed() -> dict[str, Tensor]:
    """As the ImageNet example of torch names what it parallelizes in part, and then compiles."""
    return {
        f"module._orig_mod.{name.replace('features.', 'features.module.')}": tensor
        for name, tensor in state().items()
    }


EMA = {"model": state("module."), "model_ema": state("module.")}

FILES: dict[str, Any] = {
    "plain.pt": state(),
    "ordered.pth": collections.OrderedDict(state()),
    "ddp.pt": state("module."),
    "compiled.th": state("_orig_mod."),
    "both.pt": state("module._orig_mod."),
    "either.pt": state("_orig_mod.module."),
    "infixed.pt": infixed(),
    "fsdp.pt": state("_fsdp_wrapped_module._checkpoint_wrapped_module."),
    "lightning.ckpt": {"epoch": 3, "state_dict": state("model."), "hyper_parameters": {"lr": 0.1}},
    "compiled-lightning.ckpt": {"state_dict": state("model._orig_mod.")},
    "backbone.ckpt": {"state_dict": state("backbone.")},
    "deep.ckpt": {"state_dict": state("net.encoder.model.")},
    "imagenet-example.pth.tar": {"state_dict": state("module."), "best_acc1": torch.tensor(0.9)},
    "tutorial.pt": {
        "epoch": 3,
        "model_state_dict": state(),
        "optimizer_state_dict": {"state": {0: {"step": torch.tensor(2.0)}}, "param_groups": []},
        "loss": torch.tensor(0.1),
    },
    "deepspeed.pt": {"module": state(), "buffer_names": ["a"]},
    "twice.pth": {"model": {"state_dict": state("module.")}},
    "average.pt": {"n_averaged": torch.tensor(3), **state("module.")},
    "with-average.pth": EMA,
    "noted.pt": {**state(), "epoch": 3, "date": "today"},
    "pytorch_model.bin": state(),
    "no-suffix": state(),
    "odd.weights": state(),
    "half.pt": {k: t.half() if t.is_floating_point() else t for k, t in state().items()},
    "bfloat16.pt": {k: t.bfloat16() if t.is_floating_point() else t for k, t in state().items()},
    "double.pt": {k: t.double() for k, t in state().items()},  # the counter, too
    "counters.pt": {k: t for k, t in state().items() if "num_batches" not in k},
    "some-counters.pt": {k: t for k, t in state("module.").items() if "num_batches" not in k},
    "sparse.pt": {k: t.to_sparse() if k == "fc.weight" else t for k, t in state().items()},
    "parameters.pt": {k: nn.Parameter(t, False) for k, t in state().items()},
}


@pytest.mark.parametrize("name", FILES)
def test_weights_are_found_however_they_were_saved(name: str) -> None:
    torch.save(FILES[name], name)
    low = "half" in name or "bfloat16" in name
    found = loaded(name if "." in name else Path(name))
    assert found.classifier.head.weight.dtype == torch.float32
    if low:
        torch.testing.assert_close(
            found.classifier(images()), trained()(images()), atol=0.02, rtol=0.02
        )
    else:
        assert same(found, trained())
    assert found.classes == ["0", "1", "2", "3"]  # as many as the file has


@pytest.mark.parametrize("name", ["plain.pt", "lightning.ckpt", "tutorial.pt"])
def test_files_from_before_torch_1_6(name: str) -> None:
    torch.save(FILES[name], name, _use_new_zipfile_serialization=False)
    assert same(loaded(name), trained())


@pytest.mark.parametrize("name", ["mine.safetensors", "pytorch_model.bin", "mine.pt"])
def test_a_file_is_known_by_its_content(name: str) -> None:
    """Whatever its suffix says."""
    save_file(state("model."), name)
    assert same(loaded(name), trained())
    torch.save(state(), "mine.safetensors")
    assert same(loaded("mine.safetensors"), trained())


def test_a_part_of_a_file_is_named_after_a_hash() -> None:
    better = {name: tensor + 1 for name, tensor in state("module.").items()}
    torch.save({**EMA, "model_ema": better}, "ema.pth")
    torch.save({"student": state(), "teacher": better}, "two.pt")
    torch.save({"state_dict": {**state("student."), **state("projector.")}}, "parts.ckpt")
    torch.save(state(), "odd#name.pt")
    assert same(loaded("ema.pth"), trained())
    expected = trained()
    load_state(expected, better, "")
    for weights in ("ema.pth#model_ema", Path("ema.pth#model_ema"), "two.pt#teacher"):
        assert same(loaded(weights), expected)
    for weights in ("ema.pth#model", "two.pt#student", "parts.ckpt#student", "odd#name.pt"):
        assert same(loaded(weights), trained())
    assert file_of("ema.pth#model_ema") == Path("ema.pth")
    assert file_of("absent.ckpt#ema") == Path("absent.ckpt")
    assert file_of("a1_in1k") is None


class Config:
    """What a user keeps beside the weights, of a class that is only code of the user's."""

    made: list[str] = []

    def __init__(self, rate: float):
        self.rate = rate

    def __setstate__(self, values: dict[str, Any]) -> None:
        self.made.append("run")


class Malicious:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return Path.touch, (Path("touched"),)  # type: ignore[return-value]


@pytest.mark.parametrize("old", [True, False])
def test_what_lies_beside_the_weights_is_not_read(old: bool) -> None:
    """Objects of classes that torch does not know, and which only running code could make."""
    beside = {
        "args": argparse.Namespace(lr=0.1),
        "config": Config(0.1),
        "folder": Path("x"),
        "best": np.float64(0.9),
        "evil": Malicious(),
    }
    torch.save({"model": state(), **beside}, "mine.pth", _use_new_zipfile_serialization=not old)
    assert same(loaded("mine.pth"), trained())
    assert not Config.made
    assert not Path("touched").exists()


@pytest.mark.parametrize("old", [True, False])
@pytest.mark.parametrize("where", ["", "model", "ema"])
def test_a_pickled_module_is_named_with_what_to_save_instead(where: str, old: bool) -> None:
    content = {where: trained(), "epoch": 3} if where else trained()
    torch.save(content, "whole.pt", _use_new_zipfile_serialization=not old)
    place = f" under `{where}`" if where and not old else ""
    with pytest.raises(InputError) as error:
        loaded("whole.pt")
    assert str(error.value) == (
        f"whole.pt holds a pickled {SPEC.replace(':', '.')}{place}, which cannot be read without "
        "running code: load it where you made it, and save its `state_dict()`."
    )


def test_pickled_code_is_never_run() -> None:
    for name, content in (("a.pt", Malicious()), ("b.pt", {"state_dict": Malicious()})):
        torch.save(content, name)
        with pytest.raises(InputError, match=r"\.pt "):
            loaded(name)
    Path("c.pt").write_bytes(pickle.dumps(Malicious()))
    with pytest.raises(InputError, match=r"c\.pt cannot be read"):
        loaded("c.pt")

    class System:
        def __reduce__(self) -> Any:
            return eval, ("open('touched', 'w')",)

    torch.save({"model": state(), "x": System()}, "d.pt")
    assert same(loaded("d.pt"), trained())
    assert not Path("touched").exists()


def scripted() -> bytes:
    torch.jit.script(nn.Linear(2, 2)).save("scripted")
    return Path("scripted").read_bytes()


# Nothing taken for something


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({}, "holds no weights."),
        ({"epoch": 3, "state_dict": {}}, "holds no weights, its `state_dict` is empty."),
        ({"model": {"state_dict": {}}, "epoch": 1}, "holds no weights, but `model` and `epoch`."),
        ({"state_dict": {"epoch": 3}}, "holds no weights, but `state_dict`."),
        ({"a": 1, "b": 2, "c": 3, "d": 4}, "holds no weights, but `a`, `b`, `c` and 1 more."),
        ({0: torch.ones(2)}, "holds no weights, but `0`."),
        ([torch.ones(2)], "holds a list, not a state dict: save `model.state_dict()`."),
        (torch.ones(2), "holds a Tensor, not a state dict: save `model.state_dict()`."),
        (
            {name: tensor.numpy() for name, tensor in state().items()},
            "holds NumPy's numbers under `features.0.weight`, not tensors: save",
        ),
        (
            {"optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}, "epoch": 1},
            "holds no weights, but `optimizer` and `epoch`.",
        ),
        (
            {"model_ema": state(), "epoch": 3},
            "holds weights under `model_ema`: name those you want, such as mine.pt#model_ema.",
        ),
        (
            {"generator": state(), "critic": state(), "loss": torch.ones(())},
            "under `generator` and `critic`: name those you want, such as mine.pt#generator.",
        ),
        ({"model": state(), "net": state()}, "holds weights under `model` and `net`: name those"),
        (
            {**state(), "fc.weight": torch.empty(4, 6, device="meta")},
            "`fc.weight` in mine.pt has no data (a meta tensor): save the weights themselves.",
        ),
        (
            {
                **state(),
                "fc.weight": torch.quantize_per_tensor(torch.ones(4, 6), 1, 0, torch.qint8),
            },
            "`fc.weight` in mine.pt is quantized",
        ),
    ],
)
def test_a_file_without_the_weights_is_refused(content: Any, said: str) -> None:
    torch.save(content, "mine.pt")
    with pytest.raises(InputError) as error:
        loaded("mine.pt")
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_weights_that_hold_themselves_are_refused() -> None:
    content: dict[str, Any] = {"w": torch.ones(2)}
    content["model"] = content
    torch.save(content, "mine.pt")
    with pytest.raises(InputError, match="holds weights under `model`"):
        loaded("mine.pt")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "The file of weights mine.pt does not exist."),
        (b"", "mine.pt is not a file of weights: it is empty."),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a pointer of Git LFS"),
        (b"<!DOCTYPE html><html>404</html>", "it is a web page"),
        (b"\x89HDF\r\n\x1a\n of Keras", "it is neither safetensors nor written by torch.save."),
        (b"PK\x03\x04 and nothing else", "mine.pt cannot be read without running code, or is dam"),
        (b'\x08\0\0\0\0\0\0\0{"a": 1', "mine.pt is damaged"),
    ],
)
def test_what_is_not_a_file_of_weights(content: bytes | None, said: str) -> None:
    if content is not None:
        Path("mine.pt").write_bytes(content)
    with pytest.raises(InputError, match=r"mine\.pt") as error:
        loaded("mine.pt")
    assert said in str(error.value)
    assert error.value.about == "weights" or "damaged" in said or "cannot be read" in said


def test_folders_programs_and_cut_files() -> None:
    Path("folder.pt").mkdir()
    with pytest.raises(InputError, match=r"folder\.pt is a folder, not a file of weights"):
        loaded("folder.pt")
    Path("program.pt").write_bytes(scripted())
    with pytest.raises(InputError, match=r"program\.pt holds a TorchScript program, not weights"):
        loaded("program.pt")
    torch.save(state(), "cut.pt")
    Path("cut.pt").write_bytes(Path("cut.pt").read_bytes()[:700])
    with pytest.raises(InputError, match=r"cut\.pt cannot be read .*or is damaged"):
        loaded("cut.pt")
    with pytest.raises(InputError, match="name of the weights is empty"):
        loaded("")


def without(*parts: str) -> dict[str, Tensor]:
    return {k: t for k, t in state().items() if not any(part in k for part in parts)}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (without("fc.bias"), "(`fc.bias` is missing)"),
        (without("features"), "(`features.0.weight` is missing; `features.0.bias` is missing; "
         "`features.1.weight` is missing, and 3 more)"),
        ({**state(), "more.weight": torch.ones(2)}, "(the model has no `more.weight`)"),
        (
            {**state("module."), "module.fc.weight": torch.ones(4, 7)},
            "(`fc.weight` is (4, 7) in the weights and (4, 6) in the model)",
        ),
        (
            {**state("model."), "criterion.weight": torch.ones(4)},
            "(those under `model.` do, but not all: end the file's name in #model)",
        ),
        ({"a": torch.ones(2)}, "(they are named like `a`, the model's like `features.0.weight`)"),
        (
            {**state(), "features.0.weight": torch.ones(6, 3, 3, 3, dtype=torch.int8)},
            "(`features.0.weight` is int8, not floating point)",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_told_by_name_and_shape(content: dict[str, Tensor], said: str) -> None:
    torch.save(content, "mine.pt")
    with pytest.raises(InputError) as error:
        from_spec(SPEC, "mine.pt", SMALL, 4)
    assert f"The weights in mine.pt do not fit the model {said}." == str(error.value)
    assert error.value.about == "weights"


MODELS: dict[str, Callable[[], nn.Module]] = {
    "vit": lambda: models.VisionTransformer(8, 4, 2, 2, 8, 16, num_classes=3),
    "mnasnet": lambda: models.MNASNet(0.5, num_classes=3),
    "densenet": lambda: models.DenseNet(4, (1, 1), 8, num_classes=3),
    "resnet": lambda: models.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=3),
}


@pytest.mark.parametrize("kind", MODELS)
def test_models_that_load_tensors_of_other_versions(kind: str) -> None:
    """Some rename tensors of old files, and some ask for a version, which no safetensors has."""
    torch.manual_seed(0)
    model = MODELS[kind]()
    old = {
        key.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2.")
        if kind == "vit"
        else key.replace("norm1.", "norm.1.").replace("conv2.", "conv.2.")
        if kind == "densenet"
        else key: tensor
        for key, tensor in model.state_dict().items()
        if "num_batches" not in key
    }
    assert old.keys() != model.state_dict().keys()
    for given in (model.state_dict(), old, {f"module.{k}": t for k, t in old.items()}):
        other = MODELS[kind]()
        load_state(other, dict(given), "")
        for key, tensor in model.state_dict().items():
            assert torch.equal(other.state_dict()[key], tensor), key


def test_another_number_of_classes_is_told_as_such() -> None:
    torch.save(state("module."), "mine.pt")
    for classes in (3, list("abcde")):
        with pytest.raises(InputError) as error:
            from_spec(SPEC, "mine.pt", SMALL, classes)
        count = classes if isinstance(classes, int) else len(classes)
        assert str(error.value) == (
            f"The weights in mine.pt have 4 outputs, but the model has {count} (`fc.weight` is "
            f"(4, 6) in the weights and ({count}, 6) in the model; `fc.bias` is (4,) in the "
            f"weights and ({count},) in the model)."
        )
        assert error.value.about == "classes"


class Compiled(nn.Module):
    """As `torch.compile` wraps a model."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self._orig_mod = model


@pytest.mark.parametrize("wrap", [nn.DataParallel, Compiled])
def test_a_model_that_is_wrapped_itself_takes_any_names(wrap: Callable[..., nn.Module]) -> None:
    for prefix in ("", "module.", "_orig_mod.", "model.", "model.module._orig_mod."):
        net = Net()
        load_state(wrap(net), state(prefix), "")
        assert all(torch.equal(net.state_dict()[name], each) for name, each in state().items())


def test_names_that_are_right_stay_as_they_are() -> None:
    """Also where they look like those of a wrapper."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.ModuleDict({"model": nn.Linear(2, 2), "module": nn.Linear(2, 2)})

    odd = Odd()
    given = {name: tensor + 1 for name, tensor in odd.state_dict().items()}
    assert align(given, odd).keys() == given.keys()
    wrapped = {f"module.{name}": tensor for name, tensor in given.items()}
    assert align(wrapped, odd).keys() == given.keys()


# Weights that compute nothing


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["fc.weight", "features.0.bias", "features.1.running_var"])
def test_weights_of_a_run_that_diverged_are_refused(name: str, value: float) -> None:
    bad = state()
    bad[name] = bad[name].clone()
    bad[name].view(-1)[0] = value
    torch.save(bad, "mine.pt")
    with pytest.raises(InputError) as error:
        loaded("mine.pt")
    assert str(error.value) == f"The weights in mine.pt hold NaN or infinite values: `{name}`."


def test_numbers_that_float32_does_not_have_are_infinite() -> None:
    torch.save(
        {k: t.double() * (1e300 if k == "fc.bias" else 1) for k, t in state().items()}, "a.pt"
    )
    with pytest.raises(InputError, match=r"hold NaN or infinite values: `fc\.bias`"):
        loaded("a.pt")


def test_weights_are_read_as_they_were_saved() -> None:
    torch.save({"state_dict": state("model.")}, "mine.ckpt")
    found, stated = read_weights("mine.ckpt")
    assert stated == {}
    assert found.keys() == state("model.").keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in state("model.").items())
