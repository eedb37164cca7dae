"""What the programs read besides images and weights."""

from pathlib import Path

import pytest

from opnp.cli.words import read_classes
from opnp.errors import InputError


@pytest.mark.parametrize(
    ("content", "names"),
    [
        ("cat\ndog\n", ["cat", "dog"]),
        ("cat\ndog", ["cat", "dog"]),
        ("cat\r\ndog\r\n\r\n", ["cat", "dog"]),
        ("\ufeffcat\ndog\n", ["cat", "dog"]),
        ("  cat \ndog\t\n \n", ["cat", "dog"]),
        ("cat\n\ndog\n", ["cat", "", "dog"]),  # which is refused where it is used
        ("", []),
        ("\n", []),
    ],
)
def test_names_of_classes_are_read_as_they_are_meant(
    content: str, names: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "classes.txt"
    path.write_bytes(content.encode())
    assert read_classes(path) == names


def test_names_that_cannot_be_read(tmp_path: Path) -> None:
    assert read_classes(None) is None
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    for name in ("absent.txt", "latin.txt"):
        with pytest.raises(InputError, match=rf"{name} cannot be read") as error:
            read_classes(tmp_path / name)
        assert error.value.about == "classes"
