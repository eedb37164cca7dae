"""Imports point downwards only, and heavy libraries wait until they are needed."""

import ast
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]

# From the bottom up; a module may import from its own layer's predecessors and its own layer.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors", "files", "energy", "progress", "artifacts"),
    ("tensors", "sensitivity", "masks", "metrics", "tables"),
    ("search", "sources"),
    ("datasets", "proxies", "backbones", "training", "features", "nero"),
    ("baselines",),
    ("detector",),
    ("comparison",),
    ("parameters",),
    ("report",),
    ("stages", "tracking", "cli", "__main__"),
)


def imported(path: Path) -> set[str]:
    """Full names of the modules a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_every_module_has_its_layer() -> None:
    found = {path.stem for path in (ROOT / "opnp").glob("*.py")} - {"__init__"}
    assert found == {module for layer in LAYERS for module in layer}


def test_imports_point_downwards() -> None:
    height = {module: level for level, layer in enumerate(LAYERS) for module in layer}
    for module, level in height.items():
        for name in imported(ROOT / "opnp" / f"{module}.py"):
            part = name.split(".")[1] if name.startswith("opnp.") else ""
            assert height.get(part, 0) <= level, f"opnp.{module} imports {name}"


def test_the_core_knows_no_orchestration() -> None:
    for path in (ROOT / "opnp").glob("*.py"):
        tops = {name.split(".")[0] for name in imported(path)}
        assert not tops & {"prefect", "dvc", "flows"}, path.name
        assert "mlflow" not in tops or path.stem == "tracking"
    for module in ("energy", "sensitivity", "masks", "search"):
        tops = {name.split(".")[0] for name in imported(ROOT / "opnp" / f"{module}.py")}
        third = tops - {"torch", "numpy", "opnp"} - {"collections", "dataclasses", "itertools"}
        assert third <= {"fractions", "functools", "math", "pathlib", "typing"}, (module, third)


def test_a_stage_depends_on_the_code_it_runs() -> None:
    """What dvc.yaml lists and what the module of a result imports agree, down to the core."""
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    concerned = {
        "train": {"training", "backbones", "datasets"},
        "features": {"features", "proxies", "backbones", "datasets"},
        "sensitivity": {"sensitivity", "features"},
        "search": {"search", "features"},
        "evaluate": {"comparison", "baselines", "features", "tables"},
        "report": {"report"},
    }
    # Of no influence on results: errors, how files are written, progress, fixed places.
    plain = {"errors", "files", "progress", "artifacts", "tensors", "parameters", "opnp"}
    for stage, modules in concerned.items():
        listed = {Path(dep).stem for dep in stages[stage]["deps"] if str(dep).endswith(".py")}
        assert modules | {"stages"} <= listed, stage
        for module in listed - {"stages"}:
            names = imported(ROOT / "opnp" / f"{module}.py")
            needed = {name.split(".")[1] for name in names if name.startswith("opnp.")}
            # search and sensitivity reach evaluate and features as files, not as code
            reached = needed & {path.stem for path in (ROOT / "opnp").glob("*.py")} - plain
            assert reached - {"search", "sensitivity", "energy"} <= listed, (stage, module)
