"""The face of the package: what `import opnp` gives, and what it costs."""

import subprocess
import sys

import pytest

import opnp

NAMES = {
    "OPNP", "InputError", "PruningMask", "SavedDetector", "SearchSettings", "load",
    "neuron_sensitivity", "parameter_sensitivity", "search_masks",
}  # fmt: skip


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_importing_the_package_imports_no_heavy_library() -> None:
    heavy = "{'torch', 'numpy', 'pytorch_ood', 'sklearn', 'scipy', 'pydantic', 'mlflow'}"
    assert run(f"import sys, opnp; opnp.InputError; print({heavy} & set(sys.modules))") == "set()"


def test_every_public_name_is_there_and_no_other() -> None:
    assert set(dir(opnp)) == NAMES
    for name in NAMES:
        assert getattr(opnp, name).__name__ == name
    with pytest.raises(ImportError, match="absent"):
        from opnp import absent  # type: ignore[attr-defined] # noqa: F401 (mypy sees it, too)


def test_a_star_import_gives_the_public_names() -> None:
    code = "from opnp import *; print(*sorted(set(dir()) - set(dir(__builtins__))))"
    assert set(run(code).split()) >= NAMES
