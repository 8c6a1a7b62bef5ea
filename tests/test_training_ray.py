"""Both stages on two real Ray Train workers: killed, hanging, broken; resumed, and the same bits."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray.train
import ray.train.torch
import tiny
import torch
from ray.exceptions import RayActorError
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group
from tiny import write_sets

from pipeline.config import load_config
from pipeline.errors import UserError
from pipeline.run_folder import REFUSAL, Refusal
from pipeline.storage import Storage
from pipeline.training import checkpoint as checkpoints
from pipeline.training import faults
from pipeline.training.faults import Diverged, OutOfMemory
from pipeline.training.ray_compat import SavingTrainer, WorkerGroupCallback
from pipeline.training.ray_trainer import _kind
from pipeline.training.run import TrainingResult, run_training

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sets(tmp_path_factory.mktemp("ray-run"))


def train(folder: Path, **changes: Any) -> TrainingResult:
    return tiny.train(folder, **{"workers": 2, "tracking.register_model": False, **changes})


def processes(kind: str) -> list[psutil.Process]:
    """Processes of this kind of this session's Ray cluster, whose processes are our children."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if kind in " ".join(process.cmdline()):
                found.append(process)
    return found


def hurt_at(
    run: Storage, step: int, kind: str, number: signal.Signals, done: threading.Event, hurt: list[int]
) -> None:
    """Sends a signal to a process of this kind as soon as a checkpoint of `step` is there.

    Processes that an earlier run left and that are about to end are excluded. Before a controller is killed, its
    workers are halted: else they might end the run before Ray stops them.
    """
    earlier = set(processes(""))
    while not done.wait(0.05):
        if any(name.step >= step for name in checkpoints.listed(run)):
            for worker in set(processes("RayTrainWorker")) - earlier:
                if kind == "TrainController":
                    worker.suspend()
            for process in set(processes(kind)) - earlier:
                process.send_signal(number)
                hurt.append(process.pid)
                return


@pytest.fixture(scope="module")
def undisturbed(ray_cluster: str, folder: Path) -> TrainingResult:
    return train(folder)


@pytest.mark.parametrize(
    ("kind", "number", "text", "feed"),
    [
        ("RayTrainWorker", signal.SIGKILL, "its process ended", "ray"),
        # A worker that hangs: the others' collectives run into their time-out.
        ("RayTrainWorker", signal.SIGSTOP, "a worker stopped", "thread"),
        ("TrainController", signal.SIGKILL, "controller stopped", "auto"),
    ],
)
def test_a_process_that_is_killed_or_hangs_changes_no_bit_of_the_result(
    undisturbed: TrainingResult, folder: Path, kind: str, number: signal.Signals, text: str, feed: str
) -> None:
    name = f"{kind}-{number.name}"
    run = Storage(str(folder / "runs" / name))
    done, hurt = threading.Event(), []
    hurter = threading.Thread(target=hurt_at, args=(run, 4, kind, number, done, hurt))
    hurter.start()
    try:
        disturbed = train(folder, run_name=name, **{"faults.collective_timeout_s": 10, "data.feed": feed})
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


def test_an_error_that_repeats_ends_the_run_with_its_message(ray_cluster: str, folder: Path) -> None:
    data = folder / "without-held-out"
    shutil.copytree(folder / "data", data)
    for shard in data.glob("held_out*"):
        shard.unlink()
    with pytest.raises(RuntimeError, match=r"the same error 3 times since step 0: .*FileNotFoundError"):
        train(folder, run_name="broken", **{"data.root": str(data)})


def test_divergence_is_one_line_after_a_second_attempt(ray_cluster: str, folder: Path) -> None:
    name = "diverged"
    with pytest.raises(UserError, match=r"non-finite gradients.*lower psnr\.learning_rate"):
        train(folder, run_name=name, **{"psnr.learning_rate": 1e38, "faults.max_skipped_steps": 1})
    noted = faults.load(Storage(str(folder / "runs" / name)))
    assert [fault.kind for fault in noted] == ["diverged", "diverged"]


def test_a_refusal_ends_workers_that_wait_in_a_collective(ray_cluster: str, tmp_path: Path) -> None:
    """A worker that ended normally would leave the others in it until the time-out, with NCCL."""
    run, began = Storage(str(tmp_path / "run")), time.monotonic()

    def work() -> None:
        import torch
        import torch.distributed as dist

        from pipeline.training.ray_trainer import _refuse

        if dist.get_rank() == 1:
            _refuse(run.uri, "data.root: no such folder on this node")
        dist.all_reduce(torch.ones(1), group=dist.new_group([0, 1], timeout=timedelta(hours=1)))

    trainer = SavingTrainer(
        work,
        run=run,
        scaling_config=ray.train.ScalingConfig(num_workers=2),
        torch_config=ray.train.torch.TorchConfig(backend="gloo", timeout_s=3600),
        run_config=ray.train.RunConfig(
            storage_path=str(tmp_path), failure_config=ray.train.FailureConfig(max_failures=-1)
        ),
    )
    with pytest.raises(ray.train.TrainingFailedError):
        trainer.fit()
    assert time.monotonic() - began < 300
    assert REFUSAL.read(run) == Refusal("data.root: no such folder on this node")


def test_a_gpu_with_too_little_memory_is_retried_once_like_a_divergence() -> None:
    errors = [OutOfMemory("batch_size=16"), Diverged("step 9"), RuntimeError("no kernel image")]
    assert [_kind(error) for error in errors] == ["diverged", "diverged", "error"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_a_driver_that_does_not_fit_is_found_before_the_group_starts(tmp_path: Path) -> None:
    script = (
        "import ray, sys, tiny\n"
        "from pathlib import Path\n"
        "from pipeline.errors import UserError\n"
        # Ray schedules on GPUs that torch cannot use.
        "ray.init(address='local', num_cpus=2, num_gpus=2, include_dashboard=False, object_store_memory=100 * 2**20)\n"
        "try:\n"
        "    tiny.train(Path(sys.argv[1]), workers=2, use_gpu=True, **{'tracking.uri': 'none'})\n"
        "except UserError as error:\n"
        "    print('refused:', error)\n"
    )
    environment = {
        **os.environ,
        "PYTHONPATH": f"{Path(tiny.__file__).parent}:{os.environ.get('PYTHONPATH', '')}",
    }
    environment.pop("RAY_ADDRESS", None)
    environment["RAY_AUTH_MODE"] = "disabled"
    result = subprocess.run(
        [sys.executable, "-c", script, str(write_sets(tmp_path))],
        env=environment, capture_output=True, text=True, check=False, timeout=500,
    )  # fmt: skip
    assert "refused: use_gpu=true, " in result.stdout, result.stdout + result.stderr
    assert "torch cannot use a GPU here (" in result.stdout
    assert "resuming at step" not in result.stdout
