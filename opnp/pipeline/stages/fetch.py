"""Fetch: every image set of the parameters, written with a manifest.

Images are stored uncompressed at the size that the backbone takes: 150 kB each at 224 pixels in
RGB, so that all of ImageNet-1k takes 190 GB of disk. All labels are in memory, but never more
images than a row group holds.
"""

import logging
import shutil
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from opnp.data import imagesets, sources
from opnp.data.imagesets import MANIFEST, ImageSet, Manifest, data_file
from opnp.data.splits import Split, Unreadable
from opnp.errors import InputError, MissingError, UnavailableError
from opnp.metrics.ranking import KINDS
from opnp.pipeline.parameters import Parameters
from opnp.pipeline.results.data import data_parameters
from opnp.runtime.files import write_json
from opnp.runtime.seeds import generator
from opnp.workspace import Workspace

logger = logging.getLogger(__name__)


def run(workspace: Workspace, parameters: Parameters) -> Manifest:
    """Write every image set of the parameters, and their manifest."""
    begin(workspace, parameters)
    sets = id_sets(workspace, parameters)
    for name in ood_sources(parameters):
        sets |= ood_set(workspace, parameters, name)
    fetched = manifest(workspace, parameters, sets)
    finish(workspace, fetched)
    return fetched


def begin(workspace: Workspace, parameters: Parameters) -> None:
    """Make room beside the data, which stay as they are until everything has been fetched.

    Raises:
        InputError: a source lies in the folder of the data, which will be replaced.
        MissingError: the files of a source are missing, and it may not be left out.
    """
    data, outliers = parameters.data, parameters.search.outliers
    for spec in (data.id, *data.near.values(), *data.far.values(), *outliers.values()):
        if (workspace.root / spec).resolve().is_relative_to(workspace.data.resolve()):
            raise InputError(
                f"The source {spec} lies in {workspace.data}, which will be replaced: move it "
                "elsewhere."
            )
    sources.require(data.id, "The ID source")
    tests = [name for name, (role, _) in ood_sets(parameters).items() if role in KINDS]
    absent = []
    for name, (_, source) in ood_sets(parameters).items():
        try:
            sources.require(source, f"The source of the OOD set {name.split('/')[1]},")
        except MissingError as error:
            if data.missing == "refuse" or name not in tests:
                raise
            absent.append(name)
            if len(absent) == len(tests):
                raise MissingError(f"None of the OOD sets is there. {error}") from None
    shutil.rmtree(workspace.fetched, ignore_errors=True)


def ood_sets(parameters: Parameters) -> dict[str, tuple[str, str]]:
    """Every set of OOD images by name, with its role and its source."""
    sets = {f"ood/{name}": ("near", source) for name, source in parameters.data.near.items()}
    sets |= {f"ood/{name}": ("far", source) for name, source in parameters.data.far.items()}
    for name, source in parameters.search.outliers.items():
        sets[f"outliers/{name}"] = ("outliers", source)
    return sets


def ood_sources(parameters: Parameters) -> list[str]:
    """The OOD sets that have a source of their own: all but those of held-out classes."""
    sets = ood_sets(parameters)
    return [name for name, (_, source) in sets.items() if source != "held-out"]


def id_sets(workspace: Workspace, parameters: Parameters) -> dict[str, ImageSet]:
    """Write the ID splits, and the OOD sets made of their held-out classes.

    Where the source has no test split of its own, the images are divided by class (stratified).
    """
    data = parameters.data
    unreadable = Unreadable(data.max_unreadable)
    classes, splits = sources.open_id(data.id)
    if unknown := [label for label in data.held_out if label >= len(classes)]:
        raise InputError(
            f"Class {unknown[0]} is to be held out, but {data.id} has only {len(classes)} classes.",
            "data.held_out",
        )
    known = [label for label in range(len(classes)) if label not in data.held_out]
    if len(known) < 2:
        raise InputError(
            f"Of the {len(classes)} classes {len(known)} would remain: hold out fewer, so that at "
            "least 2 remain.",
            "data.held_out",
        )
    names = [classes[label] for label in known]
    if "all" in splits and data.test is None:
        raise InputError(f"{data.id} has no test split.", "data.test")
    for name, split in splits.items():
        wrong = np.flatnonzero((split.labels < 0) | (split.labels >= len(classes)))
        if len(wrong):
            raise InputError(
                f"Image {wrong[0]} of the {name} split of {data.id} has label "
                f"{split.labels[wrong[0]]}, but there are {len(classes)} classes from 0 on: "
                "correct the labels."
            )
    rng = generator(data.seed, "split")
    whole = splits["all"] if "all" in splits else splits["train"]
    divided = divide(parameters, whole.labels, known, classes, "all" in splits, rng)
    new = np.full(len(classes), -1)  # the label of each class among the known ones
    new[known] = np.arange(len(known))
    chosen = {name: whole.select(rows, new[whole.labels[rows]]) for name, rows in divided.items()}
    others = splits.get("test", whole)
    if "test" in splits:
        rows = np.flatnonzero(new[others.labels] >= 0)
        chosen["test"] = others.select(rows, new[others.labels[rows]])
    rows = np.flatnonzero(new[others.labels] < 0)
    held_out = others.select(rows, new[others.labels[rows]])

    def write(name: str, role: str, split: Split, labels: list[str]) -> ImageSet:
        shuffled = split.examples(rng.permutation(len(split)), unreadable)
        limit = None if labels else data.ood_count
        path = data_file(name, workspace.fetched)
        return imagesets.write(
            path,
            role,
            data.id,
            shuffled,
            data.image_size,
            data.mode,
            labels,
            limit,
            data.resize,
            data.interpolation,
            unreadable,
        )

    sets = {name: write(name, name, split, names) for name, split in chosen.items()}
    for role, named in (("near", data.near), ("far", data.far)):
        for name, source in named.items():
            if source == "held-out":
                sets[f"ood/{name}"] = write(f"ood/{name}", role, held_out, [])
    sets["train"] = replace(sets["train"], unreadable=unreadable.images)
    return sets


