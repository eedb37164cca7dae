"""Data and artifacts under DVC: what has changed, and recording what was made."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from opnp.data.imagesets import Manifest
from opnp.errors import InputError
from opnp.runtime.files import atomic, full_disk
from opnp.workspace import Workspace

__all__ = ["changed", "check_data", "data_changed", "push", "record", "record_data"]


@contextmanager
def repository(workspace: Workspace) -> Iterator[Any]:
    """The DVC repository of a workspace.

    Raises:
        InputError: the workspace is not a repository, or another DVC command is at work in it.
    """
    from dvc.exceptions import DvcException, NotDvcRepoError
    from dvc.repo import Repo

    logging.getLogger("dvc").setLevel(logging.ERROR)  # no hints on git, no word on empty folders
    try:
        with Repo(str(workspace.root)) as repo:
            yield repo
    except NotDvcRepoError:
        raise InputError(
            f"{workspace.root} is not a DVC workspace: run in the project's folder, or `dvc init` "
            "first."
        ) from None
    except (DvcException, OSError) as error:
        if reason := full_disk(error):
            raise InputError(reason) from error
        if isinstance(error, OSError):
            raise
        raise InputError(f"DVC: {' '.join(str(error).split())}") from error


def changed(workspace: Workspace, stage: str) -> bool:
    """Whether the stage's code, parameters, inputs or outputs differ from what was recorded."""
    with repository(workspace) as repo:
        return bool(repo.status(targets=[target(workspace, stage)]))


def target(workspace: Workspace, stage: str) -> str:
    """A stage as DVC finds it from any current folder."""
    return f"{workspace.root / 'dvc.yaml'}:{stage}"


def record(workspace: Workspace, stage: str) -> None:
    """Record the stage's outputs in dvc.lock and DVC's cache, as ``dvc repro`` would have.

    Raises:
        InputError: the cache could not take all of them; the next run records them again.
    """
    with repository(workspace) as repo:
        repo.commit(target=target(workspace, stage), force=True)
    if changed(workspace, stage):  # DVC logs what its cache could not take, and goes on
        raise InputError(
            f"DVC's cache could not take all outputs of {stage}, for the reason in the lines above "
            "(a full disk?): make room or mend it, and run again, which goes on from here."
        )


def push(workspace: Workspace) -> None:
    """Push what is recorded to DVC's default remote; nothing where none is set."""
    if not (workspace.root / ".dvc").is_dir():
        return
    with repository(workspace) as repo:
        if repo.config["core"].get("remote"):
            repo.push()


def read_record(workspace: Workspace) -> Any:
    """What `data.dvc` holds."""
    return YAML(typ="safe", pure=True).load(workspace.data_record.read_text())  # as DVC reads it


def recorded_data(workspace: Workspace) -> dict[str, Any]:
    """The parameters of the data, and the SHA-256 of each file, as `data.dvc` records them."""
    try:
        meta = read_record(workspace).get("meta")
    except FileNotFoundError:
        return {}
    except (YAMLError, AttributeError) as error:
        raise InputError(
            f"{workspace.data_record} is damaged ({error}): restore it from git."
        ) from None
    return meta or {}


def data_changed(workspace: Workspace, parameters: dict[str, Any]) -> bool:
    """Whether the data are absent, altered, or made with other parameters than these."""
    recorded = recorded_data(workspace).get("parameters")
    if not workspace.manifest.exists() or recorded != parameters:
        return True
    with repository(workspace) as repo:
        return bool(repo.status(targets=[str(workspace.data_record)]))


def check_data(workspace: Workspace, manifest: Manifest) -> None:
    """Compare data just fetched with the data that the same parameters gave before.

    Raises:
        InputError: a file differs from its recorded SHA-256.
    """
    before = recorded_data(workspace)
    if before.get("parameters") != manifest.parameters:
        return
    for name, entry in manifest.sets.items():
        if (expected := before["files"].get(name, entry.sha256)) != entry.sha256:
            raise InputError(
                f"{workspace.images(name)} has SHA-256 {entry.sha256[:12]}… where data.dvc records "
                f"{str(expected)[:12]}…: install the pinned versions (constraints.txt), or run "
                "`python -m flows.fetch --accept` to record what this machine makes."
            )


def record_data(workspace: Workspace, manifest: Manifest) -> None:
    """Record the data in `data.dvc`, with the parameters and the SHA-256 of each file."""
    from dvc.utils.serialize import dumps_yaml  # so that DVC, writing it again, changes nothing

    with repository(workspace) as repo:
        repo.add(str(workspace.data))
    text = read_record(workspace)
    files = {name: entry.sha256 for name, entry in manifest.sets.items()}
    text["meta"] = {"parameters": manifest.parameters, "files": files}
    with atomic(workspace.data_record) as temporary:
        temporary.write_text(dumps_yaml(text))
