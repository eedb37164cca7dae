"""The pages of the site that are made from the code; `make docs` runs it, and so does MkDocs.

Run as a program, it writes ``cli.md`` from what the command line says of itself. As a hook of
MkDocs it adds a page for each room of the package, and the pages that stand above this folder.
"""

import ast
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

ROOT = Path(__file__).resolve().parents[1]
CLI = ROOT / "docs" / "cli.md"
ABOVE = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}

INTRODUCTION = """# Command line

One program, `opnp`, does everything. This page is what `--help` prints; `make docs` writes it.
"""


def cli_page() -> str:
    """The page of the command line: the help of every command, at 80 columns."""
    from typer.main import get_command
    from typer.testing import CliRunner

    from opnp.cli.app import app

    def help_of(words: list[str]) -> str:
        wide = {"COLUMNS": "80", "TERMINAL_WIDTH": "80", "NO_COLOR": "1", "TERM": "dumb"}
        done = CliRunner().invoke(app, [*words, "--help"], env=wide, prog_name="opnp")
        lines = done.stdout.strip("\n").splitlines()
        return "\n".join(line.rstrip() for line in lines)

    def sections(command: Any, words: list[str]) -> list[str]:
        heading = " ".join(["opnp", *words])
        level = "#" * (2 + max(0, len(words) - 1))
        found = [f"{level} {heading}\n\n```text\n{help_of(words)}\n```\n"]
        for name, each in getattr(command, "commands", {}).items():
            found += sections(each, [*words, name])
        return found

    return "\n".join([INTRODUCTION, *sections(get_command(app), [])])


def names_table() -> str:
    """The names that can be imported from the package itself, each with its summary."""
    stub = (ROOT / "opnp" / "__init__.pyi").read_text()
    rows = ["| Name | What it is |", "| --- | --- |"]
    for module, name in re.findall(r"from \.([\w.]+) import (\w+) as \2", stub):
        tree = ast.parse((ROOT / "opnp" / f"{module.replace('.', '/')}.py").read_text())
        [node] = [each for each in tree.body if getattr(each, "name", "") == name]
        summary = summary_of(node)
        rows.append(f"| [`{name}`][opnp.{module}.{name}] | {summary} |")
    return "\n".join(rows)


def rooms_table() -> str:
    """The rooms and what each is for."""
    rows = ["| Room | What it is for |", "| --- | --- |"]
    for room in rooms():
        summary = summary_of(ast.parse((room / "__init__.py").read_text()))
        rows.append(f"| [{room.name}]({room.name}.md) | {summary} |")
    return "\n".join(rows)


def summary_of(node: Any) -> str:
    """The first paragraph of a docstring, as a cell of a table."""
    paragraph = (ast.get_docstring(node) or "").partition("\n\n")[0]
    return " ".join(paragraph.replace("|", "\\|").split())


def rooms() -> list[Path]:
    """The folders of the rooms that a program may import from, by name."""
    found = sorted(path.parent for path in (ROOT / "opnp").glob("*/__init__.py"))
    return [room for room in found if room.name != "cli"]


def room_page(room: Path) -> str:
    """A page with the public names of every module of a room, the room itself first."""
    purpose = summary_of(ast.parse((room / "__init__.py").read_text()))
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in sorted(room.rglob("*.py"))
        if not path.name.startswith("_")
    ]
    return "\n\n".join([f"# opnp.{room.name}", purpose, *(f"::: {name}" for name in modules)])


def moved(text: str) -> str:
    """The text of a file above this folder, with its links as they are from here."""
    return re.sub(r"\]\(docs/", "](", text)


def on_files(files: "Files", config: "MkDocsConfig") -> "Files":
    """Add the pages that are made; MkDocs calls it."""
    from mkdocs.structure.files import File

    pages = {name: moved((ROOT / source).read_text()) for name, source in ABOVE.items()}
    pages |= {f"api/{room.name}.md": room_page(room) for room in rooms()}
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fill in the tables of the page that leads to the rooms; MkDocs calls it."""
    tables = {"<!-- names -->": names_table, "<!-- rooms -->": rooms_table}
    for mark, table in tables.items():
        if mark in markdown:
            markdown = markdown.replace(mark, table())
    return markdown


if __name__ == "__main__":
    CLI.write_text(cli_page())
