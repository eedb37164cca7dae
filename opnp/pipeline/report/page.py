"""The report of a run: one self-contained HTML page, which needs no network."""

from importlib.resources import files
from io import StringIO
from typing import Any

import matplotlib
from jinja2 import Environment, StrictUndefined
from ruamel.yaml import YAML

from opnp.detectors.names import detector_name
from opnp.metrics.separation import METRICS
from opnp.pipeline.report.findings import Evaluation, Pruning
from opnp.pipeline.report.plots import (
    STYLE,
    histograms,
    roc_curves,
    sensitivities,
    tradeoff,
    training_curves,
)
from opnp.pipeline.report.tables import SAME, best, comparison, heat_maps
from opnp.pipeline.report.words import chosen_values, number, outcome, prunes, span
from opnp.pipeline.results import Run
from opnp.runtime.files import digest

__all__ = ["render"]


def render(run: Run) -> str:
    """Render the report of a run as one HTML page; the same files give the same page.

    Raises:
        InputError: a file of the run is missing, damaged, or does not belong to the run.
    """
    parameters, backbone = run.parameters, run.training
    manifest, pruning, evaluation = run.manifest, Pruning.of(run), Evaluation.of(run)
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "chosen": chosen_values,
        "label": evaluation.name,
        "name": detector_name,
        "number": number,
        "prunes": prunes,
        "span": span,
    }
    environment.tests["ours"] = evaluation.prunes
    template = environment.from_string(
        files("opnp.pipeline.report").joinpath("page.html.jinja").read_text(encoding="utf-8")
    )
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # not the user's own settings
        matplotlib.rcParams.update(STYLE)
        page = template.render(
            parameters=parameters,
            backbone=backbone,
            pruning=pruning,
            evaluation=evaluation,
            same_sentence=SAME,
            unmoved=any(p == 0 for n, p in evaluation.pruned.items() if n not in evaluation.same),
            outcome=outcome(pruning, evaluation),
            comparisons={metric: comparison(evaluation, metric) for metric in ("fpr95", "auroc")},
            best={metric: best(evaluation, metric) for metric in METRICS},
            histograms=histograms(evaluation),
            rocs=roc_curves(evaluation),
            sensitivities=sensitivities(pruning),
            tradeoff=tradeoff(parameters, pruning),
            heat_maps=heat_maps(parameters, pruning),
            curves=training_curves(backbone.history),
            # Without the engine, which does not affect what is shown.
            yaml=to_yaml(parameters.model_dump(mode="json", exclude={"engine"})),
            hashes=hashes(run),
            missing=manifest.missing,
        )
    return page.replace(" %", "\N{NO-BREAK SPACE}%")


def to_yaml(values: dict[str, Any]) -> str:
    """Values as YAML, in order; sections without lists take one line, which the page wraps."""
    yaml, text = YAML(), StringIO()
    yaml.default_flow_style, yaml.width = None, 10_000
    yaml.dump(values, text)
    return text.getvalue()


def hashes(run: Run) -> dict[str, str]:
    """SHA-256 of the files that went into the run and of those that it made, by path."""
    workspace, sets = run.workspace, run.manifest.sets
    made = (workspace.sensitivity, workspace.mask)
    return {
        **{workspace.relative(workspace.images(name)): of.sha256 for name, of in sets.items()},
        workspace.relative(workspace.backbone): run.backbone_stated.sha256,
        **{workspace.relative(path): digest(path) for path in made},
    }
