"""The parameters of a run: what is read, what is refused and in which words, what is written in."""

import json
import re
from pathlib import Path
from textwrap import wrap
from typing import Any

import pytest
from pydantic.fields import FieldInfo

from opnp.errors import InputError
from opnp.pipeline import parameters
from opnp.pipeline.parameters import Parameters
from opnp.runtime.settings import Settings

ROOT = Path(__file__).parents[2]
PRESETS = sorted((ROOT / "presets").glob("*.yaml"))


@pytest.fixture(autouse=True)
def _workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def changed(key: str, value: Any) -> Path:
    """The default parameters with one key set to another value."""
    values = parameters.load(ROOT / "params.yaml").model_dump()
    *sections, last = key.split(".")
    section = values
    for name in sections:
        section = section[name]
    section[last] = value
    path = Path("changed.yaml")
    path.write_text(json.dumps(values))  # JSON is YAML
    return path


def test_a_changed_parameter_is_read() -> None:
    assert parameters.load(changed("energy.temperature", 2)).energy.temperature == 2


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("train.epoch", 3, "no parameter `train.epoch`; did you mean `train.epochs`"),
        ("search.weight_high", [1], "did you mean `search.weights_high`"),
        ("sead", 0, "no parameter `sead`; did you mean `seed`"),
        ("train.epochs", "many", "`train.epochs`.*'many'"),
        ("train.epochs", 2.5, "`train.epochs`.*2.5"),
        ("train.epochs", True, "`train.epochs`.*True"),
        ("train.epochs", 0, "`train.epochs`.*0"),
        ("train.learning_rate", "0.1", "`train.learning_rate`.*'0.1'"),
        ("data", None, "`data`"),
        ("seed", -1, "`seed`.*-1"),
        ("energy.temperature", 0, "`energy.temperature`.*0"),
        ("features.dtype", "bfloat16", "`features.dtype`.*'bfloat16'"),
        ("search.weights_low", [0, 100], "`search.weights_low.1`.*100"),
        ("search.neurons_high", [-1], "`search.neurons_high.0`.*-1"),
        ("search.neurons_high", [0, 80], "`search.neurons_low` 30 and `search.neurons_high` 80"),
        ("search.weights_high", [], "`search.weights_high`: value should have at least 1 item"),
        ("search.weights_high", [float("nan")], "`search.weights_high.0`"),
        ("search.neuron_sensitivity", ["median"], "`search.neuron_sensitivity.0`.*'median'"),
        ("search.proxies", [], "at least one proxy in `search.proxies`, or a set in `search.outl"),
        ("search.proxies", ["jigsaw-4", "phases"], "no proxy 'phases'; did you mean phase"),
        ("search.clip", [], "`search.clip`: value should have at least 1 item"),
        ("search.clip", [90, None], "`search.clip` must begin with no clipping"),
        ("search.clip", [90], "`search.clip` must begin with no clipping"),
        ("search.clip", [None, 90, 90.0], "`search.clip` holds a value twice"),
        ("search.clip", [None, None], "`search.clip` holds a value twice"),
        ("search.clip", [None, 100], "`search.clip.1.*100"),
        ("search.clip", [None, 0], "`search.clip.1.*0"),
        ("search.clip", [None, "90"], "`search.clip.1.*'90'"),
        ("search.temperature", [], "`search.temperature`"),
        ("search.temperature", [0], "`search.temperature.0`.*0"),
        ("search.temperature", [1, 2, 1.0], "`search.temperature` holds a value twice"),
        ("search.bootstrap", 1, "`search.bootstrap`.*1"),
        ("search.outliers", {"phase": "digits"}, "`search.outliers`: phase is a proxy's name"),
        ("search.outliers", {"more": "noise"}, "`search.outliers`: more is noise, which is a test"),
        ("search.outliers", {"more": "held-out"}, "`search.outliers`: more cannot be held-out"),
        ("search.outliers", {"More": "digits"}, "`search.outliers.More"),
        ("train.backbone", "vgg", "`train.backbone`.*'vgg'"),
        ("train.optimizer", "adam", "`train.optimizer`.*'adam'"),
        ("train.precision", "float16", "`train.precision`.*'float16'"),
        ("train.spcp", 0, "`train.spcp`.*0"),
        ("train.spcp", 100, "`train.spcp`.*100"),
        ("evaluate.budget", 0, "`evaluate.budget`.*0"),
        ("engine.runner", "ray", "`engine.runner`.*'ray'"),
        ("engine.workers", 0, "`engine.workers`.*0"),
        ("engine.scheduler", "tcp://a:1", "`engine.scheduler` is an address of Dask, and "),
        ("engine.storage", "/mnt/shards", "`engine.storage` must be a URL .*'/mnt/shards'"),
        ("engine.storage", "s3://me:secret@a/b", "`engine.storage` must not hold a password"),
        (
            "engine",
            {"runner": "dask", "scheduler": "host"},
            "`engine.scheduler` must be an address such as tcp://HOST:8786, not 'host'",
        ),
        (
            "engine",
            {"runner": "dask", "scheduler": "tcp://a:1", "workers": 2},
            "`engine.workers` is for a cluster on this machine",
        ),
        ("evaluate.tuning_samples", 0, "`evaluate.tuning_samples`.*0"),
        ("evaluate.training_images", 0, "`evaluate.training_images`.*0"),
        ("evaluate.detectors", [], "`evaluate.detectors`"),
        ("evaluate.detectors", ["knn", "knn"], "`evaluate.detectors`: it holds a name twice"),
        ("evaluate.detectors", ["mahalanobiss"], "'mahalanobiss'; did you mean mahalanobis"),
        ("evaluate.detectors", ["opnp+opnp"], r"no detector 'opnp\+opnp'"),
        ("evaluate.detectors", ["opnp+opp"], r"no detector 'opnp\+opp'"),
        ("evaluate.detectors", ["opnp+reakt"], r"no detector 'opnp\+reakt'; did you mean react"),
        ("search.proxies", ["phase", "jigsaw-3"], "'jigsaw-3'; did you mean jigsaw-"),
        ("data.held_out", [], "held-out needs classes in `data.held_out`"),
        ("data.near", {"letters": "letters"}, "letters is in both `data.near` and `data.far`"),
        ("data.near", {"mean": "letters"}, "mean is a reserved name"),
        ("data.near", {"near": "letters"}, "near is a reserved name"),
        ("data.far", {"far": "letters"}, "far is a reserved name"),
        ("data.far", {"test": "letters"}, "test is a reserved name"),
        ("data.near", {"Not a Name": "letters"}, "`data.near.Not a Name"),
        ("data.validation", 70, "`data.validation` and `data.test` together leave no tr"),
        ("evaluate.detectors", ["opnp", "odin+"], r"no detector 'odin\+'; did you mean odin"),
    ],
)  # fmt: skip
def test_a_wrong_parameter_is_refused_by_file_and_key(key: str, value: Any, sentence: str) -> None:
    with pytest.raises(InputError, match=rf"^changed\.yaml: .*{sentence}"):
        parameters.load(changed(key, value))


