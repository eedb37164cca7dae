"""What a detector costs beside the classifier it was made of.

Goal: scoring images (preprocessed batches to score, decision and class) takes at most 1.03 × what
the unpruned model takes to classify them. Run ``python -m benchmarks.scoring [--model resnet18]
[--device cuda] [--threads N] [--json]``. Weights are random; a third of the neurons and 5 % of the
weights are pruned.
"""

import argparse
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks import timing
from opnp.backbones.backbone import Backbone, build
from opnp.data.preprocessing import Preprocessing
from opnp.deployment.detector import SavedDetector
from opnp.pruning.candidates import Candidate
from opnp.pruning.sensitivity import SensitivitySums

__all__ = ["detector_of", "main"]


def detector_of(model: str, size: int, device: str, clip: float | None) -> SavedDetector:
    """A detector of a torchvision model with random weights, K = 1000, fitted to noise."""
    torch.manual_seed(0)
    spec = f"torchvision:{model}"
    classifier = build(spec, channels=3, classes=1000, size=size).eval().requires_grad_(False)
    preprocessing = Preprocessing(size, "RGB", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    backbone = Backbone(
        classifier.to(device), preprocessing, [str(k) for k in range(1000)], {"name": spec}
    )
    h = torch.randn(256, classifier.head.in_features, device=device).relu()
    head = classifier.head
    sensitivity = SensitivitySums.of(h, head.weight, head.bias, clip=clip).mean()
    candidate = Candidate((0.0, 5.0), (30.0, 3.0), clip=clip)
    return SavedDetector.of(backbone, candidate.mask(sensitivity), candidate, sensitivity, h, {})


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    device = arguments.device
    plain, clipped = (
        detector_of(arguments.model, arguments.size, device, clip) for clip in (None, 1.0)
    )
    backbone = plain.backbone
    images = torch.rand(arguments.images, 3, arguments.size, arguments.size).to(device)
    batches = images.split(arguments.batch_size)

    @torch.no_grad()
    def classify() -> list[Tensor]:
        normalize = backbone.preprocessing.normalize
        return [backbone.classifier(normalize(x)).argmax(dim=1).cpu() for x in batches]

    def score(detector: SavedDetector) -> list[Any]:
        return [detector.predict(x) for x in batches]

    works: dict[str, Callable[[], Any]] = {
        "classify": classify,
        "score": lambda: score(plain),
        "score, clipped": lambda: score(clipped),
    }
    for work in works.values():  # warms up
        work()
    seconds = timing.interleaved(works, arguments.repeats)  # results lie on the CPU
    times = timing.ratio(seconds, "score", "classify")
    return {
        "model": arguments.model,
        "device": device,
        "threads": torch.get_num_threads(),
        "images": arguments.images,
        "repeats": arguments.repeats,
        "works": [
            {"work": name, "seconds": median(of), "images_per_second": len(images) / median(of)}
            for name, of in seconds.items()
        ],
        "ratio_clipped": timing.ratio(seconds, "score, clipped", "classify"),
        "goals": [timing.goal("scoring at most 1.03 × classifying", times, times <= 1.03)],
    }


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.scoring", description=__doc__)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    timing.show(measure(arguments), arguments.json, "scoring")


if __name__ == "__main__":
    main()
