"""Open data sets of other libraries: torchvision's, and the OOD collections of pytorch-ood.

Files in `downloads/` are used as they are; missing ones are downloaded if the machine has access.
The libraries unpack archives: no member may be written outside of the target folder.
"""

import hashlib
import inspect
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from opnp.data.decoding import check_size, faults_of
from opnp.data.splits import Rows, Source, Split
from opnp.errors import InputError, UnavailableError, did_you_mean

__all__ = ["LIBRARIES", "open_collection"]

# The default of Python 3.14; pytorch-ood does not always ask for it.
tarfile.TarFile.extraction_filter = staticmethod(tarfile.data_filter)

DOWNLOADS = Path("downloads")
LIBRARIES = ("torchvision", "pytorch-ood")

# What the libraries call their splits, in the order in which they are tried.
SPLITS = {
    "train": ("train", "train-standard", "trainval"),
    "validation": ("val", "valid", "validation", "test"),
    "test": ("test", "val", "valid", "validation"),
}
# Arguments that select the common version of a data set, or one that does not fill the disk.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "INaturalist": {"version": "2021_valid"},
    "Places365": {"small": True},
}


def open_collection(spec: str, part: str | None = None) -> Source:
    """Open a data set of another library by name.

    Args:
        spec: ``torchvision:NAME`` or ``pytorch-ood:NAME``.
        part: ``train``, ``validation`` or ``test``: of a divided data set one split is opened, with
            labels if they are listed. Without it all images are opened, and must be labelled.

    Raises:
        InputError: the data set does not exist, or has no labels.
        UnavailableError: files are missing and could not be downloaded.
    """
    library, _, name = spec.partition(":")
    if library == "pytorch-ood" and part is None:
        raise InputError(f"{spec} has no labels: take it for an OOD set, not for ID images.")
    factory = named(library, name)
    accepted = set(inspect.signature(factory).parameters)
    sets = {}
    for each in ("train", "test") if part is None else (part,):
        split, data = opened(spec, factory, accepted, each)
        if split == "all":
            sets = {split: (spec, data)}
            break
        sets[each if part is None else split] = (f"{spec}/{split}", data)
    splits = {
        split: Split.of(Items(data, where), labels_of(data, where, part is None))
        for split, (where, data) in sets.items()
    }
    first = next(iter(sets.values()))[1]
    classes = getattr(first, "classes", None)
    if classes is None:  # then they are numbers, as SVHN's digits are
        classes = range(int(max(split.labels.max(initial=-1) for split in splits.values())) + 1)
    return Source([str(each) for each in classes], splits)


def named(library: str, name: str) -> Any:
    """The library's class for a data set.

    Raises:
        InputError: the library has no data set of this name that it can download.
    """
    if library == "torchvision":
        from torchvision import datasets as found
    else:
        import pytorch_ood.dataset.img as found
    factory = getattr(found, name, None) if name in found.__all__ else None
    if factory is None or "download" not in inspect.signature(factory).parameters:
        near = did_you_mean(
            name, (each for each in found.__all__ if each[0].isupper()), f"`{library}:{{}}`"
        )
        raise InputError(f"{library} has no data set {name!r} to download; {near}")
    return factory


def opened(spec: str, factory: Any, accepted: set[str], part: str) -> tuple[str, Any]:
    """One split of a data set, with its name: from files on the disk, else downloaded."""
    ours = spec.startswith("torchvision:")
    root = DOWNLOADS if ours else DOWNLOADS / "pytorch-ood"
    arguments = ARGUMENTS.get(factory.__name__, {}) if ours else {}
    choices: list[tuple[str, dict[str, Any]]] = [("all", {})]
    if "train" in accepted:
        train = part == "train"
        choices = [("train" if train else "test", {"train": train})]
    elif key := next((key for key in ("split", "subset") if key in accepted), None):
        choices = [(name, {key: name}) for name in SPLITS[part]]
    for name, chosen in choices:
        try:
            try:
                return name, factory(str(root), **arguments, **chosen)
            except (OSError, RuntimeError):  # files are missing
                root.mkdir(parents=True, exist_ok=True)
                return name, factory(str(root), **arguments, **chosen, download=True)
        except (TypeError, ValueError, AssertionError) as error:  # no such split
            refused = error
        except (OSError, RuntimeError) as error:
            home = getattr(factory, "url", None) or getattr(factory, "_URL", None)
            origin = f" from {home}" if isinstance(home, str) else ""
            reason = " ".join(str(error).split())
            raise UnavailableError(
                f"{spec} could not be downloaded{origin} ({reason}): put its files in {root}/ as "
                "the library keeps them, or name a local folder instead."
            ) from error
    raise InputError(f"{spec} cannot be opened as a set of images ({refused}): name another.")


class Items(Rows):
    """The images of a data set of another library, as the library gives them.

    Args:
        dataset: gives pairs of an image and something else.
        where: names it and its split.
    """

    def __init__(self, dataset: Any, where: str) -> None:
        self.dataset, self.where = dataset, where

    def __len__(self) -> int:
        return len(self.dataset)

    def load(self, row: int) -> Image.Image:
        image = self.dataset[row][0]
        if not isinstance(image, Image.Image):
            raise TypeError(f"the library gives {type(image).__name__}")
        check_size(image, self.name(row))
        image.load()  # some are opened only
        image.filename = self.name(row)  # type: ignore[attr-defined]
        return image

    def name(self, row: int) -> str:
        return f"{self.where}#{row}"

    def state(self, row: int) -> object:  # which files it is of, the library alone knows
        try:
            with faults_of(self.name(row)):
                image = self.load(row)
                return [image.mode, *image.size, hashlib.sha256(image.tobytes()).hexdigest()]
        except InputError as error:
            return str(error)

    def size(self, row: int) -> int:
        return 0

    def content(self, row: int) -> bytes:
        """Of its name: to decode all images of a data set would take too long."""
        return hashlib.sha256(self.name(row).encode()).digest()


def labels_of(dataset: Any, where: str, needed: bool) -> NDArray[np.int64]:
    """Labels of a data set, without decoding images if it lists them.

    Returns:
        Labels, int64 (N,); −1 if they are not needed, and not listed or not numbers.

    Raises:
        InputError: labels are needed and are not numbers.
    """
    none = np.full(len(dataset), -1)
    try:
        for name in ("targets", "labels", "_labels"):
            if len(listed := getattr(dataset, name, ())) == len(dataset):
                return np.asarray([int(label) for label in listed], np.int64)
        if not needed:
            return none
        return np.asarray([int(dataset[row][1]) for row in range(len(dataset))], np.int64)
    except (TypeError, ValueError) as error:
        if not needed:
            return none
        raise InputError(f"{where} has no labels of classes ({error}): name another.") from None
