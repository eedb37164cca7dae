"""Which split of a divided source serves as training, validation or test images."""

import re
from collections.abc import Iterable
from typing import TypeVar

from opnp.errors import InputError

__all__ = ["PARTS", "split_named"]

NAMES = {
    "train": "train", "training": "train", "trainval": "train",
    "val": "validation", "valid": "validation", "validation": "validation",
    "dev": "validation", "development": "validation", "minival": "validation",
    "test": "test", "testing": "test", "eval": "test", "evaluation": "test", "holdout": "test",
}  # fmt: skip
"""What exporters call splits (Hugging Face, Roboflow, Kaggle, COCO, VOC), and what they mean."""

FILLING = {"set", "split", "data", "dataset", "image", "images", "img", "imgs"}

HELD_OUT = ("test", "validation")  # the first that is there is the test split
PARTS = {"train": ("train",), "validation": ("validation", "test"), "test": HELD_OUT}
"""The splits that serve as a part of a source: the first that is there."""

Found = TypeVar("Found")


def split_named(name: str) -> str | None:
    """Which split a name means: ``train``, ``validation``, ``test``, or None if it is unknown.

    Case, numbers and words such as "set" and "images" are ignored: Train, val2017, test_images.
    """
    return splits_named([name])[name]


def splits_named(names: Iterable[str]) -> dict[str, str | None]:
    """Which split each of several names means, as `split_named`.

    Words that all names share are ignored: cats_train, cats_test.
    """
    words = {name: words_of(name) for name in names}
    shared = set.intersection(*words.values()) - set(NAMES) if len(words) > 1 else set()
    kept = {name: found - shared for name, found in words.items()}
    return {name: NAMES.get(*found) if len(found) == 1 else None for name, found in kept.items()}


def words_of(name: str) -> set[str]:
    """The words of a name that may tell a split."""
    text = re.sub(r"(hold|held)[^a-z]*out", "holdout", name.lower())
    text = re.sub(r"train[^a-z]+val\b", "trainval", text)
    words = {re.sub("(?<=.)set$", "", word) for word in re.findall("[a-z]+", text)}
    return words - FILLING


def by_split(names: Iterable[str], where: object, kind: str) -> dict[str, str]:
    """Names that all mean splits, by split.

    Args:
        names: of folders, say.
        where: what they lie in, for the error.
        kind: what they are, in the plural.

    Raises:
        InputError: a name is unknown, or two mean the same split.
    """
    known = splits_named(sorted(names))
    if None in known.values():
        splits, others = (
            ", ".join(name for name, split in known.items() if (split is None) is unknown)
            for unknown in (False, True)
        )
        beside = f"named like splits ({splits}) beside others" if splits else "of unknown splits"
        raise InputError(
            f"{where} has {kind} {beside} ({others}), so that it is unclear which images are "
            "meant: name one of them, rename them, or list the images in a manifest."
        )
    found: dict[str, str] = {}
    for name, split in known.items():
        if split in found:
            raise InputError(
                f"{where} has two {kind} for its {split} split, {found[split]} and {name}: name "
                "one of them, or rename one."
            )
        found[str(split)] = name
    return found


def divided(found: dict[str, Found], part: str | None, where: object) -> dict[str, Found]:
    """The splits of a source that are to be read.

    Args:
        found: splits by name: ``train``, ``validation``, ``test``; or ``all``.
        part: a key of `PARTS`; None: what can be trained on, and tested on if there is such a one.
        where: names the source in the error.

    Returns:
        Without a part ``train`` and ``test``, or ``all`` of a source with one split; of a part,
        the split that serves as it, by its own name, or what there is.

    Raises:
        InputError: there are held-out splits of labelled images and none to train on.
    """
    if "all" in found:
        return found
    held = next((name for name in HELD_OUT if name in found), None)
    if part is None:
        if len(found) == 1:
            return {"all": next(iter(found.values()))}
        if held is None or "train" not in found:
            raise InputError(
                f"{where} has the splits {' and '.join(found)}, and none for training: name one "
                "of them, or add a split train."
            )
        return {"train": found["train"], "test": found[held]}
    name = next((n for n in PARTS[part] if n in found), held or "train")
    return {name: found[name]}
