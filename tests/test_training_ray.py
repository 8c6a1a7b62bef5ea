"""Both stages on two real Ray Train workers: killed, resumed, and the same bits."""

import threading
from pathlib import Path
from typing import Any

import psutil
import pytest
from tiny import fields, flags, write_photos

from pipeline.config import load_config
from pipeline.errors import UserError
from pipeline.storage import Storage
from pipeline.training import checkpoint as checkpoints
from pipeline.training.run import TrainingResult, run_training

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ray-run")
    write_photos(folder / "photos", 3, 96, seed=1)
    write_photos(folder / "held_out", 2, 64, seed=2)
    return folder


def train(folder: Path, **changes: Any) -> TrainingResult:
    changes = {"workers": 2, "tracking.register_model": False, **changes}
    config, _ = load_config(flags(fields(folder, **changes)), description="", environment={})
    return run_training(config)


def kill_a_worker_at(run: Storage, step: int, done: threading.Event, killed: list[int]) -> None:
    """SIGKILL for a training worker, as soon as a checkpoint of `step` is there; this Ray's are our descendants."""
    while not done.wait(0.05):
        if any(name.step >= step for name in checkpoints.listed(run)):
            for process in psutil.Process().children(recursive=True):
                if "RayTrainWorker" in " ".join(process.cmdline()):
                    process.kill()
                    killed.append(process.pid)
                    return


def test_two_workers_train_both_stages_and_survive_a_killed_worker(ray_cluster: str, folder: Path) -> None:
    undisturbed = train(folder)
    assert (undisturbed.stage, undisturbed.step) == ("gan", 12)

    run = Storage(str(folder / "runs" / "disturbed"))
    done, killed = threading.Event(), []
    killer = threading.Thread(target=kill_a_worker_at, args=(run, 4, done, killed))
    killer.start()
    try:
        disturbed = train(folder, run_name="disturbed")
    finally:
        done.set()
        killer.join()
    assert killed
    assert disturbed.generator_sha256 == undisturbed.generator_sha256
    assert disturbed.metrics == undisturbed.metrics


def test_a_workers_refusal_is_one_line_and_is_not_tried_again(ray_cluster: str, folder: Path) -> None:
    name = "refused"
    with pytest.raises(UserError, match="non-finite gradients"):
        train(folder, run_name=name, **{"psnr.learning_rate": 1e38, "faults.max_skipped_steps": 1})
    # One attempt leaves one folder of Ray Train's.
    assert len(Storage(str(folder / "runs" / name / "ray")).names()) == 1
