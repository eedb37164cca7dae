"""KNN against pytorch-ood's, which searches with scikit-learn."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pytorch_ood.detector import KNN as Library
from torch import nn

from opnp.detectors.knn import KNN
from opnp.errors import InputError


@given(st.integers(1, 40), st.integers(0, 2**31))
def test_scores_are_those_of_the_library(k: int, seed: int) -> None:
    drawn = torch.Generator().manual_seed(seed)
    train, test = torch.randn(40, 6, generator=drawn), torch.randn(9, 6, generator=drawn)
    labels = torch.arange(40) % 3
    ours = KNN(None, nn.Linear(6, 3), k=k).fit_features(train, labels)
    theirs = Library(None, k=k).fit_features(train, labels)
    expected = theirs.predict_features(test).double()
    torch.testing.assert_close(ours.predict_features(test), expected, rtol=1e-4, atol=1e-3)


def test_a_bank_holds_at_most_what_is_asked_and_k_is_bounded_by_it() -> None:
    train, labels = torch.rand(50, 4), torch.arange(50) % 2
    detector = KNN(None, nn.Linear(4, 2), k=1000, largest=10).fit_features(train, labels)
    assert detector.bank is not None
    assert detector.bank.shape == (10, 4)
    whole = {tuple(row) for row in nn.functional.normalize(train.double()).float().tolist()}
    assert {tuple(row) for row in detector.bank.tolist()} < whole
    farthest = 2 - 2 * (nn.functional.normalize(train) @ detector.bank.T).amin(dim=1).double()
    torch.testing.assert_close(
        detector.predict_features(train), farthest.sqrt(), rtol=1e-4, atol=1e-3
    )


def test_a_k_that_is_not_positive_is_refused() -> None:
    with pytest.raises(InputError, match="k=0"):
        KNN(None, nn.Linear(4, 2), k=0)
