"""The detectors of an experiment, as versions of one registered model in MLflow.

The registered model has the name of the experiment. Its alias ``champion`` marks the version in
use, ``challenger`` the version that may replace it. The tag ``replaced`` of a version holds the
champion before it, which `rollback` restores.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from opnp.deployment.detector import SavedDetector
from opnp.deployment.detector import load as load_detector
from opnp.errors import InputError, first_line
from opnp.tracking.mlflow_client import (
    experiment_name,
    keep_files_here,
    quiet_mlflow,
    tracking_uri,
)
from opnp.tracking.models import log_model
from opnp.workspace import Workspace

__all__ = [
    "CHALLENGER",
    "CHAMPION",
    "champion",
    "load",
    "promote",
    "register",
    "rollback",
    "served",
]

CHAMPION, CHALLENGER = "champion", "challenger"
REPLACED, DIGEST = "replaced", "detector.digest"


def register(
    workspace: Workspace,
    folder: Path | str,
    alias: str | None = CHALLENGER,
    run: str | None = None,
    trust: str | None = None,
    metrics: dict[str, float] | None = None,
) -> str:
    """Log a detector's folder as an MLflow model and register it.

    A detector that is registered already keeps its version.

    Args:
        workspace: whose MLflow keeps the registry, as in every function here.
        folder: the detector's folder.
        alias: the alias to give to the version, if any.
        run: id of the MLflow run that made the detector, if any.
        trust: the ``package.module:factory`` that may run, if the detector's model is one.
        metrics: further metrics to log with the model.

    Returns:
        The version.

    Raises:
        InputError: the folder does not hold a valid detector, or MLflow cannot be reached.
    """
    detector = load_detector(folder, trust=trust)
    client, name = registry(workspace), experiment_name()
    with told(workspace):
        if not client.search_registered_models(f"name = '{name}'"):
            client.create_registered_model(name)
        known = client.search_model_versions(
            f"name = '{name}' and tags.`{DIGEST}` = '{detector.digest}'"
        )
        if known:
            version = str(known[0].version)
        else:
            model = log_model(client, workspace, Path(folder), run, trust, metrics)
            tags = {DIGEST: detector.digest}
            made = client.create_model_version(
                name, f"models:/{model.model_id}", run, tags, model_id=model.model_id
            )
            version = str(made.version)
            linked = json.dumps([{"name": name, "version": made.version}])
            client.set_logged_model_tags(model.model_id, {"mlflow.modelVersions": linked})
        if alias:
            client.set_registered_model_alias(name, alias, version)
    return version


def promote(workspace: Workspace, version: str | None = None) -> str:
    """Make a version the champion, and remember the champion before it.

    Args:
        workspace: see `register`.
        version: by default the challenger.

    Returns:
        The version.

    Raises:
        InputError: the version does not exist, or MLflow cannot be reached.
    """
    client, name = registry(workspace), experiment_name()
    with told(workspace):
        aliases = aliases_of(client, name)
        version = version or aliases.get(CHALLENGER)
        if version is None:
            raise InputError("There is no challenger.", "challenger")
        client.get_model_version(name, version)
        before = aliases.get(CHAMPION)
        if before != version:
            # The alias is set last, so that a failure before leaves the champion as it is.
            if before:
                client.set_model_version_tag(name, version, REPLACED, before)
            client.set_registered_model_alias(name, CHAMPION, version)
        if aliases.get(CHALLENGER) == version:
            client.delete_registered_model_alias(name, CHALLENGER)
    return version


def rollback(workspace: Workspace) -> str:
    """Restore the champion before the present one.

    Returns:
        Its version.

    Raises:
        InputError: there is no champion, it replaced none, or MLflow cannot be reached.
    """
    client, name = registry(workspace), experiment_name()
    with told(workspace):
        now = aliases_of(client, name).get(CHAMPION)
        if now is None:
            raise InputError("There is no champion to roll back.", "champion")
        before = client.get_model_version(name, now).tags.get(REPLACED)
        if before is None:
            raise InputError(f"Version {now} did not replace another: nothing to roll back to.")
        client.set_registered_model_alias(name, CHAMPION, before)
    return str(before)


def champion(
    workspace: Workspace, trust: str | None = None, device: torch.device | str = "cpu"
) -> SavedDetector | None:
    """Load the detector in use; None before the first promotion.

    Args:
        workspace: see `register`.
        trust: the ``package.module:factory`` that may run, if the detector's model is one.
        device: where it is to run.

    Raises:
        InputError: the detector is damaged, its code is not trusted, or MLflow cannot be reached.
    """
    client, name = registry(workspace), experiment_name()
    with told(workspace):
        version = aliases_of(client, name).get(CHAMPION)
    return None if version is None else load(workspace, version, trust, device)


def load(
    workspace: Workspace,
    version: str,
    trust: str | None = None,
    device: torch.device | str = "cpu",
) -> SavedDetector:
    """Load the detector of a version, without running the code that was logged with it.

    Args:
        workspace: see `register`.
        version: of the registered model.
        trust: the ``package.module:factory`` that may run, if the detector's model is one.
        device: where it is to run.

    Raises:
        InputError: the version does not exist, its code is not trusted, or MLflow cannot be
            reached.
    """
    mlflow, client, name = quiet_mlflow(), registry(workspace), experiment_name()
    with told(workspace), TemporaryDirectory() as temporary:
        source = client.get_model_version_download_uri(name, version)
        folder = mlflow.artifacts.download_artifacts(
            artifact_uri=f"{source.rstrip('/')}/data",
            dst_path=temporary,
            tracking_uri=tracking_uri(workspace),
        )
        (detector,) = Path(folder).iterdir()
        return load_detector(detector, device, trust)


def served(workspace: Workspace, alias: str) -> tuple[str, str]:
    """The version with an alias, and the URI of its model, which MLflow in this process can load.

    Raises:
        InputError: no version has the alias, or MLflow cannot be reached.
    """
    client, name = registry(workspace), experiment_name()
    with told(workspace):
        version = aliases_of(client, name).get(alias)
    if version is None:
        raise InputError(f"No version of {name} has the alias {alias}.", alias)
    return version, f"models:/{name}/{version}"


def registry(workspace: Workspace) -> Any:
    """A client of MLflow at `tracking_uri`, which also becomes this process's global setting.

    MLflow looks for the models of registered versions there, whatever its client was given.
    """
    mlflow, uri = quiet_mlflow(), tracking_uri(workspace)
    mlflow.set_tracking_uri(uri)
    client = mlflow.MlflowClient(uri, registry_uri=uri)
    with told(workspace):
        keep_files_here(client, workspace)
    return client


def aliases_of(client: Any, name: str) -> dict[str, str]:
    """The version of each alias; empty if nothing is registered."""
    found = client.search_registered_models(f"name = '{name}'")
    return {alias: str(version) for alias, version in found[0].aliases.items()} if found else {}


@contextmanager
def told(workspace: Workspace) -> Iterator[None]:
    """Turn MLflow's errors into sentences."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        raise InputError(
            f"MLflow at {tracking_uri(workspace)} refused or could not be reached "
            f"({first_line(error)})."
        ) from error
