"""The stages of the pipeline, from parameters and files to files: one function each, and for those
whose work is divided, the parts of it.

`flows/` runs the parts as Prefect tasks; calling the functions here does the same in this process.
"""

import csv
import hashlib
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import lru_cache
from itertools import islice
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
from opnp.errors import InputError
from opnp.features import Shard
from opnp.files import atomic, digest, read_json, write_json
from opnp.masks import PruningMask
from opnp.parameters import Parameters
from opnp.progress import track
from opnp.search import Candidate, Grid, SearchResult, Trial, choose, search_masks
from opnp.sensitivity import Sensitivity, SensitivitySums

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
    data = parameters.data
    for spec in (data.id, *data.near.values(), *data.far.values()):
        if Path(spec).resolve().is_relative_to(artifacts.DATA.resolve()):
            raise InputError(
                f"The source {spec} lies in {artifacts.DATA}/, which fetch replaces: move it away."
            )
    shutil.rmtree(artifacts.FETCHED, ignore_errors=True)


def ood_sources(parameters: Parameters) -> list[str]:
    """The OOD sets with a source of their own: all but those of held-out classes."""
    named = {**parameters.data.near, **parameters.data.far}
    return [name for name, source in named.items() if source != "held-out"]


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
    role, source = ("near", data.near[name]) if name in data.near else ("far", data.far[name])
    examples = sources.open_ood(source, data.image_size, data.seed)
    limited = islice(examples, data.ood_count)
    path = data_file(f"ood/{name}", artifacts.FETCHED)
    entry = datasets.write(path, role, source, limited, data.image_size, data.mode, [])
    return {f"ood/{name}": entry}


