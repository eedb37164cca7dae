"""Read manifests: tables that list paths of image files, with labels and splits."""

import os
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from opnp.data.decoding import printable
from opnp.data.parquet import IMAGE_COLUMNS, column_names
from opnp.data.parts import divided, splits_named
from opnp.data.splits import Files, Source, Split
from opnp.errors import InputError, first_line


def is_manifest(path: Path) -> bool:
    """Whether a Parquet file lists paths and holds no images."""
    names = column_names(path)
    return "path" in names and not names & set(IMAGE_COLUMNS)


def open_manifest(path: Path, part: str | None) -> Source:
    """Image files listed in columns ``path`` and ``label``, and ``split`` if it is divided.

    Paths are relative to the manifest. Classes are the labels that occur, numbers in their order.
    Splits are named as in `opnp.data.parts`.

    Raises:
        InputError: a column or value is missing, a path leads out of the manifest's folder, or a
            label occurs in the test split only.
    """
    columns = read_manifest(path, ("path", "label") if part is None else ("path",))
    places = [inside(path, row, place) for row, place in enumerate(columns["path"])]
    labels = columns.get("label", [""] * len(places))
    names = set(filter(None, labels))
    numbers = all(re.fullmatch(r"\d{1,18}", label) for label in names)
    classes = sorted(names, key=(lambda label: (int(label), label)) if numbers else None)
    number = {name: label for label, name in enumerate(classes)}
    rows: dict[str, list[int]] = {}
    listed = [each or "" for each in columns.get("split", [])]
    known = splits_named(set(listed)) if listed else {"all": "all"}
    for row, named in enumerate(listed or ["all"] * len(places)):
        if (split := known[named]) is None:
            raise InputError(
                f"Row {row} of {path} is of split {named!r}, and known are train, validation and "
                "test: correct it."
            )
        rows.setdefault(split, []).append(row)
    if not places:
        raise InputError(f"{path} lists no images: fill it.")
    found = divided(rows, part, path)
    if "train" in found and part is None:
        trained = {labels[row] for row in found["train"]}
        if unknown := sorted({labels[row] for row in found["test"]} - trained):
            raise InputError(
                f"{path} has the label {unknown[0]!r} in its test split only: correct it."
            )
    splits = {}
    for split, chosen in found.items():
        y = [number.get(labels[row], -1) for row in chosen]
        splits[split] = Split.of(Files([places[row] for row in chosen]), np.array(y, np.int64))
    return Source(classes, splits)


def read_manifest(path: Path, needed: tuple[str, ...]) -> dict[str, list[str]]:
    """Read the columns of a manifest as text; the needed ones have a value in every row."""
    try:
        if path.suffix == ".csv":
            text = {name: pa.string() for name in ("path", "label", "split")}
            options = pa.csv.ConvertOptions(column_types=text)
            table = pa.csv.read_csv(path, convert_options=options)
        else:
            table = pq.read_table(path)
        columns = {
            name: table.column(name).cast(pa.string()).to_pylist()
            for name in ("path", "label", "split")
            if name in table.column_names
        }
    except (OSError, pa.ArrowException) as error:
        raise InputError(
            f"{path} is not a whole table of images ({first_line(error)}): replace it."
        ) from None
    for name in needed:
        if name not in columns:
            raise InputError(f"{path} has no column {name}: add it.")
        if not all(columns[name]):
            row = next(row for row, value in enumerate(columns[name]) if not value)
            raise InputError(f"Row {row} of {path} has no {name}: fill it in.")
    return columns


def inside(manifest: Path, row: int, place: str) -> str:
    """The path in a row of a manifest, which must not lead out of the manifest's folder."""
    full = os.path.join(manifest.parent, place)  # noqa: PTH118
    try:
        stays = Path(full).resolve().is_relative_to(manifest.parent.resolve())
    except (OSError, RuntimeError, ValueError):  # a link to itself, or a name that cannot be one
        stays = True  # and cannot be read
    if Path(place).is_absolute() or not stays:
        raise InputError(
            f"Row {row} of {manifest} is {printable(place)}, which leads out of "
            f"{manifest.parent}/: put the manifest above all its images, and write paths relative "
            "to it."
        )
    return full
