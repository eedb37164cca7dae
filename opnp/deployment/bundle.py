"""What a logged model needs of its maker's machine: code to copy, and libraries to require.

Both are found by reading the imports of the user's code, without running it. `check` then loads the
model as a server would, in a process that sees what was logged and no more.
"""

import ast
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from importlib.machinery import ModuleSpec
from importlib.metadata import distributions, packages_distributions, version
from pathlib import Path
from tempfile import TemporaryDirectory

import opnp
from opnp.errors import InputError

__all__ = ["check", "needs", "pin"]

INSTALLED = {"site-packages", "dist-packages"}  # folders of libraries


def needs(module: str) -> tuple[list[Path], set[str]]:
    """What a user's module imports, directly or through other modules of the user.

    Args:
        module: its full name.

    Returns:
        The user's own packages and files, to be copied whole, and the names of the libraries
        (distributions) that these need.

    Raises:
        InputError: the module is not in a file.
    """
    first = module.partition(".")[0]
    spec = found(first)
    if spec is None or not (spec.origin or spec.submodule_search_locations):
        raise InputError(f"The code of {module} is not in a file, so it cannot be copied.")
    own: dict[str, Path] = {}
    libraries: set[str] = set()
    known = packages_distributions()
    waiting = [first]
    while waiting:
        name = waiting.pop()
        if name in own or name in sys.stdlib_module_names or name == opnp.__name__:
            continue
        spec = found(name)
        if spec is None:  # imported in a condition, perhaps: `check` will tell
            continue
        place = place_of(spec)
        if place is None:
            continue
        if INSTALLED & set(place.parts):
            libraries |= set(known.get(name, ()))
            continue
        own[name] = place
        for file in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            waiting += imported(file)
    return list(own.values()), libraries


def found(name: str) -> ModuleSpec | None:
    try:
        return importlib.util.find_spec(name)
    except (ImportError, ValueError):  # a module that was made, not found, has none
        return None


def place_of(spec: ModuleSpec) -> Path | None:
    """The package's folder or the module's file; None if it is in neither."""
    if spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations)))
    return Path(spec.origin) if spec.origin and spec.has_location else None


def imported(file: Path) -> Iterator[str]:
    """The first names of all modules that a file imports, relative ones excepted."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):  # another version's file, which nothing may ever import
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.partition(".")[0]


def pin(library: str) -> str:
    """A requirement of the installed version, without the name of a local build.

    No index has builds such as torch 2.9.0+cu128; their public version is the same code.
    """
    return f"{library}=={version(library).partition('+')[0]}"


ALONE = """
import importlib.abc, json, os, sys

folder, hidden, folders = json.loads(sys.argv[1])
sys.path[:] = [path for path in sys.path if os.path.realpath(path or ".") not in folders]

class Hide(importlib.abc.MetaPathFinder):  # as if not installed, also to those who only ask
    def __init__(self, finders):
        self.finders = finders

    def find_spec(self, name, path=None, target=None):
        found = (each.find_spec(name, path, target) for each in self.finders)
        return None if name in hidden else next(filter(None, found), None)

    def find_distributions(self, *context):
        for each in self.finders:
            if hasattr(each, "find_distributions"):
                yield from each.find_distributions(*context)

sys.meta_path[:] = [Hide([*sys.meta_path])]
from mlflow import pyfunc
model = pyfunc.load_model(folder)
scores = model.predict(model.input_example)["score"]
assert len(scores) == 1
"""


def check(folder: Path, libraries: Iterable[str], code: Iterable[Path]) -> None:
    """Load a logged model and score its example, in a fresh process and with what was logged.

    Args:
        folder: the MLflow model.
        libraries: that are among its requirements; the user's code may import no other.
        code: the packages and files that were copied: their originals are hidden.

    Raises:
        InputError: it cannot be loaded; the sentence says why.
    """
    folders = {str(path.resolve().parent) for path in code}
    folders = {path for path in folders if not INSTALLED & set(Path(path).parts)}
    hidden = unneeded(libraries)
    words = json.dumps([str(folder), sorted(hidden), sorted(folders)])
    with TemporaryDirectory() as empty:
        done = subprocess.run(
            [sys.executable, "-P", "-c", ALONE, words],
            cwd=empty,
            env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        reason = lines[-1].strip() if lines else f"exit code {done.returncode}"
        raise InputError(
            f"The model cannot be loaded with what was logged of it ({reason.rstrip('.')}): keep "
            "what its code reads beside the module that makes it, and import libraries by name."
        )


def unneeded(libraries: Iterable[str]) -> set[str]:
    """The modules of installed libraries that no requirement leads to."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    # Of a name there may be several, such as a build of one's own before the public one.
    stated: dict[str, list[str]] = {}
    for each in distributions():
        stated.setdefault(canonicalize_name(each.name), []).extend(each.requires or ())
    wanted: set[str] = set()
    waiting = [canonicalize_name(each) for each in libraries]
    while waiting:
        name = waiting.pop()
        if name in wanted:
            continue
        wanted.add(name)
        waiting += [canonicalize_name(Requirement(each).name) for each in stated.get(name, ())]
    modules = packages_distributions().items()
    return {
        module
        for module, of in modules
        if not wanted & {canonicalize_name(each) for each in of} and module != opnp.__name__
    }
