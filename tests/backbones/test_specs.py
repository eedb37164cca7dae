"""Specs come back as they were written, and name code only where they seem to."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opnp.backbones import specs
from opnp.errors import InputError

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
values = scalars | st.lists(scalars, max_size=3)
names = st.from_regex(r"[a-z_][a-z_0-9]{0,8}", fullmatch=True).filter(lambda n: n != "name")


@given(st.dictionaries(names, values.filter(lambda v: v not in (float("inf"), float("-inf")))))
def test_a_spec_comes_back_as_it_was_written(options: dict[str, Any]) -> None:
    finite = {k: v for k, v in options.items() if "inf" not in str(v)}
    assert specs.parse(specs.write("timm:resnet18", **finite)) == ("timm:resnet18", finite)


@pytest.mark.parametrize(
    ("spec", "name", "options"),
    [
        ("resnet", "resnet", {}),
        ("net:make?", "net:make", {}),
        ("a.b:c?width=6&deep=true", "a.b:c", {"width": 6, "deep": True}),
        ("timm:x.tag?global_pool=max", "timm:x.tag", {"global_pool": "max"}),
        ("torchvision:x?sizes=[1,2]&p=0.5", "torchvision:x", {"sizes": [1, 2], "p": 0.5}),
        ('net:make?path=a%26b&text="1"', "net:make", {"path": "a&b", "text": "1"}),
        ("net:make?rate=NaN", "net:make", {"rate": "NaN"}),
    ],
)
def test_what_a_spec_says(spec: str, name: str, options: dict[str, Any]) -> None:
    assert specs.parse(spec) == (name, options)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("net:make?width", "'width' of net:make.width is not of the form NAME=VALUE"),
        ("net:make?width=", "is not of the form"),
        ("net:make?=3", "is not of the form"),
        ("net:make?a-b=3", "is not of the form"),
        ("net:make?a=3&a=4", "option a of .* is given twice"),
    ],
)
def test_options_that_are_not_any(spec: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        specs.parse(spec)


@pytest.mark.parametrize(
    ("name", "factory", "trusted"),
    [
        ("resnet", None, True),
        ("timm:vit_tiny", None, True),
        ("net:make", None, False),
        ("net:make", "net:make", True),
        ("net:make", "net:make?width=6", True),  # the file states its options itself
        ("net:make", "net:other", False),
        ("resnet?x", None, False),  # no file that was written here names a model so
        ("timm", None, True),  # which then is not found
    ],
)
def test_code_runs_only_where_it_is_trusted(name: str, factory: str | None, trusted: bool) -> None:
    assert specs.trusts(name, factory) is trusted


def test_a_spec_with_options_names_code_as_one_without() -> None:
    assert specs.is_factory("net:make?width=6")
    assert not specs.is_factory("torchvision:resnet18?width_per_group=32")
    assert not specs.is_factory("resnet")
