"""What several test modules share: reference numbers and one Ray for the whole run."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

# One thread per process: the tests run several processes on few cores, and small sums stay in one order.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def reference() -> dict[str, np.ndarray]:
    """Numbers computed with the field's reference implementation; tests/golden/README.md explains them."""
    with np.load(Path(__file__).parent / "golden" / "reference.npz", allow_pickle=False) as file:
        return dict(file)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[str]:
    """A private Ray with two CPUs; gives its address. It neither sees nor disturbs another Ray on the machine."""
    import ray

    # Ray's sockets need a short path. Ray Train asks the dashboard whether a controller is gone; see ray_trainer.
    folder = tempfile.mkdtemp(prefix="er", dir="/tmp")
    previous = os.environ.pop("RAY_ADDRESS", None)
    os.environ["RAY_AUTH_MODE"] = "disabled"
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
