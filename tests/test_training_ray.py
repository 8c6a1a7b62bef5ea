"""Both stages on two real Ray Train workers: killed, hanging, broken; resumed, and the same bits."""

import os
import shutil
import signal
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import tiny
from ray.exceptions import RayActorError
from ray.train.v2._internal.execution.callback import WorkerGroupCallback
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group
from tiny import write_sets

from pipeline.config import load_config
from pipeline.errors import UserError
from pipeline.storage import Storage
from pipeline.training import checkpoint as checkpoints
from pipeline.training import faults
from pipeline.training.run import TrainingResult, run_training

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sets(tmp_path_factory.mktemp("ray-run"))


def train(folder: Path, **changes: Any) -> TrainingResult:
    return tiny.train(folder, **{"workers": 2, "tracking.register_model": False, **changes})


def hurt_at(
    run: Storage, step: int, kind: str, number: signal.Signals, done: threading.Event, hurt: list[int]
) -> None:
    """Sends a signal to a process of this kind as soon as a checkpoint of `step` is there; ours are our children."""
    while not done.wait(0.05):
        if any(name.step >= step for name in checkpoints.listed(run)):
            for process in psutil.Process().children(recursive=True):
                if kind in " ".join(process.cmdline()):
                    process.send_signal(number)
                    hurt.append(process.pid)
                    return


@pytest.fixture(scope="module")
def undisturbed(ray_cluster: str, folder: Path) -> TrainingResult:
    return train(folder)


@pytest.mark.parametrize(
    ("kind", "number", "text"),
    [
        ("RayTrainWorker", signal.SIGKILL, "its process ended"),
        # A worker that hangs: the others' collectives run into their time-out.
        ("RayTrainWorker", signal.SIGSTOP, "a worker stopped"),
        ("TrainController", signal.SIGKILL, "controller stopped"),
    ],
)
def test_a_process_that_is_killed_or_hangs_changes_no_bit_of_the_result(
    undisturbed: TrainingResult, folder: Path, kind: str, number: signal.Signals, text: str
) -> None:
    name = f"{kind}-{number.name}"
    run = Storage(str(folder / "runs" / name))
    done, hurt = threading.Event(), []
    hurter = threading.Thread(target=hurt_at, args=(run, 4, kind, number, done, hurt))
    hurter.start()
    try:
        disturbed = train(folder, run_name=name, **{"faults.collective_timeout_s": 10})
    finally:
        done.set()
        hurter.join()
    assert hurt
    assert text in " ".join(fault.text for fault in faults.load(run))
    assert (disturbed.stage, disturbed.step) == ("gan", 12)
    assert disturbed.generator_sha256 == undisturbed.generator_sha256
    assert disturbed.metrics == undisturbed.metrics


def test_a_driver_that_is_killed_is_started_again_and_changes_no_bit(
    undisturbed: TrainingResult, folder: Path
) -> None:
    changes = {"run_name": "driver", "workers": 2, "tracking.register_model": False}
    arguments = tiny.command("train_gan", folder, tiny.fields(folder, **changes))
    tiny.run_until(arguments, "step 8/12")
    assert not (folder / "runs" / "driver" / "result.json").exists()
    again = train(folder, run_name="driver")
    assert again.generator_sha256 == undisturbed.generator_sha256
    assert again.metrics == undisturbed.metrics


def failing_start(mark: Path, kind: str) -> WorkerGroupCallback:
    """Fails the first start of a worker group when its workers' processes are there; runs in the controller."""

    # A local class travels by value: the controller cannot import this module.
    class FailingStart(WorkerGroupCallback):
        def before_init_train_context(self, workers: list[Any]) -> dict[str, list[Any]]:
            if kind == "controller" and self._is_first():
                os.kill(os.getpid(), signal.SIGKILL)
            return {}

        def after_worker_group_start(self, worker_group: Any) -> None:
            if kind != "controller" and self._is_first():
                # An error ends the controller; after a worker's death it starts another group.
                raise OSError("no process group") if kind == "error" else RayActorError()

        def _is_first(self) -> bool:
            try:
                mark.touch(exist_ok=False)
            except FileExistsError:
                return False
            return True

    return FailingStart()


@pytest.mark.parametrize("kind", ["error", "worker", "controller"])
def test_a_worker_group_that_fails_while_starting_frees_its_cpus_for_the_next(
    undisturbed: TrainingResult, folder: Path, tmp_path: Path, kind: str
) -> None:
    values = tiny.fields(
        folder, run_name=f"start-{kind}", workers=2,
        **{"tracking.register_model": False, "faults.worker_start_timeout_s": 30, "faults.max_restarts": 2},
    )  # fmt: skip
    config, _ = load_config(tiny.flags(values), description="", environment={})
    # Another user of the same Ray: its placement group stays.
    others = placement_group([{"memory": 2**20}])
    try:
        result = run_training(config, callbacks=[failing_start(tmp_path / "failed", kind)])
        assert (tmp_path / "failed").exists()
        assert result.generator_sha256 == undisturbed.generator_sha256
        assert placement_group_table(others)["state"] == "CREATED"
    finally:
        remove_placement_group(others)


def test_ray_trains_own_processes_know_which_ray_is_theirs(ray_cluster: str, folder: Path) -> None:
    # Else the one that watches over the controller asks the newest Ray on the machine, finds no such controller there,
    # and takes the workers' CPUs away.
    done, addresses = threading.Event(), set()

    def watch() -> None:
        while not done.wait(0.2):
            for process in psutil.Process().children(recursive=True):
                with suppress(psutil.Error):
                    if "PlacementGroupCleaner" in " ".join(process.cmdline()):
                        addresses.add(process.environ().get("RAY_ADDRESS"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        train(folder, run_name="watched", **{"gan.steps": 0})
    finally:
        done.set()
        watcher.join()
    assert addresses == {ray_cluster}


def test_an_error_that_repeats_ends_the_run_with_its_message(ray_cluster: str, folder: Path) -> None:
    data = folder / "without-held-out"
    shutil.copytree(folder / "data", data)
    for shard in data.glob("held_out*"):
        shard.unlink()
    with pytest.raises(RuntimeError, match=r"the same error 3 times since step 0: .*FileNotFoundError"):
        train(folder, run_name="broken", **{"data.root": str(data)})


def test_divergence_is_one_line_after_a_second_try(ray_cluster: str, folder: Path) -> None:
    name = "diverged"
    with pytest.raises(UserError, match=r"non-finite gradients.*lower psnr\.learning_rate"):
        train(folder, run_name=name, **{"psnr.learning_rate": 1e38, "faults.max_skipped_steps": 1})
    noted = faults.load(Storage(str(folder / "runs" / name)))
    assert [fault.kind for fault in noted] == ["diverged", "diverged"]
