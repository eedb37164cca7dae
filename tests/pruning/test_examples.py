"""The examples in the docstrings of the room give what they say."""

import doctest
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import nn

import opnp.pruning
from opnp.pruning.sensitivity import measure

MODULES = sorted(path.stem for path in Path(opnp.pruning.__file__).parent.glob("[a-z]*.py"))


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_run(name: str) -> None:
    module = import_module(f"opnp.pruning.{name}")
    names = {"torch": torch, "nn": nn, "measure": measure, **vars(module)}
    torch.manual_seed(0)
    found = doctest.testmod(module, globs=names, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert found.failed == 0


def test_most_modules_have_examples() -> None:
    found = [import_module(f"opnp.pruning.{name}") for name in MODULES]
    examples = [sum(len(each.examples) for each in doctest.DocTestFinder().find(m)) for m in found]
    assert sum(count > 0 for count in examples) >= len(MODULES) - 1
