"""Training a classifier: plain SGD with a one-cycle schedule, deterministic under its seed."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from opnp.backbones import Classifier
from opnp.errors import InputError
from opnp.progress import track

# cuBLAS is deterministic only with a workspace of fixed size, stated before CUDA starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

__all__ = ["accuracy", "deterministic", "fit"]


@contextmanager
def deterministic(threads: int) -> Iterator[None]:
    """Run with deterministic algorithms and a fixed number of threads of this thread's kernels.

    The order in which a kernel sums depends on how many threads share it, so bits that should not
    depend on the machine's load or size need a fixed number. That number is each Python thread's
    own; the choice of algorithms is the process's, and stays, since tasks overlap in time.
    """
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.allow_tf32 = False  # of 10 bits, where the CPU's float32 has 23
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def shift(images: Tensor, pixels: int, generator: torch.Generator) -> Tensor:
    """Shift each image of (N, C, H, W) by up to ``pixels`` either way; the border is repeated."""
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
def accuracy(model: nn.Module, images: Tensor, labels: Tensor, batch_size: int = 512) -> float:
    """Percentage of images (N, C, H, W) whose largest logit is their label's (N,)."""
    training = model.training
    model.eval()
    hits = sum(
        int((model(x).argmax(dim=1) == y).sum())
        for x, y in zip(images.split(batch_size), labels.split(batch_size), strict=True)
    )
    model.train(training)
    return 100 * hits / len(labels)


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
) -> list[dict[str, float]]:
    """Train ``model`` in place.

    Args:
        model: on the device to train on; its weights are initialized by the caller.
        train: normalized images, float32 (N, C, H, W), and labels, int64 (N,), on that device.
        validation: the same; looked at, never learnt from.
        epochs: passes over the training images.
        batch_size: images in a step.
        learning_rate: peak of the one-cycle schedule (SGD, Nesterov momentum 0.9).
        weight_decay: of SGD.
        shift_pixels: augmentation by random shifts of up to that many pixels.
        seed: of the order and the augmentation.

    Returns:
        One record an epoch: ``epoch``, ``loss``, ``train_accuracy``, ``validation_accuracy``
        (percent; train accuracy is that of the augmented images as they were learnt from).

    Raises:
        InputError: the loss stopped being finite.
    """
    images, labels = train
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(
        model.parameters(), learning_rate, momentum=0.9, nesterov=True, weight_decay=weight_decay
    )
    steps = -(-len(images) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, epochs * steps)
    history = []
    for epoch in track(range(1, epochs + 1), "train (epochs)", epochs):
        model.train()
        loss_sum = hits = 0.0
        for index in torch.randperm(len(images), generator=generator).split(batch_size):
            index = index.to(images.device)
            x, y = shift(images[index], shift_pixels, generator), labels[index]
            logits = model(x)
            loss = F.cross_entropy(logits, y)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            loss_sum += loss.item() * len(y)
            hits += int((logits.argmax(dim=1) == y).sum())
        if not loss_sum < float("inf"):
            raise InputError(
                f"The training loss is not finite in epoch {epoch}: lower train.learning_rate."
            )
        history.append(
            {
                "epoch": epoch,
                "loss": loss_sum / len(images),
                "train_accuracy": 100 * hits / len(images),
                "validation_accuracy": accuracy(model, *validation),
            }
        )
    return history
