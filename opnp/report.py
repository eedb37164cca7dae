"""The report of a run: one page of everything found, which opens from disk without a network."""

import csv
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from io import StringIO
from pathlib import Path
from typing import Any, get_args

import matplotlib
import numpy as np
import pyarrow.parquet as pq
import torch
import yaml
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, Normalize, to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from pyarrow import ArrowException

from opnp import artifacts, tables, tensors
from opnp.errors import InputError
from opnp.files import digest, read_json
from opnp.metrics import METRICS, tpr_at_fpr
from opnp.parameters import Parameters
from opnp.sensitivity import NeuronSensitivity
from opnp.tables import detector_name

__all__ = ["render"]

Array = NDArray[Any]

CANDIDATE = ("weights_low", "weights_high", "neurons_low", "neurons_high", "neuron_sensitivity")
METHODS = ("opp", "onp", "opnp", "opnp+react")  # for which the search chooses a mask
TIMES = ("fit", "score")

# Okabe and Ito's colours, which differ for every kind of colour vision, but for their yellow, too
# pale for a line on white. OPNP is dashed: it may equal ONP or OPP.
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


def render(parameters: Parameters) -> str:
    """Draw the run in the current folder as one HTML page, the same bits for the same files.

    Raises:
        InputError: a file is missing, damaged or of another run; the sentence names it.
    """
    backbone = read_backbone()
    pruning = read_pruning(backbone.record["sha256"])
    evaluation = read_evaluation(parameters, pruning)
    hashes, missing = read_hashes(backbone)
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "chosen": chosen_values,
        "name": detector_name,
        "number": number,
        "prunes": prunes,
        "span": span,
    }
    environment.tests["ours"] = tables.ours
    template = environment.from_string(
        files("opnp").joinpath("report.html.jinja").read_text(encoding="utf-8")
    )
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # whatever the user's own settings are
        matplotlib.rcParams.update(STYLE)
        page = template.render(
            parameters=parameters,
            backbone=backbone,
            pruning=pruning,
            evaluation=evaluation,
            outcome=outcome(pruning, evaluation),
            comparisons={metric: comparison(evaluation, metric) for metric in ("fpr95", "auroc")},
            best={metric: best(evaluation, metric) for metric in METRICS},
            histograms=histograms(evaluation),
            rocs=roc_curves(evaluation),
            sensitivities=sensitivities(pruning),
            tradeoff=tradeoff(parameters, pruning),
            heat_maps=heat_maps(parameters, pruning),
            curves=training_curves(backbone.history),
            yaml=yaml.safe_dump(
                # Without the engine, of no influence on what is shown.
                parameters.model_dump(mode="json", exclude={"engine"}),
                sort_keys=False,
                default_flow_style=None,
            ),
            hashes=hashes,
            missing=missing,
        )
    return page.replace(" %", "\N{NO-BREAK SPACE}%")


# what is read -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Backbone:
    """`training.json`, and the columns of the history, which are empty for a loaded checkpoint."""

    record: dict[str, Any]
    history: dict[str, Array]


@dataclass(frozen=True)
class Pruning:
    """Sensitivities, all trials of the search, what it chose for each method, and OPNP's mask."""

    sensitivity: dict[str, Array]
    search: dict[str, Any]
    methods: dict[str, dict[str, Any]]
    trials: dict[str, Array]
    mask: dict[str, Array]

    @property
    def chosen(self) -> dict[str, Any]:
        """What OPNP prunes, which the saved mask does."""
        return self.methods["opnp"]

    @property
    def zero(self) -> float:
        """Share of the head's weights that the mask sets to zero, in percent."""
        return 100 * (1 - float((self.mask["weights"] & self.mask["neurons"]).mean()))


