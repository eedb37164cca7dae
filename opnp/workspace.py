"""The places of everything that a run reads and writes."""

from dataclasses import dataclass
from pathlib import Path

__all__ = ["Workspace"]


class Place:
    """A path below the root of a workspace."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __get__(self, workspace: "Workspace", owner: type) -> Path:
        return workspace.root / self.path


@dataclass(frozen=True)
class Workspace:
    """A folder in which a pipeline runs.

    Nothing below the programs knows the current folder: they make a workspace of it, or of the
    folder that they are told, and pass it on.

    Attributes:
        root: the folder; every other attribute is a path below it.
    """

    root: Path

    parameters = Place("params.yaml")

    data = Place("data")
    fetched = Place("data.part")  # takes the place of `data` once everything has been fetched
    data_record = Place("data.dvc")
    manifest = Place("data/manifest.json")

    backbone = Place("artifacts/backbone/backbone.safetensors")
    training = Place("artifacts/backbone/training.json")
    history = Place("artifacts/backbone/history.csv")

    features = Place("artifacts/features")

    clips = Place("artifacts/sensitivity/clips.json")
    sensitivity = Place("artifacts/sensitivity/sensitivity.safetensors")
    sums = Place("artifacts/sensitivity/shards")  # of each shard of the training features

    trials = Place("artifacts/search/trials.parquet")
    mask = Place("artifacts/search/mask.safetensors")  # of OPNP
    mask_react = Place("artifacts/search/mask-react.safetensors")  # for features that are clipped
    search = Place("artifacts/search/search.json")

    metrics = Place("artifacts/evaluation/metrics.json")
    intervals = Place("artifacts/evaluation/intervals.json")
    evaluation = Place("artifacts/evaluation/evaluation.json")
    comparison = Place("artifacts/evaluation/comparison.parquet")
    comparison_text = Place("artifacts/evaluation/comparison.md")
    scores = Place("artifacts/evaluation/scores.parquet")
    roc = Place("artifacts/evaluation/roc.csv")

    report = Place("artifacts/report/index.html")
    detector = Place("artifacts/detector")

    # No stage depends on what lies in `logs`: times, for one, differ from run to run.
    logs = Place("logs")
    times = Place("logs/detectors.json")  # of each detector
    timings = Place("logs/timings.json")  # of each stage
    lock = Place("logs/run.lock")
    unlogged = Place("logs/unlogged")  # runs that are not in MLflow yet
    unrecorded = Place("logs/unrecorded")  # names the record that the run at work will have
    monitor_lock = Place("logs/monitor.lock")
    monitored = Place("logs/monitor.json")

    tracking = Place("mlflow.db")

    @property
    def owner(self) -> "Workspace":
        """The workspace that keeps the records of this one: itself.

        ``dvc exp run --queue`` and ``--temp`` run in a copy of the workspace below its
        ``.dvc/tmp/exps``, which DVC removes afterwards: records belong to the workspace around it.
        """
        root = self.root.resolve()
        for folder in root.parents:
            if root.is_relative_to(folder / ".dvc" / "tmp" / "exps"):
                return Workspace(folder)
        return self

    def images(self, name: str) -> Path:
        """The Parquet file of an image set, such as ``train`` or ``ood/letters``."""
        return self.data / f"{name}.parquet"

    def shards(self, split: str) -> Path:
        """The folder of the feature shards of a split, such as ``train`` or ``proxies/phase``."""
        return self.features / split

    def relative(self, path: Path) -> str:
        """A path as it is named in records, which do not depend on where the workspace lies."""
        return str(path.relative_to(self.root))
