"""The pages keep their word: every command on them runs, in their order."""

import json
import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image

from opnp.cli import app
from opnp.data import images
from tests.conftest import run_program

DOCS = Path(__file__).parents[1] / "docs"


def commands(page: str) -> list[list[str]]:
    """The words of every command in a page's console blocks."""
    blocks = re.findall(r"```console\n(.*?)```", (DOCS / page).read_text(), re.S)
    lines = [line for block in blocks for line in block.splitlines()]
    assert all(line.startswith("$ ") for line in lines)
    return [shlex.split(line.removeprefix("$ "), comments=True) for line in lines]


def python(page: str) -> list[str]:
    """Its Python blocks."""
    return re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.S)


def opnp(words: list[str], patch: pytest.MonkeyPatch) -> int | str:
    """Run the program in this process: its exit code, or the sentence it ends with."""
    patch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as stop:
        app.main()
    return stop.value.code or 0


def test_detector(
    own: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(own, tmp_path, dirs_exist_ok=True)
    for place, path in enumerate(images.find(tmp_path / "images" / "validation").paths):
        if place % 4:  # so that the search takes a second
            path.unlink()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    found = commands("detector.md")
    assert [words[1] for words in found] == ["fit", "show", "score", "evaluate", "export", "export"]
    for words in found:
        assert words[0] == "opnp"
        assert opnp(words, monkeypatch) == 0, words
        printed = capsys.readouterr().out
        assert printed, words
        if words[1] == "fit":
            assert "of 1920 masks" in printed
            assert re.search(r"accepts 95 % of 79 ID validation images", printed)
    assert pq.read_table("scores.parquet").column_names == ["file", "score", "is_ood", "predicted"]
    assert json.loads(Path("evaluation.json").read_text())["ood"]["digits"]["fpr95"] < 60
    assert {path.name for path in Path().iterdir()} >= {"detector.pt2", "detector.onnx"}
    assert not Path(".detector.features").exists()

    names: dict[str, Any] = {}
    in_python, _ = python("detector.md")
    exec(in_python, names)
    assert len(names["found"]) == 2
    table = pq.read_table("scores.parquet").to_pylist()
    by_file = {row["file"]: row for row in table}
    first = by_file["images/others/7-000.png"]
    assert first["score"] == pytest.approx(float(names["found"].score[0]), abs=1e-5)
    assert first["is_ood"] == bool(names["found"].is_ood[0])

    done = run_program(
        "opnp", "show", "detector", "--trust", "network:Network", "--json", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["threshold"]["samples"] == 79


def test_the_exit_codes_it_names(
    detector_folder: Path,
    own: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(own / "images" / "test" / "six", tmp_path / "six")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    words = ["opnp", "score", "--detector", str(detector_folder), "--trust", "network:Network"]
    assert opnp([*words, "six", "--out", "scores.parquet"], monkeypatch) == 0
    capsys.readouterr()
    whole = pq.read_table("scores.parquet").to_pylist()

    broken = sorted(Path("six").iterdir())[3]
    broken.write_bytes(broken.read_bytes()[:50])
    assert opnp([*words, "six", "--out", "scores.parquet", "--json"], monkeypatch) == 3
    printed = capsys.readouterr()
    assert json.loads(printed.out)["images"] == len(whole) - 1
    assert str(broken) in printed.err
    assert "1 image could not be read" in printed.err
    rows = pq.read_table("scores.parquet").to_pylist()
    assert [row["file"] for row in rows] == [r["file"] for r in whole if r["file"] != str(broken)]

    code = opnp([*words, str(broken), "--out", "other.parquet"], monkeypatch)
    assert str(code).startswith(f"error: No image of {broken} can be read")
    assert not Path("other.parquet").exists()
    assert opnp([*words, "six"], monkeypatch) == 2
    assert opnp([*words, "six", "--out", "scores.parquet", "--device", "quantum"], monkeypatch) != 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("score", "--detector", "absent", "six", "--out", "s.parquet"), "neither a file nor"),
        (("score", "--detector", ".", ".", "--out", "s.csv"), "s.csv is not a .parquet file"),
        (("show", "."), "is not a detector"),
        (("show", "DETECTOR"), "wants to run the code of network:Network"),
        (("show", "DETECTOR", "--trust", "os:system"), "wants to run the code of network:Network"),
        (("evaluate", "--detector", ".", "--id", ".", "--ood", "x"), "--ood takes NAME=PATH"),
        (
            ("evaluate", "--detector", ".", "--id", ".", "--ood", "x=a", "--ood", "x=b"),
            "with another NAME each time",
        ),
        (("fit", "--out", "new"), "Give --model, --id-train and --id-val, or --from-run"),
        (("fit", "--out", "new", "--from-run", "--model", "resnet"), "--from-run takes no model"),
        (("fit", "--out", "DETECTOR", "--from-run"), "already holds a detector"),
        (("fit", "--out", ".", "--from-run"), "is not a detector"),
        (("fit", "--out", "new", "--from-run"), "params.yaml"),
        (
            ("fit", "--out", "new", "--model", "resnet", "--id-train", "a", "--id-val", "b"),
            "a is neither a file nor a folder",
        ),
        (
            ("fit", "--out", "n", "--model", "m", "--id-train", f"{DOCS}/report.png",
             "--id-val", f"{DOCS}/report.png"),
            "which is not divided",
        ),
        (
            ("fit", "--out", "n", "--model", "m", "--id-train", "a", "--id-val", "b",
             "--clip", "x"),
            "--clip: input should be a valid number (it is 'x')",
        ),
        (("export", "--detector", "DETECTOR", "--out", "x", "--trust", "network:Network",
          "--format", "tflite"), "no format 'tflite'"),
    ],
)  # fmt: skip
def test_mistakes_are_told_in_a_sentence(
    words: tuple[str, ...],
    said: str,
    detector_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    given = [word.replace("DETECTOR", str(detector_folder)) for word in words]
    message = str(opnp(["opnp", *given], monkeypatch))
    assert message.startswith("error: ")
    assert said in message
    assert "\n" not in message
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_fit_needs_no_orchestration(tmp_path: Path) -> None:
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "a.csv").write_text("path\na.png\n")
    code = (
        "import sys; import opnp.cli.app, opnp.deployment.detector, opnp.deployment.export;"
        "import opnp.deployment.fit, opnp.deployment.score;"
        "from opnp.data import images; images.find('.', 'a.csv');"
        "heavy = {'mlflow', 'prefect', 'dvc', 'pytorch_ood', 'torchvision', 'sklearn'};"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    done = run_program("python", "-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", ["fit", "score", "evaluate", "show", "export"])
def test_help_has_an_example(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert opnp(["opnp", command, "--help"], monkeypatch) == 0
    assert f"Example: opnp {command} " in " ".join(capsys.readouterr().out.split())
