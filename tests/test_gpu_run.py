"""Whole runs on a GPU, each in its own process: killed, resumed, and moved between devices."""

from pathlib import Path
from typing import Any

import pytest
from gpu import DEVICES, GPU, different
from minimal import run_minimal
from tiny import command, fields, run_until, write_photos
from torch import Tensor

from pipeline.run_folder import RESULT
from pipeline.storage import Storage
from pipeline.training import checkpoint as checkpoints

pytestmark = pytest.mark.slow


def settings(folder: Path, device: str, **changes: Any) -> dict[str, Any]:
    return fields(
        folder,
        use_gpu=device == "cuda",
        deterministic=True,
        precision="tf32",
        **{"tracking.uri": "none", **changes},
    )


def train(folder: Path, values: dict[str, Any], *more: str) -> str:
    """Trains in a new process, to the end; returns what it printed."""
    _, job, *arguments = command("train_gan", folder, values)
    result = run_minimal(job, *arguments, *more, folder=folder)
    assert result.returncode == 0, result.stderr
    return result.stdout


def tensors_of(folder: Path, run: str) -> dict[str, Tensor]:
    """All tensors of the last checkpoint."""
    newest = checkpoints.newest(Storage(str(folder / "runs" / run)))
    assert newest is not None
    assert newest.name.step == 12
    return {**newest.tensors, **{f"ema.{name}": value for name, value in newest.ema.items()}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_photos(tmp_path / "photos", 3, 96, seed=1)
    write_photos(tmp_path / "held_out", 2, 64, seed=2)
    return tmp_path


@pytest.mark.parametrize("device", DEVICES)
def test_a_killed_deterministic_run_ends_with_the_same_bits(folder: Path, device: str) -> None:
    train(folder, settings(folder, device, run_name="whole"))
    killed = settings(folder, device, run_name="killed")
    run_until(command("train_gan", folder, killed), "[gan] step 9/12")
    assert "resuming at step" in train(folder, killed)
    assert different(tensors_of(folder, "whole"), tensors_of(folder, "killed")) == []
    results = [RESULT.read(Storage(str(folder / "runs" / run))) for run in ("whole", "killed")]
    assert results[0] is not None
    assert results[1] is not None
    assert results[0].metrics == results[1].metrics
    assert set(results[0].metrics) >= {"psnr_y", "ssim_y"}


@pytest.mark.parametrize("device", [GPU])
def test_a_run_moves_from_the_gpu_to_the_cpu_and_back(folder: Path, device: str) -> None:
    for step, target in ((3, device), (6, "cpu"), (9, device)):
        values = settings(folder, target)
        run_until([*command("train_gan", folder, values), "--accept-changes"], f"step {step}/12")
    train(folder, settings(folder, device), "--accept-changes")
    result = RESULT.read(Storage(str(folder / "runs" / "tiny")))
    assert result is not None
    assert result.step == 12
