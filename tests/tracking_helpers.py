"""Shared by the tests of tracking: records, runs, small generators, and a real MLflow server."""

import functools
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import torch
from mlflow import MlflowClient

from pipeline.model import RRDBNet, save_generator
from pipeline.run_folder import CandidateDescription
from pipeline.storage import Storage
from pipeline.tracking.candidate import Candidate, trained_generator
from pipeline.tracking.config import TrackingConfig
from pipeline.tracking.connection import connect
from pipeline.tracking.registry import RegisteredVersion, register_candidate
from pipeline.tracking.run import TrackedRun, open_run
from pipeline.tracking.spool import Event, ImageRecord, Metrics, Record, write_segment

DATA = "0123456789abcdef" * 4


@functools.cache
def _migrated_database() -> bytes:
    """An MLflow database with its tables and nothing else. Creating it takes seconds: pytest's cache keeps it."""
    folder = Path(__file__).parent.parent / ".pytest_cache"
    kept = folder / f"mlflow-{mlflow.__version__}.db"
    if not kept.exists():
        folder.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            connect(f"sqlite:///{temporary}/mlflow.db")
            (Path(temporary) / "mlflow.db").replace(kept)
    return kept.read_bytes()


def new_database(folder: Path, name: str = "mlflow.db") -> str:
    """Writes an MLflow database into the folder; returns its URI. Creating its tables would take seconds."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(_migrated_database())
    return f"sqlite:///{folder / name}"


def shorten(limits: dict[str, int], patch: pytest.MonkeyPatch, at_most_s: int) -> None:
    """Checks that requests with these limits end within `at_most_s`, and lowers the timeout to 1 s."""
    assert limits["timeout_s"] * (1 + limits["retries"]) <= at_most_s
    patch.setitem(limits, "timeout_s", 1)


def records_between(after: int, last: int) -> list[Record]:
    """Records of the steps in (after, last]: two curves, and an image at the end."""
    points: list[Record] = [
        Metrics(
            step, 1_700_000_000_000 + step, {"loss/pixel": 1 / step, "train/steps_per_s": 10.0 + step % 3}
        )
        for step in range(after + 1, last + 1)
    ]
    image = np.full((8, 12, 3), last % 256, np.uint8)
    return [*points, ImageRecord(last, 1_700_000_000_000 + last, "validation/astronaut", image)]


def write_segments(run: Storage, last: int, every: int = 10) -> None:
    """Segments at every, 2 * every, ... up to `last`."""
    for step in range(every, last + 1, every):
        write_segment(run, step, records_between(step - every, step))


def open_small(config: TrackingConfig, run: Storage, key: str, **changes: Any) -> TrackedRun:
    """An open run with one parameter."""
    defaults: dict[str, Any] = {
        "run_name": key,
        "parameters": {"gan.steps": 5},
        "tags": {"esrgan.key": key, "esrgan.data": DATA},
        "config_text": "gan: {steps: 5}\n",
    }
    tracked = open_run(config, run, **{**defaults, **changes})
    assert tracked is not None
    return tracked


def client_of(tracked: TrackedRun) -> MlflowClient:
    """MLflow's client for the run's tracking server."""
    return MlflowClient(tracked.uri, tracked.uri)


def curve(tracked: TrackedRun, key: str) -> list[tuple[int, int, float]]:
    """All points of a metric, as (step, time, value)."""
    history = client_of(tracked).get_metric_history(tracked.run_id, key)
    return sorted((point.step, point.timestamp, point.value) for point in history)


def files_in(tracked: TrackedRun, folder: str) -> list[str]:
    """Names of the run's artifacts in `folder`."""
    return sorted(Path(info.path).name for info in client_of(tracked).list_artifacts(tracked.run_id, folder))


def events_of(tracked: TrackedRun) -> list[str]:
    """The lines of the run's events."""
    if "events.txt" not in files_in(tracked, ""):
        return []
    path = client_of(tracked).download_artifacts(tracked.run_id, "events.txt")
    return Path(path).read_text().splitlines()


def everything(tracked: TrackedRun) -> dict[str, Any]:
    """Everything that MLflow's page shows: curves, names of images, events."""
    keys = client_of(tracked).get_run(tracked.run_id).data.metrics
    return {
        "curves": {key: curve(tracked, key) for key in sorted(keys)},
        "images": files_in(tracked, "images"),
        "events": events_of(tracked),
    }


def small_generator(path: Path, seed: int) -> RRDBNet:
    """A small generator with visible output, saved as .safetensors."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        generator = RRDBNet(num_feat=8, num_block=2, num_grow_ch=4)
        with torch.no_grad():
            generator.conv_last.bias.fill_(0.4)
            generator.conv_last.weight.mul_(4)
    save_generator(generator, path)
    return generator


def candidate(
    tracked: TrackedRun, weights: Path, step: int, metrics: dict[str, float], **changes: Any
) -> Candidate:
    """A generator's file to be registered; it is copied into the run's folder."""
    run, file = Storage(tracked.folder), f"generator-{step}.safetensors"
    run.write_bytes(file, weights.read_bytes())
    defaults: dict[str, Any] = {
        "model_name": "esrgan-x4", "metric": "psnr_y", "earlier": [], "evaluation_set": DATA,
        "config_text": "a: 1\n", "data_sha256": DATA,
    }  # fmt: skip
    trained = trained_generator(run, file, step, metrics)
    return Candidate(CandidateDescription(generator=trained, **{**defaults, **changes}))


def register(
    tracked: TrackedRun, weights: Path, step: int, metrics: dict[str, float], **changes: Any
) -> RegisteredVersion:
    """Registers a generator's file."""
    return register_candidate(tracked, candidate(tracked, weights, step, metrics, **changes))


def champion_version(name: str, uri: str) -> int | None:
    """Number of the champion; None without one."""
    version = MlflowClient(uri, uri).get_registered_model(name).aliases.get("champion")
    return None if version is None else int(version)


def event(step: int, text: str) -> Event:
    """An event at a time that is derived from its step."""
    return Event(step, 1_700_000_000_000 + step, text)


def wait_until(condition: Callable[[], bool]) -> None:
    """Waits for a condition; fails after 300 s."""
    ends = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.05)


def free_port() -> int:
    """A port on which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """A real `mlflow server` in its own process group; the port stays the same over restarts."""

    def __init__(
        self,
        folder: Path,
        *options: str,
        backend: str | None = None,
        environment: dict[str, str] | None = None,
    ):
        self.folder = folder
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self._log = folder / "server.log"
        backend = backend or new_database(folder, "server.db")
        artifacts = options or ("--artifacts-destination", str(folder / "server-artifacts"))
        self._command = [
            sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port),
            "--workers", "1", "--backend-store-uri", backend, *artifacts,
        ]  # fmt: skip
        self._environment = {
            **os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true",
            **(environment or {}),
        }  # fmt: skip
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts the server and waits until it answers."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command, stdout=log, stderr=log, env=self._environment, start_new_session=True
            )
        wait_until(self._answers)

    def kill(self) -> None:
        """Kills the server and its workers."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    @property
    def alive(self) -> bool:
        """Whether the server was started and not killed."""
        return self._process is not None

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, self._log.read_text()[-2000:]
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=2) as response:
                return response.status == 200
        except OSError:
            return False
