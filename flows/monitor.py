"""Score new production images with the champion, and ask for a retraining where too many are OOD.

Images are known by their SHA-256, and counted once for as long as they lie in the folder.
"""

import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from prefect import flow
from prefect.events import emit_event

from flows import prefect_server, schedule
from flows.process import command
from flows.retrain import trusted
from opnp.data import images
from opnp.data.images import Images
from opnp.deployment import score
from opnp.errors import InputError
from opnp.pipeline import parameters
from opnp.pipeline.parameters import Parameters
from opnp.runtime.files import read_json, write_json
from opnp.tracking import registry
from opnp.tracking.mlflow_client import experiment_id, experiment_name
from opnp.workspace import Workspace

__all__ = ["monitor", "watch"]

LOCK = Path("logs/monitor.lock")  # not the runs': production is watched while one is at work
RUN = "monitor"  # the tag of the run whose metrics are the history


def new_images(workspace: Workspace, folder: Path) -> tuple[Images, list[str]]:
    """Images of the folder that were not counted yet, and the digests of all."""
    found = images.find(folder)
    seen = read_json(workspace.monitored) if workspace.monitored.exists() else {}
    before = set(seen.get(str(folder.resolve()), []))
    of = {digest: row for row, digest in reversed(list(enumerate(found.digests())))}
    rows = {sha256: row for sha256, row in of.items() if sha256 not in before}
    return found.select(list(rows.values())), list(of)


def log(workspace: Workspace, folder: Path, figures: dict[str, float]) -> None:
    """Append figures to the history of a folder, one MLflow run of the experiment."""
    from mlflow.entities import Metric

    client, place = registry.registry(workspace), str(folder.resolve())
    with registry.told(workspace):
        experiment = experiment_id(client, workspace)
        found = client.search_runs([experiment], f"tags.{RUN} = '{place}'")
        run = found[0] if found else client.create_run(experiment, None, {RUN: place}, RUN)
        step = len(client.get_metric_history(run.info.run_id, "flagged"))
        now = int(time.time() * 1000)
        metrics = [Metric(key, value, now, step) for key, value in figures.items()]
        client.log_batch(run.info.run_id, metrics)


def watch(workspace: Workspace, folder: Path, chosen: Parameters) -> bool:
    """Score the folder's new images, log the share that is flagged OOD, and act where it is large.

    Images count as seen at last: what fails before is made up for by the next run.

    Returns:
        Whether that share is beyond ``retrain.max_flagged``.

    Raises:
        InputError: there is no champion, the folder holds no image that can be read, or MLflow
            cannot be reached.
    """
    limit, champion = chosen.retrain.max_flagged, registry.champion(workspace, trusted(chosen))
    if champion is None:
        raise InputError("There is no champion to score with.", "retrain")
    found, everything = new_images(workspace, folder)
    if len(found) < chosen.retrain.min_images:
        print(f"monitor: {len(found)} new images, fewer than retrain.min_images: they wait")
        return False
    with TemporaryDirectory() as temporary:
        summary = score.score(champion, found, Path(temporary) / "scores.parquet")
    share = summary.flagged
    print(f"monitor: {share:.1f} % of {summary.images} new images are flagged (limit {limit:g} %)")
    if share > limit:
        ask(folder, share)
    unreadable = len(summary.unreadable)
    for told in summary.unreadable:
        print(f"monitor: left out: {told}")
    log(workspace, folder, {"flagged": share, "images": summary.images, "unreadable": unreadable})
    seen = read_json(workspace.monitored) if workspace.monitored.exists() else {}
    write_json(workspace.monitored, seen | {str(folder.resolve()): sorted(everything)})
    return share > limit


def ask(folder: Path, share: float) -> None:
    """Emit the event, and start the deployment of `flows.retrain`, if there is one."""
    if not prefect_server.named():
        print("monitor: no Prefect server is named in PREFECT_API_URL: no retraining is asked for")
        return
    from prefect.client.orchestration import get_client
    from prefect.deployments import run_deployment
    from prefect.exceptions import ObjectNotFound

    with prefect_server.running():
        resource = {"prefect.resource.id": f"opnp.monitor.{experiment_name()}"}
        payload = {"folder": str(folder), "flagged": share}
        emit_event("opnp.monitor.beyond-limit", resource, payload=payload)
        with get_client(sync_client=True) as client:
            try:
                client.read_deployment_by_name("retrain/retrain")
            except ObjectNotFound:
                print("monitor: no retraining is served: run `python -m flows.retrain`")
                return
        run: Any = run_deployment("retrain/retrain", timeout=0, as_subflow=False)
        print(f"monitor: retraining {run.name} is asked for", flush=True)


@flow
def monitor(folder: Path) -> bool:
    """Score new production images with the champion, and ask for a retraining where it is due."""
    with schedule.due(LOCK):
        workspace = Workspace(Path.cwd())
        return watch(workspace, folder, parameters.load(workspace.parameters))


if __name__ == "__main__":
    command("monitor")
