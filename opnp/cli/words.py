"""What commands read from their options and print about their results."""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from opnp.errors import InputError, first_line
from opnp.workspace import Workspace

if TYPE_CHECKING:
    from opnp.deployment.detector import SavedDetector


def read_classes(path: Path | None) -> list[str] | None:
    """The names of the classes in a text file, one on each line.

    Spaces around names, and empty lines at the end, do not count.
    """
    if path is None:
        return None
    try:
        lines = path.read_text(encoding="utf-8-sig").rstrip().splitlines()
        return [line.strip() for line in lines]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read ({first_line(error)}).", "classes") from None


def here() -> Workspace:
    """The workspace in which the program was called: the current folder."""
    return Workspace(Path.cwd())


def find_own_code() -> None:
    """Import modules from the current folder too, as `python -m` does, for code the user names."""
    sys.path.insert(0, str(Path.cwd()))


def loaded(folder: Path, trust: str | None, device: str | None) -> "SavedDetector":
    """The detector of a folder, on a device."""
    from opnp.deployment.detector import load as load_detector

    if trust is not None:
        find_own_code()
    return load_detector(folder, device_named(device), trust)


def device_named(name: str | None) -> str:
    """A device that PyTorch can use; by default the GPU if there is one.

    Raises:
        InputError: this machine does not have it.
    """
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        told = f"This machine has no device {name!r} ({first_line(error)})."
        raise InputError(told, "device") from None
    return name


def told(record: dict[str, Any], as_json: bool, words: Callable[[dict[str, Any]], str]) -> None:
    """Print a record as JSON or in words."""
    print(json.dumps(record, indent=2) if as_json else words(record))


def unreadable(images: Sequence[str]) -> None:
    """Name the images that were left out, and exit with code 3 if there are any."""
    if images:
        print(*images, sep="\n", file=sys.stderr)
        count = "1 image" if len(images) == 1 else f"{len(images)} images"
        print(f"{count} could not be read.", file=sys.stderr)
        raise typer.Exit(3)


def describe(of: dict[str, Any]) -> str:
    """Describe a detector and how it was made in words, a line for each thing."""
    from opnp.backbones.specs import write

    threshold, mask, made, score = of["threshold"], of["mask"], of["made"], of["score"]
    found, size = made["search"], of["preprocessing"]["size"]
    clip = "" if score["clip"] is None else f", features clipped at {score['clip']:.4g}"
    ends = [threshold[end] for end in ("low", "high")]
    low, high = ("unbounded" if end is None else f"{end:.4g}" for end in ends)
    lines = {
        "model": f"{write(**of['model'])}, {of['features']} features, {len(of['classes'])} classes",
        "images": f"{size} × {size}, {of['preprocessing']['mode']}",
        "score": f"{score['name']}, T = {score['temperature']:g}{clip}; larger means OOD",
        "threshold": f"{threshold['value']:.4g} (95 % interval {low} to {high}) accepts "
        f"{threshold['accept']:g} % of {threshold['samples']} ID validation images",
        "pruned": f"{mask['pruned']:.1f} % of the head: the lowest "
        f"{mask['weights_low']:g} % and highest {mask['weights_high']:g} % of the weights, the "
        f"lowest {mask['neurons_low']:g} % and highest {mask['neurons_high']:g} % of the neurons "
        f"(sensitivity: {mask['neuron_sensitivity']})",
        "proxies": f"mean FPR95 {found['fpr95']:.1f} %, unpruned {found['unpruned']['fpr95']:.1f} %"
        f"; within noise of the best of {found['candidates']} masks",
        "families": families(found),
        "accuracy": accuracy(of),
        "doubts": " ".join(found.get("doubts", [])),
        "made": f"{made['at']} by {made['by']} from {mask['training_images']} training images "
        f"({made['train']['source']}) and {made['validation']['images']} validation images "
        f"({made['validation']['source']})",
        "versions": ", ".join(f"{name} {which}" for name, which in made["versions"].items()),
        "digest": of["digest"],
    }
    lines = {name: value for name, value in lines.items() if value}
    width = max(map(len, lines))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines.items())


def families(found: dict[str, Any]) -> str:
    """FPR95 on each family of outliers, before and after; those that did not decide in brackets."""
    parts = []
    for name, each in found.get("families", {}).items():
        part = f"{name} {each['unpruned']:.0f} → {each['chosen']:.0f}"
        parts.append(part if each["decides"] else f"({part})")
    return ", ".join(parts)


def accuracy(of: dict[str, Any]) -> str:
    """The accuracy of the head that predicts the class, and of the other for comparison."""
    found, labels = of["made"]["search"], of["made"]["validation"]["labels"]
    pruned, unpruned = found["accuracy"], found["unpruned"]["accuracy"]
    if of.get("classes_by") == "unpruned head":
        alone = f"the pruned head alone {pruned:.1f} %"
        return f"{unpruned:.1f} %, as unpruned; {alone} (labels: {labels})"
    return f"{pruned:.1f} %, unpruned {unpruned:.1f} % (labels: {labels})"


def show_evaluation(of: dict[str, Any]) -> None:
    """Print an evaluation as a table."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table as RichTable

    table = RichTable(box=SIMPLE_HEAD)
    heads = ("in %", "flagged", "FPR95", "AUROC", "AUPR-in", "energy FPR95", "energy AUROC")
    for head in heads:
        table.add_column(head, justify="left" if head == heads[0] else "right")
    for name, each in (*of["ood"].items(), ("mean", of["mean"])):
        figures = [each["flagged"], *(each[metric] for metric in ("fpr95", "auroc", "aupr_in"))]
        figures += [each["energy"][metric] for metric in ("fpr95", "auroc")]
        table.add_row(name, *(f"{figure:.1f}" for figure in figures))
    inside = of["id"]
    line = f"ID: {inside['images']} images, {inside['flagged']:.1f} % flagged OOD"
    if inside["accuracy"] is not None:
        line += f", accuracy {inside['accuracy']:.1f} %"
        line += f" (unpruned {inside['accuracy_unpruned']:.1f} %)"
    Console().print(table)
    print(line)