@dataclass(frozen=True)
class Evaluation:
    """Everything measured on the test sets.

    Attributes:
        table: metrics by detector and column, detectors in the order of the parameters.
        unavailable: why each of the other detectors could not run.
        oracle: of a method, what a mask chosen on the test sets themselves would reach.
        times: of each detector, where they have been measured.
    """

    table: dict[str, dict[str, dict[str, float]]]
    intervals: dict[str, dict[str, dict[str, dict[str, float]]]]
    calibration: dict[str, dict[str, float]]
    id_intervals: dict[str, dict[str, dict[str, float]]]
    hyperparameters: dict[str, dict[str, Any]]
    trials: dict[str, int]
    ranks: dict[str, dict[str, float]]
    unavailable: dict[str, str]
    oracle: dict[str, dict[str, Any]]
    times: dict[str, dict[str, float]]
    sets: dict[str, dict[str, Any]]
    id_count: int
    scores: dict[str, dict[str, Array]]
    roc: dict[str, Array]

    @property
    def groups(self) -> dict[str, list[str]]:
        """Names of the OOD sets that are near and far, as far as there are any."""
        groups = {
            kind: [name for name, entry in self.sets.items() if entry["kind"] == kind]
            for kind in ("near", "far")
        }
        return {kind: names for kind, names in groups.items() if names}

    @property
    def columns(self) -> list[str]:
        return tables.columns({name: entry["kind"] for name, entry in self.sets.items()})

    @property
    def before_after(self) -> list[str]:
        return [name for name in ("energy", "opnp") if name in self.table]