def fetched(parameters: Parameters, sets: dict[str, ImageSet]) -> Manifest:
    """The manifest of what has been fetched."""
    wanted = ["train", "validation", "test"]
    wanted += [f"ood/{name}" for name in (*parameters.data.near, *parameters.data.far)]
    return Manifest(
        parameters.data.model_dump(),
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
    if manifest.parameters != parameters.data.model_dump():
        raise InputError(
            f"{artifacts.DATA}/ was fetched with other parameters in section data than "
            f"{artifacts.PARAMETERS} has now: run `python -m flows.fetch`."
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
    spec = {"name": settings.backbone, "width": settings.width, "depth": settings.depth}
    with training.deterministic(settings.threads):
        torch.manual_seed(parameters.seed)
        model = backbones.build(
            channels=len(data.mode),
            classes=len(classes),
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
    proxy = shard.split.startswith("proxies/")
    rows = range(shard.start, shard.stop)
    if proxy:
        family = shard.split.removeprefix("proxies/")
        with one_at_a_time:
            validation = validation_images(origin["images"], preprocessing)
        made = proxies.make(family, validation, rows, parameters.seed)
        images, labels = torch.from_numpy(made), np.full(len(rows), -1, np.int64)
    else:
        pixels, labels = datasets.read(
            data_file(shard.split), preprocessing.mode, preprocessing.size, shard.start, shard.stop
        )
        images = unit(pixels)
    batches = preprocessing.normalize(images).split(parameters.features.batch_size)
    with training.deterministic(threads=1):
        encoded = shards.encode(model.encoder, batches, device)
    shards.write_shard(shard, encoded, labels, origin, parameters.features.dtype)
    return True


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


def load_proxies(parameters: Parameters) -> dict[str, Tensor]:
    """Features of each proxy family, by name; see `load_features`."""
    families = parameters.search.proxies
    loaded = load_features(parameters, *(f"proxies/{family}" for family in families))
    return {family: features for family, (features, _) in zip(families, loaded, strict=True)}


# sensitivity ------------------------------------------------------------------------------------


def sensitivity(parameters: Parameters) -> Sensitivity:
    """Measure the sensitivity of the head over all training features, shard by shard."""
    plan = sensitivity_shards(parameters)
    for path in track(plan, "sensitivity (shards)", len(plan)):
        sensitivity_shard(parameters, path)
    return merge_sensitivity(plan)


def sensitivity_shards(parameters: Parameters) -> list[Path]:
    """The feature shards of the training split, in order.

    Raises:
        InputError: they are missing, damaged, of something else, or not the whole split.
    """
    return shards.shard_paths("train", expected_features(parameters, "train"))


def sums_file(path: Path) -> Path:
    return artifacts.SENSITIVITY.parent / "shards" / f"{path.stem}.safetensors"


def sensitivity_shard(parameters: Parameters, path: Path) -> bool:
    """Sum one shard's contributions; say False if that was already done and the file is whole."""
    h, _, origin = shards.read_shard(path)
    metadata = {
        "backbone": origin["backbone"],
        "rows": origin["rows"],
        "features": digest(path),
        "temperature": parameters.energy.temperature,
        "code": code_digest(energy, sensitivity_module),
    }
    try:
        if read_sums(sums_file(path))[1] == metadata:
            return False
    except InputError:
        pass
    model, _, _ = backbones.load(artifacts.BACKBONE)
    device = device_for(int(path.stem))
    with training.deterministic(threads=1):
        sums = SensitivitySums.of(
            h.to(device), model.head.weight, model.head.bias, parameters.energy.temperature
        )
    write_sensitivity(sums_file(path), sums, metadata)
    return True


def write_sensitivity(
    path: Path, values: SensitivitySums | Sensitivity, metadata: dict[str, Any]
) -> None:
    measured = {name: value for name, value in vars(values).items() if isinstance(value, Tensor)}
    tensors.save(path, measured, {**metadata, "count": values.count})


def read_sums(path: Path) -> tuple[SensitivitySums, dict[str, Any]]:
    again = "run `python -m flows.sensitivity`"
    sums, metadata = tensors.load(path, again)
    check_sensitivity(path, sums, metadata, again)
    return SensitivitySums(**sums, count=metadata.pop("count")), metadata


def check_sensitivity(
    path: Path, found: dict[str, Tensor], metadata: dict[str, Any], again: str
) -> None:
    """Refuse a file that is whole, but holds something else than sensitivities."""
    expected = {"weights", "neurons_mean", "neurons_gradient", "neurons_taylor"}
    if set(found) != expected or "count" not in metadata:
        raise InputError(f"{path} does not hold sensitivities and their count: {again}.")


def merge_sensitivity(plan: list[Path]) -> Sensitivity:
    """Add the sums of all shards, in shard order, and write the sensitivities."""
    total, metadata = read_sums(sums_file(plan[0]))
    for path in plan[1:]:
        total = total + read_sums(sums_file(path))[0]
    mean = total.mean()
    kept = {key: metadata[key] for key in ("backbone", "temperature")}
    write_sensitivity(artifacts.SENSITIVITY, mean, kept)
    remove_others(
        artifacts.SENSITIVITY.parent,
        {artifacts.SENSITIVITY, *(sums_file(path) for path in plan)},
    )
    return mean


def read_sensitivity(parameters: Parameters) -> Sensitivity:
    """The merged sensitivities.

    Raises:
        InputError: missing, damaged, of another backbone or of another temperature.
    """
    again = "run `python -m flows.sensitivity`"
    measured, metadata = tensors.load(artifacts.SENSITIVITY, again)
    check_sensitivity(artifacts.SENSITIVITY, measured, metadata, again)
    if metadata.get("backbone") != digest(artifacts.BACKBONE):
        raise InputError(f"{artifacts.SENSITIVITY} is of another backbone: {again}.")
    if metadata.get("temperature") != parameters.energy.temperature:
        raise InputError(f"{artifacts.SENSITIVITY} is of another energy.temperature: {again}.")
    return Sensitivity(**measured, count=metadata["count"])


# search -----------------------------------------------------------------------------------------

# What the three methods of the paper may prune: OPP weights, ONP neurons, OPNP both.
METHODS: dict[str, Callable[[Candidate], bool]] = {
    "opp": lambda candidate: candidate.neurons == (0, 0),
    "onp": lambda candidate: candidate.weights == (0, 0),
    "opnp": lambda candidate: True,
}


def search(parameters: Parameters) -> SearchResult:
    """Search the grid on ID validation and proxy outliers; write all trials and the best mask."""
    settings, measured = parameters.search, read_sensitivity(parameters)
    model, _, _ = backbones.load(artifacts.BACKBONE)
    [(h, labels)], outliers = load_features(parameters, "validation"), load_proxies(parameters)
    grid = Grid(
        settings.weights_low,
        settings.weights_high,
        settings.neurons_low,
        settings.neurons_high,
        settings.neuron_sensitivity,
    )

    def progress(candidates: Any) -> Iterator[Candidate]:
        return track(candidates, "search (masks)", len(candidates))

    with training.deterministic(threads=1):
        result = search_masks(
            model.head,
            h,
            outliers,
            measured,
            grid,
            labels=labels,
            max_accuracy_drop=settings.max_accuracy_drop,
            temperature=parameters.energy.temperature,
            progress=progress,
        )
    best = {
        method: choose(result.trials, settings.max_accuracy_drop, allowed)
        for method, allowed in METHODS.items()
    }
    write_trials(result.trials)
    result.mask.save(
        artifacts.MASK,
        {
            "backbone": digest(artifacts.BACKBONE),
            "candidate": asdict(result.best.candidate),
        },
    )
    write_json(
        artifacts.SEARCH,
        {
            "unpruned": trial_record(result.trials[0]),
            **{method: trial_record(trial) for method, trial in best.items()},
            "candidates": len(result.trials),
            "outliers": list(outliers),
            "validation_samples": len(h),
            "training_samples": measured.count,
        },
    )
    return result


def trial_record(trial: Trial) -> dict[str, Any]:
    wl, wh = trial.candidate.weights
    nl, nh = trial.candidate.neurons
    return {
        "weights_low": wl,
        "weights_high": wh,
        "neurons_low": nl,
        "neurons_high": nh,
        "neuron_sensitivity": trial.candidate.neuron_sensitivity,
        "fpr95": trial.mean_fpr95,
        "auroc": trial.mean_auroc,
        "accuracy": trial.accuracy,
        "pruned": 100 * trial.pruned,
    }


def write_trials(trials: list[Trial]) -> None:
    rows = [
        trial_record(trial)
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
    """Tune every detector on the proxies, then score the test sets, for the first time."""
    from pytorch_ood.api import Detector

    from opnp import comparison, metrics
    from opnp.detector import OPNP

    temperature = parameters.energy.temperature
    model, _, _ = backbones.load(artifacts.BACKBONE)
    head = model.head
    train_split, validation = load_features(parameters, "train", "validation")
    outliers = load_proxies(parameters)
    found = read_json(artifacts.SEARCH, "python -m flows.search")
    masks = {method: method_mask(parameters, method, found) for method in METHODS}
    detectors: dict[str, Detector] = {}
    tuned: dict[str, dict[str, Any]] = {}
    with training.deterministic(threads=1):
        for name in track(
            parameters.evaluate.detectors, "tune (detectors)", len(parameters.evaluate.detectors)
        ):
            if name in masks:
                detectors[name] = OPNP.from_mask(None, head, masks[name], temperature)
                tuned[name] = {key: found[name][key] for key in PERCENTAGES}
            else:
                detectors[name] = comparison.DETECTORS[name](head, temperature)
                tuned[name] = comparison.tune(
                    detectors[name], head, train_split, validation[0], outliers
                )

        # Only here are test features read.
        manifest = manifest_of(parameters)
        names = list(manifest.ood)
        h, labels = load_features(parameters, "test")[0]
        outside = load_features(parameters, *(f"ood/{name}" for name in names))
        ood = {name: features for name, (features, _) in zip(names, outside, strict=True)}
        scores = {
            name: {
                split: comparison.score(detector, head, split_features)
                for split, split_features in {"test": h, **ood}.items()
            }
            for name, detector in detectors.items()
        }
        id_logits = {
            "unpruned": head(h),
            **{m: masks[m].apply(head)(h) for m in masks if m in detectors},
        }

        table: dict[str, dict[str, dict[str, float]]] = {}
        intervals: dict[str, Any] = {}
        resamples = parameters.evaluate.bootstrap
        for method, by_set in track(scores.items(), "bootstrap (detectors)", len(scores)):
            against = {split: by_set[split] for split in names}
            table[method] = {s: metrics.ood_metrics(by_set["test"], against[s]) for s in names}
            table[method]["mean"] = {
                metric: float(np.mean([table[method][split][metric] for split in names]))
                for metric in metrics.METRICS
            }
            drawn = metrics.bootstrap(by_set["test"], against, resamples, parameters.seed)
            intervals[method] = {split: spans(values) for split, values in drawn.items()}
        result = {
            "detectors": table,
            "id": {name: metrics.calibration(f, labels) for name, f in id_logits.items()},
        }
        id_intervals = {
            name: spans(metrics.calibration_intervals(f, labels, resamples, parameters.seed))
            for name, f in id_logits.items()
        }
    write_scores(scores, {"test": h, **ood}, labels, head)
    write_roc(scores, names)
    write_json(artifacts.INTERVALS, {"detectors": intervals, "id": id_intervals})
    write_json(
        artifacts.EVALUATION,
        {
            "hyperparameters": tuned,
            "sets": {
                s: {"kind": manifest.ood[s].role, "count": manifest.ood[s].count} for s in names
            },
            "id_test_samples": len(h),
        },
    )
    # The metrics come last: where they are, everything is.
    write_json(artifacts.METRICS, result)
    return result


def spans(intervals: dict[str, tuple[float, float]]) -> dict[str, dict[str, float]]:
    return {metric: {"low": low, "high": high} for metric, (low, high) in intervals.items()}


PERCENTAGES = ("weights_low", "weights_high", "neurons_low", "neurons_high", "neuron_sensitivity")


def method_mask(parameters: Parameters, method: str, found: dict[str, Any]) -> PruningMask:
    """The mask of a method; that of OPNP is the one the search has saved.

    Raises:
        InputError: the saved mask is missing, damaged or for another backbone.
    """
    if method == "opnp":
        again = "run `python -m flows.search`"
        _, metadata = tensors.load(artifacts.MASK, again)
        if metadata.get("backbone") != digest(artifacts.BACKBONE):
            raise InputError(f"{artifacts.MASK} is for another head: {again}.")
        return PruningMask.load(artifacts.MASK)
    chosen = found[method]
    return Candidate(
        (chosen["weights_low"], chosen["weights_high"]),
        (chosen["neurons_low"], chosen["neurons_high"]),
        chosen["neuron_sensitivity"],
    ).mask(read_sensitivity(parameters))


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
