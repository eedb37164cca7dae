"""Data and artifacts under DVC: what has changed, and recording what was made."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from opnp.data.imagesets import Manifest, data_file
from opnp.errors import InputError
from opnp.runtime.files import atomic, full_disk
from opnp.workspace import DATA, MANIFEST

__all__ = ["changed", "check_data", "data_changed", "push", "record", "record_data"]

DATA_FILE = Path("data.dvc")


@contextmanager
def repository() -> Iterator[Any]:
    """The DVC repository of the workspace.

    Raises:
        InputError: the workspace is none, or another DVC command is at work in it.
    """
    from dvc.exceptions import DvcException, NotDvcRepoError
    from dvc.repo import Repo

    logging.getLogger("dvc").setLevel(logging.ERROR)  # no hints on git, no word on empty folders
    try:
        with Repo() as repo:
            yield repo
    except NotDvcRepoError:
        raise InputError(
            "This folder is no DVC workspace: run in the project's folder, or `dvc init` first."
        ) from None
    except (DvcException, OSError) as error:
        if reason := full_disk(error):
            raise InputError(reason) from error
        if isinstance(error, OSError):
            raise
        raise InputError(f"DVC: {' '.join(str(error).split())}") from error


def changed(stage: str) -> bool:
    """Whether the stage's code, parameters, inputs or outputs differ from what was recorded."""
    with repository() as repo:
        return bool(repo.status(targets=[stage]))


def record(stage: str) -> None:
    """Record the stage's outputs in dvc.lock and DVC's cache, as ``dvc repro`` would have.

    Raises:
        InputError: the cache could not take all of them; the next run records them again.
    """
    with repository() as repo:
        repo.commit(target=stage, force=True)
    if changed(stage):  # DVC logs what its cache could not take, and goes on
        raise InputError(
            f"DVC's cache could not take all outputs of {stage}, for the reason in the lines above "
            "(a full disk?): make room or mend it, and run again, which goes on from here."
        )


def push() -> None:
    """Push what is recorded to DVC's default remote; nothing where none is set."""
    if not Path(".dvc").is_dir():
        return
    with repository() as repo:
        if repo.config["core"].get("remote"):
            repo.push()


def read_data_file() -> Any:
    return YAML(typ="safe", pure=True).load(DATA_FILE.read_text())  # as DVC reads it


def recorded_data() -> dict[str, Any]:
    """What `data.dvc` says of the data besides their hash: parameters, and SHA-256 of each file."""
    try:
        meta = read_data_file().get("meta")
    except FileNotFoundError:
        return {}
    except (YAMLError, AttributeError) as error:
        raise InputError(f"{DATA_FILE} is damaged ({error}): restore it from git.") from None
    return meta or {}


def data_changed(parameters: dict[str, Any]) -> bool:
    """Whether `data/` is absent, altered, or made with other parameters than these."""
    if not MANIFEST.exists() or recorded_data().get("parameters") != parameters:
        return True
    with repository() as repo:
        return bool(repo.status(targets=[str(DATA_FILE)]))


def check_data(manifest: Manifest) -> None:
    """Compare data just fetched with what the same parameters gave before.

    Raises:
        InputError: a file differs from its recorded SHA-256.
    """
    before = recorded_data()
    if before.get("parameters") != manifest.parameters:
        return
    for name, entry in manifest.sets.items():
        if (expected := before["files"].get(name, entry.sha256)) != entry.sha256:
            raise InputError(
                f"{data_file(name)} has SHA-256 {entry.sha256[:12]}… where data.dvc records "
                f"{str(expected)[:12]}…: install the pinned versions (constraints.txt), or run "
                "`python -m flows.fetch --accept` to record what this machine makes."
            )


def record_data(manifest: Manifest) -> None:
    """Record `data/` in `data.dvc`, with the parameters and the SHA-256 of each file."""
    from dvc.utils.serialize import dumps_yaml  # so that DVC, writing it again, changes nothing

    with repository() as repo:
        repo.add(str(DATA))
    text = read_data_file()
    files = {name: entry.sha256 for name, entry in manifest.sets.items()}
    text["meta"] = {"parameters": manifest.parameters, "files": files}
    with atomic(DATA_FILE) as temporary:
        temporary.write_text(dumps_yaml(text))
