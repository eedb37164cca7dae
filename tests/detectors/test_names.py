"""The one list of detectors: its rows, their makers, and what names are accepted."""

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from pytorch_ood.api import Detector, LogitsDetector

from opnp.detectors.base import make, takes_images
from opnp.detectors.names import (
    DETECTORS,
    alone,
    check,
    detector_name,
    label,
    maker,
    ours,
    unpruned,
)
from opnp.detectors.searched import SearchedMask
from opnp.errors import InputError, UnavailableError
from opnp.pruning.methods import METHODS
from tests.conftest import ROOT
from tests.detectors.test_zoo import BARE, MODEL


def test_every_row_has_a_maker_and_every_maker_a_row() -> None:
    modules = {row.module for row in DETECTORS.values()}
    made = [(module, key) for module in modules for key in import_module(module).MAKERS]
    assert sorted(made) == sorted((row.module, key) for key, row in DETECTORS.items())
    assert len({row.name for row in DETECTORS.values()}) == len(DETECTORS)


def takes(detector: Detector) -> str:
    if isinstance(detector, SearchedMask):
        return "search"
    if takes_images(detector):
        return "images"
    return "logits" if isinstance(detector, LogitsDetector) else "features"


@pytest.mark.parametrize("key", DETECTORS)
def test_a_row_says_what_its_detector_takes(key: str) -> None:
    assert takes(make(key, MODEL)) == DETECTORS[key].takes


def test_the_methods_of_the_search_are_detectors() -> None:
    assert {key for key, row in DETECTORS.items() if row.takes == "search"} == set(METHODS)
    with pytest.raises(UnavailableError, match=r"^onp needs a mask search, and there was none\.$"):
        make("onp", BARE)


def test_names_are_checked_without_pytorch_ood() -> None:
    code = (
        "import sys; from pathlib import Path; from opnp.pipeline import parameters; "
        f"found = parameters.load(Path({str(ROOT / 'params.yaml')!r})); "
        "assert 'opnp+gen' in found.evaluate.detectors; "
        "print([each for each in ('pytorch_ood', 'sklearn') if each in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_importing_the_list_costs_nothing() -> None:
    code = "import sys; import opnp.detectors.names; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("name", "shown", "own", "key"),
    [
        ("opnp", "OPNP", True, "opnp"),
        ("opnp+vim", "OPNP+ViM", True, "vim"),
        ("opnp+react", "OPNP+ReAct", True, "opnp+react"),
        ("onp", "ONP", True, "onp"),
        ("clip", "Clip", False, "clip"),
        ("vim", "ViM", False, "vim"),
        ("mine", "mine", False, "mine"),
        ("mine:distance", "mine:distance", False, "mine:distance"),
        ("opnp+mine:distance", "OPNP+mine:distance", True, "mine:distance"),
    ],
)
def test_names(name: str, shown: str, own: bool, key: str) -> None:
    assert detector_name(name) == shown
    assert ours(name) is own
    assert alone(name) == key


def test_what_might_prune_but_did_not_says_so() -> None:
    assert label("opnp+vim", 0.0) == "OPNP+ViM (nothing pruned)"
    assert label("opnp+vim", 0.01) == "OPNP+ViM"
    assert label("vim", None) == "ViM"
    assert label("opnp+vim", 0.0, "vim") == "OPNP+ViM = ViM"


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("opnp+vim", "vim"),
        ("opnp+react", "clip"),
        ("opp", "energy"),
        ("opnp&vim", "energy&vim"),
        ("opnp+mine:distance&knn", "mine:distance&knn"),
        ("clip", "clip"),
        ("vim&knn", "vim&knn"),
    ],
)
def test_what_is_left_where_nothing_is_pruned(name: str, other: str) -> None:
    assert unpruned(name) == other
    assert ours(name) == (name != other)


@pytest.mark.parametrize("name", ["energy", "opnp", "opnp+energy", "opnp+react"])
def test_names_of_detectors_are_accepted(name: str) -> None:
    check(name)


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("oddin", "odin?"),
        ("knm", "knn?"),
        ("opnp+opnp", "opnp, opp or onp?"),
        ("opnp+opp", "opp, opnp or onp?"),
        ("opnp+opnp+react", "opnp+react or react?"),
        ("opnp+reakt", "react or rankfeat?"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(name: str, near: str) -> None:
    with pytest.raises(InputError) as refused:
        check(name)
    assert str(refused.value) == f"There is no detector {name!r}; did you mean {near}"


@pytest.mark.parametrize("name", ["?", "", "opnp+", "a detector that nobody knows"])
def test_never_more_than_three_names_are_suggested(name: str) -> None:
    with pytest.raises(InputError, match="did you mean") as refused:
        check(name)
    said = str(refused.value).partition("did you mean ")[2].removesuffix("?")
    suggested = said.replace(" or ", ", ").split(", ")
    assert 1 <= len(suggested) <= 3
    assert set(suggested) <= DETECTORS.keys()
    with pytest.raises(InputError, match="There is no detector"):
        maker(f"{name}?")


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of the user's that can be imported."""
    (tmp_path / "mine_of_names.py").write_text(
        "number = 1\ndef one(model):\n    return 1\ndef knn(model):\n"
        "    from pytorch_ood.detector import KNN\n    return KNN(None)\n"
    )
    (tmp_path / "broken_of_names.py").write_text("one = 1 / 0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return "mine_of_names"


def test_a_factory_makes_a_detector(module: str) -> None:
    for name in (f"{module}:knn", f"opnp+{module}:knn"):
        check(name)
        assert takes(make(alone(name), BARE)) == "features"


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ("absent_of_names:one", "absent_of_names:one cannot be imported .No module named 'absent"),
        ("broken_of_names:one", "broken_of_names:one cannot be imported .division by zero"),
        ("mine_of_names:two", "mine_of_names:two does not exist: name a function of the module"),
        ("mine_of_names:number", "mine_of_names:number is not a function: name a function"),
        ("mine_of_names:", "'mine_of_names:' is not of the form module:factory"),
        ("a b:one", "'a b:one' is not of the form module:factory"),
        (":one", "':one' is not of the form module:factory"),
        ("mine_of_names:one:two", "'mine_of_names:one:two' is not of the form module:factory"),
    ],
)
@pytest.mark.parametrize("prefix", ["", "opnp+"])
@pytest.mark.usefixtures("module")
def test_a_factory_that_is_not_there_is_refused(prefix: str, spec: str, sentence: str) -> None:
    with pytest.raises(InputError, match=f"^The detector {sentence}") as refused:
        check(prefix + spec)
    assert "\n" not in str(refused.value)
    assert str(refused.value).endswith(".")


def test_what_a_factory_returns_must_be_a_detector(module: str) -> None:
    check(f"{module}:one")  # only with a model can it be called
    with pytest.raises(InputError, match=r"^The detector .*:one is of the type int: let its"):
        make(f"{module}:one", BARE)


def test_a_module_is_imported_only_if_it_is_named(
    module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, module, raising=False)
    for name in ("energy", "opnp+knn"):
        check(name)
    assert module not in sys.modules
    check(f"opnp+{module}:one")
    assert module in sys.modules
