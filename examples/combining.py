"""Other detectors on the pruned model: ReAct, KNN and more, by name, on features.

A mask changes only the features and the last layer, so whatever scores one of them can score the
pruned model. Everything is chosen on outliers made from validation images; the OOD sets are only
looked at in the end.

python examples/combining.py
"""

from statistics import fmean

import digits
import torch
from torch import Tensor

from opnp import OPNP
from opnp.data import proxies
from opnp.detectors.base import Samples, TrainedModel
from opnp.detectors.tuning import tune
from opnp.metrics.separation import ood_metrics
from opnp.pruning.candidates import Candidate

NAMES = ("energy", "opnp+energy", "react", "opnp+react", "knn", "opnp+knn")


def main() -> dict[str, float]:
    """Return each detector's mean FPR95 over the OOD sets, in percent, by name."""
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
    for family in proxies.FAMILIES:
        made = proxies.make(family, pixels, range(len(pixels)), seed=0)
        outliers[family] = Samples(features(torch.from_numpy(made)))
    candidates = [Candidate(weights=(0, high)) for high in (0.5, 1, 2, 5)]
    candidates += [Candidate(neurons=(low, high)) for low in (0, 10, 30) for high in (0, 2, 10)]
    model, ood, found = TrainedModel(network.head), [samples(name) for name in digits.OOD], {}
    for name in NAMES:
        tuned = tune(
            name, model, train, validation, outliers, budget=16, seed=0, candidates=candidates
        )
        inside = tuned.score(test)
        found[name] = fmean(ood_metrics(inside, tuned.score(each))["fpr95"] for each in ood)
        print(f"{name:12} mean FPR95 {found[name]:5.1f} %   {tuned.hyperparameters}")
    return found


if __name__ == "__main__":
    main()
