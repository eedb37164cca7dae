"""Imports point downwards only, and heavy libraries wait until they are needed."""

import ast
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]

# From the bottom up; a module may import from its own layer's predecessors and its own layer.
LAYERS: tuple[tuple[str, ...], ...] = (
    (
        "errors",
        "files",
        "energy",
        "progress",
        "artifacts",
        "devices",
        "memory",
        "storage",
        "networks",
    ),
    ("tensors", "sensitivity", "masks", "metrics", "tables", "heads", "decoding"),
    ("search", "builtin", "collections", "formats"),
    ("sources",),
    ("datasets", "proxies", "backbones", "training", "features", "nero"),
    ("images", "baselines"),
    ("saved", "detector"),
    ("export", "fitting", "scoring", "serving"),
    ("comparison", "contest"),
    ("parameters",),
    ("report",),
    ("stages", "tracking", "registry", "cli", "__main__"),
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


def sources(module: str) -> list[Path]:
    """The file of a module, or the files of a package."""
    path = ROOT / "opnp" / module
    return sorted(path.glob("*.py")) if path.is_dir() else [path.with_suffix(".py")]


def test_every_module_has_its_layer() -> None:
    found = {path.stem for path in (ROOT / "opnp").glob("*.py")} - {"__init__"} | {"stages"}
    assert found == {module for layer in LAYERS for module in layer}


def test_imports_point_downwards() -> None:
    height = {module: level for level, layer in enumerate(LAYERS) for module in layer}
    for module, level in height.items():
        for path in sources(module):
            for name in imported(path):
                part = name.split(".")[1] if name.startswith("opnp.") else ""
                assert height.get(part, 0) <= level, f"{path} imports {name}"


def test_the_core_knows_no_orchestration() -> None:
    for path in (ROOT / "opnp").rglob("*.py"):
        tops = {name.split(".")[0] for name in imported(path)}
        assert not tops & {"prefect", "dvc", "flows"}, path.name
        assert "mlflow" not in tops or path.stem in {"tracking", "registry", "serving"}
    for module in ("energy", "sensitivity", "masks", "search"):
        tops = {name.split(".")[0] for name in imported(ROOT / "opnp" / f"{module}.py")}
        third = tops - {"torch", "numpy", "opnp"} - {"collections", "dataclasses", "itertools"}
        assert third <= {"fractions", "functools", "math", "pathlib", "typing"}, (module, third)


def test_a_stage_depends_on_the_code_it_runs() -> None:
    """What dvc.yaml lists and what the module of a result imports agree, down to the core."""
    listed = {
        stage: {Path(dep) for dep in of["deps"] if str(dep).endswith(".py")}
        for stage, of in yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"].items()
    }
    # What fetch makes is a dependency as a file. Of no influence on results: errors, how files are
    # written, progress, fixed places, which device.
    plain = {
        "errors", "files", "progress", "artifacts", "tensors", "parameters", "storage",
        "tracking",
    }  # fmt: skip
    for stage, paths in listed.items():
        modules = {path.stem for path in paths if path.parent.name == "opnp"}
        assert Path(f"opnp/stages/{stage}.py") in paths, stage
        for path in paths:
            names = imported(ROOT / path)
            needed = {name.split(".")[1] for name in names if name.startswith("opnp.")}
            reached = needed & {file.stem for file in (ROOT / "opnp").glob("*.py")} - plain
            # search and sensitivity reach evaluate and features as files, not as code, and a stage
            # reads with another stage's module what that one has made
            if path.parent.name == "opnp" or path.stem == stage:
                assert reached - {"search", "sensitivity", "energy"} <= modules, (stage, path)
            others = {name.split(".")[2] for name in names if name.startswith("opnp.stages.")}
            of_stages = {path.stem for path in paths if path.parent.name == "stages"}
            assert others - {"fetch"} <= of_stages, (stage, path)
