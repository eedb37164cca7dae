"""Training a classifier with SGD or AdamW and a one-cycle schedule, reproducible by its seed."""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from opnp.backbones.backbone import Classifier
from opnp.backbones.spcp import Rectifier
from opnp.errors import InputError
from opnp.runtime.progress import track

__all__ = ["fit", "predict"]


def shift(images: Tensor, pixels: int, generator: torch.Generator) -> Tensor:
    """Shift each image of (N, C, H, W) by up to ``pixels`` either way, repeating the border."""
    n, _, height, width = images.shape
    padded = F.pad(images, (pixels,) * 4, mode="replicate")
    offset = torch.randint(2 * pixels + 1, (2, n), generator=generator).to(images.device)
    rows = offset[0][:, None] + torch.arange(height, device=images.device)
    columns = offset[1][:, None] + torch.arange(width, device=images.device)
    sample = torch.arange(n, device=images.device)
    return padded.permute(0, 2, 3, 1)[
        sample[:, None, None], rows[:, :, None], columns[:, None, :]
    ].permute(0, 3, 1, 2)


@torch.no_grad()
def predict(model: nn.Module, images: Tensor) -> Tensor:
    """The class (N,) of the largest logit for each image, (N, C, H, W)."""
    # 512 at once, but no more pixels than 64 images of 224 × 224 have: those take about 1 GB.
    size = max(1, min(512, 64 * 224**2 // images.shape[2:].numel()))
    training = model.training
    model.eval()
    found = torch.cat([model(x).argmax(dim=1) for x in images.split(size)])
    model.train(training)
    return found


def correct(model: nn.Module, images: Tensor, labels: Tensor) -> int:
    """The number of images (N, C, H, W) whose largest logit is that of their label, (N,)."""
    return int((predict(model, images) == labels).sum())


def optimizer_of(
    model: nn.Module, name: Literal["sgd", "adamw"], learning_rate: float, weight_decay: float
) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum 0.9, or AdamW."""
    parameters = model.parameters()
    if name == "adamw":
        return torch.optim.AdamW(parameters, learning_rate, weight_decay=weight_decay)
    return torch.optim.SGD(
        parameters, learning_rate, momentum=0.9, nesterov=True, weight_decay=weight_decay
    )


def fit(
    model: Classifier,
    train: tuple[Tensor, Tensor],
    validation: tuple[Tensor, Tensor],
    *,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    weight_decay: float,
    shift_pixels: int,
    seed: int,
    optimizer: Literal["sgd", "adamw"] = "sgd",
    precision: Literal["float32", "bfloat16"] = "float32",
    spcp: Rectifier | None = None,
) -> list[dict[str, float]]:
    """Train ``model`` in place.

    Args:
        model: the classifier, on the device to train on, with initialized weights.
        train: normalized images, float32 (N, C, H, W), and labels, int64 (N,), on that device.
        validation: the same for validation, which is measured after each epoch.
        epochs: passes over the training images.
        batch_size: images in a step.
        learning_rate: peak of the one-cycle schedule.
        weight_decay: the optimizer's weight decay.
        shift_pixels: pixels by which images are shifted at random, at most.
        seed: determines the order of the images and their shifts.
        optimizer: ``sgd`` (Nesterov momentum 0.9), or ``adamw``, which suits transformers.
        precision: of matrix products and convolutions; weights and sums stay float32.
        spcp: clips contributions while training, and holds the threshold afterwards; None does not
            clip.

    Returns:
        A record for each epoch: ``epoch``, ``loss``, ``train_accuracy``, ``validation_accuracy``
        (percent; train accuracy is measured on the shifted images, while training).

    Raises:
        InputError: the loss is no longer finite.
    """
    model.to(memory_format=torch.channels_last)  # faster for convolutions, on CPUs and GPUs
    images, labels = train
    generator = torch.Generator().manual_seed(seed)
    step = optimizer_of(model, optimizer, learning_rate, weight_decay)
    steps = -(-len(images) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(step, learning_rate, epochs * steps)
    history = []
    for epoch in track(range(1, epochs + 1), "train (epochs)", epochs):
        model.train()
        loss_sum = hits = 0.0
        for index in torch.randperm(len(images), generator=generator).split(batch_size):
            index = index.to(images.device)
            x = shift(images[index], shift_pixels, generator).contiguous(
                memory_format=torch.channels_last
            )
            y = labels[index]
            with torch.autocast(x.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
                out = model(x).float() if spcp is None else model.encoder(x)
            logits = out if spcp is None else spcp(model.head, out)
            loss = F.cross_entropy(logits, y)
            step.zero_grad(set_to_none=True)
            loss.backward()
            step.step()
            schedule.step()
            loss_sum += loss.item() * len(y)
            hits += int((logits.argmax(dim=1) == y).sum())
        if not loss_sum < float("inf"):
            raise InputError(
                f"The training loss is not finite in epoch {epoch}: the learning rate, "
                f"{learning_rate:g}, is too high."
            )
        history.append(
            {
                "epoch": epoch,
                "loss": loss_sum / len(images),
                "train_accuracy": 100 * hits / len(images),
                "validation_accuracy": 100 * correct(model, *validation) / len(validation[1]),
            }
        )
    return history
