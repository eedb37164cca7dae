"""The features stage: images are decoded ahead, in any number of threads, without a difference."""

import shutil
import threading
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from torch import Tensor

from opnp.errors import InputError
from opnp.pipeline import parameters, stages
from opnp.pipeline.parameters import Parameters
from opnp.pipeline.results import Run
from opnp.pipeline.stages.features import ahead
from tests.conftest import HERE

TEST = Path("artifacts/features/test")


@pytest.mark.parametrize("threads", [1, 3])
def test_images_are_prepared_ahead_in_order_and_no_further_than_asked(threads: int) -> None:
    begun: list[int] = []
    enough = threading.Event()

    def images(rows: range) -> Tensor:
        begun.append(rows.start)
        if len(begun) > threads:
            enough.set()
        return torch.tensor(rows)

    batches = ahead(images, [range(at, at + 2) for at in range(0, 20, 2)], threads)
    assert next(batches).tolist() == [0, 1]
    assert enough.wait(30)  # the next ones were begun while this one is used
    assert len(begun) == threads + 1
    assert torch.cat(list(batches)).tolist() == list(range(2, 20))


def test_an_image_that_cannot_be_prepared_ends_it() -> None:
    def images(rows: range) -> Tensor:
        if rows.start == 4:
            raise InputError("Image 4 is damaged.")
        return torch.tensor(rows)

    batches = ahead(images, [range(at, at + 2) for at in range(0, 20, 2)], 2)
    assert [next(batches).tolist(), next(batches).tolist()] == [[0, 1], [2, 3]]
    with pytest.raises(InputError, match="Image 4"):
        next(batches)


def chosen(section: str, **values: Any) -> Parameters:
    found = parameters.load()
    changed = getattr(found, section).model_copy(update=values)
    return found.model_copy(update={section: changed})


def encoded_anew(settings: Parameters) -> Tensor:
    """The features of the test images, computed anew."""
    shutil.rmtree(TEST)
    for shard in stages.features.plan(HERE, settings):
        if shard.split == "test":
            assert stages.features.compute(HERE, settings, shard)
    features, _ = Run(HERE, settings).features("test")
    return features


def contents() -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in TEST.glob("*.arrow")}


def test_any_number_of_decoders_gives_the_same_shards(workspace: Path) -> None:
    settings = chosen("features", batch_size=64)
    made = []
    for decoders in (1, 3):
        engine = settings.engine.model_copy(update={"decoders": decoders})
        encoded_anew(settings.model_copy(update={"engine": engine}))
        made.append(contents())
    assert made[0] == made[1]
    assert len(made[0]) > 1


def test_bfloat16_is_close_and_shards_of_another_precision_are_not_taken(workspace: Path) -> None:
    exact = encoded_anew(parameters.load())
    settings = chosen("features", precision="bfloat16")
    rounded = encoded_anew(settings)
    assert not torch.equal(exact, rounded)
    torch.testing.assert_close(rounded, exact, rtol=0, atol=0.03 * float(exact.abs().max()))
    with pytest.raises(InputError, match="made with another precision"):
        Run(HERE, parameters.load()).features("test")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="compiling for the CPU needs a compiler")
def test_a_compiled_backbone_gives_the_same_features(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Processes that compile take longer to start than these few kernels take to compile.
    monkeypatch.setattr("torch._inductor.config.compile_threads", 1)
    exact = encoded_anew(parameters.load())
    settings = chosen("features", compile=True)
    torch.testing.assert_close(encoded_anew(settings), exact, rtol=1e-4, atol=1e-5)
    metadata = [pa.ipc.open_file(path).schema.metadata for path in TEST.glob("*.arrow")]
    assert {each[b"compiled"] for each in metadata} == {b"True"}
