"""From images to penultimate features."""

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor, nn

from opnp.errors import InputError

__all__ = ["encode"]


@torch.no_grad()
def encode(
    encoder: nn.Module,
    batches: Iterable[Tensor],
    device: torch.device,
    precision: Literal["float32", "bfloat16"] = "float32",
) -> Tensor:
    """Penultimate features, float32 (N, L) on the CPU, of batches of normalized images.

    Args:
        encoder: maps images to features; it is on ``device``.
        batches: normalized images, float32 (N, C, H, W) each.
        device: where the encoder runs.
        precision: of matrix products and convolutions; bfloat16 keeps 8 bits.

    Raises:
        InputError: the encoder's output is not (N, L).
    """
    parts = []
    for batch in batches:
        if device.type == "cuda":  # pinned memory is copied while the GPU computes
            batch = batch.contiguous(memory_format=torch.channels_last).pin_memory()
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            parts.append(encoder(batch.to(device, non_blocking=True)).float())
    features = torch.cat(parts).cpu()
    if features.ndim != 2:
        raise InputError(
            f"The encoder returns features of shape {tuple(features.shape)}, not (N, L): "
            "it must end with pooling and flattening."
        )
    return features
