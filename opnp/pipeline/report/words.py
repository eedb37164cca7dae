"""Sentences and numbers for the report."""

from collections.abc import Mapping
from typing import Any

from opnp.metrics import ranking
from opnp.pipeline.report.findings import Evaluation, Pruning
from opnp.pipeline.results.search import CANDIDATE


def number(value: float, digits: int = 1) -> str:
    return f"{value:.{digits}f}".replace("-", "−")


def span(interval: Mapping[str, float], digits: int = 1) -> str:
    return f"{number(interval['low'], digits)}–{number(interval['high'], digits)}"


def prunes(trial: Mapping[str, Any]) -> str:
    """Say what a trial prunes."""
    parts = []
    kind = f"neurons by {trial['neuron_sensitivity']} sensitivity"
    for what, words in (("weights", "weights"), ("neurons", kind)):
        shares = [(end, trial[f"{what}_{end}"]) for end in ("low", "high")]
        if named := [f"{end}est {share:g} %" for end, share in shares if share]:
            parts.append(f"the {' and '.join(named)} of {words}")
    return " and ".join(parts) or "nothing"


def chosen_values(values: Mapping[str, Any]) -> str:
    """Say which hyperparameters a detector has."""
    parts = [f"prunes {prunes(values)}"] if "weights_low" in values else []
    rest = {key: value for key, value in values.items() if key not in CANDIDATE}
    parts += [f"{k} = {v:g}" if isinstance(v, float) else f"{k} = {v}" for k, v in rest.items()]
    return ", ".join(parts) or "no hyperparameters"


def outcome(pruning: Pruning, evaluation: Evaluation) -> str:
    """Summarize the run in one sentence, and name the best detectors in another."""
    means = {name: values["mean"]["fpr95"] for name, values in evaluation.table.items()}
    order = ranking.ranked(evaluation.table, evaluation.ranks, same=evaluation.same)
    accuracy = {name: values["accuracy"] for name, values in evaluation.calibration.items()}
    sets = f"over {len(evaluation.sets)} OOD set{'s' * (len(evaluation.sets) > 1)}"
    parts = []
    if "energy" in means and "opnp" in means:
        change = moved(means["energy"], means["opnp"], " (Energy)", " (OPNP)")
        parts.append(f"the mean FPR95 {sets} {change}")
    else:
        parts += [
            f"{evaluation.name(name)} has a mean FPR95 of {number(means[name])} % {sets}"
            for name in evaluation.before_after
        ]
    if "opnp" in accuracy:
        parts.append(f"ID test accuracy {moved(accuracy['unpruned'], accuracy['opnp'])}")
    else:
        parts.append(f"ID test accuracy unpruned is {number(accuracy['unpruned'])} %")
    parts.append(
        f"the chosen mask prunes {prunes(pruning.chosen)}, "
        f"which leaves {number(pruning.zero)} % of the head’s weights zero"
    )
    sentence = "; ".join(parts)
    lowest = number(min(means.values()))
    winners = " and ".join(evaluation.name(n) for n in order if number(means[n]) == lowest)
    told = f"{sentence[0].upper()}{sentence[1:]}. Of {len(order)} detectors"
    told += f", the lowest mean FPR95 is {lowest} %, by {winners}"
    if "opnp" in means and len(order) > 1:
        place = order.index(evaluation.same.get("opnp", "opnp")) + 1
        told += f"; by mean rank, {evaluation.name('opnp')} is number {place}"
    return f"{told}."


def moved(before: float, after: float, of_before: str = "", of_after: str = "") -> str:
    """Say how a percentage changed, judging by the digits shown."""
    old, new = number(before), number(after)
    if old == new:
        return f"stayed at {old} %"
    verb = "fell" if after < before else "rose"
    return f"{verb} from {old} %{of_before} to {new} %{of_after}"
