"""Which split of a divided source serves as training, validation or test images."""

from typing import TypeVar

__all__ = ["PARTS"]

HELD_OUT = ("test", "validation", "val")  # the first that is there is the test split
PARTS = {"train": ("train",), "validation": ("validation", "val", "test"), "test": HELD_OUT}
"""The splits that serve as a part of a source: the first that is there."""

Found = TypeVar("Found")


def divided(found: dict[str, Found], part: str | None) -> dict[str, Found]:
    """What is there as ``train`` and ``test``, or as ``all``; of one part, by its own name."""
    if part is not None and (name := next((n for n in PARTS[part] if n in found), None)):
        return {name: found[name]}
    held = next((found[name] for name in HELD_OUT if name in found), None)
    if held is not None and "train" in found:
        return {"train": found["train"], "test": held}
    return {"all": found["train"] if held is None else held}