def divide(
    parameters: Parameters,
    labels: NDArray[np.int64],
    known: list[int],
    classes: list[str],
    test: bool,
    rng: np.random.Generator,
) -> dict[str, NDArray[np.int64]]:
    """Rows of the training, validation and test images, by class (stratified).

    Args:
        parameters: of the run.
        labels: int64 (N,), of the images to divide.
        known: the labels that are not held out.
        classes: names of all labels.
        test: whether test images are to come from these.
        rng: draws them.

    Raises:
        InputError: a class has too few images.
    """
    data = parameters.data
    divided: dict[str, list[NDArray[np.int64]]] = {"train": [], "validation": [], "test": []}
    for label in known:
        pool = np.flatnonzero(labels == label)
        order = rng.permutation(len(pool))
        first = round(len(pool) * data.test / 100) if test and data.test else 0
        stop = first + round(len(pool) * data.validation / 100)
        parts = {"test": order[:first], "validation": order[first:stop], "train": order[stop:]}
        if empty := [split for split in ("train", "validation") if len(parts[split]) == 0]:
            raise InputError(
                f"Class {classes[label]} of {data.id} has no {empty[0]} images: add some, or hold "
                "the class out.",
                "data.held_out",
            )
        for split, indices in parts.items():
            divided[split].append(pool[indices])
    return {split: np.concatenate(rows) for split, rows in divided.items()}


def ood_set(workspace: Workspace, parameters: Parameters, name: str) -> dict[str, ImageSet]:
    """Write the OOD set ``name``, whose source is not the ID source's held-out classes.

    Returns:
        The set by its name; nothing if its files are missing and it may be left out.

    Raises:
        InputError: there is no such source, or its files are damaged, or missing and it may not be
            left out.
        UnavailableError: it could not be downloaded, and may not be left out.
    """
    data = parameters.data
    role, source = ood_sets(parameters)[name]
    unreadable = Unreadable(data.max_unreadable)
    examples = sources.open_ood(source, data.image_size, data.seed, unreadable)
    path = data_file(name, workspace.fetched)
    try:
        entry = imagesets.write(
            path,
            role,
            source,
            examples,
            data.image_size,
            data.mode,
            [],
            data.ood_count,
            data.resize,
            data.interpolation,
            unreadable,
        )
    except (MissingError, UnavailableError) as error:
        if data.missing == "refuse" or role not in KINDS:
            raise
        logger.warning("The OOD set %s is left out: %s", name.split("/")[1], error)
        return {}
    return {name: replace(entry, unreadable=unreadable.images)}


def manifest(workspace: Workspace, parameters: Parameters, sets: dict[str, ImageSet]) -> Manifest:
    """The manifest of what has been fetched.

    Raises:
        MissingError: no OOD test set is among it.
    """
    wanted = ["train", "validation", "test", *ood_sets(parameters)]
    missing = {
        name.removeprefix("ood/"): source
        for name, (_, source) in ood_sets(parameters).items()
        if name not in sets
    }
    if not any(entry.role in KINDS for entry in sets.values()):
        raise MissingError(
            f"None of the OOD sets is there ({', '.join(missing)}): get at least one of them, as "
            "the lines above say."
        )
    also_id = count_id_images(workspace, sets)
    return Manifest(
        data_parameters(parameters),
        list(sets["train"].classes),
        {
            name: replace(sets[name], also_id=also_id.get(name, 0))
            for name in wanted
            if name in sets
        },
        missing,
    )


def count_id_images(workspace: Workspace, sets: dict[str, ImageSet]) -> dict[str, int]:
    """Count the images of each OOD set that are ID images as well, and warn of them.

    Validation and test images that are training images are reported alike, and so are images of
    outlier sets that are OOD test images.

    Raises:
        InputError: all images of a set are ID images of another set.
    """
    order = ("train", "validation", "test", "ood", "outliers")
    names = sorted(sets, key=lambda name: order.index(name.partition("/")[0]))
    found = imagesets.repeated({name: data_file(name, workspace.fetched) for name in names})
    for name, counts in found.items():
        kind, _, inner = name.partition("/")
        what = f"images of the {'OOD' if kind == 'ood' else 'outlier'} set {inner}"
        what = f"{what if inner else f'{name} images'} ({sets[name].source})"
        others = {"id": "ID images" if inner else "images of another ID split"}
        for other, count in counts.items():
            whole = count == sets[name].count
            many = f"All {count}" if whole else f"{count} of the {sets[name].count}"
            told = f"{many} {what} are {others.get(other, 'OOD test images')} as well"
            if whole and other == "id":
                raise InputError(f"{told}: name others.")
            if count:
                logger.warning("%s", told)
    return {name: counts["id"] for name, counts in found.items() if "/" in name}


def finish(workspace: Workspace, manifest: Manifest) -> None:
    """Put what has been fetched, with its manifest, in the place of the data."""
    write_json(workspace.fetched / MANIFEST, manifest.as_json())
    for entry in manifest.sets.values():
        if left_out := entry.unreadable:
            told = "%d image(s) of %s cannot be read and are left out: %s"
            logger.warning(told, len(left_out), entry.source, ", ".join(left_out))
    place = workspace.data.resolve()  # a link to another disk stays a link
    old = place.with_name(f"{place.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if place.exists():
        place.rename(old)
    shutil.move(workspace.fetched, place)
    shutil.rmtree(old, ignore_errors=True)
