"""All detectors of features from what is cached, against pytorch-ood run one by one on the images.

Both fit and score the same detectors with the same values: pytorch-ood's own way, each goes through
the training images and every test set with the backbone (``fit(loader)``, ``predict(images)``);
`opnp.detectors` lets the backbone run once and works on what it gave. Goal: at least 10 × as fast,
that one pass counted. Scores must agree, and do so before anything is timed.

Run ``python -m benchmarks.comparison [--width N] [--train N] [--test N] [--sets N]
[--detectors NAME …] [--repeats N] [--threads N] [--json]``.
"""

import argparse
import time
from collections import defaultdict
from statistics import median

import torch
from pytorch_ood.api import Detector
from pytorch_ood.detector import GradNorm
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks import timing
from opnp.backbones import encoding as shards
from opnp.backbones.backbone import Classifier, build
from opnp.detectors import base
from opnp.detectors.base import Samples, TrainedModel
from opnp.detectors.names import DETECTORS
from opnp.errors import UnavailableError

__all__ = ["main"]

OF_FEATURES = [key for key, row in DETECTORS.items() if row.takes in ("logits", "features")]
CPU = torch.device("cpu")


class Problem:
    """A backbone with random weights, and synthetic images: training, ID test and OOD sets.

    Labels are what the classifier predicts, which some detectors cannot do without.
    """

    def __init__(self, arguments: argparse.Namespace):
        torch.manual_seed(0)
        self.batch = arguments.batch_size
        self.classifier = build("resnet", 1, 10, arguments.image, width=arguments.width)
        shape = (1, arguments.image, arguments.image)
        templates = torch.randn(10, *shape)
        drawn = templates[torch.randint(10, (arguments.train + arguments.test,))]
        inside = drawn + torch.randn_like(drawn)
        self.train, test = inside[: arguments.train], inside[arguments.train :]
        self.sets = [test]
        for _ in range(arguments.sets):
            others = torch.randn(10, *shape)[torch.randint(10, (arguments.test,))]
            self.sets.append(others + torch.randn_like(others))
        settle(self.classifier, self.train[: 4 * self.batch])
        with torch.no_grad():
            batches = self.train.split(self.batch)
            logits = torch.cat([self.classifier(batch) for batch in batches])
        self.labels = logits.argmax(dim=1)
        self.model = TrainedModel(self.classifier.head, classifier=self.classifier)
        self.loader = DataLoader(TensorDataset(self.train, self.labels), self.batch)

    def encoded(self) -> tuple[Samples, list[Samples]]:
        """What is cached: features and logits of the training images and of every test set."""

        def of(images: Tensor, labels: Tensor | None = None) -> Samples:
            h = shards.encode(self.classifier.encoder, images.split(self.batch), CPU)
            return Samples(h, labels, logits=base.logits_of(self.model, Samples(h)))

        return of(self.train, self.labels), [of(images) for images in self.sets]

    def cached(self, name: str, train: Samples, sets: list[Samples]) -> list[Tensor]:
        """Scores of every test set by a detector on what is cached."""
        detector = base.make(name, self.model)
        base.fit(detector, self.model, train)
        return [base.score(detector, self.model, samples) for samples in sets]

    def on_images(self, name: str) -> list[Tensor]:
        """The same in pytorch-ood's own way."""
        detector = self.on_model(name)
        if detector.requires_fit:
            detector.fit(self.loader)
        with torch.no_grad():
            return [
                torch.cat([detector.predict(batch) for batch in images.split(self.batch)])
                for images in self.sets
            ]

    def on_model(self, name: str) -> Detector:
        """A detector with its default values, as pytorch-ood makes it for a whole model."""
        if name == "gradnorm":
            return GradNorm(self.classifier, lambda each: each == "head.weight", self.batch)
        detector = base.make(name, self.model)
        encoder = self.classifier.encoder
        maps = nn.Sequential(encoder, nn.Unflatten(1, (self.model.head.in_features, 1, 1)))
        parts = {"model": self.classifier, "encoder": encoder, "backbone": maps}
        # RMD hands its encoder to a Mahalanobis detector of its own.
        for attribute, part in parts.items():
            for holder in (detector, getattr(detector, "_base", None)):
                if hasattr(holder, attribute):
                    setattr(holder, attribute, part)
        return detector.to(CPU)


