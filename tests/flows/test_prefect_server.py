"""What all flows have in common: retries, and the run's one server."""

import httpx
import psutil
import pytest
from prefect import flow, task

from flows import prefect_server
from flows.process import hide_what_is_told, unless_bad_input
from opnp.data import sources
from opnp.errors import InputError, UnavailableError


@pytest.mark.parametrize(
    ("error", "attempts"), [(InputError, 1), (UnavailableError, 3), (OSError, 3)]
)
def test_what_may_help_is_tried_again(
    prefect_api: str, error: type[Exception], attempts: int
) -> None:
    tried = []

    @task(retries=2, retry_condition_fn=unless_bad_input)
    def fails() -> None:
        tried.append(1)
        raise error("no")

    @flow
    def once() -> None:
        fails()

    with pytest.raises(error, match="no"):
        once()
    assert len(tried) == attempts


def test_a_download_that_fails_may_be_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import MNIST

    monkeypatch.setattr(MNIST, "mirrors", ["http://127.0.0.1:9/"])
    with pytest.raises(UnavailableError, match="torchvision:MNIST could not be downloaded"):
        sources.open_id("torchvision:MNIST")


@pytest.mark.parametrize("name", ["torchvision:Nothing", "torchvision:os"])
def test_only_data_sets_of_torchvision_are_opened(name: str) -> None:
    with pytest.raises(InputError, match="torchvision has no data set"):
        sources.open_id(name)


def test_a_server_named_in_the_environment_is_used(
    prefect_api: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", prefect_api)
    before = {process.pid for process in psutil.process_iter()}
    with prefect_server.running():
        children = {process.pid for process in psutil.Process().children()}
    assert children <= before


def test_what_is_said_of_single_events_is_hidden(caplog: pytest.LogCaptureFixture) -> None:
    from prefect._internal.concurrency import logger  # which does not heed its level

    hide_what_is_told()
    try:
        logger.error("failed to process item")
        assert not caplog.messages
    finally:
        logger.filters.clear()
    logger.error("failed to process item")
    assert caplog.messages == ["failed to process item"]


def test_a_server_that_went_away_is_told_whatever_that_kept_from_being_done() -> None:
    lost = httpx.ConnectError("All connection attempts failed")
    refused = RuntimeError("Unable to acquire concurrency slots")
    assert prefect_server.gone(refused) is None
    refused.__cause__ = lost
    for error in (lost, refused):
        assert "went away and did not come back" in str(prefect_server.gone(error))
