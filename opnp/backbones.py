"""Backbones: an encoder that turns images into penultimate features, and a linear head."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from opnp import tensors
from opnp.errors import InputError

__all__ = ["Classifier", "Preprocessing", "ResNet", "build", "load", "load_weights", "save"]


@dataclass(frozen=True)
class Preprocessing:
    """What happens to an image before the encoder sees it; it travels with the weights.

    Attributes:
        size: side of the square image in pixels.
        mode: ``L`` or ``RGB``, as in Pillow.
        mean: subtracted from pixels in [0, 1], one for each channel.
        std: divides what is left, one for each channel.
    """

    size: int
    mode: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def measured(cls, pixels: NDArray[np.uint8]) -> Self:
        """Mean and standard deviation of the training images, uint8 (N, H, W, C)."""
        scaled = pixels.reshape(-1, pixels.shape[-1]).astype(np.float64) / 255
        return cls(
            size=pixels.shape[1],
            mode="L" if pixels.shape[-1] == 1 else "RGB",
            mean=tuple(round(float(value), 6) for value in scaled.mean(axis=0)),
            std=tuple(round(float(value), 6) for value in scaled.std(axis=0)),
        )

    @classmethod
    def stated(cls, values: dict[str, Any]) -> Self:
        """As `save` has written it."""
        return cls(values["size"], values["mode"], tuple(values["mean"]), tuple(values["std"]))

    @property
    def channels(self) -> int:
        return len(self.mean)

    def normalize(self, images: Tensor) -> Tensor:
        """Normalize images in [0, 1], float32 (N, C, H, W)."""
        mean, std = (images.new_tensor(v)[:, None, None] for v in (self.mean, self.std))
        return (images - mean) / std


class Classifier(nn.Module):
    """A classifier as this project sees it: logits = head(encoder(images))."""

    def __init__(self, encoder: nn.Module, head: nn.Linear):
        super().__init__()
        self.encoder = encoder
        self.head = head

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.encoder(images))
        return logits


class Block(nn.Module):
    """Two 3 × 3 convolutions and a shortcut (He et al., CVPR 2016, Fig. 2)."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut = (
            nn.Identity()
            if stride == 1 and inputs == outputs
            else nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class Pool(nn.Module):
    """Global average pooling; unlike `nn.AdaptiveAvgPool2d`, deterministic on GPUs as well."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=(2, 3))


class ResNet(nn.Sequential):
    """A residual encoder for small images: a stem, three stages, global average pooling.

    Args:
        channels: of the images.
        width: channels of the first stage; the features have 4 × ``width``.
        depth: blocks in each stage.
    """

    def __init__(self, channels: int, width: int, depth: int = 1):
        stem = [nn.Conv2d(channels, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        blocks, inputs = [], width
        for stage in range(3):
            outputs = width << stage
            for index in range(depth):
                blocks.append(Block(inputs, outputs, 2 if stage and index == 0 else 1))
                inputs = outputs
        super().__init__(*stem, *blocks, Pool())


def build(name: str, channels: int, classes: int, width: int, depth: int) -> Classifier:
    """An untrained classifier.

    Args:
        name: ``resnet``.
        channels: of the images, 1 or 3.
        classes: K, at least 2.
        width: L = 4 × width.
        depth: blocks in each of three stages.

    Raises:
        InputError: there is no such backbone, or fewer than 2 classes.
    """
    if name != "resnet":
        raise InputError(f"There is no backbone {name!r}: set train.backbone to `resnet`.")
    if classes < 2:
        raise InputError(
            f"A classifier needs at least 2 classes, not {classes}: hold out fewer (data.held_out)."
        )
    return Classifier(ResNet(channels, width, depth), nn.Linear(4 * width, classes))


def load_weights(model: nn.Module, path: Path) -> dict[str, Any]:
    """Load a checkpoint (.safetensors; .pt or .pth, never unpickling code) into ``model``.

    Returns:
        What `save` stated beside the weights: ``preprocessing``, ``classes`` and ``spec``; nothing
        for a file of another origin.

    Raises:
        InputError: the file is missing, damaged, of another format or for another model.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"Checkpoint {path} is missing: correct train.checkpoint.")
    metadata: dict[str, Any] = {}
    if path.suffix == ".safetensors":
        state, metadata = tensors.load(path, "replace the checkpoint")
    elif path.suffix in (".pt", ".pth"):
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch.load raises almost anything on a damaged file
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise InputError(f"Checkpoint {path} cannot be read ({reason}): replace it.") from None
        if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
            raise InputError(f"Checkpoint {path} holds no state dict: save `model.state_dict()`.")
    else:
        raise InputError(f"Checkpoint {path} is neither .safetensors, .pt nor .pth: convert it.")
    check_state(model, state, path)
    model.load_state_dict(state)
    return metadata


def check_state(model: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """Refuse weights whose names or shapes are not the model's."""
    expected = model.state_dict()
    for name in [*expected, *(key for key in state if key not in expected)]:
        theirs, ours = (tuple(s[name].shape) if name in s else None for s in (state, expected))
        if theirs != ours:
            raise InputError(
                f"Checkpoint {path} is for another model: `{name}` is "
                f"{'absent' if theirs is None else theirs} there and "
                f"{'absent' if ours is None else ours} here; set train.backbone, "
                "width and depth, and the classes, to what it was trained with."
            )


def save(
    model: Classifier,
    path: Path,
    preprocessing: Preprocessing,
    classes: list[str],
    spec: dict[str, object],
) -> None:
    """Write weights and all that is needed to use them as one safetensors file, atomically."""
    metadata = {"preprocessing": asdict(preprocessing), "classes": classes, "spec": spec}
    tensors.save(path, model.state_dict(), metadata)


def load(path: Path) -> tuple[Classifier, Preprocessing, list[str]]:
    """Read what `save` wrote: the classifier in evaluation mode, its preprocessing, its classes.

    Raises:
        InputError: the file is missing or damaged.
    """
    again = "run `python -m flows.train` again"
    state, metadata = tensors.load(path, again)
    if set(metadata) != {"preprocessing", "classes", "spec"}:
        raise InputError(f"{path} holds weights, but not what they are of: {again}.")
    preprocessing = Preprocessing.stated(metadata["preprocessing"])
    classes: list[str] = metadata["classes"]
    model = build(channels=preprocessing.channels, classes=len(classes), **metadata["spec"])
    check_state(model, state, path)
    model.load_state_dict(state)
    return model.eval().requires_grad_(False), preprocessing, classes
