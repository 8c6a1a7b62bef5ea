"""RAY_ADDRESS without a Ray cluster is one line at once, instead of minutes of retries."""

import socket
from collections.abc import Iterator

import pytest

from pipeline.data.ingest.ray_ingest import join_ray, require_ray_address
from pipeline.errors import UserError
from pipeline.evaluation.ray_workers import map_on_ray


@pytest.fixture
def closed_address(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """RAY_ADDRESS with a port of this machine at which nothing listens: it stays bound, so nobody else can."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{bound.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", address)
        monkeypatch.setattr("ray.is_initialized", lambda: False)
        yield address


def test_joining_a_cluster_that_does_not_answer_is_refused(closed_address: str) -> None:
    with pytest.raises(UserError, match=rf"RAY_ADDRESS={closed_address}: no Ray cluster answers .*unset"):
        join_ray()


def test_evaluation_on_a_cluster_that_does_not_answer_is_refused(closed_address: str) -> None:
    with pytest.raises(UserError, match=rf"RAY_ADDRESS={closed_address}: no Ray cluster answers"):
        list(map_on_ray(len, ["item"], 1))


@pytest.mark.parametrize("address", ["", "auto", "local"])
def test_other_addresses_are_left_to_ray(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    require_ray_address()
