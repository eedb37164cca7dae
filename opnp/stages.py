"""The stages of the pipeline, from parameters and files to files: one function each, and for those
whose work is divided, the parts of it.

`flows/` runs the parts as Prefect tasks; calling the functions here does the same in this process.
"""

import csv
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from opnp import artifacts, backbones, datasets, proxies, sources, tensors, training
from opnp import features as shards
from opnp.datasets import ImageSet, Manifest, data_file, read_manifest
from opnp.energy import logits
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
    begin_fetch()
    sets = fetch_id(parameters)
    for name in ood_sources(parameters):
        sets |= fetch_ood(parameters, name)
    manifest = fetched(parameters, sets)
    finish_fetch(manifest)
    return manifest


def begin_fetch() -> None:
    """Make room beside `data/`, which stays as it is until everything has been fetched."""
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
    rng = sources.generator(parameters.seed, "split")
    divided: dict[str, list[sources.Example]] = {"train": [], "validation": [], "test": []}
    for new, label in enumerate(known):
        pool = [image for image, y in examples.get("all", examples.get("train", [])) if y == label]
        order = rng.permutation(len(pool))
        test = round(len(pool) * data.test / 100) if "all" in examples and data.test else 0
        stop = test + round(len(pool) * data.validation / 100)
        parts = {"test": order[:test], "validation": order[test:stop], "train": order[stop:]}
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
    examples = sources.open_ood(source, data.image_size, parameters.seed)
    limited = islice(examples, data.ood_count)
    path = data_file(f"ood/{name}", artifacts.FETCHED)
    entry = datasets.write(path, role, source, limited, data.image_size, data.mode, [])
    return {f"ood/{name}": entry}


def fetched(parameters: Parameters, sets: dict[str, ImageSet]) -> Manifest:
    """The manifest of what has been fetched."""
    wanted = ["train", "validation", "test"]
    wanted += [f"ood/{name}" for name in (*parameters.data.near, *parameters.data.far)]
    return Manifest(
        {"seed": parameters.seed, "data": parameters.data.model_dump()},
        list(sets["train"].classes),
        {name: sets[name] for name in wanted},
    )


def finish_fetch(manifest: Manifest) -> None:
    """Put what has been fetched, with its manifest, in the place of `data/`."""
    write_json(artifacts.FETCHED / artifacts.MANIFEST.name, manifest.as_json())
    shutil.rmtree(artifacts.DATA, ignore_errors=True)
    artifacts.FETCHED.rename(artifacts.DATA)


def remove_others(folder: Path, pattern: str, keep: set[Path]) -> None:
    """Remove files of an earlier run that this one did not make, and the folders left empty."""
    for path in folder.rglob(pattern):
        if path not in keep:
            path.unlink()
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()


# train ------------------------------------------------------------------------------------------


def train(parameters: Parameters) -> dict[str, Any]:
    """Train the backbone, or load its checkpoint, and record how well it classifies."""
    settings, classes = parameters.train, sources.class_names(data_file("train"))
    images, labels = {}, {}
    pixels, labels["train"] = datasets.read(
        data_file("train"), parameters.data.mode, parameters.data.image_size
    )
    preprocessing = backbones.Preprocessing.measured(pixels)
    images["train"] = normalized(pixels, preprocessing)
    pixels, labels["validation"] = datasets.read(
        data_file("validation"), preprocessing.mode, preprocessing.size
    )
    images["validation"] = normalized(pixels, preprocessing)
    device = device_for(0)
    both = {
        split: (images[split].to(device), torch.from_numpy(labels[split]).to(device))
        for split in images
    }
    with training.deterministic(settings.threads):
        torch.manual_seed(parameters.seed)
        spec = {"name": settings.backbone, "width": settings.width, "depth": settings.depth}
        model = backbones.build(
            channels=preprocessing.channels,
            classes=len(classes),
            **spec,  # type: ignore[arg-type]
        )
        history = []
        if settings.checkpoint:
            backbones.load_weights(model, Path(settings.checkpoint))
        model.to(device)
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
        "checkpoint": settings.checkpoint,
        "sha256": digest(artifacts.BACKBONE),
    }
    write_csv(
        artifacts.HISTORY, ["epoch", "loss", "train_accuracy", "validation_accuracy"], history
    )
    write_json(artifacts.TRAINING, record)
    return record


def normalized(pixels: np.ndarray[Any, Any], preprocessing: backbones.Preprocessing) -> Tensor:
    return preprocessing.normalize(unit(pixels))


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
    manifest, size = read_manifest(), parameters.features.shard_size
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
    model_sha = digest(artifacts.BACKBONE)
    device = device_for(index)
    model, preprocessing = backbone_on(model_sha, device)
    proxy = shard.split.startswith("proxies/")
    source = "validation" if proxy else shard.split
    origin = shards.origin(
        model_sha,
        asdict(preprocessing),
        read_manifest().sets[source].sha256,
        shard,
        parameters.features.dtype,
        parameters.seed if proxy else None,
    )
    if shards.is_whole(shard, origin):
        return False
    rows = range(shard.start, shard.stop)
    if proxy:
        family = shard.split.removeprefix("proxies/")
        validation = validation_images(origin["images"], preprocessing)
        made = proxies.make(family, validation, rows, parameters.seed)
        images, labels = torch.from_numpy(made), np.full(len(rows), -1, np.int64)
    else:
        pixels, labels = datasets.read(
            data_file(source), preprocessing.mode, preprocessing.size, shard.start, shard.stop
        )
        images = unit(pixels)
    batches = preprocessing.normalize(images).split(parameters.features.batch_size)
    with training.deterministic(threads=1):
        encoded = shards.encode(model.encoder, batches, device)
    shards.write_shard(shard, encoded, labels, origin, parameters.features.dtype)
    return True


