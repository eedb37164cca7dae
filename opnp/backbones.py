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

__all__ = [
    "BACKBONES",
    "Classifier",
    "ConvNeXt",
    "Preprocessing",
    "ResNet",
    "ViT",
    "build",
    "load",
    "load_weights",
    "save",
]


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


class ResidualBlock(nn.Module):
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
        size: side of the images in pixels.
        width: channels of the first stage; the features have 4 × ``width``.
        depth: blocks in each stage.

    Source: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016.
    """

    def __init__(self, channels: int, size: int, width: int, depth: int = 1):
        stem = [nn.Conv2d(channels, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        blocks, inputs = [], width
        for stage in range(3):
            outputs = width << stage
            for index in range(depth):
                blocks.append(ResidualBlock(inputs, outputs, 2 if stage and index == 0 else 1))
                inputs = outputs
        super().__init__(*stem, *blocks, Pool())


class ChannelNorm(nn.LayerNorm):
    """Layer normalization over the channels of (N, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNeXtBlock(nn.Module):
    """A depthwise 7 × 7 convolution and an inverted bottleneck (Liu et al., CVPR 2022, Fig. 4)."""

    def __init__(self, width: int):
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = ChannelNorm(width)
        self.expand = nn.Conv2d(width, 4 * width, 1)
        self.project = nn.Conv2d(4 * width, width, 1)
        self.scale = nn.Parameter(torch.full((width, 1, 1), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(F.gelu(self.expand(self.norm(self.depthwise(x)))))
        return x + self.scale * y


class ConvNeXt(nn.Sequential):
    """A ConvNeXt for small images: three stages, each at half the resolution of the one before.

    Args:
        channels: of the images.
        size: side of the images in pixels.
        width: channels of the first stage; the features have 4 × ``width``.
        depth: blocks in each stage.

    Source: Liu et al., "A ConvNet for the 2020s", CVPR 2022, arXiv 2201.03545.
    """

    def __init__(self, channels: int, size: int, width: int, depth: int = 1):
        layers: list[nn.Module] = [nn.Conv2d(channels, width, 2, 2), ChannelNorm(width)]
        for stage in range(3):
            if stage:
                layers += [
                    ChannelNorm(width << (stage - 1)),
                    nn.Conv2d(width << (stage - 1), width << stage, 2, 2),
                ]
            layers += [ConvNeXtBlock(width << stage) for _ in range(depth)]
        super().__init__(*layers, ChannelNorm(4 * width), Pool())


class Patches(nn.Module):
    """Cut images into patches and embed each, with its place, as a token: (N, patches, width)."""

    def __init__(self, channels: int, size: int, patch: int, width: int):
        super().__init__()
        self.embed = nn.Conv2d(channels, width, patch, patch)
        self.place = nn.Parameter(0.02 * torch.randn((size // patch) ** 2, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.embed(x).flatten(2).transpose(1, 2) + self.place


class TransformerBlock(nn.Module):
    """Self-attention and a perceptron, each after normalization (Dosovitskiy et al., Fig. 1)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.perceptron = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(n, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v)
        x = x + self.project(attended.transpose(1, 2).reshape(n, tokens, width))
        y: Tensor = x + self.perceptron(self.norm2(x))
        return y


class MeanToken(nn.Module):
    """The mean over the tokens of (N, tokens, width)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=1)


class ViT(nn.Sequential):
    """A small vision transformer: patches of a seventh or an eighth of the image, mean of tokens.

    Args:
        channels: of the images.
        size: side of the images in pixels, at least 4.
        width: the tokens and the features have 4 × ``width``, in heads of 32.
        depth: a third of the number of blocks.

    Source: Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021, arXiv 2010.11929; the
    mean in place of a class token: Beyer et al., arXiv 2205.01580.
    """

    def __init__(self, channels: int, size: int, width: int, depth: int = 1):
        patch = max(2, size // 7)
        tokens, heads = 4 * width, max(1, width // 8)
        super().__init__(
            Patches(channels, size, patch, tokens),
            *(TransformerBlock(tokens, heads) for _ in range(3 * depth)),
            nn.LayerNorm(tokens),
            MeanToken(),
        )


BACKBONES: dict[str, type[ResNet] | type[ConvNeXt] | type[ViT]] = {
    "resnet": ResNet,
    "convnext": ConvNeXt,
    "vit": ViT,
}
"""Encoders by name, each made from (channels, size, width, depth) and giving 4 × width features."""


def build(
    name: str, channels: int, classes: int, width: int, depth: int, size: int = 32
) -> Classifier:
    """An untrained classifier.

    Args:
        name: a key of `BACKBONES`.
        channels: of the images, 1 or 3.
        classes: K, at least 2.
        width: L = 4 × width.
        depth: blocks in each of three stages.
        size: side of the images in pixels.

    Raises:
        InputError: there is no such backbone, fewer than 2 classes, or the images are too small.
    """
    if name not in BACKBONES:
        raise InputError(
            f"There is no backbone {name!r}: set train.backbone to one of {', '.join(BACKBONES)}."
        )
    if classes < 2:
        raise InputError(
            f"A classifier needs at least 2 classes, not {classes}: hold out fewer (data.held_out)."
        )
    if name != "resnet" and size < 8:
        raise InputError(
            f"The backbone {name!r} needs images of at least 8 pixels, not {size}: set "
            "data.image_size, or train.backbone to resnet."
        )
    encoder = BACKBONES[name](channels, size, width, depth)
    return Classifier(encoder, nn.Linear(4 * width, classes))


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
    model = build(
        channels=preprocessing.channels,
        classes=len(classes),
        size=preprocessing.size,
        **metadata["spec"],
    )
    check_state(model, state, path)
    model.load_state_dict(state)
    return model.eval().requires_grad_(False), preprocessing, classes
