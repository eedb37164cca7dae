"""The head is found in any classifier, and what has none is refused with what was found."""

import pytest
import torch
from torch import Tensor, nn

from opnp.backbones import heads
from opnp.backbones.backbone import build
from opnp.errors import InputError

K = 5

# One of each family, the smallest, with images as small as it takes, and its L.
ARCHITECTURES = {
    "torchvision:resnet18": (32, 512),
    "torchvision:densenet121": (32, 1024),
    "torchvision:mobilenet_v2": (32, 1280),
    "torchvision:mobilenet_v3_small": (32, 1024),
    "torchvision:efficientnet_b0": (32, 1280),
    "torchvision:convnext_tiny": (32, 768),
    "torchvision:regnet_y_400mf": (32, 440),
    "torchvision:vit_b_32": (32, 768),
    "torchvision:swin_t": (32, 768),
    "torchvision:alexnet": (64, 4096),
    "torchvision:shufflenet_v2_x0_5": (32, 1024),
    "torchvision:googlenet": (64, 1024),  # with auxiliary heads
    "torchvision:inception_v3": (80, 2048),
    "timm:resnet10t": (32, 512),
    "timm:densenet121": (32, 1024),
    "timm:mobilenetv2_035": (32, 1280),
    "timm:mobilenetv3_small_050": (32, 1024),
    "timm:efficientnet_lite0": (32, 1280),
    "timm:convnext_atto": (32, 320),
    "timm:regnety_002": (32, 368),
    "timm:vit_tiny_patch16_224": (32, 192),
    "timm:swin_tiny_patch4_window7_224": (56, 768),
}


def images(size: int, count: int = 3) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("spec", ARCHITECTURES)
def test_a_librarys_model_is_split_into_encoder_and_head(spec: str) -> None:
    if spec.startswith("timm"):
        pytest.importorskip("timm", reason="timm is not installed: pip install 'opnp[timm]'")
    from opnp.backbones import libraries

    size, features = ARCHITECTURES[spec]
    torch.manual_seed(0)
    whole = libraries.architecture(spec, 3, size, K, {}).eval()
    x = images(size)
    with torch.no_grad():
        expected = whole(x)
        encoder, head = heads.split(whole, images(size, 2))
        found = encoder(x)
        assert found.shape == (len(x), features)
        assert expected.shape == (len(x), K)
        torch.testing.assert_close(head(found), expected, rtol=1e-4, atol=1e-5)
    assert type(head) is nn.Linear


@pytest.mark.parametrize("spec", ["torchvision:mobilenet_v3_small", "torchvision:googlenet"])
def test_a_split_model_can_be_trained(spec: str) -> None:
    """In training mode some models give more than logits, and drop features out before the head."""
    torch.manual_seed(0)
    model = build(spec, 3, K, size=ARCHITECTURES[spec][0]).train()
    logits = model(images(ARCHITECTURES[spec][0], 4))
    assert logits.shape == (4, K)
    logits.sum().backward()
    assert model.head.weight.grad is not None
    assert all(p.grad is not None for n, p in model.encoder.named_parameters() if "aux" not in n)


class Convolutional(nn.Module):
    """A 1 × 1 convolution as the head, before or after pooling, and what is done to its output."""

    def __init__(self, pooled: bool, after: nn.Module | None = None, zero: bool = False):
        super().__init__()
        self.body = nn.Conv2d(3, 8, 3)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Conv2d(8, K, 1)
        self.after = after or nn.Identity()
        self.pooled = pooled
        if zero:
            nn.init.zeros_(self.head.weight)
            assert self.head.bias is not None
            nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        x = self.head(self.pool(x)) if self.pooled else self.pool(self.after(self.head(x)))
        return self.after(x.flatten(1))


@pytest.mark.parametrize("pooled", [True, False])
@pytest.mark.parametrize("zero", [True, False])
def test_a_convolution_may_be_the_head(pooled: bool, zero: bool) -> None:
    torch.manual_seed(0)
    model, x = Convolutional(pooled, zero=zero).eval(), images(8)
    with torch.no_grad():
        expected, means = model(x), model.body(x).mean(dim=(2, 3))
    encoder, head = heads.split(model, images(8))
    torch.testing.assert_close(encoder(x), means)
    torch.testing.assert_close(head(encoder(x)), expected)


@pytest.mark.parametrize("after", [nn.Softmax(dim=1), nn.ReLU(), nn.Dropout(0.5)])
@pytest.mark.parametrize("zero", [True, False])
def test_logits_that_are_changed_afterwards_are_not_those_of_a_head(
    after: nn.Module, zero: bool
) -> None:
    """Also where the head is zero at first, as that of many a network is before training."""
    torch.manual_seed(0)
    model = Convolutional(pooled=True, after=after, zero=zero)
    if isinstance(after, nn.Dropout):  # which does nothing in evaluation
        assert heads.find(model, images(8)) == "head"
        return
    with pytest.raises(InputError, match=r"last linear layer is `head` \(Conv2d, 8 → 5\)"):
        heads.split(model, images(8))


class Distilled(nn.Module):
    """The mean of two heads, as in DeiT."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.other = nn.Linear(48, K), nn.Linear(48, K)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        return (self.head(x) + self.other(x)) / 2


class Cosine(nn.Linear):
    """A head that is not linear in its features, though its class says so."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(nn.functional.normalize(x), self.weight, self.bias)


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        (
            Distilled(),
            r"`other` \(Linear, 48 → 5\), and its logits are not the outputs of `other` or `head`",
        ),
        (
            nn.Sequential(nn.Flatten(), Cosine(48, K)),
            r"last linear layer is `1` \(Cosine, 48 → 5\)",
        ),
        (nn.Sequential(nn.Flatten(), nn.ReLU()), "it runs neither an nn.Linear nor a 1 × 1"),
        (
            nn.Sequential(nn.Flatten(), nn.Linear(48, 7), nn.GLU(1)),
            r"does not run on images of shape \(3, 4, 4\) \(Halving",
        ),
        (nn.Sequential(nn.Linear(4, 6), nn.Flatten()), r"`0` \(Linear, 4 → 6\), but it returns 72"),
        (nn.Conv2d(3, 5, 1), r"returns \(2, 5, 4, 4\) for 2 images, not logits \(N, K\)"),
        (nn.Sequential(nn.Conv2d(1, 5, 1)), r"does not run on images of shape \(3, 4, 4\)"),
    ],
    ids=["two heads", "cosine", "none", "odd", "flattened", "maps", "channels"],
)
def test_a_model_without_a_linear_head_is_refused(model: nn.Module, sentence: str) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules = list(model.modules())
    with pytest.raises(InputError, match=sentence):
        heads.split(model, images(4, 2))
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert list(model.modules()) == modules


def test_squeezenet_is_refused() -> None:
    with pytest.raises(InputError, match=r"SqueezeNet.*`classifier\.1` \(Conv2d, 512 → 5\)"):
        build("torchvision:squeezenet1_1", 3, K, size=32)


def test_looking_for_the_head_leaves_the_model_and_the_seed_as_they_were() -> None:
    model = Convolutional(pooled=True).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(3)
    state = torch.get_rng_state()
    assert heads.find(model, images(8)) == "head"
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert not any(each._forward_hooks for each in model.modules())
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