def finish_features(plan: list[Shard]) -> None:
    """Remove shards that are not in the plan."""
    remove_others(artifacts.FEATURES, "*.arrow", {shard.path for shard in plan})


@lru_cache(maxsize=16)
def backbone_on(
    sha256: str, device: torch.device
) -> tuple[backbones.Classifier, backbones.Preprocessing]:
    """The backbone on a device, loaded once a process as long as its file stays the same."""
    model, preprocessing, _ = backbones.load(artifacts.BACKBONE)
    return model.to(device), preprocessing


@lru_cache(maxsize=1)
def validation_images(sha256: str, preprocessing: backbones.Preprocessing) -> np.ndarray[Any, Any]:
    """All validation images in [0, 1], (N, C, H, W), of which proxies are made."""
    pixels, _ = datasets.read(data_file("validation"), preprocessing.mode, preprocessing.size)
    return unit(pixels).numpy()


def head_and_features(
    *splits: str, proxies: tuple[str, ...] = ()
) -> tuple[backbones.Classifier, list[tuple[Tensor, Tensor]], dict[str, Tensor]]:
    """The backbone, the features and labels of splits, and those of proxy families by name."""
    model, _, _ = backbones.load(artifacts.BACKBONE)
    sha256 = digest(artifacts.BACKBONE)
    loaded = [shards.load(split, sha256) for split in splits]
    outliers = {name: shards.load(f"proxies/{name}", sha256)[0] for name in proxies}
    return model, loaded, outliers


# sensitivity ------------------------------------------------------------------------------------


def sensitivity(parameters: Parameters) -> Sensitivity:
    """Measure the sensitivity of the head over all training features, shard by shard."""
    plan = sensitivity_shards()
    for path in track(plan, "sensitivity (shards)", len(plan)):
        sensitivity_shard(parameters, path)
    return merge_sensitivity(plan)


def sensitivity_shards() -> list[Path]:
    """The feature shards of the training split, in order.

    Raises:
        InputError: they are missing, damaged, of another backbone, or not the whole split.
    """
    return shards.shard_paths("train", digest(artifacts.BACKBONE))


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
    if "count" not in metadata:
        raise InputError(f"{path} does not say how many samples it is of: {again}.")
    return SensitivitySums(**sums, count=metadata.pop("count")), metadata


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
        "*.safetensors",
        {artifacts.SENSITIVITY, *(sums_file(path) for path in plan)},
    )
    return mean


def read_sensitivity() -> Sensitivity:
    """The merged sensitivities.

    Raises:
        InputError: missing, damaged, or of another backbone.
    """
    again = "run `python -m flows.sensitivity`"
    measured, metadata = tensors.load(artifacts.SENSITIVITY, again)
    if metadata.get("backbone") != digest(artifacts.BACKBONE):
        raise InputError(f"{artifacts.SENSITIVITY} is of another backbone: {again}.")
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
    settings, measured = parameters.search, read_sensitivity()
    model, [(h, labels)], outliers = head_and_features(
        "validation", proxies=tuple(settings.proxies)
    )
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
    model, [train_split, validation], outliers = head_and_features(
        "train", "validation", proxies=tuple(parameters.search.proxies)
    )
    head = model.head
    found = read_json(artifacts.SEARCH, "python -m flows.search")
    masks = {method: method_mask(method, found) for method in METHODS}
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
        manifest = read_manifest()
        names = list(manifest.ood)
        _, tests, _ = head_and_features("test", *(f"ood/{name}" for name in names))
        (h, labels), ood = (
            tests[0],
            dict(zip(names, (split[0] for split in tests[1:]), strict=True)),
        )
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
    for method, by_set in track(scores.items(), "bootstrap (detectors)", len(scores)):
        against = {split: by_set[split] for split in names}
        table[method] = {s: metrics.ood_metrics(by_set["test"], against[s]) for s in names}
        table[method]["mean"] = {
            metric: float(np.mean([table[method][split][metric] for split in names]))
            for metric in metrics.METRICS
        }
        intervals[method] = {
            split: {metric: {"low": low, "high": high} for metric, (low, high) in values.items()}
            for split, values in metrics.bootstrap(
                by_set["test"], against, parameters.evaluate.bootstrap, parameters.seed
            ).items()
        }
    result = {
        "detectors": table,
        "id": {name: metrics.calibration(f, labels) for name, f in id_logits.items()},
    }
    write_scores(scores, {"test": h, **ood}, labels, model)
    write_roc(scores, names)
    write_json(artifacts.INTERVALS, intervals)
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


PERCENTAGES = ("weights_low", "weights_high", "neurons_low", "neurons_high", "neuron_sensitivity")


def method_mask(method: str, found: dict[str, Any]) -> PruningMask:
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
    ).mask(read_sensitivity())


def write_scores(
    scores: dict[str, dict[str, Tensor]],
    split_features: dict[str, Tensor],
    labels: Tensor,
    model: backbones.Classifier,
) -> None:
    """One row for each test sample: its set, index, label, predicted class and outlier scores."""
    columns: dict[str, Any] = {"set": [], "index": [], "label": [], "prediction": []}
    for split, h in split_features.items():
        n = len(h)
        columns["set"] += [split] * n
        columns["index"] += range(n)
        columns["label"] += labels.tolist() if split == "test" else [-1] * n
        columns["prediction"] += (
            logits(h, model.head.weight, model.head.bias).argmax(dim=1).tolist()
        )
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

    page = render(parameters)
    with atomic(artifacts.REPORT) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return artifacts.REPORT
