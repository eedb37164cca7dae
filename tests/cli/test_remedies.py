"""Programs add the remedy in their own words."""

import ast
import re

import pytest

from opnp.cli import remedies
from opnp.cli.remedies import called_as, tell
from opnp.errors import InputError
from tests.test_layers import FILES


@pytest.mark.parametrize(
    ("path", "about", "said"),
    [
        ("opnp fit", "weights", "x is missing: correct --weights."),
        ("opnp run", "weights", "x is missing: correct train.checkpoint in params.yaml."),
        ("python -m flows.train", "weights", "x is missing: correct train.checkpoint in params.y"),
        ("opnp stage search", "stage:features", "x is missing: run `opnp stage features`."),
        ("python -m flows.search", "stage:features", "x is missing: run `python -m flows.features"),
        ("opnp compare", "run", "x is missing: run `opnp run`."),
        ("python -m flows.report", "run", "x is missing: run `python -m flows.pipeline`."),
        ("opnp monitor", "retrain", "x is missing: run `opnp retrain`."),
        ("opnp stage search", "search.clip", "x is missing: correct search.clip in params.yaml."),
        ("opnp fit", "search.clip", "x is missing: correct search.clip in params.yaml."),
        ("opnp show", None, "x is missing."),
    ],
)
def test_the_remedy_is_in_the_words_of_the_program(path: str, about: str, said: str) -> None:
    with called_as(path):
        told = tell(InputError("x is missing.", about))
    assert told.startswith(said)
    assert told.endswith(".")


def test_a_sentence_with_a_colon_takes_the_remedy_in_parentheses() -> None:
    with called_as("opnp fit"):
        told = tell(InputError("x is not a file of weights: it is empty.", "weights"))
    assert told == "x is not a file of weights: it is empty (correct --weights)."


def test_a_question_is_left_as_it_is() -> None:
    with called_as("opnp fit"):
        assert tell(InputError("No x; did you mean y?", "weights")) == "No x; did you mean y?"


def test_all_that_the_library_calls_at_fault_has_a_remedy() -> None:
    known = {*remedies.FIT, *remedies.PIPELINE, *remedies.OTHERS, "run", "retrain"}
    found = set()
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not getattr(node.func, "id", "").endswith("Error"):
                continue
            given = [*node.args[1:2], *(each.value for each in node.keywords)]
            found |= {each.value for each in given if isinstance(each, ast.Constant)}
    assert "weights" in found
    for about in found - known:
        assert re.fullmatch(r"stage:\w+|[a-z]+\.\w+", str(about)), about
