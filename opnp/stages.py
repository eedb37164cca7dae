"""The stages of the pipeline, from parameters and files to files: one function each, and for those
whose work is divided, the parts of it.

`flows/` runs the parts as Prefect tasks; calling the functions here does the same in this process.
"""

import csv
import hashlib
import json
import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cache, lru_cache
from itertools import islice, product
from math import isnan
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn

from opnp import artifacts, backbones, datasets, energy, proxies, sources, tensors, training
from opnp import features as shards
from opnp import sensitivity as sensitivity_module
from opnp.datasets import ImageSet, Manifest, data_file, read_manifest
from opnp.errors import InputError, UnavailableError
from opnp.features import Shard
from opnp.files import atomic, digest, read_json, write_json
from opnp.parameters import Parameters
from opnp.progress import track
from opnp.search import (
    Candidate,
    Grid,
    Judge,
    SearchResult,
    Trial,
    candidates_of,
    search_masks,
    setting_of,
)
from opnp.sensitivity import Sensitivity, SensitivitySums, halved

__all__ = ["evaluate", "features", "fetch", "report", "search", "sensitivity", "train"]

# fetch ------------------------------------------------------------------------------------------


def fetch(parameters: Parameters) -> Manifest:
    """Write every image set of the parameters, and their manifest, to `data/`."""
    begin_fetch(parameters)
    sets = fetch_id(parameters)
    for name in ood_sources(parameters):
        sets |= fetch_ood(parameters, name)
    manifest = fetched(parameters, sets)
    finish_fetch(manifest)
    return manifest


def begin_fetch(parameters: Parameters) -> None:
    """Make room beside `data/`, which stays as it is until everything has been fetched.

    Raises:
        InputError: a source lies in `data/`, which will be replaced.
    """
    data, outliers = parameters.data, parameters.search.outliers
    for spec in (data.id, *data.near.values(), *data.far.values(), *outliers.values()):
        if Path(spec).resolve().is_relative_to(artifacts.DATA.resolve()):
            raise InputError(
                f"The source {spec} lies in {artifacts.DATA}/, which fetch replaces: move it away."
            )
    shutil.rmtree(artifacts.FETCHED, ignore_errors=True)


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
    return parameters.data.model_dump() | ({"outliers": outliers} if outliers else {})


def fetch_id(parameters: Parameters) -> dict[str, ImageSet]:
    """Write the ID splits, and the OOD sets made of their held-out classes.

    Where the source has no test split of its own, the images are divided by class (stratified).
    """
    data = parameters.data
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
    examples = {name: list(split) for name, split in splits.items()}
    if "all" in examples and data.test is None:
        raise InputError(f"{data.id} has no test split: say in data.test how many percent to take.")
    for split, pairs in examples.items():
        for row, (_, label) in enumerate(pairs):
            if not 0 <= label < len(classes):
                raise InputError(
                    f"Image {row} of the {split} split of {data.id} has label {label}, but there "
                    f"are {len(classes)} classes from 0 on: correct the labels."
                )
    rng = sources.generator(data.seed, "split")
    divided: dict[str, list[sources.Example]] = {"train": [], "validation": [], "test": []}
    for new, label in enumerate(known):
        pool = [image for image, y in examples.get("all", examples.get("train", [])) if y == label]
        order = rng.permutation(len(pool))
        test = round(len(pool) * data.test / 100) if "all" in examples and data.test else 0
        stop = test + round(len(pool) * data.validation / 100)
        parts = {"test": order[:test], "validation": order[test:stop], "train": order[stop:]}
        if empty := [split for split in ("train", "validation") if len(parts[split]) == 0]:
            raise InputError(
                f"Class {classes[label]} of {data.id} has no {empty[0]} images: give it some, or "
                "leave it out in data.held_out."
            )
        for split, indices in parts.items():
            divided[split] += [(pool[index], new) for index in indices]
    held_out = [(image, -1) for image, y in examples.get("all", []) if y in data.held_out]
    for image, y in examples.get("test", []):
        if y in known:
            divided["test"].append((image, known.index(y)))
        else:
            held_out.append((image, -1))

    def write(name: str, role: str, chosen: list[sources.Example], labels: list[str]) -> ImageSet:
        shuffled = (chosen[index] for index in rng.permutation(len(chosen)))
        limit = None if labels else data.ood_count
        path = data_file(name, artifacts.FETCHED)
        return datasets.write(
            path, role, data.id, shuffled, data.image_size, data.mode, labels, limit
        )

    sets = {split: write(split, split, chosen, names) for split, chosen in divided.items()}
    for role, named in (("near", data.near), ("far", data.far)):
        for name, source in named.items():
            if source == "held-out":
                sets[f"ood/{name}"] = write(f"ood/{name}", role, held_out, [])
    return sets


