"""Small networks for small images, to train from scratch: a ResNet, a ConvNeXt, a transformer."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["NETWORKS", "ConvNeXt", "Pool", "ResNet", "ViT"]


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
    """A ResNet encoder for small images: a stem, three stages, global average pooling.

    Args:
        channels: channels of the images.
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
        channels: channels of the images.
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
    """Embed each patch of an image, with its position, as a token: (N, patches, width)."""

    def __init__(self, channels: int, size: int, patch: int, width: int):
        super().__init__()
        self.embed = nn.Conv2d(channels, width, patch, patch)
        self.place = nn.Parameter(0.02 * torch.randn((size // patch) ** 2, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.embed(x).flatten(2).transpose(1, 2) + self.place


class TransformerBlock(nn.Module):
    """Self-attention and a perceptron, each normalized before (Dosovitskiy et al., Fig. 1)."""

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
    """A small vision transformer: about 7 × 7 patches, and the mean of their tokens.

    Args:
        channels: channels of the images.
        size: side of the images in pixels, at least 4.
        width: a quarter of the width of tokens and features; attention has heads of width 32.
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


NETWORKS: dict[str, type[ResNet] | type[ConvNeXt] | type[ViT]] = {
    "resnet": ResNet,
    "convnext": ConvNeXt,
    "vit": ViT,
}
"""Encoders by name. Each takes (channels, size, width, depth) and returns 4 × width features."""
