"""Fetch, train, compare with the champion, and promote what is better.

The champion's alias moves last: whatever fails before leaves it where it is.
"""

from functools import partial
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.events import emit_event

from flows import dvc_repo, pipeline, prefect_server, schedule, workers
from flows.process import command, hide_what_is_told, timed
from flows.stages import fetch
from opnp.backbones.specs import is_factory
from opnp.deployment import champion
from opnp.deployment.champion import Verdict
from opnp.deployment.detector import load as load_detector
from opnp.errors import InputError
from opnp.pipeline import parameters
from opnp.pipeline.detector import from_run
from opnp.pipeline.parameters import Parameters
from opnp.pipeline.results import Run
from opnp.tracking import registry
from opnp.tracking.mlflow_client import experiment_name
from opnp.workspace import Workspace

__all__ = ["contend", "retrain"]

DECISION = "decision"  # of a version, which is judged once


def trusted(chosen: Parameters) -> str | None:
    """The factory that the workspace's own parameters name, if its backbone is one."""
    return chosen.train.backbone if is_factory(chosen.train.backbone) else None


def check_frozen(client: Any, folder: Path) -> None:
    """Record the digest of the evaluation set with the registered model; refuse another.

    Raises:
        InputError: the folder holds another set than the one that detectors were compared on.
    """
    name, tag = experiment_name(), f"evaluation.{folder.name}"
    found = champion.frozen_digest(folder)
    known = client.get_registered_model(name).tags.get(tag)
    if known is None:
        client.set_registered_model_tag(name, tag, found)
    elif known != found:
        raise InputError(
            f"{folder} is not the evaluation set that detectors were compared on (SHA-256 "
            f"{found[:12]}…, not {known[:12]}…): restore it, or name another folder in "
            "retrain.evaluation."
        )


def contend(workspace: Workspace, folder: Path, chosen: Parameters) -> str:
    """Register a detector as challenger, compare it with the champion, promote it if it is better.

    Returns:
        ``promoted``, ``rejected``, or ``unchanged`` for a detector that has been judged before.

    Raises:
        InputError: the evaluation set has changed, or MLflow cannot be reached.
    """
    settings, trust, client = chosen.retrain, trusted(chosen), registry.registry(workspace)
    evaluation, name = workspace.root / settings.evaluation, experiment_name()
    version = registry.register(workspace, folder, None, trust=trust)
    with registry.told(workspace):
        known = client.get_model_version(name, version)
        if DECISION in known.tags or registry.aliases_of(client, name).get("champion") == version:
            print(f"retrain: version {version} has been judged before, and nothing changes")
            return "unchanged"
        check_frozen(client, evaluation)
        client.set_registered_model_alias(name, registry.CHALLENGER, version)
    verdict = champion.compare(
        load_detector(folder, trust=trust),
        registry.champion(workspace, trust),
        evaluation,
        settings.max_accuracy_drop,
        settings.bootstrap,
        chosen.seed,
    )
    decision = "promoted" if verdict.promoted else "rejected"
    dvc_repo.push(workspace)
    if verdict.promoted:
        registry.promote(workspace, version)
    with registry.told(workspace):
        for key, value in verdict.figures().items():
            client.set_model_version_tag(name, version, f"contest.{key}", str(value))
        client.set_model_version_tag(name, version, DECISION, decision)
    tell(version, decision, verdict)
    return decision


def tell(version: str, decision: str, verdict: Verdict) -> None:
    """Print the decision, and emit it as a Prefect event."""
    words = f"retrain: version {version} {decision}, mean FPR95 {verdict.fpr95:.1f} %"
    if verdict.champion_fpr95 is not None:
        words += (
            f" where the champion has {verdict.champion_fpr95:.1f} %, lower by {verdict.low:.1f} "
            f"to {verdict.high:.1f}; accuracy {verdict.accuracy:.1f} % and "
            f"{verdict.champion_accuracy:.1f} %"
        )
    print(words, flush=True)
    resource = {"prefect.resource.id": f"opnp.detector.{experiment_name()}.{version}"}
    emit_event(f"opnp.retrain.{decision}", resource, payload=verdict.figures())


def retrained(workspace: Workspace) -> str:
    """What `retrain` does, in a workspace that this process holds."""
    parameters.complete(workspace.parameters)
    chosen = parameters.load(workspace.parameters)
    evaluation = workspace.root / chosen.retrain.evaluation
    prefect_server.start()
    hide_what_is_told()
    with prefect_server.running():
        # What the sources hold now, which may be other images than were recorded.
        timed("fetch", partial(workers.run, fetch, workspace, chosen, accept=True))
        pipeline.pipeline(workspace)
        champion.freeze(workspace, evaluation)
        champion.check_unseen(workspace, evaluation)
        folder = workspace.detector
        from_run(Run(workspace, chosen)).save(folder, overwrite=folder.exists())
        return contend(workspace, folder, chosen)


@flow
def retrain() -> str:
    """Fetch, train, compare with the champion, and promote what is better."""
    with schedule.due():
        return retrained(Workspace(Path.cwd()))


if __name__ == "__main__":
    command("retrain")
