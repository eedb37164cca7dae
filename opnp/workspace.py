"""The fixed places of everything a run reads and writes, relative to the workspace."""

from pathlib import Path

__all__ = [
    "BACKBONE", "CLIPS", "COMPARISON", "COMPARISON_TEXT", "DATA", "EVALUATION", "FEATURES",
    "FETCHED", "HISTORY", "INTERVALS", "MANIFEST", "MASK", "MASK_REACT", "METRICS", "PARAMETERS",
    "REPORT", "ROC", "SCORES", "SEARCH", "SENSITIVITY", "TIMES", "TRAINING", "TRIALS",
]  # fmt: skip

PARAMETERS = Path("params.yaml")

DATA = Path("data")
FETCHED = Path("data.part")  # what is being fetched: it takes the place of DATA when it is whole
MANIFEST = DATA / "manifest.json"

BACKBONE = Path("artifacts/backbone/backbone.safetensors")
TRAINING = Path("artifacts/backbone/training.json")
HISTORY = Path("artifacts/backbone/history.csv")

FEATURES = Path("artifacts/features")

CLIPS = Path("artifacts/sensitivity/clips.json")
SENSITIVITY = Path("artifacts/sensitivity/sensitivity.safetensors")

TRIALS = Path("artifacts/search/trials.parquet")
MASK = Path("artifacts/search/mask.safetensors")  # of OPNP
MASK_REACT = Path("artifacts/search/mask-react.safetensors")  # for features that are clipped first
SEARCH = Path("artifacts/search/search.json")

METRICS = Path("artifacts/evaluation/metrics.json")
INTERVALS = Path("artifacts/evaluation/intervals.json")
EVALUATION = Path("artifacts/evaluation/evaluation.json")
COMPARISON = Path("artifacts/evaluation/comparison.parquet")
COMPARISON_TEXT = Path("artifacts/evaluation/comparison.md")
SCORES = Path("artifacts/evaluation/scores.parquet")
ROC = Path("artifacts/evaluation/roc.csv")

# Of each detector; no artifact, since times differ from run to run.
TIMES = Path("logs/detectors.json")

REPORT = Path("artifacts/report/index.html")
