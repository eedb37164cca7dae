"""Whether a classifier and the labels of its images speak of the same classes."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

__all__ = ["kappa", "suspicion"]

SLIGHT = 0.2
GAIN = 10.0


def kappa(counts: NDArray[np.int64]) -> float:
    """Cohen's κ: the accuracy beyond chance, as a share of what is possible beyond chance.

    Args:
        counts: images of each true class (rows) by predicted class (columns), (K, K).

    Returns:
        1 if all predictions are right, 0 if they are as good as chance.

    Source: Cohen, "A Coefficient of Agreement for Nominal Scales", Educational and Psychological
    Measurement 20, 1960.
    """
    total = counts.sum()
    observed = np.trace(counts) / total
    chance = float(counts.sum(axis=0) @ counts.sum(axis=1)) / float(total) ** 2
    return 1.0 if chance == 1 else float((observed - chance) / (1 - chance))


def suspicion(
    truth: NDArray[np.int64], predicted: NDArray[np.int64], classes: Sequence[str]
) -> str | None:
    """What is likely wrong with a classifier whose accuracy on labelled ID images is so low.

    Near chance (κ < 0.2, "slight agreement" to Landis and Koch, Biometrics 33, 1977) either the
    classes are named in another order than that of the logits, or the images are not prepared as
    in training. If another order of the names would be far more accurate, it is the order.

    Args:
        truth: labels (N,).
        predicted: the classifier's labels (N,).
        classes: names of the K classes.

    Returns:
        One sentence; None if nothing is suspicious.
    """
    k, n = len(classes), len(truth)
    counts = np.zeros((k, k), np.int64)
    np.add.at(counts, (truth, predicted), 1)
    accuracy = 100 * np.trace(counts) / n
    rows, columns = linear_sum_assignment(counts, maximize=True)
    best = 100 * counts[rows, columns].sum() / n
    told = f"The classifier is right for {accuracy:.1f} % of {n} labelled validation images"
    # A few images agree well with some order of many classes, whatever the classifier.
    if best - accuracy >= GAIN and n >= 5 * k:
        row = int(np.flatnonzero((rows != columns) & (counts[rows, columns] > 0))[0])
        return (
            f"{told}, and would be for {best:.1f} % if its classes were named in another order "
            f"(images of {classes[rows[row]]!r} are mostly predicted as "
            f"{classes[columns[row]]!r}): are the names in the order of the logits?"
        )
    if kappa(counts) >= SLIGHT:
        return None
    return (
        f"{told}, which is near chance for {k} classes: are the names of the classes in the order "
        "of the logits, and is the preprocessing that of the training?"
    )
