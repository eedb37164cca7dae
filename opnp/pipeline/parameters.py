"""The parameters of a run: `params.yaml`, validated before any work starts."""

import re
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from opnp.detectors.names import check
from opnp.errors import InputError

__all__ = ["Parameters", "load"]

Name = Annotated[str, Field(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$")]
Percentage = Annotated[float, Field(ge=0, lt=100)]
Positive = Annotated[int, Field(gt=0)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]


class Section(BaseModel):
    """Part of the parameters: unknown keys are refused, types not coerced, values frozen."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Data(Section):
    """Where images come from; see `opnp.data.sources` for what a source may be."""

    seed: Seed = 0
    id: str
    image_size: Positive
    mode: Literal["L", "RGB"] = "L"
    resize: Positive | None = None
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    held_out: list[Annotated[int, Field(ge=0)]] = []
    validation: Annotated[float, Field(gt=0, lt=100)]
    test: Annotated[float, Field(gt=0, lt=100)] | None = None
    near: dict[Name, str] = {}
    far: dict[Name, str] = {}
    ood_count: Positive
    max_unreadable: Annotated[int, Field(ge=0)] = 10
    missing: Literal["refuse", "skip"] = "refuse"

    @model_validator(mode="after")
    def consistent(self) -> Self:
        if self.resize is not None and self.resize < self.image_size:
            raise ValueError(
                f"resize, {self.resize}, must be at least image_size, {self.image_size}: images "
                "are scaled to the one, then cropped to the other"
            )
        if not self.near and not self.far:
            raise ValueError("name at least one OOD set in near or far")
        if twice := set(self.near) & set(self.far):
            raise ValueError(f"{', '.join(sorted(twice))} is both near and far: rename one")
        if taken := {"mean", "near", "far", "test"} & {*self.near, *self.far}:
            raise ValueError(f"{', '.join(sorted(taken))} is a reserved name: rename the OOD set")
        if not self.held_out and "held-out" in (*self.near.values(), *self.far.values()):
            raise ValueError("the source held-out needs classes in held_out")
        if self.validation + (self.test or 0) >= 100:
            raise ValueError("validation and test together leave no training images")
        return self


class Train(Section):
    """The backbone: trained here, or loaded from ``checkpoint``."""

    backbone: str = "resnet"
    width: Positive = 32
    depth: Positive = 1
    checkpoint: str | None = None
    preprocessing: str | None = None
    epochs: Positive = 15
    batch_size: Positive = 64
    optimizer: Literal["sgd", "adamw"] = "sgd"
    precision: Literal["float32", "bfloat16"] = "float32"
    spcp: Annotated[float, Field(gt=0, lt=100)] | None = None
    learning_rate: Annotated[float, Field(gt=0)] = 0.1
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4
    shift_pixels: Annotated[int, Field(ge=0)] = 1
    threads: Positive = 1

    @field_validator("backbone")
    @classmethod
    def is_spec(cls, backbone: str) -> str:
        if not re.fullmatch(r"resnet|convnext|vit|[\w.]+:[\w.]+(\?.+)?", backbone):
            raise ValueError(
                "it must be resnet, convnext, vit, torchvision:NAME, timm:NAME or "
                f"package.module:factory, not {backbone!r}"
            )
        if "?" in backbone:
            from opnp.backbones.specs import parse  # torch, which few parameters need

            parse(backbone)
        return backbone


class Features(Section):
    """How penultimate features are computed and stored."""

    dtype: Literal["float32", "float16"] = "float32"
    precision: Literal["float32", "bfloat16"] = "float32"
    compile: bool = False
    batch_size: Positive = 256
    shard_size: Positive = 2048


class Energy(Section):
    """The energy S = T·logsumexp(f/T)."""

    temperature: Annotated[float, Field(gt=0)] = 1.0


class Search(Section):
    """The grid of masks, what it is judged on, and the constraint."""

    weights_low: list[Percentage]
    weights_high: list[Percentage]
    neurons_low: list[Percentage]
    neurons_high: list[Percentage]
    neuron_sensitivity: Annotated[list[Literal["mean", "gradient", "taylor"]], Field(min_length=1)]
    clip: list[Annotated[float, Field(gt=0, lt=100)] | None] = [None]
    temperature: Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=1)] = [1.0]
    max_accuracy_drop: Annotated[float, Field(ge=0)] = 1.0
    proxies: list[str]
    outliers: dict[Name, str] = {}
    bootstrap: Annotated[int, Field(ge=2)] = 200

    @model_validator(mode="after")
    def consistent(self) -> Self:
        for what in ("weights", "neurons"):
            low, high = getattr(self, f"{what}_low"), getattr(self, f"{what}_high")
            if not low or not high:
                raise ValueError(f"{what}_low and {what}_high need at least one percentage, e.g. 0")
            if max(low) + max(high) >= 100:
                raise ValueError(
                    f"{what}_low {max(low):g} and {what}_high {max(high):g} together prune "
                    "100 % or more"
                )
        if self.clip[:1] != [None]:
            raise ValueError("clip must begin with null: the unpruned head and OPNP do not clip")
        for what in ("clip", "temperature"):
            if len(set(getattr(self, what))) < len(getattr(self, what)):
                raise ValueError(f"{what} holds a value twice")
        if not self.proxies and not self.outliers:
            raise ValueError("name at least one proxy in proxies, or a set in outliers")
        if taken := set(self.proxies) & set(self.outliers):
            raise ValueError(f"outliers: {', '.join(sorted(taken))} is a proxy's name: rename it")
        # Known here, though proxies are made much later: a misspelt one must not cost a training.
        from opnp.data.proxies import FAMILIES

        for family in self.proxies:
            if family not in FAMILIES:
                near = get_close_matches(family, FAMILIES, 1) or list(FAMILIES)
                raise ValueError(f"there is no proxy {family!r}; did you mean {', '.join(near)}?")
        return self


class Evaluate(Section):
    """What is compared on the test sets, and how much each detector may try before."""

    detectors: Annotated[list[str], Field(min_length=1)]
    budget: Positive = 40
    tuning_samples: Positive = 1000
    training_images: Positive = 5000
    bootstrap: Positive = 1000

    @model_validator(mode="after")
    def consistent(self) -> Self:
        for name in self.detectors:
            check(name)
        if len(set(self.detectors)) < len(self.detectors):
            raise ValueError("detectors holds a name twice")
        return self


class Engine(Section):
    """Who computes the shards. It decides how fast a run is, and nothing of what it makes."""

    runner: Literal["threads", "processes", "dask"] = "threads"
    workers: Positive | None = None
    decoders: Positive | None = None
    scheduler: str | None = None
    storage: str | None = None

    @model_validator(mode="after")
    def consistent(self) -> Self:
        if self.scheduler is not None:
            if self.runner != "dask":
                raise ValueError(
                    f"scheduler is of Dask and runner is {self.runner}: set runner to dask, or "
                    "scheduler to null"
                )
            if self.workers is not None:
                raise ValueError(
                    "workers is of a cluster on this machine, and scheduler names another, which "
                    "has its own: set one of them to null"
                )
            if not re.fullmatch(r"[a-z]+://\S+:\d+", self.scheduler):
                raise ValueError(
                    f"scheduler must be an address such as tcp://HOST:8786, not {self.scheduler!r}"
                )
        if self.storage is not None:
            if not re.match(r"[a-z][a-z0-9+.-]*://.", self.storage):
                raise ValueError(
                    f"storage must be a URL such as s3://BUCKET/FOLDER, not {self.storage!r}"
                )
            if urlsplit(self.storage).password is not None:
                raise ValueError(
                    "storage must not hold a password, which the parameters of a run do not keep "
                    "secret: leave it to the environment"
                )
            if self.runner == "threads":
                raise ValueError(
                    "storage is for workers with folders of their own, and threads share one: set "
                    "runner to processes or dask, or storage to null"
                )
        return self


class Retrain(Section):
    """When a challenger replaces the champion, and when the monitor asks for one."""

    evaluation: Annotated[str, Field(min_length=1)] = "frozen"
    max_accuracy_drop: Annotated[float, Field(ge=0, le=100)] = 0.0
    bootstrap: Positive = 1000
    max_flagged: Annotated[float, Field(ge=0, le=100)] = 20.0
    min_images: Positive = 100


class Parameters(Section):
    """All parameters of a run: one section for each stage that has any, `engine`, `retrain`."""

    seed: Seed = 0
    data: Data
    train: Train
    features: Features
    energy: Energy
    search: Search
    evaluate: Evaluate
    engine: Engine = Engine()
    retrain: Retrain = Retrain()

    @model_validator(mode="after")
    def consistent(self) -> Self:
        def place(source: str) -> str:
            return str(Path(source).resolve()) if Path(source).exists() else source

        used = [self.data.id, *self.data.near.values(), *self.data.far.values()]
        for name, source in self.search.outliers.items():
            if source == "held-out":
                raise ValueError(f"search.outliers: {name} cannot be of held-out, a test set")
            if place(source) in map(place, used):
                raise ValueError(
                    f"search.outliers: {name} is of {source}, which is a test set or the ID data: "
                    "the search must not see it"
                )
        for family in self.search.proxies:
            grid = int(family.removeprefix("jigsaw-")) if family.startswith("jigsaw-") else 1
            if grid > self.data.image_size:
                raise ValueError(
                    f"search.proxies: {family} needs images of at least {grid} pixels, "
                    f"data.image_size is {self.data.image_size}"
                )
        return self


def load(path: Path = Path("params.yaml")) -> Parameters:
    """Read and validate the parameters.

    Raises:
        InputError: the file is missing, no YAML, or a key is unknown, absent or of a wrong value;
            the sentence names the key and, for an unknown one, the nearest that exists.
    """
    try:
        values = YAML(typ="safe", pure=True).load(Path(path).read_text())  # as DVC reads it
    except FileNotFoundError:
        raise InputError(
            f"{path} is missing: run in the project's folder, or copy one there."
        ) from None
    except (YAMLError, UnicodeDecodeError, OSError) as error:
        raise InputError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(values, Mapping):
        raise InputError(f"{path} holds no parameters: restore it.")
    try:
        return Parameters.model_validate(dict(values))
    except ValidationError as error:
        raise InputError(f"{path}: {describe(error.errors()[0])}") from None


def describe(error: Any) -> str:
    """One sentence about a pydantic error."""
    location = [str(part) for part in error["loc"]]
    key = ".".join(location)
    if error["type"] == "extra_forbidden":
        section: Any = Parameters
        for part in location[:-1]:
            section = section.model_fields[part].annotation
        near = get_close_matches(location[-1], section.model_fields, 1, cutoff=0)[0]
        return f"there is no parameter `{key}`; did you mean `{'.'.join([*location[:-1], near])}`?"
    message = error["msg"].removeprefix("Value error, ")
    got = "" if error["type"] in ("missing", "value_error") else f" (it is {error['input']!r})"
    where = f"`{key}`: " if key else ""
    return f"{where}{message[0].lower()}{message[1:]}{got}{'' if message.endswith('?') else '.'}"
