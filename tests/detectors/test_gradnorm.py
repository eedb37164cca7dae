"""GradNorm on cached features, against its formula."""

import torch

from opnp.detectors.base import score
from tests.detectors.test_zoo import HEAD, MODEL, OUTSIDE, K, fitted, one_thread

__all__ = ["one_thread"]  # a fixture that all tests here use


def test_gradnorm_is_the_norm_of_the_last_layers_gradient() -> None:
    h = OUTSIDE.features
    off = ((HEAD(h)).softmax(dim=1) - 1 / K).abs().sum(dim=1)
    expected = -(off * h.abs().sum(dim=1)).double()
    torch.testing.assert_close(score(fitted("gradnorm"), MODEL, OUTSIDE), expected)
