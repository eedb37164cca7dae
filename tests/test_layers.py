"""Rooms import only rooms below them, and heavy libraries stay where they belong."""

import ast
import re
from pathlib import Path

import pytest
from ruamel.yaml import YAML

ROOT = Path(__file__).parents[1]

# From the ground up. A room may import the rooms before it; tracking may not import the pipeline.
ROOMS = (
    "errors",
    "workspace",
    "runtime",
    "metrics",
    "pruning",
    "data",
    "backbones",
    "detectors",
    "deployment",
    "tracking",
    "pipeline",
    "cli",
)
DOORS = {"__init__", "__main__", "serving"}  # the package's face, its program, and a loader's shim

SEAM = ROOT / "opnp" / "cli" / "pipeline.py"  # the one place where `opnp` calls `flows`

# What only programs may say in an error: commands, options, files and keys of parameters.
PROGRAMS = re.compile(
    r"python -m|`opnp |(^|[\s`'\"(])--[a-z]|params\.yaml|"
    r"(?<![\w./])(train|data|search|evaluate|engine|features|energy|retrain)\.[a-z_]+(?!\w|[.(]\w)"
)

FILES = sorted((ROOT / "opnp").rglob("*.py"))


def room(path: Path) -> str:
    """The room of a module of `opnp`, or the module itself where it stands in none."""
    return path.relative_to(ROOT / "opnp").parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """Full names of the modules a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_every_module_stands_in_a_room() -> None:
    assert {room(path) for path in FILES} == {*ROOMS, *DOORS}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_downwards(path: Path) -> None:
    if room(path) in DOORS:
        return
    height = ROOMS.index(room(path))
    for name in imported(path):
        parts = name.split(".")
        if parts[0] == "opnp" and len(parts) > 1 and parts[1] in ROOMS:
            assert ROOMS.index(parts[1]) <= height, f"{path} imports {name}"
        assert parts[0] not in {"prefect", "dvc"}, f"{path} imports {name}"
        assert parts[0] != "flows" or path == SEAM, f"{path} imports {name}"


def test_the_program_imports_the_flows_only_when_a_command_runs() -> None:
    for node in ast.parse(SEAM.read_text()).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [getattr(node, "module", None), *(alias.name for alias in node.names)]
            assert not any(str(name).startswith("flows") for name in names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_library_prints_nothing_and_leaves_remedies_to_programs(path: Path) -> None:
    if room(path) == "cli":
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            assert getattr(node.func, "id", "") != "print", f"{path}:{node.lineno}"
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
            parts = [each for each in ast.walk(node.exc.args[0]) if isinstance(each, ast.Constant)]
            fact = "{}".join(str(each.value) for each in parts)
            # What is read from params.yaml is validated under the names of the file.
            if path != ROOT / "opnp" / "pipeline" / "parameters.py":
                assert not PROGRAMS.search(fact), f"{path}:{node.lineno}: {fact}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_functions_fit_on_a_screen(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef) and node.end_lineno is not None:
            longest = 95 if (path.name, node.name) == ("table.py", "table") else 80
            assert node.end_lineno - node.lineno < longest, f"{path}: {node.name}"


def test_mlflow_is_known_to_tracking_alone() -> None:
    knowing = {path for path in FILES if any(n.split(".")[0] == "mlflow" for n in imported(path))}
    assert {room(path) for path in knowing} == {"tracking", "deployment"}
    names = {path.name for path in knowing if room(path) == "deployment"}
    assert names == {"http.py", "mlflow_model.py"}


def test_the_paper_needs_torch_and_numpy_alone() -> None:
    """And pydantic, for its settings, which are read where torch has not been imported yet."""
    standard = {"collections", "dataclasses", "fractions", "functools", "itertools", "math"}
    standard |= {"logging", "pathlib", "typing"}
    for path in (ROOT / "opnp" / "pruning").glob("*.py"):
        tops = {name.split(".")[0] for name in imported(path)}
        libraries = {"pydantic"} if path.name == "settings.py" else {"torch", "numpy"}
        assert tops <= {"opnp"} | libraries | standard, path


PIPELINE = ROOT / "opnp" / "pipeline"


@pytest.mark.parametrize(
    "path",
    [path for path in FILES if path.is_relative_to(PIPELINE) and path.name != "__init__.py"],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_what_stages_write_is_read_through_results_alone(path: Path) -> None:
    """No stage imports another, and nothing else in the room imports a stage."""
    found = {name for name in imported(path) if name.startswith("opnp.pipeline.stages")}
    assert not found, f"{path} imports {', '.join(sorted(found))}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_but_the_program_knows_the_current_folder(path: Path) -> None:
    if room(path) == "cli":
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            assert node.attr not in {"cwd", "getcwd", "chdir"}, f"{path}: line {node.lineno}"


@pytest.mark.parametrize("path", [*FILES, *sorted((ROOT / "flows").glob("*.py"))], ids=str)
def test_no_module_is_long(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400


def test_a_stage_depends_on_the_rooms_it_runs() -> None:
    """`dvc.yaml` lists every room that a stage's module imports and that can change its results."""
    # How files are written, what the parameters are, and where things lie change no result; what
    # the pruning room makes reaches later stages as files.
    neutral = {"errors", "workspace", "runtime", "tracking", "pipeline", "deployment"}
    stages = YAML(typ="safe", pure=True).load((ROOT / "dvc.yaml").read_text())["stages"]
    for stage, of in stages.items():
        listed = {Path(str(dep)) for dep in of["deps"]}
        module = Path(f"opnp/pipeline/stages/{stage}.py")
        assert module in listed, stage
        rooms = {path.parts[1] for path in listed if path.parts[0] == "opnp"}
        needed = {name.split(".")[1] for name in imported(ROOT / module) if name[:5] == "opnp."}
        assert needed - neutral <= rooms, stage
