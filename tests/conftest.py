"""Shared by all tests: the order of the tests, reference values and one Ray cluster per session."""

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

# One thread per process: the tests run several processes on few cores, and sums keep their order.
os.environ.setdefault("OMP_NUM_THREADS", "1")


# Runs write the default tracking URI there; a folder of this session, so that the user's own is neither read nor set.
os.environ["XDG_CONFIG_HOME"] = tempfile.mkdtemp(prefix="er-config-")
atexit.register(shutil.rmtree, os.environ["XDG_CONFIG_HOME"], ignore_errors=True)


@pytest.fixture(autouse=True)
def _no_store_of_another_test() -> None:
    shutil.rmtree(os.environ["XDG_CONFIG_HOME"] + "/esrgan-ray", ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Fast tests first; of the others the longest first, so that two processes end at about the same time."""

    def key(item: pytest.Item) -> tuple[bool, ...]:
        slow, ray, cluster = (
            item.get_closest_marker(mark) is not None for mark in ("slow", "ray", "cluster")
        )
        return slow or ray, not cluster, not (slow and ray)

    items.sort(key=key)


@pytest.fixture(scope="session")
def reference() -> dict[str, np.ndarray]:
    """Values computed with the reference implementations; see tests/golden/README.md."""
    with np.load(Path(__file__).parent / "golden" / "reference.npz", allow_pickle=False) as file:
        return dict(file)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[str]:
    """Address of a private Ray cluster with two CPUs, separate from any other Ray on the machine."""
    import ray

    # Ray's sockets need a short path. The dashboard: see pipeline/training/ray_cluster.py.
    folder = tempfile.mkdtemp(prefix="er", dir="/tmp")
    previous = os.environ.pop("RAY_ADDRESS", None)
    os.environ["RAY_AUTH_MODE"] = "disabled"
    # Ray Train waits this long for a worker that hangs before it kills it; by default 30 s.
    os.environ["TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S"] = "5"
    context = ray.init(
        address="local", num_cpus=2, include_dashboard=True, dashboard_port=0, _temp_dir=folder, log_to_driver=True,
        object_store_memory=256 * 2**20,
    )  # fmt: skip
    os.environ["RAY_ADDRESS"] = context.address_info["gcs_address"]
    try:
        yield context.address_info["gcs_address"]
    finally:
        ray.shutdown()
        os.environ.pop("RAY_ADDRESS", None)
        if previous is not None:
            os.environ["RAY_ADDRESS"] = previous
        shutil.rmtree(folder, ignore_errors=True)
