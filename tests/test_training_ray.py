"""Both stages on two real Ray Train workers: killed, hanging, broken; resumed, and the same bits."""

import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import forked
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


# Long enough for three faults, with progress before each.
WORKERS: dict[str, Any] = {"workers": 2, "gan.steps": 24, "tracking.uri": "none"}


def train(folder: Path, **changes: Any) -> TrainingResult:
    return tiny.train(folder, **{**WORKERS, **changes})


def processes(kind: str) -> list[psutil.Process]:
    """Processes of this kind of this session's Ray cluster, whose processes are our children."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if kind in " ".join(process.cmdline()):
                found.append(process)
    return found


@contextmanager
def hurting(run: Storage, after: int, *hurts: tuple[str, signal.Signals]) -> Iterator[None]:
    """Sends each signal to a process of its kind, and fails if the run ends before.

    The first is sent after a checkpoint later than step `after`, each other one after a checkpoint that is later than
    the fault before. Processes that an earlier run left and that are about to end are excluded. Before a controller is
    killed, its workers are halted: else they might end the run before Ray stops them.
    """
    earlier, done = set(processes("")), threading.Event()
    hurt: list[psutil.Process] = []

    def hurt_all() -> None:
        while len(hurt) < len(hurts) and not done.wait(0.05):
            kind, number = hurts[len(hurt)]
            noted = faults.load(run)
            since = noted[-1].step if noted else after
            if len(noted) < len(hurt) or not any(name.step > since for name in checkpoints.listed(run)):
                continue
            for worker in set(processes("RayTrainWorker")) - earlier:
                if kind == "TrainController":
                    worker.suspend()
            for process in set(processes(kind)) - earlier:
                process.send_signal(number)
                hurt.append(process)
                break

    thread = threading.Thread(target=hurt_all)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    assert len(hurt) == len(hurts)


@pytest.fixture(scope="module")
def undisturbed(ray_cluster: str, folder: Path) -> TrainingResult:
    return train(folder)


def test_processes_that_are_killed_or_hang_change_no_bit_of_the_result(
    undisturbed: TrainingResult, folder: Path
) -> None:
    run = Storage(str(folder / "runs" / "disturbed"))
    hurts = [
        ("RayTrainWorker", signal.SIGKILL),
        # A worker that hangs: the collectives of the others run into their time-out.
        ("RayTrainWorker", signal.SIGSTOP),
        ("TrainController", signal.SIGKILL),
    ]
    with hurting(run, 2, *hurts):
        disturbed = train(folder, run_name="disturbed", **{"faults.collective_timeout_s": 10})
    noted = " ".join(fault.text for fault in faults.load(run))
    for text in (
        "a worker stopped: its process ended",
        "a worker stopped: RuntimeError",
        "controller stopped",
    ):
        assert text in noted
    assert (disturbed.stage, disturbed.step) == ("gan", 30)
    assert disturbed.generator_sha256 == undisturbed.generator_sha256
    assert disturbed.metrics == undisturbed.metrics


def test_a_driver_that_is_killed_is_started_again_and_changes_no_bit(
    undisturbed: TrainingResult, folder: Path
) -> None:
    changes = {**WORKERS, "run_name": "driver", "data.feed": "ray"}
    arguments = tiny.command("train_gan", folder, tiny.fields(folder, **changes))
    tiny.run_until(arguments, "step 8/30")
    assert not (folder / "runs" / "driver" / "result.json").exists()
    again = train(folder, **changes)
    assert again.generator_sha256 == undisturbed.generator_sha256
    assert again.metrics == undisturbed.metrics


def failing_starts(marks: Path) -> WorkerGroupCallback:
    """Fails the first three starts of a worker group when its workers' processes are there; runs in the controller."""

    # A local class travels by value: the controller cannot import this module.
    class FailingStarts(WorkerGroupCallback):
        def before_init_train_context(self, workers: list[Any]) -> dict[str, list[Any]]:
            if self._is_next("controller"):
                os.kill(os.getpid(), signal.SIGKILL)
            return {}

        def after_worker_group_start(self, worker_group: Any) -> None:
            # After a worker's death the controller starts another group; an error ends it.
            if self._is_next("worker"):
                raise RayActorError()
            if self._is_next("error"):
                raise OSError("no process group")

        def _is_next(self, kind: str) -> bool:
            kinds = ("worker", "controller", "error")
            if kind != next((each for each in kinds if not (marks / each).exists()), None):
                return False
            (marks / kind).touch()
            return True

    return FailingStarts()


def test_worker_groups_that_fail_while_starting_free_their_cpus_for_the_next(
    undisturbed: TrainingResult, folder: Path, tmp_path: Path
) -> None:
    limits = {"faults.worker_start_timeout_s": 30, "faults.max_restarts": 3}
    values = tiny.fields(folder, run_name="starts", **WORKERS, **limits)
    config, _ = load_config(tiny.flags(values), description="", environment={})
    # Another user of the same Ray: its placement group stays.
    others = placement_group([{"memory": 2**20}])
    try:
        result = run_training(config, callbacks=[failing_starts(tmp_path)])
        assert (tmp_path / "error").exists()
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
    changes = {"workers": 1, "psnr.learning_rate": 1e38, "faults.max_skipped_steps": 1}
    name = "diverged"
    with pytest.raises(UserError, match=r"non-finite gradients.*lower psnr\.learning_rate"):
        train(folder, run_name=name, **changes)
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
def test_a_driver_that_does_not_fit_is_found_before_the_group_starts(
    undisturbed: TrainingResult, folder: Path, tmp_path: Path
) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import ray, sys, tiny\n"
        "from pathlib import Path\n"
        "from pipeline.errors import UserError\n"
        # Ray schedules on GPUs that torch cannot use.
        "ray.init(address='local', num_cpus=2, num_gpus=2, include_dashboard=False, object_store_memory=100 * 2**20)\n"
        "try:\n"
        "    tiny.train(Path(sys.argv[1]), workers=2, run_name='unfit', use_gpu=True, **{'tracking.uri': 'none'})\n"
        "except UserError as error:\n"
        "    print('refused:', error)\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    result = forked.run([str(script), str(folder)], environment={**environment, "RAY_AUTH_MODE": "disabled"})
    assert "refused: use_gpu=true, " in result.stdout, result.stdout + result.stderr
    assert "torch cannot use a GPU here (" in result.stdout
    assert "resuming at step" not in result.stdout