@torch.no_grad()
def settle(classifier: Classifier, images: Tensor) -> None:
    """Statistics of normalization from images, and a head whose predictions spread over classes."""
    for module in classifier.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the mean of all that is seen
    classifier.train()
    classifier.encoder(images)
    classifier.eval().requires_grad_(False)
    h = classifier.encoder(images)
    weight = torch.randn_like(classifier.head.weight) / (h.std(dim=0) + 1e-6)
    weight /= ((h - h.mean(dim=0)) @ weight.T).std(dim=0)[:, None] / 3
    classifier.head.weight.copy_(weight)
    classifier.head.bias.copy_(-weight @ h.mean(dim=0))


def agreed(problem: Problem, names: list[str]) -> dict[str, str]:
    """Whether both ways give the same scores, by detector; why one cannot run here.

    Raises:
        AssertionError: scores differ.
    """
    train, sets = problem.encoded()
    told = {}
    for name in names:
        try:
            ours = problem.cached(name, train, sets)
        except UnavailableError as error:
            told[name] = f"cannot run: {error}"
            continue
        theirs = problem.on_images(name)
        for mine, other in zip(ours, theirs, strict=True):
            other = other.double()
            largest = float(mine.abs().max())
            if not torch.allclose(mine, other, rtol=1e-3, atol=1e-3 * largest):
                off = float((mine - other).abs().max())
                raise AssertionError(f"{name}: scores up to {largest:g} differ by up to {off:g}")
        told[name] = "same scores"
    return told


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.comparison", description=__doc__)
    parser.add_argument("--width", type=int, default=32, help="of the ResNet")
    parser.add_argument("--image", type=int, default=28, help="side of the images in pixels")
    parser.add_argument("--train", type=int, default=4000, help="training images")
    parser.add_argument("--test", type=int, default=1000, help="images of each test set")
    parser.add_argument("--sets", type=int, default=4, help="OOD sets")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--detectors", nargs="+", choices=OF_FEATURES, default=OF_FEATURES)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    problem = Problem(arguments)
    scores = agreed(problem, arguments.detectors)  # warms up
    names = [name for name, told in scores.items() if not told.startswith("cannot")]

    images: dict[str, list[float]] = defaultdict(list)
    cached: dict[str, list[float]] = defaultdict(list)
    encoding = []
    for _ in range(arguments.repeats):
        start = time.perf_counter()
        train, sets = problem.encoded()
        encoding.append(time.perf_counter() - start)
        for name in names:
            start = time.perf_counter()
            problem.on_images(name)
            between = time.perf_counter()
            problem.cached(name, train, sets)
            cached[name].append(time.perf_counter() - between)
            images[name].append(between - start)
    totals = {
        "on images": [sum(each) for each in zip(*images.values(), strict=True)],
        "cached": [sum(each) for each in zip(*cached.values(), strict=True)],
    }
    totals["with the pass"] = [a + b for a, b in zip(totals["cached"], encoding, strict=True)]
    times = timing.ratio(totals, "on images", "with the pass")
    result = {
        "threads": arguments.threads,
        "repeats": arguments.repeats,
        "detectors": [
            {
                "detector": name,
                "on_images_seconds": median(images[name]),
                "cached_seconds": median(cached[name]),
                "ratio": timing.ratio({"i": images[name], "c": cached[name]}, "i", "c"),
                "scores": scores[name],
            }
            for name in names
        ],
        "unavailable": [f"{name} {told}" for name, told in scores.items() if name not in names],
        "pass_seconds": median(encoding),
        "on_images_seconds": median(totals["on images"]),
        "cached_seconds": median(totals["cached"]),
        "ratio_without_the_pass": timing.ratio(totals, "on images", "cached"),
        "goals": [
            timing.goal("all detectors, the pass counted, at least 10 ×", times, times >= 10)
        ],
    }
    timing.show(result, arguments.json, f"comparison, {arguments.threads} thread(s)")


if __name__ == "__main__":
    main()