def test_a_section_may_be_left_out() -> None:
    values = parameters.load(ROOT / "params.yaml").model_dump()
    assert values.pop("engine")["runner"] == "threads"
    Path("changed.yaml").write_text(json.dumps(values))
    assert parameters.load(Path("changed.yaml")) == parameters.load(ROOT / "params.yaml")


def test_real_outliers_may_stand_in_for_proxies() -> None:
    values = parameters.load(ROOT / "params.yaml").model_dump()
    values["search"].update(proxies=[], outliers={"more": "more.parquet"})
    Path("changed.yaml").write_text(json.dumps(values))
    found = parameters.load(Path("changed.yaml")).search
    assert (found.proxies, found.outliers) == ((), {"more": "more.parquet"})


def test_a_lack_of_ood_sets_is_refused() -> None:
    values = parameters.load(ROOT / "params.yaml").model_dump()
    values["data"].update(near={}, far={})
    Path("changed.yaml").write_text(json.dumps(values))
    with pytest.raises(InputError, match="at least one OOD set"):
        parameters.load(Path("changed.yaml"))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "is missing"),
        (b"", "holds no parameters"),
        (b"# nothing\n", "holds no parameters"),
        (b"- a\n- b\n", "holds no parameters"),
        (b"seed: [1", "is not valid YAML"),
        (b"a: b: c", "is not valid YAML"),
        (b"\xff\xfes", "cannot be read"),
        (b"seed: \x00", "is not valid YAML"),
        (b"1: 2", "keys should be strings"),
        (b"seed: 1\nseed: 2\n", "holds `seed` twice \\(line 2\\): keep one of them"),
        (b"data:\n  id: a\n  id: b\n", "holds `id` twice \\(line 3\\)"),
        (b"seed: " + b"[" * 20000, "is nested too deeply"),
        (b"seed: " + b"9" * 5000, "is not valid YAML"),
        (b"seed: 0x" + b"f" * 5000, "`seed`.*a number of thousands of digits"),
        (b"seed: !!bool perhaps", "is not valid YAML"),
        (b"seed: 2020-13-45", "is not valid YAML"),
        (b"seed: &a [*a]", "`seed`"),
        (b"seed: !!python/object/apply:os.getcwd []", "is not valid YAML"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_a_file_that_holds_no_parameters_is_refused_by_name(
    content: bytes | None, said: str
) -> None:
    path = Path("params.yaml")
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=f"^params.yaml.*{said}") as stop:
        parameters.load(path)
    assert "\n" not in str(stop.value)
    assert len(str(stop.value)) < 600
    assert parameters.faults(path)[0] == str(stop.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", 10**20),
        ("data.image_size", 10**20),
        ("train.epochs", 2**31),
        ("search.bootstrap", 10**20),
        ("data.held_out", [10**20]),
        ("train.learning_rate", 10**400),
        ("energy.temperature", float("inf")),
        ("search.weights_low", "0"),
        ("search.weights_low", {"a": 1}),
        ("search.weights_low", [[0]]),
        ("data.near", ["letters"]),
        ("train.checkpoint", 5),
        ("features.compile", "yes"),
        ("search", [1, 2]),
        ("data.id", list(range(10000))),
    ],
)
def test_a_value_of_another_kind_takes_one_short_sentence(key: str, value: Any) -> None:
    with pytest.raises(InputError, match=rf"^changed\.yaml: `{key}") as stop:
        parameters.load(changed(key, value))
    assert "\n" not in str(stop.value)
    assert len(str(stop.value)) < 250


