"""Nodes that come and go: an elastic worker group, and a sweep's trial, on a Ray of three nodes on this machine."""

import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import forked
import pytest
from ray.cluster_utils import Cluster
from tiny import command, fields, write_photos, write_sets
from tracking_helpers import wait_until
from tuning_helpers import open_queue, run_all, sweep_fields

from pipeline.storage import Storage
from pipeline.tracking.spool import published_step
from pipeline.training import checkpoint as checkpoints
from pipeline.tuning.sweep_folder import outcomes

pytestmark = [pytest.mark.cluster, pytest.mark.ray, pytest.mark.slow]

NODE = {"num_cpus": 1, "object_store_memory": 100 * 2**20}


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A head without CPUs and two nodes with one each."""
    folder = tempfile.mkdtemp(prefix="ec", dir="/tmp")  # Ray's sockets need a short path.
    head = {
        "num_cpus": 0, "include_dashboard": True, "dashboard_port": 0, "temp_dir": folder,
        "object_store_memory": 200 * 2**20,
        # A lost node is noticed after 3 s; by default 15 s.
        "_system_config": {"health_check_period_ms": 1000, "health_check_failure_threshold": 3},
    }  # fmt: skip
    cluster = Cluster(initialize_head=True, head_node_args=head, shutdown_at_exit=False)
    try:
        yield cluster
    finally:
        cluster.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


class Run:
    """train_gan.py in a separate process, whose log lines can be waited for."""

    def __init__(self, folder: Path, address: str, **changes: object) -> None:
        environment = {
            **os.environ,
            "RAY_ADDRESS": address,
            "RAY_AUTH_MODE": "disabled",
            "RAY_DEDUP_LOGS": "0",
        }
        output = folder / "output"
        os.mkfifo(output)
        program = command("train_gan", folder, fields(folder, **changes))[1:]
        self.process = forked.start(program, (str(output), str(output)), environment=environment)
        self._lines: queue.Queue[str] = queue.Queue()
        self._seen: list[str] = []
        threading.Thread(target=self._read, args=(output,), daemon=True).start()

    def _read(self, output: Path) -> None:
        with output.open() as lines:
            for line in lines:
                self._lines.put(line)

    def last_step(self) -> int:
        """Of the newest line of progress."""
        return int(
            next(line for line in reversed(self._seen) if "] step " in line).split("] step ")[1].split("/")[0]
        )

    def wait_for(self, *parts: str, timeout_s: float = 180.0) -> str:
        """The next line that has all of `parts`."""
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                line = self._lines.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                pytest.fail(f"no line with {parts}; the last: {''.join(self._seen[-15:])}")
            self._seen.append(line)
            if all(part in line for part in parts):
                return line


def test_a_run_saves_at_notice_shrinks_grows_and_saves_when_stopped(cluster: Cluster, tmp_path: Path) -> None:
    nodes = [cluster.add_node(**NODE) for _ in range(2)]
    write_photos(tmp_path / "photos", 3, 96, seed=1)
    write_photos(tmp_path / "held_out", 1, 64, seed=2)
    # No checkpoint is due by itself.
    endless = {"psnr.steps": 10**6, "checkpoint_every_steps": 10**6, "validate_every_steps": 10**6}
    run = Run(
        tmp_path, cluster.address, workers=[1, 2], **endless,
        **{"log_every_steps": 5, "tracking.uri": "none", "faults.collective_timeout_s": 20},
    )  # fmt: skip
    saved = Storage(str(tmp_path / "runs" / "tiny"))
    try:
        run.wait_for("step 20/")
        assert not checkpoints.listed(saved)
        # A node is announced to go, and goes.
        drain = [
            str(Path(sys.executable).parent / "ray"), "drain-node", "--address", cluster.address,
            "--node-id", nodes[1].node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION",
            "--reason-message", "spot", "--deadline-remaining-seconds", "60",
        ]  # fmt: skip
        subprocess.run(drain, check=True, capture_output=True, timeout=300)
        deadline = time.monotonic() + 60
        while not checkpoints.listed(saved):
            assert time.monotonic() < deadline, "the notice was not followed by a checkpoint"
            run.wait_for("step ")
        at_notice = checkpoints.listed(saved)[-1].step
        cluster.remove_node(nodes[1], allow_graceful=False)
        line = run.wait_for("resuming at step", "1 worker) after a fault (")
        assert int(line.split("resuming at step ")[1].split()[0]) >= at_notice
        # Another node joins: no step is lost, although no checkpoint was due.
        cluster.add_node(**NODE)
        line = run.wait_for("resuming at step", "2 workers) in place of 1")
        assert int(line.split("resuming at step ")[1].split()[0]) == run.last_step() > at_notice
        run.wait_for("] step ")
        run.process.terminate()
        run.wait_for("SIGTERM: saving")
        run.process.join(300)
        assert run.process.exitcode == 128 + signal.SIGTERM
        assert checkpoints.listed(saved)[-1].step > at_notice
        assert json.loads(saved.read_bytes("run.json"))["fields"]["batch_size"] == 4
    finally:
        run.process.kill()
        run.process.join()


def test_a_trial_whose_node_is_lost_ends_on_another_one_with_the_same_value(
    cluster: Cluster, tmp_path: Path
) -> None:
    first = cluster.add_node(**NODE)
    write_sets(tmp_path)
    changes = {
        "checkpoint_every_steps": 2,
        "validate_every_steps": 1000,
        "gan.steps": 300,
        "tune.trials": 1,
    }
    undisturbed = open_queue(tmp_path, **{"tune.name": "undisturbed", **changes})
    run_all(undisturbed)
    (expected,) = undisturbed.outcomes.values()
    sweep = Storage(str(tmp_path / "runs" / "sweep"))
    environment = {**os.environ, "RAY_ADDRESS": cluster.address, "RAY_AUTH_MODE": "disabled"}
    with subprocess.Popen(
        command("tune_gan", tmp_path, sweep_fields(tmp_path, **changes)), env=environment, stdout=subprocess.DEVNULL
    ) as driver:  # fmt: skip
        wait_until(lambda: published_step(sweep / f"trials/{expected.run_name}") > 6)
        cluster.add_node(**NODE)
        cluster.remove_node(first, allow_graceful=False)
    assert driver.returncode == 0
    (outcome,) = outcomes(sweep)
    assert (outcome.status, outcome.metrics) == ("finished", expected.metrics)
