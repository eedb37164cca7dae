"""CADRef: how far features are from the mean of the predicted class, split by what they do to it.

With k the predicted class, μ_k the mean features of the training samples of that label and S(x) a
score of the logits, the error h − μ_k is divided into the part that raises the logit of k and the
part that lowers it,

    e⁺(x) = Σ_j max(+s_j (h_j − μ_kj), 0) / ‖h‖₁,    e⁻(x) = Σ_j max(−s_j (h_j − μ_kj), 0) / ‖h‖₁,

with s_j the sign of W_kj. The outlier score is e⁺/S(x) + e⁻/S̄, where S̄ is the mean of S over the
training samples; CARef is e⁺ + e⁻ alone.

Source: Ling et al., "CADRef: Robust Out-of-Distribution Detection via Class-Aware Decoupled
Relative Feature Leveraging", CVPR 2025, arXiv 2503.00325. From the authors' code
(github.com/LingAndZero/CADRef): GEN, energy, maximum logit or maximum softmax probability as S,
where GEN is taken as 1 / Σ p^γ (1 − p)^γ over the largest tenth, at least ten, of the
probabilities, with γ = 0.1. Decided here: a logit score of zero or below, which can turn the sign
of the first term, counts as a small positive number, and features that are all zero have an error
of zero.
"""

from collections.abc import Callable

from torch import Tensor, nn

from opnp.detectors.base import Maker
from opnp.detectors.cached import CachedDetector, about, class_means
from opnp.errors import InputError

__all__ = ["CADRef"]

SMALLEST = 1e-6


def gen(logits: Tensor) -> Tensor:
    """1 / Σ p^γ (1 − p)^γ over the largest probabilities; γ = 0.1."""
    kept = min(logits.shape[1], max(10, logits.shape[1] // 10))
    p = logits.softmax(dim=1).topk(kept, dim=1).values
    return 1 / (p**0.1 * (1 - p) ** 0.1).sum(dim=1).clamp(min=SMALLEST)


SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "gen": gen,
    "energy": lambda logits: logits.logsumexp(dim=1),
    "maxlogit": lambda logits: logits.amax(dim=1),
    "msp": lambda logits: logits.softmax(dim=1).amax(dim=1),
}


class CADRef(CachedDetector):
    """Class-aware decoupled relative features; see the module's formulas."""

    info = about(
        "CADRef: Robust Out-of-Distribution Detection via Class-Aware Decoupled Relative Feature "
        "Leveraging",
        "CVPR",
        2025,
        "https://arxiv.org/abs/2503.00325",
        "https://github.com/LingAndZero/CADRef",
    )
    hyperparameter_space = {"logit_score": ["energy", "gen", "maxlogit", "msp"]}
    fitted = ("means", "mean_score")

    means: Tensor | None  # (K, L)
    mean_score: Tensor | None  # S̄, a scalar

    def __init__(
        self,
        encoder: Callable[[Tensor], Tensor] | None,
        head: nn.Linear,
        logit_score: str = "energy",
    ):
        """
        Args:
            encoder: maps inputs to penultimate features (N, L); None if only features are given.
            head: the classifier's last layer; a copy is kept.
            logit_score: S, a key of `SCORES`.

        Raises:
            InputError: there is no such score.
        """
        super().__init__(encoder, head)
        self.logit_score = logit_score
        self._check()

    def _check(self) -> None:
        if self.logit_score not in SCORES:
            raise InputError(
                f"CADRef knows no logit score {self.logit_score!r}: choose from "
                f"{', '.join(SCORES)}."
            )

    def _logit_score(self, logits: Tensor) -> Tensor:
        return SCORES[self.logit_score](logits).clamp(min=SMALLEST)

    def _fit(self, h: Tensor, y: Tensor) -> None:
        self.means, _ = class_means(h, y, self.head.out_features)
        self.mean_score = self._logit_score(self.logits(h)).mean()

    def _score(self, h: Tensor) -> Tensor:
        assert self.means is not None
        assert self.mean_score is not None
        logits = self.logits(h)
        predicted = logits.argmax(dim=1)
        signed = (h - self.means[predicted]) * self.weight[predicted].sign()
        size = h.abs().sum(dim=1).clamp(min=SMALLEST)
        raising, lowering = (each.clamp(min=0).sum(dim=1) / size for each in (signed, -signed))
        return raising / self._logit_score(logits) + lowering / self.mean_score


MAKERS: dict[str, Maker] = {"cadref": lambda m: CADRef(None, m.head)}