def test_all_faults_of_a_file_are_listed_and_load_tells_the_first() -> None:
    path = Path("params.yaml")
    path.write_text(
        "data: {id: digits, image_size: 0, near: {a: letters}}\n"
        "train: {epoch: 3, width: wide}\n"
        "search: {weights_low: [0, 100, -1]}\n"
        "sede: 1\n"
    )
    found = parameters.faults(path)
    for each, told in zip(
        found,
        (
            "`data.image_size`: input should be greater than 0 (it is 0).",
            "`train.width`: input should be a valid integer (it is 'wide').",
            "there is no parameter `train.epoch`; did you mean `train.epochs` or `train.depth`?",
            "`search.weights_low.1`: input should be less than 100 (it is 100).",
            "`search.weights_low.2`: input should be greater than or equal to 0 (it is -1).",
            "there is no parameter `sede`; did you mean `seed`?",
        ),
        strict=True,
    ):
        assert each == f"params.yaml: {told}"
    with pytest.raises(InputError) as stop:
        parameters.load(path)
    assert str(stop.value) == found[0]
    assert parameters.faults(ROOT / "params.yaml") == []
    assert parameters.faults(Path("absent.yaml"))[0].startswith("absent.yaml is missing")


# Defaults


# What the default run states of its own: the digits are few, come undivided, and have no OOD sets.
DIGITS = {
    "data.id",
    "data.image_size",
    "data.held_out",
    "data.test",
    "data.near",
    "data.far",
    "data.ood_count",
}


def fields(chosen: Parameters) -> dict[str, tuple[FieldInfo, Any]]:
    """Every parameter by its name, as the code defines it and as it is chosen."""
    found = {}
    for name, field in Parameters.model_fields.items():
        section = getattr(chosen, name)
        if isinstance(section, Settings):
            for key, each in type(section).model_fields.items():
                found[f"{name}.{key}"] = (each, getattr(section, key))
        else:
            found[name] = (field, section)
    return found


def test_the_parameters_that_ship_are_the_defaults() -> None:
    for name, (field, value) in fields(parameters.load(ROOT / "params.yaml")).items():
        if name in DIGITS:
            assert field.is_required() or value != field.get_default(), name
        else:
            assert value == field.get_default(), name


