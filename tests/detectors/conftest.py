"""A small run of the pipeline up to the mask search, on real images."""

from pathlib import Path

import pytest

from tests.conftest import ROOT, set_parameters

SMALL = {
    "data.ood_count": 60,
    "train.width": 8,
    "train.epochs": 3,
    "search.weights_low": [0],
    "search.weights_high": [0, 2],
    "search.neurons_low": [0, 20],
    "search.neurons_high": [0],
    "search.neuron_sensitivity": ["mean"],
    "search.clip": [None, 90],
    "search.temperature": [1.0],
    "search.proxies": ["blobs", "phase"],
    "search.bootstrap": 20,
    "evaluate.budget": 4,
    "evaluate.bootstrap": 20,
}


@pytest.fixture(scope="session")
def searched_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace in which everything before the evaluation is done; not to be changed."""
    from opnp.pipeline import parameters, stages
    from opnp.workspace import Workspace

    folder = tmp_path_factory.mktemp("searched")
    (folder / "params.yaml").write_bytes((ROOT / "params.yaml").read_bytes())
    set_parameters(folder, SMALL)
    workspace = Workspace(folder)
    chosen = parameters.load(workspace.parameters)
    for stage in (
        stages.fetch, stages.train, stages.features, stages.sensitivity, stages.search,
    ):  # fmt: skip
        stage.run(workspace, chosen)
    return folder
