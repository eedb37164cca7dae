"""Whether a classifier and the labels of its images speak of the same classes."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

__all__ = ["kappa", "suspicion"]

SLIGHT = 0.2  # κ below which agreement is near chance
SUBSTANTIAL = 0.6  # κ from which another order is taken for the right one
GAIN = 15.0  # points of accuracy that another order of the classes must gain to be told
MANY = 2000  # classes: among more, no better order is looked for


def kappa(truth: NDArray[np.int64], predicted: NDArray[np.int64]) -> float:
    """Cohen's κ: the accuracy beyond chance, as a share of what is possible beyond chance.

    Args:
        truth: labels (N,), N ≥ 1.
        predicted: a classifier's labels (N,).

    Returns:
        1 if all predictions are right, 0 if they are as good as chance.

    Source: Cohen, "A Coefficient of Agreement for Nominal Scales", Educational and Psychological
    Measurement 20, 1960.
    """
    k = int(max(truth.max(), predicted.max())) + 1
    shares = [np.bincount(each, minlength=k) / len(truth) for each in (truth, predicted)]
    chance, accuracy = float(shares[0] @ shares[1]), float(np.mean(truth == predicted))
    return 1.0 if chance == 1 else (accuracy - chance) / (1 - chance)


def suspicion(
    truth: NDArray[np.int64], predicted: NDArray[np.int64], classes: Sequence[str]
) -> str | None:
    """What is likely wrong where a classifier disagrees with the labels of ID images.

    Near chance (κ < 0.2, "slight agreement" to Landis and Koch, Biometrics 33, 1977) either the
    classes are named in another order than that of the logits, or the images are not prepared as
    in training. It is the order if with another one agreement would be substantial (κ ≥ 0.6) and
    far better than it is, which is told at any accuracy.

    Args:
        truth: labels (N,), N ≥ 1.
        predicted: the classifier's labels (N,).
        classes: names of the K classes.

    Returns:
        One sentence; None if nothing is suspicious.
    """
    n, accuracy = len(truth), 100 * float(np.mean(truth == predicted))
    told = f"The classifier is right for {accuracy:.1f} % of {n} labelled validation images"
    present, places = np.unique(np.concatenate([truth, predicted]), return_inverse=True)
    # A few images of many classes agree with some order by chance.
    if len(present) <= min(MANY, n / 10):
        counts = np.zeros((len(present),) * 2, np.int64)
        np.add.at(counts, (places[:n], places[n:]), 1)
        _, columns = linear_sum_assignment(counts, maximize=True)
        renamed = np.argsort(columns)[places[n:]]
        best = 100 * float(np.mean(renamed == places[:n]))
        if best - accuracy >= GAIN and kappa(places[:n], renamed) >= SUBSTANTIAL:
            agreed = np.where(columns == np.arange(len(present)), 0, counts.max(axis=1))
            row = int(agreed.argmax())
            one, other = (classes[present[place]] for place in (row, columns[row]))
            return (
                f"{told}, and would be for {best:.1f} % if its classes were named in another order "
                f"(it takes most images of {one!r} for {other!r}): are the names of the classes in "
                "the order of the logits?"
            )
    if kappa(truth, predicted) >= SLIGHT:
        return None
    return (
        f"{told}, which is near chance for {len(classes)} classes: are the names of the classes in "
        "the order of the logits, and is the preprocessing that of the training?"
    )
