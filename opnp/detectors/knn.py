"""KNN: the distance to the k-th nearest training sample, of features of length 1.

    score(h) = ‖ĥ − ĥ_(k)‖,   ĥ = h / ‖h‖,

with ĥ_(k) the k-th nearest of the bank. The bank holds all training features, or of very many a
random part: the authors' ablation finds 1 % of ImageNet's enough.

Source: Sun, Ming, Zhu and Li, "Out-of-Distribution Detection with Deep Nearest Neighbors", ICML
2022, arXiv 2204.06507.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from opnp.detectors.base import Maker
from opnp.detectors.cached import CachedDetector, about
from opnp.errors import InputError

__all__ = ["KNN"]

BLOCK = 1 << 25  # similarities held at once
NEIGHBOURS = [1, 2, 5, 10, 20, 50, 200, 1000]  # values of k to try


class KNN(CachedDetector):
    """Distance to the k-th nearest neighbour among normalized training features.

    >>> detector = KNN(None, nn.Linear(4, 2), k=1)
    >>> bank = torch.eye(4)
    >>> detector.fit_features(bank, torch.tensor([0, 1, 0, 1])).predict_features(2 * bank).tolist()
    [0.0, 0.0, 0.0, 0.0]
    """

    info = about(
        "Out-of-Distribution Detection with Deep Nearest Neighbors",
        "ICML",
        2022,
        "https://arxiv.org/abs/2204.06507",
        code="https://github.com/deeplearning-wisc/knn-ood",
    )
    hyperparameter_space = {"k": NEIGHBOURS}
    fitted = ("bank",)
    at_once = frozenset({"k"})

    bank: Tensor | None  # ĥ of training samples, float32 (n, L)

    def __init__(
        self,
        encoder: Callable[[Tensor], Tensor] | None,
        head: nn.Linear,
        k: int = 50,
        largest: int = 50_000,
        seed: int = 0,
    ):
        """
        Args:
            encoder: maps inputs to penultimate features (N, L); None if only features are given.
            head: the classifier's last layer; a copy is kept.
            k: which neighbour counts; fitting lowers it to the number of samples in the bank.
            largest: number of training samples that the bank holds at most.
            seed: of the draw, where there are more.

        Raises:
            InputError: ``k`` or ``largest`` is not positive.
        """
        super().__init__(encoder, head)
        self.k, self.largest, self.seed = k, largest, seed
        self._check()

    def _check(self) -> None:
        if self.k < 1 or self.largest < 1:
            raise InputError(f"k={self.k} and largest={self.largest} must be positive.")

    def _fit(self, h: Tensor, y: Tensor) -> None:
        if len(h) > self.largest:
            drawn = torch.Generator().manual_seed(self.seed)
            h = h[torch.randperm(len(h), generator=drawn)[: self.largest].sort().values]
        self.bank = F.normalize(h, dim=1).float()
        self.k = min(self.k, len(self.bank))

    def _score(self, h: Tensor) -> Tensor:
        assert self.bank is not None
        k, rows = min(self.k, len(self.bank)), max(1, BLOCK // len(self.bank))
        found = [
            (part @ self.bank.T).topk(k, dim=1).values[:, -1]
            for part in F.normalize(h, dim=1).float().split(rows)
        ]
        # Of vectors of length 1, the squared distance is 2 − 2 cos.
        return (2 - 2 * torch.cat(found).double()).clamp(min=0).sqrt()


MAKERS: dict[str, Maker] = {"knn": lambda m: KNN(None, m.head)}