def fetch_ood(parameters: Parameters, name: str) -> dict[str, ImageSet]:
    """Write the OOD set ``name``, whose source is not the ID source's held-out classes."""
    data = parameters.data
    role, source = ood_sets(parameters)[name]
    examples = sources.open_ood(source, data.image_size, data.seed)
    limited = islice(examples, data.ood_count)
    path = data_file(name, artifacts.FETCHED)
    entry = datasets.write(path, role, source, limited, data.image_size, data.mode, [])
    return {name: entry}


def fetched(parameters: Parameters, sets: dict[str, ImageSet]) -> Manifest:
    """The manifest of what has been fetched."""
    wanted = ["train", "validation", "test", *ood_sets(parameters)]
    return Manifest(
        data_parameters(parameters),
        list(sets["train"].classes),
        {name: sets[name] for name in wanted},
    )


def finish_fetch(manifest: Manifest) -> None:
    """Put what has been fetched, with its manifest, in the place of `data/`."""
    write_json(artifacts.FETCHED / artifacts.MANIFEST.name, manifest.as_json())
    place = artifacts.DATA.resolve()  # a link to another disk stays one
    old = place.with_name(f"{place.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if place.exists():
        place.rename(old)
    shutil.move(artifacts.FETCHED, place)
    shutil.rmtree(old, ignore_errors=True)


def manifest_of(parameters: Parameters) -> Manifest:
    """The manifest of `data/`, if they were fetched with these parameters.

    Raises:
        InputError: it was fetched with others, or is missing.
    """
    manifest = read_manifest()
    if manifest.parameters != data_parameters(parameters):
        raise InputError(
            f"{artifacts.DATA}/ was fetched with other parameters in section data, or other "
            f"search.outliers, than {artifacts.PARAMETERS} has now: run `python -m flows.fetch`."
        )
    return manifest


def remove_others(folder: Path, keep: set[Path]) -> None:
    """Remove what an earlier run made and this one did not, or left half made."""
    for path in folder.rglob("*"):
        if path.is_file() and path not in keep and path.name != ".gitignore":
            path.unlink()
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()


# train ------------------------------------------------------------------------------------------


def train(parameters: Parameters) -> dict[str, Any]:
    """Train the backbone, or load its checkpoint, and record how well it classifies."""
    settings, data, device = parameters.train, parameters.data, device_for(0)
    manifest_of(parameters)
    classes = sources.class_names(data_file("train"))
    read = {
        split: datasets.read(data_file(split), data.mode, data.image_size)
        for split in ("train", "validation")
    }
    spec: dict[str, object] = {
        "name": settings.backbone,
        "width": settings.width,
        "depth": settings.depth,
    }
    with training.deterministic(settings.threads):
        torch.manual_seed(parameters.seed)
        model = backbones.build(
            channels=len(data.mode),
            classes=len(classes),
            size=data.image_size,
            **spec,  # type: ignore[arg-type]
        )
        preprocessing = backbones.Preprocessing.measured(read["train"][0])
        if settings.checkpoint:
            path = Path(settings.checkpoint)
            preprocessing = load_checkpoint(model, path, classes, preprocessing)
        model.to(device)
        both = {
            split: (
                preprocessing.normalize(unit(pixels)).to(device),
                torch.from_numpy(labels).to(device),
            )
            for split, (pixels, labels) in read.items()
        }
        history = []
        if not settings.checkpoint:
            history = training.fit(
                model,
                both["train"],
                both["validation"],
                epochs=settings.epochs,
                batch_size=settings.batch_size,
                learning_rate=settings.learning_rate,
                weight_decay=settings.weight_decay,
                shift_pixels=settings.shift_pixels,
                seed=parameters.seed,
                optimizer=settings.optimizer,
                precision=settings.precision,
                spcp=settings.spcp,
            )
        model.eval()
        record: dict[str, Any] = {
            f"{split}_accuracy": training.accuracy(model, *both[split]) for split in both
        }
    backbones.save(model.cpu(), artifacts.BACKBONE, preprocessing, classes, spec)
    record |= {
        "parameters": sum(p.numel() for p in model.parameters()),
        "features": model.head.in_features,
        "classes": model.head.out_features,
        "checkpoint": digest(Path(settings.checkpoint)) if settings.checkpoint else None,
        "sha256": digest(artifacts.BACKBONE),
    }
    write_csv(
        artifacts.HISTORY, ["epoch", "loss", "train_accuracy", "validation_accuracy"], history
    )
    write_json(artifacts.TRAINING, record)
    return record


def load_checkpoint(
    model: backbones.Classifier,
    path: Path,
    classes: list[str],
    measured: backbones.Preprocessing,
) -> backbones.Preprocessing:
    """Load a checkpoint, and return the preprocessing it states, else the one measured here.

    Raises:
        InputError: it is not for this model, or states other classes or another size of images.
    """
    stated = backbones.load_weights(model, path)
    if stated.get("classes", classes) != classes:
        raise InputError(
            f"Checkpoint {path} is of the classes {', '.join(stated['classes'])}, the data are of "
            f"{', '.join(classes)}: take the data it was trained on."
        )
    if "preprocessing" not in stated:
        return measured
    preprocessing = backbones.Preprocessing.stated(stated["preprocessing"])
    if (preprocessing.size, preprocessing.mode) != (measured.size, measured.mode):
        raise InputError(
            f"Checkpoint {path} wants images of {preprocessing.size} pixels in mode "
            f"{preprocessing.mode}: set data.image_size and data.mode so."
        )
    return preprocessing


def unit(pixels: np.ndarray[Any, Any]) -> Tensor:
    """uint8 (N, H, W, C) as float32 in [0, 1], (N, C, H, W)."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().float() / 255


def write_csv(path: Path, columns: list[str], rows: list[dict[str, float]]) -> None:
    with atomic(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def device_for(index: int) -> torch.device:
    """GPUs in turn where there are any, else the CPU."""
    count = torch.cuda.device_count()
    return torch.device("cuda", index % count) if count else torch.device("cpu")


# features ---------------------------------------------------------------------------------------


def features(parameters: Parameters) -> None:
    """Compute the penultimate features of every split and of the proxy outliers."""
    plan = feature_shards(parameters)
    for index, shard in enumerate(track(plan, "features (shards)", len(plan))):
        feature_shard(parameters, shard, index)
    finish_features(plan)


def feature_shards(parameters: Parameters) -> list[Shard]:
    """The shards to compute, in order."""
    manifest, size = manifest_of(parameters), parameters.features.shard_size
    _, _, classes = backbones.load(artifacts.BACKBONE)
    if classes != manifest.classes:
        raise InputError(
            f"The backbone has {len(classes)} classes and the data {len(manifest.classes)}, or "
            "others: run `python -m flows.train` again."
        )
    counts = {name: entry.count for name, entry in manifest.sets.items()}
    validation = counts["validation"]
    counts |= {f"proxies/{family}": validation for family in parameters.search.proxies}
    return [shard for split, count in counts.items() for shard in shards.divide(split, count, size)]


def feature_shard(parameters: Parameters, shard: Shard, index: int) -> bool:
    """Compute one shard, on the GPU whose turn it is; False if it was there already, whole."""
    device = device_for(index)
    expected = expected_features(parameters, shard.split)
    model, preprocessing = backbone_on(expected["backbone"], device)
    origin = {
        **expected,
        "preprocessing": json.dumps(asdict(preprocessing)),
        "device": device.type,
        "code": code_digest(backbones, datasets, shards, proxies, sources),
    }
    if shards.is_whole(shard, origin):
        return False
    images, labels = load_images(parameters, shard.split, shard.start, shard.stop)
    batches = images.split(parameters.features.batch_size)
    with training.deterministic(threads=1):
        encoded = shards.encode(model.encoder, batches, device)
    shards.write_shard(shard, encoded, labels, origin, parameters.features.dtype)
    return True


def load_images(
    parameters: Parameters, split: str, start: int, stop: int
) -> tuple[Tensor, np.ndarray[Any, Any]]:
    """Normalized images (N, C, H, W) and labels (N,) of some rows of a split."""
    expected = expected_features(parameters, split)
    _, preprocessing = backbone_on(expected["backbone"], torch.device("cpu"))
    if split.startswith("proxies/"):
        rows = range(start, stop)
        with one_at_a_time:
            validation = validation_images(expected["images"], preprocessing)
        made = proxies.make(split.removeprefix("proxies/"), validation, rows, parameters.seed)
        images, labels = torch.from_numpy(made), np.full(len(rows), -1, np.int64)
    else:
        path = data_file(split)
        pixels, labels = datasets.read(path, preprocessing.mode, preprocessing.size, start, stop)
        images = unit(pixels)
    return preprocessing.normalize(images), labels


def expected_features(parameters: Parameters, split: str) -> dict[str, str]:
    """What the shards of a split must say of themselves, wherever they are read."""
    proxy = split.startswith("proxies/")
    return {
        "backbone": digest(artifacts.BACKBONE),
        "images": manifest_of(parameters).sets["validation" if proxy else split].sha256,
        "dtype": parameters.features.dtype,
        **({"seed": str(parameters.seed)} if proxy else {}),
    }


def code_digest(*modules: ModuleType) -> str:
    """SHA-256 over the sources of modules: what was made by other code is made again."""
    sha = hashlib.sha256()
    for module in modules:
        sha.update(Path(str(module.__file__)).read_bytes())
    return sha.hexdigest()


def finish_features(plan: list[Shard]) -> None:
    """Remove shards that are not in the plan."""
    remove_others(artifacts.FEATURES, {shard.path for shard in plan})
    for optional in ("outliers", "proxies"):  # DVC wants each of its outputs
        (artifacts.FEATURES / optional).mkdir(exist_ok=True)


@lru_cache(maxsize=16)
def backbone_on(
    sha256: str, device: torch.device
) -> tuple[backbones.Classifier, backbones.Preprocessing]:
    """The backbone on a device, loaded once a process as long as its file stays the same."""
    model, preprocessing, _ = backbones.load(artifacts.BACKBONE)
    return model.to(device), preprocessing


one_at_a_time = threading.Lock()  # tasks that start together must not all decode all images


@lru_cache(maxsize=1)
def validation_images(sha256: str, preprocessing: backbones.Preprocessing) -> np.ndarray[Any, Any]:
    """All validation images in [0, 1], (N, C, H, W), of which proxies are made."""
    pixels, _ = datasets.read(data_file("validation"), preprocessing.mode, preprocessing.size)
    return unit(pixels).numpy()


def load_features(parameters: Parameters, *splits: str) -> list[tuple[Tensor, Tensor]]:
    """Features, float32 (N, L), and labels (N,) of each split.

    Raises:
        InputError: shards are missing, damaged, or made from something else than is here now.
    """
    return [shards.load(split, expected_features(parameters, split)) for split in splits]


def outlier_splits(parameters: Parameters) -> dict[str, str]:
    """What masks and hyperparameters are chosen on besides ID validation: splits by name."""
    settings = parameters.search
    splits = {family: f"proxies/{family}" for family in settings.proxies}
    return splits | {name: f"outliers/{name}" for name in settings.outliers}


def load_outliers(parameters: Parameters) -> dict[str, Tensor]:
    """Features of each proxy family and each real outlier set, by name; see `load_features`."""
    splits = outlier_splits(parameters)
    loaded = load_features(parameters, *splits.values())
    return {name: features for name, (features, _) in zip(splits, loaded, strict=True)}


# sensitivity ------------------------------------------------------------------------------------


SENSITIVITIES = ("weights", "neurons_mean", "neurons_gradient", "neurons_taylor")


def sensitivity(parameters: Parameters) -> list[Sensitivity]:
    """Measure the sensitivities of the head over all training features, shard by shard."""
    plan = sensitivity_shards(parameters)
    for path in track(plan, "sensitivity (shards)", len(plan)):
        sensitivity_shard(parameters, path)
    return merge_sensitivity(plan)


def sensitivity_shards(parameters: Parameters) -> list[Path]:
    """The feature shards of the training split, in order; where to clip is written down first.

    Raises:
        InputError: they are missing, damaged, of something else, or not the whole split.
    """
    expected = expected_features(parameters, "train")
    paths = shards.shard_paths("train", expected)
    clips: dict[str, float] = {}
    if percentiles := [each for each in parameters.search.clip if each is not None]:
        h, _ = shards.load("train", expected)
        clips = {str(each): sensitivity_module.clip_threshold(h, each) for each in percentiles}
        if len(set(clips.values())) < len(clips):
            raise InputError(
                "search.clip: at two of its percentiles the training activations are the same "
                f"({', '.join(f'{name} %: {at:g}' for name, at in clips.items())}): keep one."
            )
    write_json(artifacts.CLIPS, clips)
    return paths


def settings_of(parameters: Parameters) -> list[dict[str, Any]]:
    """Every clip (percentile and threshold) and temperature that the search tries, in its order."""
    clips = read_json(artifacts.CLIPS, "python -m flows.sensitivity")
    search = parameters.search
    if set(clips) != {str(each) for each in search.clip if each is not None}:
        raise InputError(
            f"{artifacts.CLIPS} is of another search.clip: run `python -m flows.sensitivity`."
        )
    return [
        {"clip": clip, "threshold": clips.get(str(clip)), "temperature": temperature}
        for clip, temperature in product(search.clip, search.temperature)
    ]


def sums_file(path: Path) -> Path:
    return artifacts.SENSITIVITY.parent / "shards" / f"{path.stem}.safetensors"


def sensitivity_shard(parameters: Parameters, path: Path) -> bool:
    """Sum one shard's contributions; say False if that was already done and the file is whole.

    Rows in even and in odd places are summed apart: two halves of the training samples.
    """
    h, _, origin = shards.read_shard(path)
    metadata: dict[str, Any] = {
        "backbone": origin["backbone"],
        "rows": origin["rows"],
        "features": digest(path),
        "settings": settings_of(parameters),
        "code": code_digest(energy, sensitivity_module),
    }
    try:
        if read_sums(sums_file(path))[1] == metadata:
            return False
    except InputError:
        pass
    model, _, _ = backbones.load(artifacts.BACKBONE)
    device = device_for(int(path.stem))
    weight, bias = model.head.weight, energy.bias_of(model.head)
    halves = (h[::2].to(device), h[1::2].to(device))
    with training.deterministic(threads=1):
        sums = [
            SensitivitySums.of(half, weight, bias, setting["temperature"], setting["threshold"])
            for setting in metadata["settings"]
            for half in halves
        ]
    write_sums(sums_file(path), sums, metadata)
    return True


def write_sums(path: Path, sums: Sequence[SensitivitySums], metadata: dict[str, Any]) -> None:
    """Write the sums of two halves for each setting: tensors SETTING/HALF/NAME."""
    named = {
        f"{place // 2}/{place % 2}/{name}": getattr(each, name)
        for place, each in enumerate(sums)
        for name in SENSITIVITIES
    }
    tensors.save(path, named, {**metadata, "counts": [each.count for each in sums]})


def read_sums(path: Path) -> tuple[list[SensitivitySums], dict[str, Any]]:
    """The sums of either half for each setting, and what they were made from.

    Raises:
        InputError: the file is missing, damaged or holds something else.
    """
    again = "run `python -m flows.sensitivity`"
    found, metadata = tensors.load(path, again)
    try:
        settings, counts = metadata["settings"], metadata.pop("counts")
        sums = [
            SensitivitySums(
                **{name: found[f"{place // 2}/{place % 2}/{name}"] for name in SENSITIVITIES},
                count=count,
                temperature=settings[place // 2]["temperature"],
                clip=settings[place // 2]["threshold"],
            )
            for place, count in enumerate(counts)
        ]
    except (KeyError, IndexError, TypeError):
        sums = []
    if len(sums) * len(SENSITIVITIES) != len(found) or not sums:
        raise InputError(f"{path} does not hold sensitivities and their counts: {again}.")
    return sums, metadata


def merge_sensitivity(plan: list[Path]) -> list[Sensitivity]:
    """Add the sums of all shards, in shard order, and write them as the sums of the whole."""
    total, metadata = read_sums(sums_file(plan[0]))
    for path in plan[1:]:
        total = [a + b for a, b in zip(total, read_sums(sums_file(path))[0], strict=True)]
    kept = {key: metadata[key] for key in ("backbone", "settings")}
    write_sums(artifacts.SENSITIVITY, total, kept)
    remove_others(
        artifacts.SENSITIVITY.parent,
        {artifacts.SENSITIVITY, artifacts.CLIPS, *(sums_file(path) for path in plan)},
    )
    return halves_together(total)


def halves_together(sums: list[SensitivitySums]) -> list[Sensitivity]:
    """The sensitivity at each setting, of the sums of either half at each."""
    return [halved(*pair) for pair in zip(sums[::2], sums[1::2], strict=True)]


def read_sensitivity(parameters: Parameters) -> list[Sensitivity]:
    """The merged sensitivities at every clip and temperature, in the order of `settings_of`.

    Raises:
        InputError: missing, damaged, of another backbone or of other clips and temperatures.
    """
    again = "run `python -m flows.sensitivity`"
    total, metadata = read_sums(artifacts.SENSITIVITY)
    if metadata["backbone"] != digest(artifacts.BACKBONE):
        raise InputError(f"{artifacts.SENSITIVITY} is of another backbone: {again}.")
    if metadata["settings"] != settings_of(parameters):
        raise InputError(
            f"{artifacts.SENSITIVITY} is of another search.clip or search.temperature: {again}."
        )
    return halves_together(total)


# search -----------------------------------------------------------------------------------------

# What OPP, ONP and OPNP, the methods of the paper, may do, and what OPNP with ReAct's clipping may.
METHODS: dict[str, Callable[[Candidate], bool]] = {
    "opp": lambda candidate: candidate.clip is None and candidate.neurons == (0, 0),
    "onp": lambda candidate: candidate.clip is None and candidate.weights == (0, 0),
    "opnp": lambda candidate: candidate.clip is None,
    "opnp+react": lambda candidate: True,
}


def search(parameters: Parameters) -> SearchResult:
    """Search the grid on ID validation and outliers; write all trials and the chosen masks."""
    settings, measured = parameters.search, read_sensitivity(parameters)
    model, _, _ = backbones.load(artifacts.BACKBONE)
    [(h, labels)], outliers = load_features(parameters, "validation"), load_outliers(parameters)

    def progress(trials: Iterator[Trial], count: int) -> Iterator[Trial]:
        return track(trials, "search (masks)", count)

    start = time.perf_counter()
    with training.deterministic(threads=1):
        result = search_masks(
            model.head,
            h,
            outliers,
            measured,
            grid_of(parameters),
            labels=labels,
            max_accuracy_drop=settings.max_accuracy_drop,
            restrictions=METHODS,
            resamples=settings.bootstrap,
            seed=parameters.seed,
            progress=progress,
        )
    seconds = time.perf_counter() - start
    write_json(artifacts.TIMES, {method: {"tune": seconds} for method in METHODS})
    percentiles = {each["threshold"]: each["clip"] for each in settings_of(parameters)}
    write_trials(result.trials, percentiles)
    for method, path in (("opnp", artifacts.MASK), ("opnp+react", artifacts.MASK_REACT)):
        candidate = result.choices[method].trial.candidate
        mask = candidate.mask(setting_of(measured, candidate))
        about = {"backbone": digest(artifacts.BACKBONE), "candidate": asdict(candidate)}
        mask.save(path, about)
    record = {"unpruned": trial_record(result.trials[0], percentiles)}
    for method in METHODS:
        choice = result.choices[method]
        record[method] = trial_record(choice.trial, percentiles) | {
            "interval": {"low": choice.interval[0], "high": choice.interval[1]},
            "within_noise": choice.within_noise,
            "instability": None if isnan(choice.instability) else choice.instability,
            "lowest": choice.lowest.mean_fpr95,
        }
    write_json(
        artifacts.SEARCH,
        {
            **record,
            "backbone": digest(artifacts.BACKBONE),
            "parameters": settings.model_dump(),
            "candidates": len(result.trials),
            "proxies": settings.proxies,
            "outliers": list(settings.outliers),
            "validation_samples": len(h),
            "training_samples": measured[0].count,
        },
    )
    return result


def grid_of(parameters: Parameters) -> Grid:
    settings = parameters.search
    return Grid(
        settings.weights_low,
        settings.weights_high,
        settings.neurons_low,
        settings.neurons_high,
        settings.neuron_sensitivity,
    )


def candidate_record(
    candidate: Candidate, percentiles: Mapping[float | None, float | None]
) -> dict[str, Any]:
    """A candidate as files have it; ``percentiles`` names the clips by their thresholds."""
    return candidate.record() | {
        "clip": percentiles[candidate.clip],
        "threshold": candidate.clip,
        "temperature": candidate.temperature,
    }


def trial_record(trial: Trial, percentiles: Mapping[float | None, float | None]) -> dict[str, Any]:
    return candidate_record(trial.candidate, percentiles) | {
        "fpr95": trial.mean_fpr95,
        "auroc": trial.mean_auroc,
        "accuracy": trial.accuracy,
        "pruned": 100 * trial.pruned,
    }


def write_trials(trials: list[Trial], percentiles: Mapping[float | None, float | None]) -> None:
    rows = [
        trial_record(trial, percentiles)
        | {f"fpr95/{name}": value for name, value in trial.fpr95.items()}
        | {f"auroc/{name}": value for name, value in trial.auroc.items()}
        for trial in trials
    ]
    write_table(artifacts.TRIALS, pa.Table.from_pylist(rows))


def write_table(path: Path, table: pa.Table) -> None:
    with atomic(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")


# evaluate ---------------------------------------------------------------------------------------


def evaluate(parameters: Parameters) -> dict[str, Any]:
    """Tune every detector on proxies, then score the test sets, for the first time."""
    from opnp import comparison, metrics, tables
    from opnp.baselines import Samples, TrainedModel, by_name, takes_images

    # ViM says for each combination that it takes fewer dimensions where there are fewer.
    logging.getLogger("pytorch_ood").setLevel(logging.ERROR)
    settings, temperature = parameters.evaluate, parameters.energy.temperature
    model, preprocessing, _ = backbones.load(artifacts.BACKBONE)
    trained = TrainedModel(model.head, temperature, model, preprocessing.std)
    measured = read_sensitivity(parameters)
    found = read_json(artifacts.SEARCH, "python -m flows.search")
    for key, value, what in (
        ("backbone", digest(artifacts.BACKBONE), "another backbone"),
        ("parameters", parameters.search.model_dump(), "other parameters in section search"),
    ):
        if found.get(key) != value:
            raise InputError(
                f"{artifacts.SEARCH} was made with {what}: run `python -m flows.search`."
            )
    chosen = {method: chosen_candidate(found[method]) for method in METHODS}

    @cache  # the training features serve twice
    def loaded(split: str) -> tuple[Tensor, Tensor]:
        return load_features(parameters, split)[0]

    def samples(split: str, limit: int | None = None) -> Samples:
        features, labels = loaded(split)
        stop = min(len(features), limit or len(features))
        return Samples(
            features[:stop],
            labels[:stop],
            lambda: load_images(parameters, split, 0, stop)[0],
        )

    heads = {
        method: candidate.mask(setting_of(measured, candidate)).apply(model.head)
        for method, candidate in chosen.items()
    }

    def pruned(method: str, features: Tensor) -> Tensor:
        """Logits of what the search chose for a method."""
        clip = chosen[method].clip
        return heads[method](features if clip is None else features.clamp(max=clip))

    train_split = samples("train")
    train_images = samples("train", settings.training_images)
    validation = samples("validation", settings.tuning_samples)
    outliers = {
        name: samples(split, settings.tuning_samples)
        for name, split in outlier_splits(parameters).items()
    }
    tuned: dict[str, comparison.Tuned] = {}
    hyperparameters: dict[str, dict[str, Any]] = {}
    trials: dict[str, int] = {}
    times: dict[str, dict[str, float]] = {}
    if artifacts.TIMES.is_file():  # of the search
        times = {name: of for name, of in read_json(artifacts.TIMES, "").items() if name in METHODS}
    unavailable: dict[str, str] = {}
    with training.deterministic(threads=1), torch.no_grad():
        for name in track(settings.detectors, "tune (detectors)", len(settings.detectors)):
            if name in METHODS:
                kept = (*chosen[name].record(), "clip", "temperature")
                hyperparameters[name] = {key: found[name][key] for key in kept}
                trials[name] = found["candidates"]
                start = time.perf_counter()
                candidate = chosen[name]
                SensitivitySums.of(
                    train_split.features,
                    model.head.weight,
                    energy.bias_of(model.head),
                    candidate.temperature,
                    candidate.clip,
                ).mean()
                times[name] = times.get(name, {}) | {"fit": time.perf_counter() - start}
                continue
            start = time.perf_counter()
            try:
                on_images = takes_images(by_name(name.removeprefix("opnp+"))(trained))
                tuned[name] = comparison.tune(
                    name,
                    trained,
                    train_images if on_images else train_split,
                    validation,
                    outliers,
                    budget=settings.budget,
                    seed=parameters.seed,
                    candidates=pruning_to_try(parameters, chosen),
                )
            except UnavailableError as error:
                unavailable[name] = str(error)
                continue
            hyperparameters[name], trials[name] = tuned[name].hyperparameters, tuned[name].trials
            seconds = time.perf_counter() - start
            times[name] = {"tune": seconds, "fit": tuned[name].fit_seconds}

        # Only here are test features read.
        manifest = manifest_of(parameters)
        names = list(manifest.ood)
        kinds = {name: manifest.ood[name].role for name in names}
        test = {"test": samples("test"), **{name: samples(f"ood/{name}") for name in names}}
        h, labels = test["test"].features, test["test"].labels
        assert labels is not None
        scores: dict[str, dict[str, Tensor]] = {}
        for name in track(settings.detectors, "score (detectors)", len(settings.detectors)):
            start = time.perf_counter()
            try:
                if name in METHODS:
                    t = chosen[name].temperature
                    scores[name] = {
                        split: -energy.energy_score(pruned(name, each.features), t).double()
                        for split, each in test.items()
                    }
                elif name in tuned:
                    scores[name] = {s: tuned[name].score(each) for s, each in test.items()}
            except UnavailableError as error:
                unavailable[name] = str(error)
                continue
            count = sum(len(each.features) for each in test.values())
            milliseconds = 1e6 * (time.perf_counter() - start) / count
            times[name] = times.get(name, {}) | {"score": milliseconds}
        if not scores:
            reasons = " ".join(unavailable.values())
            raise InputError(f"None of evaluate.detectors can run here: {reasons}")
        id_logits = {"unpruned": model.head(h)}
        id_logits |= {method: pruned(method, h) for method in METHODS if method in scores}

        table: dict[str, dict[str, dict[str, float]]] = {}
        intervals: dict[str, Any] = {}
        resamples = settings.bootstrap
        for method, by_set in track(scores.items(), "bootstrap (detectors)", len(scores)):
            against = {split: by_set[split] for split in names}
            by = {s: metrics.ood_metrics(by_set["test"], against[s]) for s in names}
            table[method] = tables.with_means(by, kinds)
            drawn = metrics.bootstrap(by_set["test"], against, kinds, resamples, parameters.seed)
            intervals[method] = {split: spans(values) for split, values in drawn.items()}
        result = {
            "detectors": table,
            "id": {name: metrics.calibration(f, labels) for name, f in id_logits.items()},
        }
        id_intervals = {
            name: spans(metrics.calibration_intervals(f, labels, resamples, parameters.seed))
            for name, f in id_logits.items()
        }
        ood = {name: test[name].features for name in names}
        oracle = oracles(parameters, model.head, measured, chosen, h, ood)
    ranks = tables.ranks(table, names)
    split_features = {split: each.features for split, each in test.items()}
    write_scores(scores, split_features, labels, model.head)
    write_roc(scores, names)
    write_json(artifacts.INTERVALS, {"detectors": intervals, "id": id_intervals})
    evaluation = {
        "hyperparameters": {name: hyperparameters[name] for name in scores},
        "trials": {name: trials[name] for name in scores},
        "sets": {s: {"kind": kinds[s], "count": manifest.ood[s].count} for s in names},
        "id_test_samples": len(h),
        "ranks": ranks,
        "unavailable": unavailable,
        "oracle": oracle,
    }
    write_json(artifacts.EVALUATION, evaluation)
    write_comparison(table, intervals, evaluation)
    write_json(artifacts.TIMES, times)
    # The metrics come last: where they are, everything is.
    write_json(artifacts.METRICS, result)
    return result


def chosen_candidate(record: dict[str, Any]) -> Candidate:
    """The candidate of a record that `search` wrote."""
    return Candidate(
        (record["weights_low"], record["weights_high"]),
        (record["neurons_low"], record["neurons_high"]),
        record["neuron_sensitivity"],
        record["threshold"],
        record["temperature"],
    )


def pruning_to_try(parameters: Parameters, chosen: dict[str, Candidate]) -> list[Candidate]:
    """What a detector may prune in combination: what the search chose, and each end by itself.

    What is best for the energy need not be for others: detectors of features heed no weights, and
    ViM, which adds the residual of the features, loses by pruned neurons.
    """
    settings = parameters.search
    weights = [(0.0, high) for high in settings.weights_high if high]
    weights += [(low, 0.0) for low in settings.weights_low if low]
    neurons = [(0.0, high) for high in settings.neurons_high if high]
    neurons += [(low, 0.0) for low in settings.neurons_low if low]
    return [
        *(replace(chosen[method], clip=None) for method in ("opp", "onp", "opnp")),
        *(Candidate(weights=ends) for ends in weights),
        *(
            Candidate((0.0, 0.0), ends, kind)
            for kind in settings.neuron_sensitivity
            for ends in neurons
        ),
    ]


def oracles(
    parameters: Parameters,
    head: nn.Linear,
    measured: list[Sensitivity],
    chosen: dict[str, Candidate],
    h: Tensor,
    ood: dict[str, Tensor],
) -> dict[str, Any]:
    """What choosing masks on the test sets themselves would have given, which nobody may do.

    Beside the lowest mean FPR95 of any candidate that keeps the accuracy on ID validation stands
    how much of its gain over the unpruned head the mask chosen without these sets keeps.
    """
    rows = pq.read_table(artifacts.TRIALS).to_pylist()
    floor = rows[0]["accuracy"] - parameters.search.max_accuracy_drop - 1e-9
    accurate = {chosen_candidate(row) for row in rows if row["accuracy"] >= floor}
    candidates = candidates_of(measured, grid_of(parameters))
    tested = Judge.of(head, h, ood).trials(measured, candidates)
    percentiles = {each["threshold"]: each["clip"] for each in settings_of(parameters)}
    by_candidate = {
        trial.candidate: trial.mean_fpr95
        for trial in track(tested, "oracle (masks)", len(candidates))
    }
    unpruned, found = by_candidate[candidates[0]], {}
    for method in ("opnp", "opnp+react"):
        eligible = [each for each in candidates if METHODS[method](each) and each in accurate]
        lowest = min(eligible, key=lambda candidate: by_candidate[candidate])
        gain, kept = unpruned - by_candidate[lowest], unpruned - by_candidate[chosen[method]]
        found[method] = candidate_record(lowest, percentiles) | {
            "fpr95": by_candidate[lowest],
            "kept": 100 * kept / gain if gain > 0 else 100.0,
        }
    return found


def write_comparison(
    table: dict[str, Any], intervals: dict[str, Any], evaluation: dict[str, Any]
) -> None:
    """The comparison as a long table and as Markdown."""
    from opnp import tables

    write_table(artifacts.COMPARISON, tables.long_table(table, intervals, evaluation))
    text = tables.to_markdown(table, intervals, evaluation)
    with atomic(artifacts.COMPARISON_TEXT) as temporary:
        temporary.write_text(text, encoding="utf-8")


def spans(intervals: dict[str, tuple[float, float]]) -> dict[str, dict[str, float]]:
    return {metric: {"low": low, "high": high} for metric, (low, high) in intervals.items()}


def write_scores(
    scores: dict[str, dict[str, Tensor]],
    split_features: dict[str, Tensor],
    labels: Tensor,
    head: nn.Linear,
) -> None:
    """One row for each test sample: its set, index, label, predicted class and outlier scores."""
    columns: dict[str, Any] = {"set": [], "index": [], "label": [], "prediction": []}
    for split, h in split_features.items():
        n = len(h)
        columns["set"] += [split] * n
        columns["index"] += range(n)
        columns["label"] += labels.tolist() if split == "test" else [-1] * n
        columns["prediction"] += head(h).argmax(dim=1).tolist()
    for name, by_set in scores.items():
        columns[name] = torch.cat([by_set[split] for split in split_features]).numpy()
    write_table(artifacts.SCORES, pa.table(columns))


def write_roc(scores: dict[str, dict[str, Tensor]], names: list[str]) -> None:
    """ROC curves with ID positive, averaged over the OOD sets at each FPR, in percent."""
    from opnp.metrics import tpr_at_fpr

    fpr = np.linspace(0, 1, 101)
    curves = {
        name: np.mean([tpr_at_fpr(by_set["test"], by_set[s], fpr) for s in names], axis=0)
        for name, by_set in scores.items()
    }
    rows = [
        {"fpr": 100 * fpr[i], **{name: 100 * float(curve[i]) for name, curve in curves.items()}}
        for i in range(len(fpr))
    ]
    write_csv(artifacts.ROC, ["fpr", *curves], rows)


# report -----------------------------------------------------------------------------------------


def report(parameters: Parameters) -> Path:
    """Draw everything found into one self-contained page."""
    from opnp.report import render

    manifest_of(parameters)
    page = render(parameters)
    with atomic(artifacts.REPORT) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return artifacts.REPORT
