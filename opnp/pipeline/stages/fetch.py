"""Fetch: every image set of the parameters, written to `data/` with a manifest.

Images are stored as the backbone wants them, at `data.image_size` and undeflated: 150 kB each at
224 pixels in RGB, so that all of ImageNet-1k takes 190 GB of disk. In memory are their labels, and
never more images than a row group holds.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opnp import workspace
from opnp.data import imagesets, sources
from opnp.data.imagesets import ImageSet, Manifest, data_file, read_manifest
from opnp.data.preprocessing import Preprocessing
from opnp.data.splits import Split, Unreadable
from opnp.errors import InputError, MissingError, UnavailableError
from opnp.metrics.ranking import KINDS
from opnp.pipeline.parameters import Parameters
from opnp.runtime.files import write_json
from opnp.runtime.seeds import generator


def run(parameters: Parameters) -> Manifest:
    """Write every image set of the parameters, and their manifest, to `data/`."""
    begin(parameters)
    sets = id_sets(parameters)
    for name in ood_sources(parameters):
        sets |= ood_set(parameters, name)
    fetched = manifest(parameters, sets)
    finish(fetched)
    return fetched


def begin(parameters: Parameters) -> None:
    """Make room beside `data/`, which stays as it is until everything has been fetched.

    Raises:
        InputError: a source lies in `data/`, which will be replaced.
        MissingError: files of a source are not there, and it may not be left out.
    """
    data, outliers = parameters.data, parameters.search.outliers
    for spec in (data.id, *data.near.values(), *data.far.values(), *outliers.values()):
        if Path(spec).resolve().is_relative_to(workspace.DATA.resolve()):
            raise InputError(
                f"The source {spec} lies in {workspace.DATA}/, which fetch replaces: move it away."
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
    shutil.rmtree(workspace.FETCHED, ignore_errors=True)


def ood_sets(parameters: Parameters) -> dict[str, tuple[str, str]]:
    """Every set of OOD images by name, with its role and its source."""
    sets = {f"ood/{name}": ("near", source) for name, source in parameters.data.near.items()}
    sets |= {f"ood/{name}": ("far", source) for name, source in parameters.data.far.items()}
    for name, source in parameters.search.outliers.items():
        sets[f"outliers/{name}"] = ("outliers", source)
    return sets


def ood_sources(parameters: Parameters) -> list[str]:
    """The OOD sets with a source of their own: all but those of held-out classes."""
    sets = ood_sets(parameters)
    return [name for name, (_, source) in sets.items() if source != "held-out"]


def data_parameters(parameters: Parameters) -> dict[str, Any]:
    """What the images depend on."""
    outliers = parameters.search.outliers
    images = parameters.data.model_dump(exclude={"max_unreadable", "missing"})
    for key in ("resize", "interpolation"):  # unsaid in manifests where they are as ever
        if images[key] == type(parameters.data).model_fields[key].default:
            del images[key]
    return images | ({"outliers": outliers} if outliers else {})


def id_sets(parameters: Parameters) -> dict[str, ImageSet]:
    """Write the ID splits, and the OOD sets made of their held-out classes.

    Where the source has no test split of its own, the images are divided by class (stratified).
    """
    data = parameters.data
    unreadable = Unreadable(data.max_unreadable)
    classes, splits = sources.open_id(data.id)
    if unknown := [label for label in data.held_out if label >= len(classes)]:
        raise InputError(
            f"data.held_out names class {unknown[0]}, but {data.id} has only {len(classes)}."
        )
    known = [label for label in range(len(classes)) if label not in data.held_out]
    if len(known) < 2:
        raise InputError(
            f"data.held_out leaves {len(known)} of {len(classes)} classes: at least 2 must stay."
        )
    names = [classes[label] for label in known]
    if "all" in splits and data.test is None:
        raise InputError(f"{data.id} has no test split: say in data.test how many percent to take.")
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
        path = data_file(name, workspace.FETCHED)
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
                f"Class {classes[label]} of {data.id} has no {empty[0]} images: give it some, or "
                "leave it out in data.held_out."
            )
        for split, indices in parts.items():
            divided[split].append(pool[indices])
    return {split: np.concatenate(rows) for split, rows in divided.items()}


def ood_set(parameters: Parameters, name: str) -> dict[str, ImageSet]:
    """Write the OOD set ``name``, whose source is not the ID source's held-out classes.

    Returns:
        The set by its name; nothing if its files are missing and ``data.missing`` is ``skip``.

    Raises:
        InputError: the source is none, broken, or missing and may not be left out.
        UnavailableError: it could not be downloaded, and may not be left out.
    """
    data = parameters.data
    role, source = ood_sets(parameters)[name]
    unreadable = Unreadable(data.max_unreadable)
    examples = sources.open_ood(source, data.image_size, data.seed, unreadable)
    path = data_file(name, workspace.FETCHED)
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
        print(f"fetch: the OOD set {name.split('/')[1]} is left out: {error}", flush=True)
        return {}
    return {name: replace(entry, unreadable=unreadable.images)}


def manifest(parameters: Parameters, sets: dict[str, ImageSet]) -> Manifest:
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
            f"None of the OOD sets is there ({', '.join(missing)}): get one of them at least, as "
            "the lines above say."
        )
    also_id = count_id_images(sets)
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


def count_id_images(sets: dict[str, ImageSet]) -> dict[str, int]:
    """How many images of each OOD set are ID images, too; a line says so.

    Raises:
        InputError: all images of a set are.
    """
    files = {name: data_file(name, workspace.FETCHED) for name in sets}
    inside = [files.pop(name) for name in ("train", "validation", "test") if name in files]
    found = imagesets.also_id(inside, files)
    for name, count in found.items():
        of = f"images of the OOD set {name.split('/')[1]} ({sets[name].source})"
        if count == sets[name].count:
            raise InputError(f"All {count} {of} are ID images as well: name other images for it.")
        if count:
            print(f"fetch: {count} of the {sets[name].count} {of} are ID images as well")
    return found


def finish(manifest: Manifest) -> None:
    """Put what has been fetched, with its manifest, in the place of `data/`."""
    write_json(workspace.FETCHED / workspace.MANIFEST.name, manifest.as_json())
    for entry in manifest.sets.values():
        if left_out := entry.unreadable:
            print(
                f"fetch: {len(left_out)} image(s) of {entry.source} cannot be read and are left "
                f"out: {', '.join(left_out)}"
            )
    place = workspace.DATA.resolve()  # a link to another disk stays one
    old = place.with_name(f"{place.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if place.exists():
        place.rename(old)
    shutil.move(workspace.FETCHED, place)
    shutil.rmtree(old, ignore_errors=True)


def check_images(parameters: Parameters, preprocessing: Preprocessing) -> None:
    """Refuse a backbone that wants images prepared in another way than those of `data/` are.

    Raises:
        InputError: it does; the sentence says what to set.
    """
    data = parameters.data
    wanted = {
        "image_size": (preprocessing.size, data.image_size),
        "mode": (preprocessing.mode, data.mode),
        "resize": (preprocessing.resize, data.resize),
        "interpolation": (preprocessing.interpolation, data.interpolation),
    }
    others = [f"data.{key} to {json.dumps(a)}" for key, (a, b) in wanted.items() if a != b]
    if others:
        raise InputError(
            f"The backbone {parameters.train.backbone} wants images prepared in another way: set "
            f"{' and '.join(others)}."
        )


def manifest_of(parameters: Parameters) -> Manifest:
    """The manifest of `data/`, if they were fetched with these parameters.

    Raises:
        InputError: it was fetched with others, or is missing.
    """
    manifest = read_manifest(elsewhere=parameters.engine.storage is not None)
    if manifest.parameters != data_parameters(parameters):
        raise InputError(
            f"{workspace.DATA}/ was fetched with other parameters in section data, or other "
            f"search.outliers, than {workspace.PARAMETERS} has now.",
            "stage:fetch",
        )
    return manifest
