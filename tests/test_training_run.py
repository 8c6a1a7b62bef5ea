"""A whole run in this process: both stages, exact resume after a kill, one line for each mistake."""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny import command, fields, run_until, train, write_sets

from pipeline.errors import UserError
from pipeline.storage import Storage
from pipeline.tracking.records import Metrics, read_segment, segment_steps
from pipeline.training import checkpoint as checkpoints
from pipeline.training.run import TrainingResult

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sets(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> Iterator[TrainingResult]:
    return train(folder)


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}


def curve(run: Storage) -> list[tuple[int, dict[str, float]]]:
    """Every recorded point but rates, memory and waiting."""
    points = []
    for step in segment_steps(run):
        for record in read_segment(run, step).records:
            if isinstance(record, Metrics):
                kept = {
                    key: value
                    for key, value in record.values.items()
                    if key.startswith(("loss", "validation"))
                }
                points.append((record.step, kept))
    return points


def test_both_stages_run_and_leave_what_they_promise(folder: Path, undisturbed: TrainingResult) -> None:
    run = Storage(str(folder / "runs" / "tiny"))
    assert (undisturbed.stage, undisturbed.step) == ("gan", 12)
    assert json.loads(run.read_bytes("result.json"))["generator_sha256"] == undisturbed.generator_sha256
    names = [str(name) for name in checkpoints.listed(run)]
    assert "psnr-00000006" in names
    assert names[-1] == "gan-00000012"
    assert undisturbed.model_version == 1
    assert set(undisturbed.metrics) == {"psnr_y", "ssim_y", "psnr_rgb", "ssim_rgb"}
    assert [step for step, values in curve(run) if any(key.startswith("loss") for key in values)] == list(
        range(1, 13)
    )


def test_a_finished_run_says_so_and_changes_nothing(
    folder: Path, undisturbed: TrainingResult, capsys: pytest.CaptureFixture[str]
) -> None:
    run = folder / "runs" / "tiny"
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    assert train(folder) == undisturbed
    assert "has ended at step 12; nothing to do" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}


@pytest.mark.parametrize("line", ["step 5/12", "step 6 validation", "step 11/12"])
def test_killed_anywhere_and_resumed_ends_with_the_same_bits_and_curve(
    folder: Path, undisturbed: TrainingResult, line: str
) -> None:
    name = "killed-" + line.replace(" ", "-").replace("/", "-")
    arguments = command("train_gan", folder, fields(folder, run_name=name))
    run_until(arguments, line, environment())
    run = Storage(str(folder / "runs" / name))
    assert not run.exists("result.json")
    result = train(folder, run_name=name)
    assert result.generator_sha256 == undisturbed.generator_sha256
    assert result.metrics == undisturbed.metrics
    assert curve(run) == curve(Storage(str(folder / "runs" / "tiny")))


def test_weights_that_never_get_better_than_the_first_are_registered_all_the_same(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"run_name": "still", "psnr.learning_rate": 1e-30, "psnr.steps": 3, "gan.steps": 0}
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    result = train(folder, **changes, **{"tracking.register_model": True, "tracking.uri": uri})
    assert result.model_version == 1
    assert "cannot be read" not in capsys.readouterr().out


def test_another_configuration_under_the_same_name_is_refused(
    folder: Path, undisturbed: TrainingResult
) -> None:
    with pytest.raises(UserError) as caught:
        train(folder, **{"gan.pixel_weight": 0.5})
    assert "run_name=tiny is in use with another configuration (gan.pixel_weight was 0.01, now 0.5)" in str(
        caught.value
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.source": "/no/such/folder", "data.root": "new"}, "data.source=/no/such/folder"),
        ({"data.source": "empty", "data.root": "new"}, "no photographs"),
        ({"storage": "/proc/runs"}, "storage=/proc/runs"),
        ({"perceptual.weights": "/no/weights.pth"}, "/no/weights.pth"),
        ({"perceptual.layers": {"conv9_9": 1.0}}, "conv9_9"),
        ({"workers": 4096, "batch_size": 4096}, "workers=4096: they need 4096 CPUs"),
        ({"tracking.uri": "http://127.0.0.1:9"}, "tracking.uri=http://127.0.0.1:9"),
        ({"tracking.metric": "beauty"}, "tracking.metric=beauty"),
        ({"data.patch_px": 128}, "64"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    folder: Path, tmp_path: Path, undisturbed: TrainingResult, changes: dict[str, Any], message: str
) -> None:
    (tmp_path / "empty").mkdir()
    changes = {
        key: str(tmp_path / value) if value in ("new", "empty") else value for key, value in changes.items()
    } | {"run_name": "mistake"}
    if "data.patch_px" in changes:
        changes["crop_px"] = 128
    result = subprocess.run(
        command("train_gan", folder, fields(folder, **changes)),
        capture_output=True,
        text=True,
        env=environment(),
        timeout=120,
        check=False,
    )
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert message in lines[0]


def test_a_relative_storage_in_a_copied_folder_is_refused(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_1"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    with pytest.raises(UserError, match="storage=runs: relative to a copy"):
        train(folder, storage="runs")


def test_too_little_space_is_said_before_anything_starts(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Storage, "free_bytes", lambda self: 1000)
    with pytest.raises(UserError, match=r"storage=.*0 MiB free, and checkpoints take about"):
        train(folder, run_name="no-space")


def test_two_processes_cannot_train_the_same_run(folder: Path, undisturbed: TrainingResult) -> None:
    import fcntl

    other = folder / "runs" / "locked"
    other.mkdir()
    with (other / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process is training"):
            train(folder, run_name="locked")
