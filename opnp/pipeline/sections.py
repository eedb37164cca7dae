"""The sections of the parameters, each with the name, default, check and meaning of its values."""

import re
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from opnp.data.families import DECIDING, REPORTED, Families, Reported
from opnp.detectors.names import check
from opnp.pruning.settings import SearchSettings
from opnp.runtime.settings import Count, Percentage, Positive, Seed, Settings, Several

__all__ = ["Data", "Energy", "Engine", "Evaluate", "Features", "Retrain", "Search", "Train"]

Name = Annotated[str, Field(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$")]
Share = Annotated[float, Field(gt=0, lt=100)]


class Data(Settings):
    """Where images come from, and how they are split."""

    seed: Seed = Field(
        default=0,
        description="Seed of the split and of generated images; the seed above is for training, "
        "proxies and intervals.",
    )
    id: str = Field(
        description="In-distribution (ID) images: digits, torchvision:NAME, or a folder or file of "
        "images; see docs/data.md.",
    )
    image_size: Positive = Field(description="Width and height in pixels of the images.")
    mode: Literal["L", "RGB"] = Field(default="L", description="L (grey) or RGB.")
    resize: Positive | None = Field(
        default=None,
        description="Pixels that the shorter side is scaled to before the centre is cropped, as "
        "backbones of torchvision and timm expect; null: scale the largest central square.",
    )
    interpolation: Literal["bilinear", "bicubic"] = Field(
        default="bilinear", description="How images are scaled: bilinear or bicubic."
    )
    held_out: Several[Count] = Field(
        default=(),
        description="Classes that the classifier never sees; the OOD source held-out consists of "
        "them.",
    )
    validation: Share = Field(
        default=20.0, description="Percent of the training images of each class to validate on."
    )
    test: Share | None = Field(
        default=None,
        description="Percent of the images of each class to test on; null: the images come with a "
        "test split.",
    )
    near: dict[Name, str] = Field(
        default={}, description="OOD test sets that resemble the ID images, as name: source."
    )
    far: dict[Name, str] = Field(
        default={}, description="OOD test sets that do not resemble them, as name: source."
    )
    ood_count: Positive = Field(
        default=10000, description="Largest number of images in each OOD set."
    )
    max_unreadable: Count = Field(
        default=10,
        description="Largest number of images of a source that may be unreadable; they are left "
        "out, counted and named.",
    )
    missing: Literal["refuse", "skip"] = Field(
        default="refuse",
        description="What to do about OOD sets whose files are missing: refuse or skip.",
    )

    @model_validator(mode="after")
    def consistent(self) -> Self:
        if self.resize is not None and self.resize < self.image_size:
            raise ValueError(
                f"`resize` {self.resize} must be at least `image_size` {self.image_size}: images "
                "are scaled to the one, then cropped to the other"
            )
        if not self.near and not self.far:
            raise ValueError("name at least one OOD set in `near` or `far`")
        if twice := set(self.near) & set(self.far):
            raise ValueError(f"{listed(twice)} is in both `near` and `far`: rename one")
        if taken := {"mean", "near", "far", "test"} & {*self.near, *self.far}:
            raise ValueError(f"{listed(taken)} is a reserved name: rename that OOD set")
        if not self.held_out and "held-out" in (*self.near.values(), *self.far.values()):
            raise ValueError("the source held-out needs classes in `held_out`")
        if self.validation + (self.test or 0) >= 100:
            raise ValueError("`validation` and `test` together leave no training images")
        return self


class Train(Settings):
    """The backbone: trained here, or loaded from a checkpoint."""

    backbone: str = Field(
        default="resnet",
        description="resnet, convnext or vit (small networks of the width and depth below), "
        "torchvision:NAME, timm:NAME, or package.module:factory; models other than the small "
        "networks may take options, as in torchvision:inception_v3?transform_input=false.",
    )
    width: Positive = Field(
        default=32, description="Channels of the first stage of a small network."
    )
    depth: Positive = Field(default=1, description="Blocks in each stage of a small network.")
    checkpoint: str | None = Field(
        default=None,
        description="Weights to load instead of training: a file, such as model.safetensors or "
        "model.pth; FILE#KEY for those under a key in it, such as model_ema; or the library's own "
        "name for them, such as IMAGENET1K_V2 (torchvision), a1_in1k (timm) or DEFAULT.",
    )
    preprocessing: str | None = Field(
        default=None,
        description="JSON file with size, mode, mean and std, and optionally resize and "
        "interpolation, of the images that the weights expect, if the weights do not state them; "
        "null: measured on the training images.",
    )
    epochs: Positive = Field(default=15, description="Passes over the training images.")
    batch_size: Positive = Field(default=64, description="Images in each step of training.")
    optimizer: Literal["sgd", "adamw"] = Field(
        default="sgd", description="sgd, or adamw for transformers."
    )
    precision: Literal["float32", "bfloat16"] = Field(
        default="float32", description="Precision of products while training: float32 or bfloat16."
    )
    spcp: Share | None = Field(
        default=None,
        description="Percentile (0 to 100) at which training clips contributions to the logits; "
        "null: no clipping.",
    )
    learning_rate: Annotated[float, Field(gt=0)] = Field(
        default=0.1, description="Peak learning rate."
    )
    weight_decay: Annotated[float, Field(ge=0)] = Field(default=5e-4, description="Weight decay.")
    shift_pixels: Count = Field(
        default=1, description="Pixels that training images are shifted by at random, at most."
    )
    threads: Positive = Field(
        default=1,
        description="CPU threads. They affect the result, since they decide the order of sums.",
    )

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


class Features(Settings):
    """How penultimate features are computed and stored."""

    dtype: Literal["float32", "float16"] = Field(
        default="float32", description="Type that features are stored as: float32 or float16."
    )
    precision: Literal["float32", "bfloat16"] = Field(
        default="float32", description="Precision of the backbone's products: float32 or bfloat16."
    )
    compile: bool = Field(
        default=False, description="Whether to compile the backbone (torch.compile)."
    )
    batch_size: Positive = Field(
        default=256, description="Images that go through the backbone at once."
    )
    shard_size: Positive = Field(
        default=256, description="Images in each shard, the unit of work that a resumed run keeps."
    )


class Energy(Settings):
    """The energy score T·logsumexp(f/T)."""

    temperature: Annotated[float, Field(gt=0)] = Field(
        default=1.0, description="Temperature T, where it is not searched for."
    )


class Search(SearchSettings):
    """The grid of masks, and the outliers that masks and hyperparameters are judged on."""

    proxies: Families = Field(
        default=DECIDING,
        description="Families of proxy outliers, made from validation images, that masks and "
        "hyperparameters are chosen on.",
    )
    reported: Reported = REPORTED
    outliers: dict[Name, str] = Field(
        default={},
        description="Real OOD sets to judge masks and hyperparameters on as well, as name: source; "
        "test sets are refused.",
    )

    @model_validator(mode="after")
    def judged(self) -> Self:
        if not self.proxies and not self.outliers:
            raise ValueError("name at least one proxy in `proxies`, or a set in `outliers`")
        if taken := {*self.proxies, *self.reported} & set(self.outliers):
            raise ValueError(f"`outliers`: {listed(taken)} is a proxy's name: rename that set")
        return self


class Evaluate(Settings):
    """What is compared on the test sets, and how much each detector may try before."""

    detectors: Annotated[Several[str], Field(min_length=1)] = Field(
        default=(
            *("energy", "clip", "opp", "onp", "opnp", "opnp+react", "opnp+gen", "opnp+ash"),
            *("opnp+scale", "opnp+knn", "opnp+vim", "opnp+gmm", "opnp+mahalanobis", "opnp+odin"),
            *("opnp&vim", "opnp&mahalanobis++", "energy&vim", "msp", "maxlogit", "gen"),
            *("klmatching", "react", "dice", "ash", "scale", "vra", "she", "knn", "mahalanobis"),
            *("rmd", "vim", "gmm", "fdbd", "nci", "nnguide", "lts", "openmax", "nero", "odin"),
            *("gradnorm", "rankfeat", "nac", "mahalanobis++", "rmd++", "cadref", "core", "itp"),
            *("kpca", "line", "optfs", "ras"),
        ),
        description="Detectors to compare; opnp+NAME is the detector NAME on the pruned model, "
        "NAME&NAME the fusion of two.",
    )
    budget: Positive = Field(
        default=8,
        description="Largest number of combinations of hyperparameters that each detector may try, "
        "and of masks with the best of them in opnp+NAME; the mask search has a grid of its own.",
    )
    tuning_samples: Positive = Field(
        default=100,
        description="Largest number of ID validation samples, and of samples of each outlier set, "
        "to try them on.",
    )
    training_images: Positive = Field(
        default=5000,
        description="Largest number of training images to fit detectors of images (odin, rankfeat) "
        "on.",
    )
    bootstrap: Positive = Field(
        default=200, description="Bootstrap resamples behind the 95 % intervals."
    )

    @field_validator("detectors")
    @classmethod
    def exist(cls, detectors: tuple[str, ...]) -> tuple[str, ...]:
        for name in detectors:
            check(name)
        if len(set(detectors)) < len(detectors):
            raise ValueError("it holds a name twice")
        return detectors


class Engine(Settings):
    """Who computes the shards; does not affect results."""

    runner: Literal["threads", "processes", "dask"] = Field(
        default="threads",
        description="threads, processes, or dask (pip install 'opnp[dask]'); see docs/clusters.md.",
    )
    workers: Positive | None = Field(
        default=None, description="Tasks at once; null: one for each GPU, or else for each core."
    )
    decoders: Positive | None = Field(
        default=None,
        description="Threads that decode images for each task; null: one, or the task's share of "
        "the cores beside a GPU.",
    )
    scheduler: str | None = Field(
        default=None,
        description="Address of a Dask scheduler (tcp://HOST:8786); null: a Dask cluster on this "
        "machine for the duration of the run.",
    )
    storage: str | None = Field(
        default=None,
        description="Any fsspec URL where workers that share no disk exchange files; null: they "
        "share this folder.",
    )

    @model_validator(mode="after")
    def consistent(self) -> Self:
        if self.scheduler is not None:
            if self.runner != "dask":
                raise ValueError(
                    f"`scheduler` is an address of Dask, and `runner` is {self.runner}: set the "
                    "latter to dask, or the former to null"
                )
            if self.workers is not None:
                raise ValueError(
                    "`workers` is for a cluster on this machine, and `scheduler` names another, "
                    "which has its own: set one of them to null"
                )
            if not re.fullmatch(r"[a-z]+://\S+:\d+", self.scheduler):
                raise ValueError(
                    "`scheduler` must be an address such as tcp://HOST:8786, not "
                    f"{self.scheduler!r}"
                )
        if self.storage is not None:
            if not re.match(r"[a-z][a-z0-9+.-]*://.", self.storage):
                raise ValueError(
                    f"`storage` must be a URL such as s3://BUCKET/FOLDER, not {self.storage!r}"
                )
            if has_password(self.storage):
                raise ValueError(
                    "`storage` must not hold a password, since parameters are not kept secret: "
                    "leave it to the environment"
                )
            if self.runner == "threads":
                raise ValueError(
                    "`storage` is for workers with folders of their own, and threads share one: "
                    "set `runner` to processes or dask, or the former to null"
                )
        return self


class Retrain(Settings):
    """When to replace the champion, and when to ask for a retraining; see docs/retraining.md."""

    evaluation: Annotated[str, Field(min_length=1)] = Field(
        default="frozen",
        description="Folder of the frozen evaluation set; the first retraining makes it from the "
        "test sets.",
    )
    max_accuracy_drop: Percentage = Field(
        default=0.0,
        description="Percentage points of ID accuracy that a better challenger may lose.",
    )
    bootstrap: Positive = Field(
        default=1000, description="Bootstrap resamples behind the interval of the difference."
    )
    max_flagged: Percentage = Field(
        default=20.0,
        description="Percent of new production images that may be flagged OOD before a retraining "
        "is asked for.",
    )
    min_images: Positive = Field(
        default=100, description="New production images that the monitor waits for."
    )


def listed(names: set[str]) -> str:
    return ", ".join(sorted(names))


def has_password(url: str) -> bool:
    try:
        return urlsplit(url).password is not None
    except ValueError:  # such as an unclosed bracket, which whoever opens the URL will name
        return False
