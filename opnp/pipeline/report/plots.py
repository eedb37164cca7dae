"""The plots of the report, as SVG."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from io import StringIO
from typing import Any

import numpy as np
import torch
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from opnp.detectors.names import detector_name, ours
from opnp.metrics import ranking
from opnp.metrics.separation import tpr_at_fpr
from opnp.pipeline.parameters import Parameters
from opnp.pipeline.report.findings import Evaluation, Pruning
from opnp.pipeline.report.words import number
from opnp.pipeline.results.reading import Array
from opnp.pruning.methods import METHODS

# Okabe and Ito's colours, which can be told apart with any kind of colour vision, except their
# yellow, which is too pale on white. OPNP is dashed, since it may coincide with ONP or OPP.
BLUE, VERMILLION, ORANGE, GREEN, PURPLE, BLACK = (
    "#0072B2", "#D55E00", "#E69F00", "#009E73", "#CC79A7", "#000000",
)  # fmt: skip
STYLES: dict[str, tuple[str, str]] = {
    "energy": (BLUE, "solid"),
    "opp": (ORANGE, "solid"),
    "onp": (BLACK, "solid"),
    "opnp": (VERMILLION, "dashed"),
}
CUT: dict[str, Any] = {"color": BLACK, "linestyle": "dashed", "linewidth": 1.2}

STYLE: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "font.sans-serif": ["DejaVu Sans", "sans-serif"],
    "font.size": 10,
    "grid.color": "#e4e4e4",
    "legend.fontsize": 9,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "opnp",
}


@dataclass(frozen=True)
class Plot:
    svg: Markup
    caption: str


def axes_for(title: str, x: str, y: str) -> Axes:
    """Axes of a new plot, which is small enough to be legible on a phone."""
    axes = Figure(figsize=(4.5, 3.0), layout="constrained").add_subplot()
    axes.set(title=title, xlabel=x, ylabel=y)
    return axes


def plot(axes: Axes, name: str, caption: str, legend: Mapping[str, Any] | None = None) -> Plot:
    """Finish a plot; ``name`` makes its ids unique on the page."""
    axes.legend(**legend or {})
    figure = axes.get_figure(root=True)
    assert figure is not None
    file = StringIO()
    # A date or the library's version would make the same results give different files.
    no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(file, format="svg", metadata=no_metadata)
    svg = file.getvalue()
    svg = re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{name}-", svg[svg.index("<svg") :])
    label = f'<svg role="img" aria-label="{Markup.escape(caption)}"'
    return Plot(Markup(label + svg.removeprefix("<svg")), caption)


def histograms(evaluation: Evaluation) -> list[Plot]:
    """Energy scores of ID test and of each OOD set, before and after pruning, on one scale."""
    plots: list[Plot] = []
    for name in evaluation.sets:
        pairs = {
            detector: (-evaluation.scores[detector]["test"], -evaluation.scores[detector][name])
            for detector in evaluation.before_after
        }
        if not pairs:
            break
        edges = np.histogram_bin_edges(np.concatenate([s for p in pairs.values() for s in p]), 60)
        for detector, (id_scores, ood_scores) in pairs.items():
            title = f"{evaluation.name(detector)}: ID test and {name}"
            axes = axes_for(title, "Energy score S (higher: ID)", "Samples per bin (%)")
            for label, scores, colour in (("ID test", id_scores, BLUE), (name, ood_scores, ORANGE)):
                share = 100 * np.histogram(scores, edges)[0] / len(scores)
                axes.stairs(share, edges, fill=True, color=colour, alpha=0.45, label=label)
                axes.stairs(share, edges, color=colour)
            n = len(id_scores)
            threshold = np.sort(id_scores)[
                n + (-95 * n // 100)
            ]  # the largest that keeps 95 % of ID
            axes.axvline(threshold, label="keeps 95 % of ID", **CUT)
            caption = (
                f"{evaluation.name(detector)} on {name}: 95 % of ID test samples score "
                f"{number(threshold, 2)} or more, and so do "
                f"{number(evaluation.table[detector][name]['fpr95'])} % of the OOD samples."
            )
            plots.append(plot(axes, f"h{len(plots)}", caption))
    return plots


def roc_curves(evaluation: Evaluation) -> list[Plot]:
    """ROC curves with ID positive: the mean of a few detectors, and Energy and OPNP on each set."""
    fpr, styles = evaluation.roc["fpr"], roc_styles(evaluation)
    curves = {"mean over OOD sets": {name: evaluation.roc[name] for name in styles}}
    for name in evaluation.sets if evaluation.before_after else ():
        curves[name] = {
            detector: 100 * tpr_at_fpr(scores["test"], scores[name], fpr / 100)
            for detector in evaluation.before_after
            for scores in [{s: torch.tensor(v) for s, v in evaluation.scores[detector].items()}]
        }
    plots: list[Plot] = []
    for name, by_detector in curves.items():
        axes = axes_for(f"ROC, {name}", "OOD samples passed, FPR (%)", "ID samples kept, TPR (%)")
        for detector, tpr in by_detector.items():
            colour, line = styles[detector]
            axes.plot(fpr, tpr, color=colour, linestyle=line, label=evaluation.name(detector))
        axes.axhline(95, color="#767676", linewidth=0.8)
        axes.set(xlim=(0, 100), ylim=(0, 102))
        shown = ", ".join(map(evaluation.name, by_detector))
        caption = f"ROC curves, {name}: {shown}. The grey line is a TPR of 95 %."
        legend = {"loc": "lower right", "ncols": 1 + (len(by_detector) > 4)}
        plots.append(plot(axes, f"r{len(plots)}", caption, legend))
    return plots


def roc_styles(evaluation: Evaluation) -> dict[str, tuple[str, str]]:
    """Colours and lines of the detectors in a plot, few enough to tell apart.

    These are Energy, OPP, ONP, OPNP, and by mean rank the best of OPNP's combinations that prune
    and of the other detectors.
    """
    order = ranking.ranked(evaluation.table, evaluation.ranks, same=evaluation.same)
    rest = [name for name in order if name not in STYLES]
    others = [name for name in rest if not ours(name)][:1]
    combined = [name for name in rest if evaluation.prunes(name)][:1]
    return (
        dict.fromkeys(others, (GREEN, "solid"))
        | dict.fromkeys(combined, (PURPLE, "dashdot"))
        | {name: style for name, style in STYLES.items() if name in evaluation.table}
    )


def tradeoff(parameters: Parameters, pruning: Pruning) -> Plot:
    """Proxy FPR95 against ID validation accuracy, of all candidates and of the choices."""
    accuracy, fpr95, chosen = pruning.trials["accuracy"], pruning.trials["fpr95"], pruning.methods
    drop = parameters.search.max_accuracy_drop
    floor = parameters.search.lowest_accuracy(accuracy[0])
    # Masks that cost far too much accuracy would squeeze the others together.
    lowest = min(each["accuracy"] for each in chosen.values()) if drop is None else floor
    shown = accuracy >= lowest - 4 * max(drop or 0, 1.0)
    axes = axes_for("Candidates", "Accuracy of the pruned head (%)", "Proxy FPR95 (%)")
    # Cells instead of thousands of points keep the page small.
    axes.hexbin(
        accuracy[shown], fpr95[shown], gridsize=(36, 20), bins="log", mincnt=1, linewidths=0,
        cmap=LinearSegmentedColormap.from_list("candidates", ["#c9ced4", "#3c434b"]),
    )  # fmt: skip
    if floor > accuracy.min():
        axes.axvline(floor, label="lowest accuracy allowed", **CUT)
    colours = (GREEN, ORANGE, BLACK, VERMILLION, PURPLE)
    looks = zip(METHODS, "Xs^oD", colours, (140, 110, 80, 50, 25), strict=True)
    for (
        method,
        marker,
        colour,
        size,
    ) in looks:  # smaller ones on top, as they may coincide
        axes.scatter(
            chosen[method]["accuracy"], chosen[method]["fpr95"],
            s=size, c=colour, marker=marker, edgecolors="#ffffff", label=detector_name(method),
        )  # fmt: skip
    caption = (
        f"Proxy FPR95 against the accuracy that the pruned head alone has on ID validation, of "
        f"{int(shown.sum())} candidates (darker: more of them), and the choice of each method."
    )
    if not shown.all():
        caption += f" {int((~shown).sum())} candidates of even lower accuracy are not shown."
    return plot(axes, "c0", caption)


def sensitivities(pruning: Pruning) -> list[Plot]:
    """Distributions of M and of the chosen N, and what the mask prunes of each."""
    kind = pruning.chosen["neuron_sensitivity"]
    plots: list[Plot] = []
    for what, key, label in (
        ("weights", "weights", "Parameter sensitivity M"),
        ("neurons", f"neurons_{kind}", f"Neuron sensitivity N ({kind})"),
    ):
        values, kept = pruning.sensitivity[key], pruning.mask[what]
        axes = axes_for(label, f"{label}, log scale", f"Number of {what}")
        distribution(axes, values, kept)
        ends = {"low": values[kept].min(), "high": values[kept].max()}
        for end, cut in ends.items():
            if pruning.chosen[f"{what}_{end}"] and cut > 0:  # a log scale has no zero
                axes.axvline(cut, **CUT)
        zeros = int((values == 0).sum())
        caption = (
            f"{label} of {values.size} {what}: {int((~kept).sum())} pruned (beyond dashed lines), "
            f"{zeros or 'none'} exactly zero{', in their own bar at the left' * bool(zeros)}."
        )
        plots.append(plot(axes, f"s{len(plots)}", caption))
    return plots


def distribution(axes: Axes, values: Array, kept: Array) -> None:
    """Histogram on a log scale, pruned above kept; zeros have their own bar at the left."""
    positive = values[values > 0]
    low, high = (positive.min(), positive.max()) if positive.size else (1.0, 1.0)
    # A little wider than the values, so that rounding loses none of them.
    edges = np.geomspace(low / 1.0001, high * 1.0001, 41)
    step = edges[1] / edges[0]
    axes.set_xscale("log")
    base, zero_base = np.zeros(40), 0
    for label, chosen, colour in (("kept", kept, BLUE), ("pruned", ~kept, VERMILLION)):
        top = base + np.histogram(values[chosen & (values > 0)], edges)[0]
        axes.stairs(top, edges, baseline=base, fill=True, color=colour, label=label)
        base = top
        if zeros := int((values[chosen] == 0).sum()):
            left = edges[0] / step**4
            axes.bar(left, zeros, left * (step**2 - 1), zero_base, align="edge", color=colour)
            zero_base += zeros
    if zero_base:
        axes.annotate("zero", (edges[0] / step**3, zero_base), ha="center", va="bottom")
    axes.set_ylim(0, 1.12 * max(zero_base, *base))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))


def training_curves(history: Mapping[str, Array]) -> list[Plot]:
    """Accuracy and loss by epoch; no plots if the backbone was not trained here."""
    epochs = history["epoch"]
    if not epochs.size:
        return []
    accuracy = axes_for("Accuracy", "Epoch", "Accuracy (%)")
    accuracy.plot(epochs, history["train_accuracy"], BLUE, label="training")
    accuracy.plot(epochs, history["validation_accuracy"], VERMILLION, ls="--", label="validation")
    loss = axes_for("Loss", "Epoch", "Cross-entropy (nats, log scale)")
    loss.plot(epochs, history["loss"], BLUE, label="training")
    loss.set_yscale("log")
    return [
        plot(accuracy, "t0", f"Accuracy over {epochs.size} epochs."),
        plot(loss, "t1", f"Training loss over {epochs.size} epochs."),
    ]