def test_the_parameters_that_ship_are_complete() -> None:
    path = Path("params.yaml")
    path.write_bytes((ROOT / "params.yaml").read_bytes())
    assert parameters.complete(path) == []


def test_their_comments_are_the_descriptions_of_the_fields() -> None:
    text = (ROOT / "params.yaml").read_text()
    for name, (field, _) in fields(parameters.load(ROOT / "params.yaml")).items():
        indent = "  " * name.count(".")
        lines = [f"{indent}# {line}" for line in wrap(field.description or "", 98 - len(indent))]
        key = f"{indent}{name.rpartition('.')[2]}:"
        assert "\n".join([*lines, key]) in text, f"correct the comment above {name}"
    for name in ("data", "train", "features", "energy", "search", "evaluate", "engine", "retrain"):
        told = parameters.introduction(type(getattr(parameters.load(ROOT / "params.yaml"), name)))
        assert f"# {told}\n{name}:" in text, f"correct the comment above {name}"


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_a_preset_holds_only_what_differs(path: Path) -> None:
    chosen = parameters.load(path)
    for section in chosen.model_fields_set:
        value = getattr(chosen, section)
        assert isinstance(value, Settings), section
        for key in value.model_fields_set:
            field = type(value).model_fields[key]
            given = getattr(value, key)
            assert field.is_required() or given != field.get_default(), f"{section}.{key}"


def test_there_are_eight_presets() -> None:
    assert len(PRESETS) == 8


# What a file leaves out


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_what_a_preset_leaves_out_is_written_in(path: Path) -> None:
    written = Path("params.yaml")
    written.write_bytes(path.read_bytes())
    before = parameters.load(path)
    added = parameters.complete(written)
    assert "seed" in added
    assert "search.weights_low" in added
    assert parameters.load(written) == before
    text = written.read_text()
    kept = [line for line in path.read_text().splitlines() if line]
    assert [line for line in text.splitlines() if line in kept] != []
    for line in kept:
        assert line in text.splitlines(), line
    assert all(len(line) <= 100 for line in text.splitlines())
    assert parameters.complete(written) == []
    assert written.read_text() == text
    found = parameters.load(written)
    assert found.model_fields_set == set(Parameters.model_fields)
    assert found.search.model_fields_set == set(type(found.search).model_fields)


def test_values_are_written_beside_those_that_are_there() -> None:
    path = Path("params.yaml")
    path.write_text(
        "data:   # mine\n"
        "    # the images\n"
        "    id: digits\n"
        "    image_size: 8\n"
        "    held_out: [7]\n"
        "    near: {a: held-out}\n"
        "search:\n"
        "\n"
        "  clip: [null]  # no clip\n"
        "seed: 3"
    )
    added = parameters.complete(path)
    assert "seed" not in added
    assert "search.clip" not in added
    text = path.read_text()
    assert "    # the images\n    id: digits\n" in text
    assert "    mode: L\n" in text
    assert "  clip: [null]  # no clip\n" in text
    assert parameters.load(path).search.clip == (None,)
    assert parameters.load(path).seed == 3


def test_a_file_that_cannot_be_completed_stays_as_it_is() -> None:
    path = Path("params.yaml")
    text = "data: {id: digits, image_size: 8, near: {a: letters}}\n"
    path.write_text(text)
    with pytest.raises(InputError, match=r"leaves out seed: write each section over several lines"):
        parameters.complete(path)
    assert path.read_text() == text
    path.write_text(text.replace("8", "-8"))
    with pytest.raises(InputError, match=r"data\.image_size"):
        parameters.complete(path)


def test_values_are_written_as_yaml_reads_them() -> None:
    values: list[Any] = [
        None,
        True,
        5,
        0.25,
        3.0,
        "digits",
        "L",
        "no",
        "a: b",
        [None, 80.0],
        [],
        {},
    ]
    for value in values:
        line = parameters.entry("key", value, "About it.")
        assert parameters.values_of(Path("x"), line) == {"key": value}, line
    assert re.fullmatch(
        r"# About it\.\nkey: \[null, 80\]\n", parameters.entry("key", [None, 80.0], "About it.")
    )
