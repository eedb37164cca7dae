"""The documentation as a site: it builds, is up to date, and names what exists."""

import ast
import importlib.util
import re
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from ruamel.yaml import YAML

import opnp
from tests.conftest import ROOT, run_program
from tests.test_layers import ROOMS

yaml = YAML(typ="safe", pure=True)
PAGES = [ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.fixture(scope="module")
def build() -> ModuleType:
    """The module `docs/build.py`."""
    spec = importlib.util.spec_from_file_location("build", ROOT / "docs" / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `make docs` does it: every warning is an error."""
    folder = tmp_path_factory.mktemp("site")
    words = ("mkdocs", "build", "--quiet", "--strict", "--site-dir", str(folder))
    done = run_program(*words, cwd=ROOT, env={"NO_MKDOCS_2_WARNING": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_the_page_of_the_command_line_is_up_to_date(build: ModuleType) -> None:
    written = (ROOT / "docs" / "cli.md").read_text()
    assert build.cli_page() == written, "docs/cli.md is out of date: run `make docs`"
    assert max(map(len, written.partition("## ")[2].splitlines())) <= 80


def test_the_site_has_a_page_for_each_room(site: Path) -> None:
    rooms = {path.parent.name for path in (ROOT / "opnp").glob("*/__init__.py")} - {"cli"}
    assert {path.name for path in (site / "api").iterdir() if path.is_dir()} == rooms
    page = (site / "api" / "pruning" / "index.html").read_text()
    assert 'id="opnp.pruning.search.search_masks"' in page
    assert 'id="opnp.pruning.search.pareto_front"' not in page, "it is not public"


def test_the_site_fetches_nothing_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        text = page.read_text()
        loaded = re.findall(r"<(?:script|img|iframe)[^>]+src=\"?([^\s\">]+)", text)
        loaded += re.findall(r"<link[^>]+rel=\"?stylesheet[^>]+href=\"?([^\s\">]+)", text)
        assert loaded, page
        assert not [url for url in loaded if url.startswith(("http:", "https:", "//"))], page


def test_the_public_names_are_on_the_python_page(site: Path) -> None:
    page = (site / "api" / "index.html").read_text()
    for name in vars(opnp)["__all__"]:
        assert re.search(rf"<tr>\s*<td><a[^>]*><code>{name}</code></a></td>\s*<td>[^<]", page), name


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_the_files_that_a_page_names_exist(path: Path) -> None:
    text = path.read_text()
    code = re.findall(r"`((?:opnp|flows|tests|docs|examples|presets|\.ci)/[\w./-]+)`", text)
    for name in code:
        if not re.search(r"NAME|KEY|KIND|ROOM", name):
            assert (ROOT / name).exists(), name
    for name in re.findall(r"`((?:opnp|flows)(?:\.\w+)+)`", text):
        if not re.match(r"opnp\.(retrain|monitor)\.", name):  # which are events
            assert named(name), name
    for target in re.findall(r"`make ([\w-]+)`", text):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M), target


def test_the_walk_through_a_run_names_functions_that_exist() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    walk = re.findall(r"^\| `([\w/]+\.py)` \| `(\w+)` \|", page, re.M)
    assert len(walk) > 10
    for path, function in walk:
        tree = ast.parse((ROOT / path).read_text())
        assert function in {getattr(node, "name", "") for node in tree.body}, (path, function)


def test_the_diagram_shows_every_room_in_its_order() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    shown = re.findall(r"^opnp/(\w+) ", page, re.M)
    assert shown == [room for room in reversed(ROOMS) if (ROOT / "opnp" / room).is_dir()]


def named(dotted: str) -> bool:
    """Whether a module has this name, or something in it."""
    parts = dotted.split(".")
    for length in range(len(parts), 0, -1):
        place = ROOT.joinpath(*parts[:length])
        module = place.with_suffix(".py") if place.with_suffix(".py").is_file() else None
        module = module or (place / "__init__.py" if place.is_dir() else None)
        if module:
            rest = parts[length:]
            text = module.read_text() + "".join(p.read_text() for p in module.parent.glob("*.pyi"))
            return not rest or re.search(rf"\b{rest[0]}\b", text) is not None
    return False


def test_the_version_is_the_same_everywhere() -> None:
    citation: dict[str, Any] = yaml.load((ROOT / "CITATION.cff").read_text())
    changelog = (ROOT / "CHANGELOG.md").read_text()
    [(version, date), *_] = re.findall(r"^## \[([\d.]+)\] - ([\d-]+)$", changelog, re.M)
    assert version == citation["version"] == opnp.__version__
    assert date == str(citation["date-released"])
    assert changelog.index("## [Unreleased]") < changelog.index(f"## [{version}]")


def test_the_hooks_run_what_lint_runs() -> None:
    [local] = yaml.load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert local["repo"] == "local"
    lint = (ROOT / "Makefile").read_text().partition("\nlint:")[2].partition("\n\n")[0]
    for hook in local["hooks"]:
        tool, *words = hook["entry"].removeprefix(".venv/bin/").split()
        command = " ".join([tool, *(word for word in words if word != "--force-exclude")])
        assert f"$(BIN)/{command}" in lint


def test_the_package_is_typed() -> None:
    assert (Path(opnp.__file__).parent / "py.typed").is_file()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "opnp" in project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    assert "Typing :: Typed" in project["project"]["classifiers"]
