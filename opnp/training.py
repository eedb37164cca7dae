"""Training a classifier: SGD or AdamW with a one-cycle schedule, deterministic under its seed."""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from opnp.backbones import Classifier
from opnp.errors import InputError
from opnp.progress import track

__all__ = ["Rectifier", "correct", "fit"]

CONTRIBUTIONS = 2**23  # products W_ij·h_j held at once by `Rectifier`: 32 MiB of float32


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
def correct(model: nn.Module, images: Tensor, labels: Tensor) -> int:
    """How many images (N, C, H, W) have their label's (N,) logit as their largest."""
    # 512 at once, but no more pixels than 64 images of 224 × 224 have: those take about 1 GB.
    size = max(1, min(512, 64 * 224**2 // images.shape[2:].numel()))
    training = model.training
    model.eval()
    found = sum(
        int((model(x).argmax(dim=1) == y).sum())
        for x, y in zip(images.split(size), labels.split(size), strict=True)
    )
    model.train(training)
    return found


def excess(features: Tensor, weight: Tensor, threshold: Tensor) -> Tensor:
    """Σ_j max(W_ij h_j − λ, 0), shape (N, K), of features (N, L), weight (K, L) and a scalar λ."""
    return F.relu(features[:, None] * weight - threshold).sum(dim=2)


class Rectifier:
    """Logits for training whose contributions W_ij·h_j are clipped to a threshold λ (SPCP).

    f_i = Σ_j min(W_ij h_j, λ) + b_i, so that a class learns to rest on many weights. For each batch
    λ ← decay·λ + (1 − decay)·q, where q is the mean over its samples of the percentile of a
    sample's K·L contributions; the backward pass takes λ as a constant.

    Of the B·K·L contributions of a batch, those of one class or `CONTRIBUTIONS` are held at once,
    since the backward pass computes them anew, and so many are looked at for q: all of them for
    small heads, those of 16 samples for K = 1000, L = 512. A head of more than 2²⁴ weights is more
    than `torch.quantile` takes.

    Source: Xu and Yang, "Shaping Parameter Contribution Patterns for Out-of-Distribution
    Detection", AAAI 2026, arXiv 2603.07195. From the authors' code (github.com/njustkmg/
    AAAI2026-SPCP): one λ for all classes, its update, before the batch is clipped, and 16 samples
    for q from 200 classes on; with percentile 70 for CIFAR-10, 99.5 for CIFAR-100 and 99.8 for
    ImageNet-200. Ours: they start at λ = 1000 with decay 0.999, so that thousands of steps clip
    nothing, more than a whole training has here; λ starts at the first batch's q, and decay is the
    0.95 of their default configuration. Their evaluation clips as well; here a trained head is a
    plain linear layer.
    """

    def __init__(self, percentile: float, decay: float = 0.95):
        self.percentile = percentile
        self.decay = decay
        self.threshold: Tensor | None = None

    def __call__(self, head: nn.Linear, features: Tensor) -> Tensor:
        """Update λ and return logits, float32 (N, K), of features (N, L)."""
        features = features.float()
        estimate = self._estimate(features.detach(), head.weight.detach())
        if self.threshold is None:
            self.threshold = estimate
        else:
            self.threshold = self.threshold.lerp(estimate, 1 - self.decay)
        return self.rectify(head, features, self.threshold)

    def _estimate(self, features: Tensor, weight: Tensor) -> Tensor:
        some = features[: max(1, CONTRIBUTIONS // weight.numel())]  # batches are shuffled already
        return (some[:, None] * weight).flatten(1).quantile(self.percentile / 100, dim=1).mean()

    @staticmethod
    def rectify(head: nn.Linear, features: Tensor, threshold: Tensor) -> Tensor:
        """Logits (N, K) of features (N, L) with contributions clipped to the scalar threshold."""
        classes = head.weight.split(max(1, CONTRIBUTIONS // features.numel()))
        over = [
            checkpoint(
                excess, features, w, threshold, use_reentrant=False, preserve_rng_state=False
            )
            for w in classes
        ]
        # Taken off the plain logits, which thus keep their bits where nothing is clipped.
        logits: Tensor = head(features) - torch.cat(over, dim=1)
        return logits


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
    spcp: float | None = None,
) -> list[dict[str, float]]:
    """Train ``model`` in place.

    Args:
        model: on the device to train on; its weights are initialized by the caller.
        train: normalized images, float32 (N, C, H, W), and labels, int64 (N,), on that device.
        validation: the same; looked at, never learnt from.
        epochs: passes over the training images.
        batch_size: images in a step.
        learning_rate: peak of the one-cycle schedule.
        weight_decay: of the optimizer.
        shift_pixels: augmentation by random shifts of up to that many pixels.
        seed: of the order and the augmentation.
        optimizer: ``sgd`` (Nesterov momentum 0.9) or ``adamw``, which transformers want.
        precision: of the products while training; weights and sums stay float32.
        spcp: percentile in (0, 100) at which `Rectifier` clips contributions; None clips nothing.

    Returns:
        One record an epoch: ``epoch``, ``loss``, ``train_accuracy``, ``validation_accuracy``
        (percent; train accuracy is that of the augmented images as they were learnt from).

    Raises:
        InputError: the loss stopped being finite.
    """
    model.to(memory_format=torch.channels_last)  # the faster one for convolutions, here and on GPUs
    images, labels = train
    generator = torch.Generator().manual_seed(seed)
    step: torch.optim.Optimizer = (
        torch.optim.SGD(
            model.parameters(),
            learning_rate,
            momentum=0.9,
            nesterov=True,
            weight_decay=weight_decay,
        )
        if optimizer == "sgd"
        else torch.optim.AdamW(model.parameters(), learning_rate, weight_decay=weight_decay)
    )
    rectifier = None if spcp is None else Rectifier(spcp)
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
                out = model(x).float() if rectifier is None else model.encoder(x)
            logits = out if rectifier is None else rectifier(model.head, out)
            loss = F.cross_entropy(logits, y)
            step.zero_grad(set_to_none=True)
            loss.backward()
            step.step()
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
                "validation_accuracy": 100 * correct(model, *validation) / len(validation[1]),
            }
        )
    return history