@contextmanager
def reading(path: Path, command: str) -> Iterator[None]:
    """Turn whatever goes wrong while ``path`` is read into one sentence."""
    try:
        yield
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{path} is missing: run `{command}` first.") from None
    except (ArrowException, AttributeError, LookupError, OSError, TypeError, ValueError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise InputError(f"{path} is damaged ({reason}): run `{command}` again.") from None


def select(values: Any, *levels: Iterable[str]) -> Any:
    """The part of nested mappings with these keys on each level; `KeyError` where one lacks."""
    if not levels:
        return values
    return {key: select(values[key], *levels[1:]) for key in levels[0]}


def read_columns(path: Path, command: str, columns: Sequence[str]) -> dict[str, Array]:
    """Numeric columns of a CSV file."""
    with reading(path, command), open(path, newline="") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
        select(dict.fromkeys(reader.fieldnames or ()), columns)  # even where there are no rows
        return {name: np.array([float(row[name]) for row in rows]) for name in columns}


def read_tensors(
    path: Path, command: str, backbone: str
) -> tuple[dict[str, Array], dict[str, Any]]:
    """Arrays, and what is said of them, of a file made for the backbone of this SHA-256."""
    with reading(path, command):
        found, metadata = tensors.load(path, f"run `{command}`")
        if metadata["backbone"] != backbone:
            raise InputError(f"{path} is of another backbone: run `{command}` again.")
        return {name: tensor.numpy() for name, tensor in found.items()}, metadata


def read_backbone() -> Backbone:
    command = "python -m flows.train"
    keys = ("train_accuracy", "validation_accuracy", "parameters", "features", "classes", "sha256")
    with reading(artifacts.TRAINING, command):
        record = select(read_json(artifacts.TRAINING, command), keys)
    columns = ("epoch", "loss", "train_accuracy", "validation_accuracy")
    return Backbone(record, read_columns(artifacts.HISTORY, command, columns))


def read_pruning(backbone: str) -> Pruning:
    measure, search = "python -m flows.sensitivity", "python -m flows.search"
    arrays, _ = read_tensors(artifacts.MASK, search, backbone)
    with reading(artifacts.MASK, search):
        mask = {name: arrays[name].astype(bool) for name in ("weights", "neurons")}
    with reading(artifacts.SEARCH, search):
        found = read_json(artifacts.SEARCH, search)
        keys = (*CANDIDATE, "clip", "threshold", "temperature", "fpr95", "auroc", "accuracy")
        found_by = ("interval", "within_noise", "instability")
        methods = {method: select(found[method], (*keys, *found_by)) for method in METHODS}
        for chosen in methods.values():
            select(chosen["interval"], ("low", "high"))
        counts = ("candidates", "validation_samples", "training_samples")
        record = select(found, (*counts, "proxies", "outliers"))
        record["unpruned"] = select(found["unpruned"], ("fpr95", "accuracy"))
    arrays, metadata = read_tensors(artifacts.SENSITIVITY, measure, backbone)
    with reading(artifacts.SENSITIVITY, measure):
        # Sums over either half of the training samples, for each clip and temperature.
        wanted = (None, methods["opnp"]["temperature"])
        settings = [(each["clip"], each["temperature"]) for each in metadata["settings"]]
        place = settings.index(wanted)
        count = sum(metadata["counts"][2 * place : 2 * place + 2])
        sensitivity = {
            name: (arrays[f"{place}/0/{name}"] + arrays[f"{place}/1/{name}"]) / count
            for name in ("weights", *(f"neurons_{kind}" for kind in get_args(NeuronSensitivity)))
        }
    with reading(artifacts.TRIALS, search):
        columns = (*CANDIDATE, "clip", "fpr95", "accuracy")
        table = pq.read_table(artifacts.TRIALS, columns=list(columns))
        trials = {name: table[name].to_numpy() for name in columns if name != "clip"}
        trials["clips"] = ~table["clip"].is_null().to_numpy()
    return Pruning(sensitivity, record, methods, trials, mask)


def read_evaluation(parameters: Parameters, pruning: Pruning) -> Evaluation:
    command = "python -m flows.evaluate"
    with reading(artifacts.EVALUATION, command):
        record = read_json(artifacts.EVALUATION, command)
        sets = select(record["sets"], record["sets"], ("kind", "count"))
        wanted = list[str](parameters.evaluate.detectors)
        unavailable = {n: reason for n, reason in record["unavailable"].items() if n in wanted}
        names = [name for name in wanted if name not in unavailable]
        tuned, trials = (select(record[key], names) for key in ("hyperparameters", "trials"))
        ranks = select(record["ranks"], names, (*sets, "mean"))
        oracle = select(record["oracle"], record["oracle"], (*CANDIDATE, "fpr95", "kept"))
        id_count = record["id_test_samples"]
        if "opnp" in tuned and any(tuned["opnp"][key] != pruning.chosen[key] for key in CANDIDATE):
            raise InputError(f"{artifacts.EVALUATION} is of another mask: run `{command}` again.")
    shown = tables.columns({name: entry["kind"] for name, entry in sets.items()})
    with reading(artifacts.METRICS, command):
        found = read_json(artifacts.METRICS, command)
        table = select(found["detectors"], names, shown, METRICS)
        heads = ["unpruned", *(name for name in names if name in ("opp", "onp", "opnp"))]
        calibration = select(found["id"], heads, ("accuracy", "ece", "nll"))
    with reading(artifacts.INTERVALS, command):
        found = read_json(artifacts.INTERVALS, command)
        intervals = select(found["detectors"], names, shown, METRICS, ("low", "high"))
        id_intervals = select(found["id"], heads, ("accuracy", "ece", "nll"), ("low", "high"))
    with reading(artifacts.SCORES, command):
        scores_of = pq.read_table(artifacts.SCORES, columns=["set", *names])
        place = scores_of["set"].to_numpy()
        scores = {
            name: {s: scores_of[name].to_numpy()[place == s] for s in ("test", *sets)}
            for name in names
        }
        if missing := {"test", *sets} - set(place):
            raise LookupError(f"no scores of {min(missing)}")
    roc = read_columns(artifacts.ROC, command, ("fpr", *names))
    return Evaluation(
        table=table,
        intervals=intervals,
        calibration=calibration,
        id_intervals=id_intervals,
        hyperparameters=tuned,
        trials=trials,
        ranks=ranks,
        unavailable=unavailable,
        oracle=oracle,
        times=read_times(names),
        sets=sets,
        id_count=id_count,
        scores=scores,
        roc=roc,
    )


def read_times(names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Seconds and milliseconds of the detectors; none where they were not measured here."""
    if not artifacts.TIMES.is_file():
        return {}
    command = "python -m flows.evaluate"
    with reading(artifacts.TIMES, command):
        found = read_json(artifacts.TIMES, command)
        return {name: select(found[name], TIMES) for name in names if name in found}


def read_hashes(backbone: Backbone) -> tuple[dict[str, str], dict[str, str]]:
    """SHA-256 of what the run was made of and of what it made, and the OOD sets it went without."""
    command = "python -m flows.fetch"
    with reading(artifacts.MANIFEST, command):
        manifest = read_json(artifacts.MANIFEST, command)
        sets, missing = manifest["sets"], manifest.get("missing", {})
        found = {f"data/{name}.parquet": sets[name]["sha256"] for name in sets}
    found[str(artifacts.BACKBONE)] = backbone.record["sha256"]
    found |= {str(path): digest(path) for path in (artifacts.SENSITIVITY, artifacts.MASK)}
    return found, missing


# words and tables -------------------------------------------------------------------------------


def number(value: float, digits: int = 1) -> str:
    return f"{value:.{digits}f}".replace("-", "−")


def span(interval: Mapping[str, float], digits: int = 1) -> str:
    return f"{number(interval['low'], digits)}–{number(interval['high'], digits)}"


def prunes(trial: Mapping[str, Any]) -> str:
    """What a trial prunes, in words."""
    parts = []
    kind = f"neurons by {trial['neuron_sensitivity']} sensitivity"
    for what, words in (("weights", "weights"), ("neurons", kind)):
        shares = [(end, trial[f"{what}_{end}"]) for end in ("low", "high")]
        if named := [f"{end}est {share:g} %" for end, share in shares if share]:
            parts.append(f"the {' and '.join(named)} of {words}")
    return " and ".join(parts) or "nothing"


def chosen_values(values: Mapping[str, Any]) -> str:
    """The hyperparameters of a detector, in words."""
    parts = [f"prunes {prunes(values)}"] if "weights_low" in values else []
    rest = {key: value for key, value in values.items() if key not in CANDIDATE}
    parts += [f"{k} = {v:g}" if isinstance(v, float) else f"{k} = {v}" for k, v in rest.items()]
    return ", ".join(parts) or "none to choose"


def outcome(pruning: Pruning, evaluation: Evaluation) -> str:
    """The run in one sentence, and who did best in another."""
    means = {name: values["mean"]["fpr95"] for name, values in evaluation.table.items()}
    accuracy = {name: values["accuracy"] for name, values in evaluation.calibration.items()}
    sets = f"over {len(evaluation.sets)} OOD set{'s' * (len(evaluation.sets) > 1)}"
    parts = []
    if "energy" in means and "opnp" in means:
        change = moved(means["energy"], means["opnp"], " (Energy)", " (OPNP)")
        parts.append(f"the mean FPR95 {sets} {change}")
    else:
        parts += [
            f"{detector_name(name)} has a mean FPR95 of {number(means[name])} % {sets}"
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
    winners = " and ".join(detector_name(n) for n, mean in means.items() if number(mean) == lowest)
    told = f"{sentence[0].upper()}{sentence[1:]}. Of {len(means)} detectors"
    told += f", the lowest mean FPR95 is {lowest} %, by {winners}"
    if "opnp" in means and len(means) > 1:
        place = tables.ranked(evaluation.table, evaluation.ranks).index("opnp") + 1
        told += f"; by mean rank OPNP is number {place}"
    return f"{told}."


def moved(before: float, after: float, of_before: str = "", of_after: str = "") -> str:
    """How a percentage changed, as far as its shown digits tell."""
    old, new = number(before), number(after)
    if old == new:
        return f"stayed at {old} %"
    verb = "fell" if after < before else "rose"
    return f"{verb} from {old} %{of_before} to {new} %{of_after}"


@dataclass(frozen=True)
class Comparison:
    """Detectors by their mean rank in one metric, and all their ranks in it."""

    order: list[str]
    ranks: dict[str, dict[str, float]]


def comparison(evaluation: Evaluation, metric: str) -> Comparison:
    """The order of the rows of a metric's table."""
    ranks = (
        evaluation.ranks
        if metric == "fpr95"
        else tables.ranks(evaluation.table, list(evaluation.sets), metric)
    )
    return Comparison(tables.ranked(evaluation.table, ranks, metric), ranks)


def best(evaluation: Evaluation, metric: str) -> dict[str, str]:
    """The best value of each column, as shown: equal digits are equally good."""
    choose = min if tables.lower_is_better(metric) else max
    rows = evaluation.table.values()
    return {
        column: number(choose(row[column][metric] for row in rows)) for column in evaluation.columns
    }


@dataclass(frozen=True)
class Cell:
    text: str
    background: str
    colour: str
    chosen: bool


@dataclass(frozen=True)
class HeatMap:
    """Mean FPR95 on the proxies; rows are by the lowest, columns by the highest percentage."""

    what: str
    kind: str
    columns: list[float]
    rows: dict[float, list[Cell | None]]


def heat_maps(parameters: Parameters, pruning: Pruning) -> list[HeatMap]:
    """The search grid by each definition of N: the least over whatever a map does not show.

    As in the search, only trials that keep the accuracy count; a cell without any is None.
    """
    trials, chosen = pruning.trials, pruning.chosen
    floor = trials["accuracy"][0] - parameters.search.max_accuracy_drop
    # Masks of clipped features are those of OPNP with ReAct.
    accurate = ~(trials["accuracy"] < floor - 1e-9) & ~trials["clips"]
    # Without neuron pruning the definitions agree, and the search tries such masks once, as `mean`.
    neuronless = (trials["neurons_low"] == 0) & (trials["neurons_high"] == 0)
    scale = Normalize(trials["fpr95"][accurate].min(), np.percentile(trials["fpr95"][accurate], 75))
    maps = []
    for kind in parameters.search.neuron_sensitivity:
        for what in ("weights", "neurons"):
            low, high = trials[f"{what}_low"], trials[f"{what}_high"]
            rows, columns = np.unique(low), np.unique(high)
            use = accurate & (neuronless | (trials["neuron_sensitivity"] == kind))
            least = np.full((len(rows), len(columns)), np.inf)
            place = np.searchsorted(rows, low[use]), np.searchsorted(columns, high[use])
            np.minimum.at(least, place, trials["fpr95"][use])
            here = kind == chosen["neuron_sensitivity"]
            here |= not (chosen["neurons_low"] or chosen["neurons_high"])
            best_at = (chosen[f"{what}_low"], chosen[f"{what}_high"])
            cells: dict[float, list[Cell | None]] = {
                row: [
                    cell(value, scale, here and (row, column) == best_at)
                    for column, value in zip(columns.tolist(), line, strict=True)
                ]
                for row, line in zip(rows.tolist(), least.tolist(), strict=True)
            }
            maps.append(HeatMap(what, kind, columns.tolist(), cells))
    return maps


def cell(value: float, scale: Normalize, chosen: bool) -> Cell | None:
    if value == np.inf:
        return None
    red, green, blue, _ = rgba = matplotlib.colormaps["cividis_r"](float(scale(value)))
    dark = 0.2126 * red + 0.7152 * green + 0.0722 * blue < 0.45
    return Cell(number(value), to_hex(rgba), "#ffffff" if dark else "#000000", chosen)


# plots ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plot:
    svg: Markup
    caption: str


def axes_for(title: str, x: str, y: str) -> Axes:
    """The axes of a new plot, small enough to be legible on a telephone."""
    axes = Figure(figsize=(4.5, 3.0), layout="constrained").add_subplot()
    axes.set(title=title, xlabel=x, ylabel=y)
    return axes


def plot(axes: Axes, name: str, caption: str, legend: Mapping[str, Any] | None = None) -> Plot:
    """The finished plot; ``name`` keeps its ids apart from those of the page's other plots."""
    axes.legend(**legend or {})
    figure = axes.get_figure(root=True)
    assert figure is not None
    file = StringIO()
    # A date, or the version of the library, would make equal results differ.
    no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(file, format="svg", metadata=no_metadata)
    svg = file.getvalue()
    svg = re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{name}-", svg[svg.index("<svg") :])
    label = f'<svg role="img" aria-label="{Markup.escape(caption)}"'
    return Plot(Markup(label + svg.removeprefix("<svg")), caption)


def histograms(evaluation: Evaluation) -> list[Plot]:
    """Energy scores of ID test and each OOD set, before and after pruning, on the same axis."""
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
            title = f"{detector_name(detector)}: ID test and {name}"
            axes = axes_for(title, "Energy score S (higher: ID)", "Samples per bin (%)")
            for label, scores, colour in (("ID test", id_scores, BLUE), (name, ood_scores, ORANGE)):
                share = 100 * np.histogram(scores, edges)[0] / len(scores)
                axes.stairs(share, edges, fill=True, color=colour, alpha=0.45, label=label)
                axes.stairs(share, edges, color=colour)
            n = len(id_scores)
            threshold = np.sort(id_scores)[n + (-95 * n // 100)]  # the largest to keep 95 % of ID
            axes.axvline(threshold, label="keeps 95 % of ID", **CUT)
            caption = (
                f"{detector_name(detector)} on {name}: 95 % of ID test samples score "
                f"{number(threshold, 2)} or more, and so do "
                f"{number(evaluation.table[detector][name]['fpr95'])} % of the OOD samples."
            )
            plots.append(plot(axes, f"h{len(plots)}", caption))
    return plots


def roc_curves(evaluation: Evaluation) -> list[Plot]:
    """ROC curves, ID positive: of a few detectors in the mean, of Energy and OPNP on each set."""
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
            axes.plot(fpr, tpr, color=colour, linestyle=line, label=detector_name(detector))
        axes.axhline(95, color="#767676", linewidth=0.8)
        axes.set(xlim=(0, 100), ylim=(0, 102))
        shown = ", ".join(map(detector_name, by_detector))
        caption = f"ROC curves, {name}: {shown}. The grey line is a TPR of 95 %."
        legend = {"loc": "lower right", "ncols": 1 + (len(by_detector) > 4)}
        plots.append(plot(axes, f"r{len(plots)}", caption, legend))
    return plots


def roc_styles(evaluation: Evaluation) -> dict[str, tuple[str, str]]:
    """Colour and line of what can be told apart in one plot.

    These are Energy, OPP, ONP, OPNP, and by mean rank the best of OPNP's combinations and of the
    others.
    """
    order = tables.ranked(evaluation.table, evaluation.ranks)
    rest = [name for name in order if name not in STYLES]
    others = [name for name in rest if not tables.ours(name)][:1]
    combined = [name for name in rest if tables.ours(name)][:1]
    return (
        dict.fromkeys(others, (GREEN, "solid"))
        | dict.fromkeys(combined, (PURPLE, "dashdot"))
        | {name: style for name, style in STYLES.items() if name in evaluation.table}
    )


def tradeoff(parameters: Parameters, pruning: Pruning) -> Plot:
    """Proxy FPR95 against ID validation accuracy, of the candidates and of what was chosen."""
    accuracy, fpr95, chosen = pruning.trials["accuracy"], pruning.trials["fpr95"], pruning.methods
    drop = parameters.search.max_accuracy_drop
    floor = accuracy[0] - drop
    # Masks that cost far too much would leave no room for the others.
    shown = accuracy >= floor - 4 * max(drop, 1.0)
    axes = axes_for("Candidates", "ID validation accuracy (%)", "Proxy FPR95 (%)")
    # Cells in place of thousands of points keep the page small.
    axes.hexbin(
        accuracy[shown], fpr95[shown], gridsize=(36, 20), bins="log", mincnt=1, linewidths=0,
        cmap=LinearSegmentedColormap.from_list("candidates", ["#c9ced4", "#3c434b"]),
    )  # fmt: skip
    if floor > accuracy.min():
        axes.axvline(floor, label="least accuracy allowed", **CUT)
    looks = zip(
        METHODS, "s^oD", (ORANGE, BLACK, VERMILLION, PURPLE), (110, 80, 50, 25), strict=True
    )
    for method, marker, colour, size in looks:  # the smaller on the larger: they may be equal
        axes.scatter(
            chosen[method]["accuracy"], chosen[method]["fpr95"],
            s=size, c=colour, marker=marker, edgecolors="#ffffff", label=detector_name(method),
        )  # fmt: skip
    caption = (
        f"Proxy FPR95 against ID validation accuracy of {int(shown.sum())} candidates, darker "
        "where there are more, and what was chosen for each method."
    )
    if not shown.all():
        caption += f" {int((~shown).sum())} of still less accuracy are left out."
    return plot(axes, "c0", caption)


def sensitivities(pruning: Pruning) -> list[Plot]:
    """Distributions of M and of the chosen N, with what the mask prunes of each."""
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
            if pruning.chosen[f"{what}_{end}"] and cut > 0:  # zero has no place here
                axes.axvline(cut, **CUT)
        zeros = int((values == 0).sum())
        caption = (
            f"{label} of {values.size} {what}: {int((~kept).sum())} pruned (beyond dashed lines), "
            f"{zeros or 'none'} exactly zero{', in their own bar at the left' * bool(zeros)}."
        )
        plots.append(plot(axes, f"s{len(plots)}", caption))
    return plots


def distribution(axes: Axes, values: Array, kept: Array) -> None:
    """Histogram on a log scale, pruned on top of kept; zeros have their own bar at the left."""
    positive = values[values > 0]
    low, high = (positive.min(), positive.max()) if positive.size else (1.0, 1.0)
    # A little wider than the values: rounding must lose none of them.
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
    """Accuracy and loss by epoch; none if the backbone was not trained here."""
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
