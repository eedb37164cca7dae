"""Other detectors on the pruned model, by name, on features; and two detectors as one.

A mask changes only the features and the last layer, so whatever scores one of them can score the
pruned model. Everything is chosen on outliers made from validation images; the OOD sets are only
looked at in the end.

python examples/combining.py
"""

import logging
from statistics import fmean

import digits
import torch
from torch import Tensor

from opnp import OPNP
from opnp.data import families, proxies
from opnp.detectors.base import Samples, TrainedModel
from opnp.detectors.fusion import Fusion
from opnp.detectors.tuning import Tuned, tune
from opnp.metrics.separation import ood_metrics
from opnp.pruning.candidates import Candidate

NAMES = ("energy", "opnp+energy", "knn", "opnp+knn", "vim", "opnp+vim")
FUSED = ("opnp+energy", "vim")


def main() -> dict[str, float]:
    """Return each detector's mean FPR95 over the OOD sets, in percent, by name."""
    # ViM says each time that it takes fewer dimensions, because there are fewer.
    logging.getLogger("pytorch_ood").setLevel(logging.ERROR)
    network = digits.trained()

    def features(images: Tensor) -> Tensor:
        return network.encoder(digits.PREPROCESSING.normalize(images))

    def samples(name: str) -> Samples:
        images, labels = digits.tensors(name)
        return Samples(features(images), labels)

    train, validation, test = (samples(name) for name in ("train", "validation", "test"))

    # One detector, with percentages of your own: OPNP prunes, and ReAct scores what is left.
    detector = OPNP(None, network.head, weights=(0, 1), neurons=(10, 2), detector="react")
    scores = detector.fit_features(train.features, train.labels).predict_features(test.features)
    print(f"OPNP+ReAct gives {len(scores)} scores; larger means OOD")

    # Several, tuned alike on outliers made from validation images; `opnp+NAME` may prune nothing.
    pixels = digits.tensors("validation")[0].numpy()
    outliers = {}
    for family in families.DECIDING:
        made = proxies.make(family, pixels, range(len(pixels)), seed=0)
        outliers[family] = Samples(features(torch.from_numpy(made)))
    candidates = [Candidate(weights=(0, high)) for high in (0.5, 1, 2, 5)]
    candidates += [Candidate(neurons=(low, high)) for low in (0, 10, 30) for high in (0, 2, 10)]
    model = TrainedModel(network.head)
    tuned = {
        name: tune(
            name, model, train, validation, outliers, budget=16, seed=0, candidates=candidates
        )
        for name in NAMES
    }

    # Two kinds of evidence as one: each score becomes a p-value among those of validation images.
    detectors: dict[str, Tuned | Fusion] = {**tuned}
    detectors["&".join(FUSED)] = Fusion.of({name: tuned[name] for name in FUSED}, validation)

    ood = [samples(name) for name in digits.OOD]
    found = {}
    for name, each in detectors.items():
        inside = each.score(test)
        found[name] = fmean(ood_metrics(inside, each.score(of))["fpr95"] for of in ood)
        print(f"{name:16} mean FPR95 {found[name]:5.1f} %   {each.hyperparameters}")
    return found


if __name__ == "__main__":
    main()
