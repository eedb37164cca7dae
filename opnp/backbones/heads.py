"""The head of a classifier: the linear layer whose outputs are the logits, found by trial."""

from typing import Any

import torch
from torch import Tensor, nn

from opnp.errors import InputError, first_line

__all__ = ["Encoder", "find", "split"]

TOLERANCE = 1e-4  # of the largest logit: by how much another order of summation may change it


class Encoder(nn.Module):
    """A model without its head: maps images (N, C, H, W) to the head's inputs, (N, L).

    Args:
        model: the model, with `torch.nn.Identity` in place of its head.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = outputs_of(self.model, images)
        return features


def find(model: nn.Module, images: Tensor) -> str:
    """The name of the head.

    It is the last linear layer whose outputs are the logits, directly or averaged over space. Each
    candidate is tried by running the model without it: where the model does more to its features
    than a linear map (a softmax, a ReLU, a second head), head(features) and model(images) differ.

    Args:
        model: any classifier; its parameters and its mode are the same afterwards.
        images: a probe batch of at least 2 images, (N, C, H, W), of a size that the model takes.

    Raises:
        InputError: the model does not run on the images, does not return finite logits, or has no
            such head; the sentence says what was found.
    """
    kind, training = type(model).__name__, model.training
    layers = {name: each for name, each in model.named_modules() if name and is_linear(each)}
    called: list[str] = []
    hooks = [
        each.register_forward_hook(lambda *_, name=name: called.append(name))
        for name, each in layers.items()
    ]
    model.eval()
    try:
        logits = attempt(model, images)
        for hook in hooks:
            hook.remove()
        if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(images):
            found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise InputError(
                f"The model {kind} returns {found} for {len(images)} images, not logits (N, K)."
            )
        if not logits.isfinite().all():
            raise InputError(
                f"The model {kind} returns NaN or infinite logits for images of noise: its weights "
                "or its preprocessing are at fault."
            )
        if not called:
            raise InputError(
                f"The model {kind} has no linear head: it runs neither an nn.Linear nor a 1 × 1 "
                "convolution."
            )
        order = list(dict.fromkeys(reversed(called)))
        fitting = [name for name in order if len(layers[name].weight) == logits.shape[1]]
        for name in fitting:
            if gives_logits(model, name, images, logits):
                return name
    finally:
        for hook in hooks:
            hook.remove()
        model.train(training)
    last = order[0]
    found = f"its last linear layer is `{last}` ({described(layers[last])})"
    if not fitting:
        raise InputError(
            f"The model {kind} has no linear head: {found}, but it returns {logits.shape[1]} "
            "logits."
        )
    raise InputError(
        f"The model {kind} has no linear head: {found}, and its logits are not the outputs of "
        f"{' or '.join(f'`{name}`' for name in fitting)}, neither directly nor averaged over "
        "space; something is done to them afterwards."
    )


def split(model: nn.Module, images: Tensor) -> tuple[nn.Module, nn.Linear]:
    """Divide a classifier into an encoder, which is the model without its head, and the head.

    Args:
        model: any classifier; it becomes part of the encoder.
        images: see `find`.

    Returns:
        The encoder, giving features (N, L), and a linear head (L → K) with the same weights.

    Raises:
        InputError: see `find`.
    """
    name = find(model, images)
    head = as_linear(model.get_submodule(name))
    substitute(model, model.get_submodule(name), nn.Identity())
    return Encoder(model), head


def is_linear(module: nn.Module) -> bool:
    """Whether it is a linear layer, or a convolution that is one at each pixel."""
    if isinstance(module, nn.Conv2d):
        return (module.kernel_size, module.groups, module.padding) == ((1, 1), 1, (0, 0))
    return isinstance(module, nn.Linear)


def as_linear(module: nn.Module) -> nn.Linear:
    """A plain linear layer with the weights of one, or of a 1 × 1 convolution."""
    weight, bias = module.weight, module.bias
    assert isinstance(weight, Tensor)
    linear = nn.utils.skip_init(nn.Linear, weight[0].numel(), len(weight), bias=bias is not None)
    linear.weight = nn.Parameter(weight.detach().flatten(1))
    if isinstance(bias, Tensor):
        linear.bias = nn.Parameter(bias.detach())
    return linear.train(module.training)


def gives_logits(model: nn.Module, name: str, images: Tensor, logits: Tensor) -> bool:
    """Whether the model's logits (N, K) are the layer's outputs.

    Tested with the layer's own weights and with random ones, since a head whose weights are zero
    would agree with anything.
    """
    layer = model.get_submodule(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        other: nn.Module = (
            nn.Conv2d(layer.in_channels, layer.out_channels, 1)
            if isinstance(layer, nn.Conv2d)
            else nn.Linear(as_linear(layer).in_features, len(logits[0]))
        ).to(logits)
    try:
        expected = replaced(model, layer, other, images)
        features = replaced(model, layer, nn.Identity(), images)
    except InputError:  # the model does more with its head than call it
        return False
    with torch.no_grad():
        return features.ndim == 2 and all(
            close(as_linear(each)(features), outputs)
            for each, outputs in ((layer, logits), (other, expected))
        )


def replaced(model: nn.Module, layer: nn.Module, other: nn.Module, images: Tensor) -> Tensor:
    """The model's outputs with another module in place of a layer."""
    substitute(model, layer, other)
    try:
        outputs: Tensor = attempt(model, images)
        return outputs
    finally:
        substitute(model, other, layer)


def close(one: Tensor, other: Tensor) -> bool:
    """Whether two batches of logits are the same up to rounding."""
    scale = float(other.abs().max())
    return one.shape == other.shape and torch.allclose(one, other, TOLERANCE, TOLERANCE * scale)


def substitute(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Replace a module by another, wherever it is used."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is old:
                setattr(parent, name, new)


def attempt(model: nn.Module, images: Tensor) -> Any:
    """Run the model; if it fails, say why in a sentence."""
    try:
        with torch.no_grad():
            return outputs_of(model, images)
    except Exception as error:  # a model may raise anything
        raise InputError(
            f"The model {type(model).__name__} does not run on images of shape "
            f"{tuple(images.shape[1:])} ({first_line(error)}): correct its preprocessing, or the "
            "model."
        ) from error


def outputs_of(model: nn.Module, images: Tensor) -> Any:
    """A model's outputs; the logits alone where there are more, as with auxiliary heads."""
    outputs = model(images)
    return getattr(outputs, "logits", outputs)


def described(layer: nn.Module) -> str:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return f"{type(layer).__name__}, {weight.shape[1]} → {len(weight)}"
