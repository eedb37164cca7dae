"""The program `opnp`: detectors for one's own model and images, and the runs in MLflow compared.

Exit codes: 0, done; 1, the input is at fault, told in one sentence; 2, wrong options; 3, done, but
some images could not be read.
"""

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from pathlib import Path
from shutil import rmtree
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Any

import typer

from opnp import memory
from opnp.errors import InputError
from opnp.files import write_json

if TYPE_CHECKING:
    from opnp.saved import SavedDetector
    from opnp.tracking import DetectorRun

__all__ = ["app", "main"]

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback()
def program() -> None:
    """OOD detection by optimal parameter and neuron pruning; `make run` runs the pipeline.

    Exit codes: 0, done; 1, the input is at fault; 2, wrong options; 3, done, but some images could
    not be read.
    """


@app.command()
def compare(
    metric: Annotated[
        str, typer.Option(help="fpr95, fpr95_ood_positive, auroc, aupr_in, aupr_out or rank.")
    ] = "fpr95",
    on: Annotated[str, typer.Option(help="mean, near, far or an OOD set.")] = "mean",
    experiment: Annotated[
        str | None, typer.Option(help="The experiment in MLflow; else that of the pipeline.")
    ] = None,
    detectors: Annotated[
        str | None, typer.Option(help="Some detectors, as msp,energy,opnp; else all.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="The ID data; else all.")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a GitHub table.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare the detectors over backbones and data, from the runs in MLflow.

    Of each backbone, data and seed the latest run counts; seeds are averaged.
    """
    if markdown and as_json:
        raise InputError("--markdown and --json exclude each other: choose one.")
    from opnp import tracking

    runs = tracking.detector_runs(experiment or tracking.experiment_name())
    table = tabulate(runs, metric, on, detectors.split(",") if detectors else None, data)
    if as_json:
        print(json.dumps(as_values(table), indent=2))
    elif markdown:
        print(as_markdown(table))
    else:
        show_table(table)


Detector = Annotated[Path, typer.Option(help="A detector's folder, made by `opnp fit`.")]
Trust = Annotated[
    str | None, typer.Option(help="The module:factory that may run, if the model is one.")
]
Device = Annotated[str | None, typer.Option(help="cpu or cuda; else the GPU if there is one.")]
BatchSize = Annotated[int, typer.Option(help="Images that go through the model at once.", min=1)]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def fit(
    out: Annotated[Path, typer.Option(help="The detector's folder.")],
    model: Annotated[str | None, typer.Option(help="torchvision:NAME, module:factory, …")] = None,
    weights: Annotated[
        Path | None, typer.Option(help="The model's weights: .safetensors, .pt or .pth.")
    ] = None,
    id_train: Annotated[str | None, typer.Option(help="Training images, labelled or not.")] = None,
    id_val: Annotated[str | None, typer.Option(help="Other images of the same kind.")] = None,
    from_run: Annotated[
        bool, typer.Option("--from-run", help="Take it all from the pipeline's run in this folder.")
    ] = False,
    preprocessing: Annotated[
        Path | None, typer.Option(help="JSON: size, mode, mean, std; else the weights' own.")
    ] = None,
    classes: Annotated[
        Path | None, typer.Option(help="Names of the classes, one a line, in the logits' order.")
    ] = None,
    accept: Annotated[float, typer.Option(help="% of ID images the threshold accepts.")] = 95.0,
    clip: Annotated[str, typer.Option(help="Percentiles to clip features at.")] = "none,80,90",
    temperature: Annotated[str, typer.Option(help="Temperatures of the energy.")] = "1,2",
    weights_low: Annotated[
        str, typer.Option(help="% of the weights of lowest sensitivity to prune.")
    ] = "0,10,30,50",
    weights_high: Annotated[str, typer.Option(help="Of highest.")] = "0,0.2,0.5,1,2,3,5",
    neurons_low: Annotated[str, typer.Option(help="The same of neurons.")] = "0,10,30",
    neurons_high: Annotated[str, typer.Option(help="Of highest.")] = "0,1,2,5,10,20",
    max_accuracy_drop: Annotated[
        float, typer.Option(help="Points of ID accuracy that pruning may cost.", min=0)
    ] = 1.0,
    search_images: Annotated[
        int, typer.Option(help="Validation images to choose the mask on at most.", min=1)
    ] = 1000,
    max_unreadable: Annotated[
        int, typer.Option(help="Images that may be left out as unreadable.", min=0)
    ] = 10,
    seed: Annotated[int, typer.Option(help="Of proxy outliers and bootstraps.", min=0)] = 0,
    device: Device = None,
    batch_size: BatchSize = 64,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a detector.")] = False,
    as_json: AsJson = False,
) -> None:
    """Make a detector of a trained classifier and images.

    Images are a folder of them, of Parquet or of IDX files, a manifest (.csv, .parquet),
    torchvision:NAME or pytorch-ood:NAME. Of a divided source --id-train takes the split train,
    --id-val validation, else test. If classes of --id-val, such as folders, are named like the
    model's, its images are labelled; else agreement with the unpruned model stands in for accuracy.
    A fit that was stopped goes on where it was.

    Example: opnp fit --model torchvision:resnet50 --weights resnet50.pth --id-train train
    --id-val val --out detector
    """
    from opnp import backbones, fitting, images, saved
    from opnp.backbones import Preprocessing
    from opnp.search import Grid

    saved.check_place(out, overwrite)
    if from_run:
        if given := [path for path in (model, weights, id_train, id_val) if path is not None]:
            raise InputError(f"--from-run takes no model and no images: leave {given[0]} out.")
        from opnp.parameters import load as load_parameters
        from opnp.stages import detector as of_run

        made = of_run.from_run(load_parameters(), accept)
    else:
        if model is None or id_train is None or id_val is None:
            raise InputError("Give --model, --id-train and --id-val, or --from-run.")
        settings = fitting.Settings(
            grid=Grid(
                numbers("weights-low", weights_low),
                numbers("weights-high", weights_high),
                numbers("neurons-low", neurons_low),
                numbers("neurons-high", neurons_high),
            ),
            clips=[
                None if word == "none" else numbers("clip", word)[0] for word in clip.split(",")
            ],
            temperatures=numbers("temperature", temperature),
            accept=accept,
            max_accuracy_drop=max_accuracy_drop,
            search_images=search_images,
            max_unreadable=max_unreadable,
            seed=seed,
            batch_size=batch_size,
        )
        train = images.find(id_train, part="train", asked="--id-train")
        validation = images.find(id_val, part="validation", asked="--id-val")
        if train.source == validation.source:
            raise InputError(
                f"--id-train and --id-val are both {id_val}, which is not divided: keep some "
                "images out of training, and name them with --id-val."
            )
        find_own_code()
        backbone = backbones.from_spec(
            model,
            weights=weights,
            preprocessing=Preprocessing.stated(preprocessing) if preprocessing else None,
            classes=read_classes(classes),
        )
        features = out.with_name(f".{out.name}.features")
        made = fitting.fit(backbone, train, validation, features, settings, device_named(device))
    made = made.save(out, overwrite)
    if not from_run:
        rmtree(features)
    told(made.describe(), as_json, describe)


@app.command()
def score(
    paths: Annotated[list[str], typer.Argument(help="Images: files, or sources of them.")],
    detector: Detector,
    out: Annotated[Path, typer.Option(help="The table to write, .parquet.")],
    trust: Trust = None,
    device: Device = None,
    batch_size: BatchSize = 64,
    as_json: AsJson = False,
) -> None:
    """Score images: a table of file (or file#row), score, is_ood and predicted class.

    Images are single files, or what `opnp fit` takes; of a divided source the split test. Larger
    scores mean OOD. Images that cannot be read are named and left out: exit code 3.

    Example: opnp score --detector detector today/ extra.png --out scores.parquet
    """
    if out.suffix != ".parquet":
        raise InputError(f"{out} is no .parquet file: name one with --out.")
    from opnp import images, scoring

    found = images.find(*paths)
    summary = scoring.score(loaded(detector, trust, device), found, out, batch_size)
    record = asdict(summary) | {"flagged": summary.flagged, "out": str(out)}
    told(record, as_json, lambda of: f"{of['images']} images, {of['flagged']:.1f} % OOD: {out}")
    unreadable(summary.unreadable)


@app.command()
def evaluate(
    detector: Detector,
    id_images: Annotated[str, typer.Option("--id", help="ID images that fit has not seen.")],
    ood: Annotated[list[str], typer.Option(help="NAME=PATH of an OOD set; may be repeated.")],
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the figures here.")
    ] = None,
    trust: Trust = None,
    device: Device = None,
    batch_size: BatchSize = 64,
) -> None:
    """Measure how well a detector tells OOD images from ID ones, beside the unpruned energy.

    FPR95 is the share of OOD images that a threshold which keeps 95 % of the ID images lets pass.
    Images are what `opnp fit` takes; of a divided source the split test.

    Example: opnp evaluate --detector detector --id test --ood sketches=sketches --ood noise=noise
    --json evaluation.json
    """
    from opnp import images, scoring

    places = {name: path for name, _, path in (entry.partition("=") for entry in ood)}
    if len(places) < len(ood) or not all(places) or not all(places.values()):
        raise InputError("Every --ood is NAME=PATH, and every NAME another.")
    sets = {name: images.find(path, asked=f"--ood {name}") for name, path in places.items()}
    inside = images.find(id_images, asked="--id")
    found = scoring.evaluate(loaded(detector, trust, device), inside, sets, batch_size)
    if json_file:
        write_json(json_file, found)
    show_evaluation(found)
    unreadable([each for of in (found["id"], *found["ood"].values()) for each in of["unreadable"]])


@app.command()
def show(
    detector: Annotated[Path, typer.Argument(help="A detector's folder.")],
    trust: Trust = None,
    as_json: AsJson = False,
) -> None:
    """Say what a detector is and how it was made; the folder is verified first.

    Example: opnp show detector
    """
    told(loaded(detector, trust, "cpu").describe(), as_json, describe)


@app.command()
def export(
    detector: Detector,
    out: Annotated[Path, typer.Option(help="The file to write.")],
    format: Annotated[str, typer.Option(help="torch (.pt2) or onnx.")] = "torch",
    trust: Trust = None,
) -> None:
    """Write a detector as one program from images to logits and scores, compared with it.

    It takes images in [0, 1], float32 (N, C, H, W), not normalized, any N.

    Example: opnp export --detector detector --format onnx --out detector.onnx
    """
    from opnp import export as exporting

    exporting.export(loaded(detector, trust, "cpu"), out, format)
    print(f"{out}: images (N, C, H, W) → logits, score")


@app.command()
def register(
    detector: Detector,
    alias: Annotated[str, typer.Option(help="What the version is named.")] = "challenger",
    trust: Trust = None,
) -> None:
    """Log a detector as an MLflow model and register it.

    Example: opnp register --detector detector
    """
    from opnp import registry

    if trust is not None:
        find_own_code()
    print(f"version {registry.register(detector, alias, trust=trust)} is {alias}")


@app.command()
def promote(
    version: Annotated[str | None, typer.Argument(help="Else the challenger.")] = None,
) -> None:
    """Make a registered version champion, and remember the one before.

    Example: opnp promote
    """
    from opnp import registry

    print(f"version {registry.promote(version)} is champion")


@app.command()
def rollback() -> None:
    """Bring back the champion before this one.

    Example: opnp rollback
    """
    from opnp import registry

    print(f"version {registry.rollback()} is champion")


@app.command()
def serve(
    alias: Annotated[str, typer.Option(help="Which registered version.")] = "champion",
    host: Annotated[str, typer.Option(help="0.0.0.0 lets others in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Where it listens.", min=1, max=65535)] = 5000,
    max_bytes: Annotated[int, typer.Option(help="Of a request.", min=1)] = 50_000_000,
) -> None:
    """Answer MLflow's protocol over HTTP, with a limit on the size of requests.

    Example: opnp serve --port 5000
    """
    from opnp import registry, serving

    serving.serve(registry.uri(alias), host, port, max_bytes)


def main() -> None:
    """Run the program; what is wrong with the input is told in one sentence."""
    memory.keep()
    try:
        app()
    except InputError as error:
        sys.exit(f"error: {error}")


def numbers(option: str, text: str) -> list[float]:
    try:
        return [float(word) for word in text.split(",")]
    except ValueError:
        raise InputError(f"--{option} takes numbers with commas between, not {text!r}.") from None


def read_classes(path: Path | None) -> list[str] | None:
    """What `--classes` names, one a line."""
    if path is None:
        return None
    try:
        return path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read ({error}): correct --classes.") from None


def find_own_code() -> None:
    """Let modules be imported from here, as `python -m` does, when a user names code to run."""
    sys.path.insert(0, str(Path.cwd()))


def loaded(folder: Path, trust: str | None, device: str | None) -> "SavedDetector":
    from opnp import saved

    if trust is not None:
        find_own_code()
    return saved.load(folder, device_named(device), trust)


def device_named(name: str | None) -> str:
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"There is no device {name!r} here ({reason}): leave it out.") from None
    return name


def told(record: dict[str, Any], as_json: bool, words: Callable[[dict[str, Any]], str]) -> None:
    print(json.dumps(record, indent=2) if as_json else words(record))


def unreadable(images: Sequence[str]) -> None:
    """Name the images that were left out, and say so with the exit code."""
    if images:
        print(*images, sep="\n", file=sys.stderr)
        count = "1 image" if len(images) == 1 else f"{len(images)} images"
        print(f"{count} could not be read.", file=sys.stderr)
        raise typer.Exit(3)


def describe(of: dict[str, Any]) -> str:
    """What a detector is and how it was made, in words."""
    threshold, mask, made, score = of["threshold"], of["mask"], of["made"], of["score"]
    found, size = made["search"], of["preprocessing"]["size"]
    clip = "" if score["clip"] is None else f", features clipped at {score['clip']:.4g}"
    lines = {
        "model": f"{of['model']['name']}, {of['features']} features, {len(of['classes'])} classes",
        "images": f"{size} × {size}, {of['preprocessing']['mode']}",
        "score": f"{score['name']}, T = {score['temperature']:g}{clip}; larger means OOD",
        "threshold": f"{threshold['value']:.4g} ({threshold['low']:.4g} to {threshold['high']:.4g})"
        f" accepts {threshold['accept']:g} % of {threshold['samples']} ID validation images",
        "pruned": f"{mask['pruned']:.1f} % of the head: of the weights the lowest "
        f"{mask['weights_low']:g} % and the highest {mask['weights_high']:g} %, of the neurons "
        f"{mask['neurons_low']:g} % and {mask['neurons_high']:g} % ({mask['neuron_sensitivity']})",
        "proxies": f"mean FPR95 {found['fpr95']:.1f} %, unpruned {found['unpruned']['fpr95']:.1f} %"
        f"; best of {found['candidates']} masks within noise",
        "accuracy": f"{found['accuracy']:.1f} %, unpruned {found['unpruned']['accuracy']:.1f} % "
        f"(labels: {made['validation']['labels']})",
        "made": f"{made['at']} by {made['by']} from {mask['training_images']} training images "
        f"({made['train']['source']}) and {made['validation']['images']} validation images "
        f"({made['validation']['source']})",
        "versions": ", ".join(f"{name} {which}" for name, which in made["versions"].items()),
        "digest": of["digest"],
    }
    width = max(map(len, lines))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines.items())


def show_evaluation(of: dict[str, Any]) -> None:
    """Print an evaluation as a table."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table as RichTable

    table = RichTable(box=SIMPLE_HEAD)
    heads = ("in %", "flagged", "FPR95", "AUROC", "AUPR-in", "energy FPR95", "energy AUROC")
    for head in heads:
        table.add_column(head, justify="left" if head == heads[0] else "right")
    for name, each in (*of["ood"].items(), ("mean", of["mean"])):
        figures = [each["flagged"], *(each[metric] for metric in ("fpr95", "auroc", "aupr_in"))]
        figures += [each["energy"][metric] for metric in ("fpr95", "auroc")]
        table.add_row(name, *(f"{figure:.1f}" for figure in figures))
    inside = of["id"]
    line = f"ID: {inside['images']} images, {inside['flagged']:.1f} % flagged OOD"
    if inside["accuracy"] is not None:
        line += f", accuracy {inside['accuracy']:.1f} %"
        line += f" (unpruned {inside['accuracy_unpruned']:.1f} %)"
    Console().print(table)
    print(line)


@dataclass(frozen=True)
class Row:
    """The detectors on one backbone and ID data set: each one's value for each seed that has it."""

    backbone: str
    data: str
    seeds: list[int]
    values: dict[str, list[float]]

    def mean(self, detector: str) -> float | None:
        values = self.values.get(detector)
        return fmean(values) if values else None

    def text(self, detector: str) -> str:
        """The mean; of how many seeds, where some lack it."""
        mean, count = self.mean(detector), len(self.values.get(detector, ()))
        if mean is None:
            return "–"
        return f"{mean:.1f}" + f" ({count} of {len(self.seeds)})" * (count < len(self.seeds))


@dataclass(frozen=True)
class Table:
    """One metric of detectors, the best first, over rows."""

    metric: str
    on: str
    detectors: list[str]
    rows: list[Row]

    def means(self) -> dict[str, float | None]:
        """Of each detector over all rows; none where a row lacks it, which would not be fair."""
        found: dict[str, float | None] = {}
        for name in self.detectors:
            known = [value for row in self.rows if (value := row.mean(name)) is not None]
            found[name] = fmean(known) if len(known) == len(self.rows) else None
        return found

    @property
    def title(self) -> str:
        from opnp.tables import lower_is_better

        unit = "" if self.metric == "rank" else " in %"
        better = "lower" if lower_is_better(self.metric) else "higher"
        return f"{self.metric}{unit} on {self.on}, {better} is better"

    def lines(self) -> list[tuple[list[str], list[str], list[bool]]]:
        """Heads, cells and which cells are best, of each row and of the mean over rows."""
        lines = []
        for row in self.rows:
            shown = [row.text(name) for name in self.detectors]
            heads = [row.backbone, short(row.data), str(len(row.seeds))]
            lines.append((heads, shown, self.best([row.mean(name) for name in self.detectors])))
        means = list(self.means().values())
        shown = ["–" if mean is None else f"{mean:.1f}" for mean in means]
        return [*lines, (["mean", "", ""], shown, self.best(means))]

    def best(self, values: Sequence[float | None]) -> list[bool]:
        """Which are the best as they are shown: equal digits are equally good."""
        from opnp.tables import lower_is_better

        known = [round(value, 1) for value in values if value is not None]
        first = (min if lower_is_better(self.metric) else max)(known, default=None)
        return [value is not None and round(value, 1) == first for value in values]


def tabulate(
    runs: "list[DetectorRun]",
    metric: str,
    on: str,
    detectors: list[str] | None,
    data: str | None,
) -> Table:
    """Put runs, latest first, into a table.

    Raises:
        InputError: a metric, column, detector or data set is not in any of the runs.
    """
    from opnp.tables import lower_is_better

    keys = {key.rpartition("/") for run in runs for key in run.metrics}
    known = {column for column, _, what in keys if what == "fpr95"}
    require("metric", metric, {what for column, _, what in keys if column in known})
    require("OOD set", on, {column for column, _, what in keys if what == metric})
    if data is not None:
        require("ID data", data, {name for run in runs for name in (run.data, short(run.data))})
        runs = [run for run in runs if data in (run.data, short(run.data))]
    for name in detectors or ():
        require("detector", name, {run.detector for run in runs})
    latest: dict[tuple[str, str, int], str] = {}
    for run in runs:
        latest.setdefault((run.backbone, run.data, run.seed), run.run)
    rows: dict[tuple[str, str], Row] = {}
    for backbone, of, seed in sorted(latest):
        row = rows.setdefault((backbone, of), Row(backbone, of, [], {}))
        row.seeds.append(seed)
    key = f"{on}/{metric}"
    for run in runs:
        newest = latest[run.backbone, run.data, run.seed] == run.run
        if newest and key in run.metrics and run.detector in (detectors or [run.detector]):
            values = rows[run.backbone, run.data].values
            values.setdefault(run.detector, []).append(run.metrics[key])
    filled = [row for row in rows.values() if row.values]
    if not filled:
        raise InputError(f"No run has {metric} on {on} of these detectors: leave one choice out.")
    named = detectors or sorted({name for row in filled for name in row.values})
    if detectors is None:
        sign, means = 1 if lower_is_better(metric) else -1, Table(metric, on, named, filled).means()
        named.sort(key=lambda name: (means[name] is None, sign * (means[name] or 0)))
    return Table(metric, on, named, filled)


def require(what: str, name: str, known: set[str]) -> None:
    if name not in known:
        near = get_close_matches(name, known, 3, cutoff=0.5) or sorted(known)
        raise InputError(f"No run has the {what} {name!r}; did you mean {', '.join(near)}?")


def short(data: str) -> str:
    """The name of ID data that may be a path or `torchvision:NAME`."""
    return Path(data).name.removeprefix("torchvision:")


def as_values(table: Table) -> dict[str, Any]:
    return {
        "metric": table.metric,
        "on": table.on,
        "rows": [
            {
                "backbone": row.backbone,
                "data": row.data,
                "seeds": row.seeds,
                "values": {name: row.mean(name) for name in table.detectors},
            }
            for row in table.rows
        ],
        "mean": table.means(),
    }


def as_markdown(table: Table) -> str:
    def line(cells: Iterable[str]) -> str:
        return f"| {' | '.join(cells)} |"

    rows = [line(["backbone", "data", "seeds", *table.detectors])]
    rows.append(line(["---", "---"] + ["--:"] * (1 + len(table.detectors))))
    for heads, cells, best in table.lines():
        pairs = zip(cells, best, strict=True)
        rows.append(line([*heads, *(f"**{cell}**" if first else cell for cell, first in pairs)]))
    return "\n".join([f"{table.title}.", "", *rows])


def show_table(table: Table) -> None:
    """Print the table, in as many parts as the terminal's width asks for."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    lines, heads = table.lines(), ("backbone", "data", "seeds")
    border = 3  # of each cell: a space on both sides, and the line
    widths = [
        border + max(len(name), *(len(cells[place]) for _, cells, _ in lines))
        for place, name in enumerate(table.detectors)
    ]
    fixed = 1 + sum(
        border + max(len(head), *(len(names[place]) for names, _, _ in lines))
        for place, head in enumerate(heads)
    )
    # A terminal too narrow for a single detector wraps the lines, which loses nothing.
    console = Console(width=max(Console().width, fixed + max(widths)))
    room = console.width - fixed
    print(table.title)
    start = 0
    while start < len(widths):
        stop = start + 1
        while stop < len(widths) and sum(widths[start : stop + 1]) <= room:
            stop += 1
        part = RichTable(box=SIMPLE_HEAD)
        for head in heads:
            part.add_column(head, no_wrap=True, justify="right" if head == "seeds" else "left")
        for name in table.detectors[start:stop]:
            part.add_column(Text(name), no_wrap=True, justify="right")
        for names, cells, best in lines:
            if names[0] == "mean":
                part.add_section()
            pairs = zip(cells[start:stop], best[start:stop], strict=True)
            part.add_row(*names, *(Text(cell, "bold" if first else "") for cell, first in pairs))
        console.print(part)
        start = stop
