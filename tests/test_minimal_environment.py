"""Without Ray, MLflow and the packages of single features: prepare, train, evaluate and upscale on one machine."""

import json
from pathlib import Path
from typing import Any

import pytest
from minimal import blocked_modules, run_minimal
from tiny import JOBS, command, fields, write_photos

from pipeline.run_folder import RESULT
from pipeline.storage import Storage

pytestmark = pytest.mark.slow


def minimal_job(job: str, folder: Path, *arguments: str) -> str:
    """Output of a job that must succeed."""
    result = run_minimal(str(JOBS / f"{job}.py"), *arguments, folder=folder)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a run that was prepared and trained without these packages, and what training printed."""
    folder = tmp_path_factory.mktemp("minimal")
    write_photos(folder / "photos", 3, 96, seed=1)
    write_photos(folder / "held_out", 2, 64, seed=2)
    flags = command("train_gan", folder, fields(folder, **{"tracking.register_model": True}))[2:]
    minimal_job("prepare_data", folder, *flags)
    return folder, minimal_job("train_gan", folder, *flags)


def test_the_packages_are_blocked(tmp_path: Path) -> None:
    assert {"ray", "mlflow", "psutil", "skimage", "matplotlib", "tqdm", "jinja2"} <= set(blocked_modules())
    script = tmp_path / "script.py"
    for code in ("import ray\n", "from importlib.metadata import version\nversion('scikit-image')\n"):
        script.write_text(code)
        assert "NotFoundError" in run_minimal(str(script), folder=tmp_path).stderr


def test_a_run_trains_and_keeps_what_mlflow_would_receive(trained: tuple[Path, str]) -> None:
    folder, printed = trained
    run = Storage(str(folder / "runs" / "tiny"))
    result = RESULT.read(run)
    assert result is not None
    assert (result.step, result.model_version) == (12, None)
    assert f"jobs/send_metrics.py --run {run.uri}" in printed
    assert run.exists("tracking/candidate")


def test_the_metrics_can_be_sent_later(trained: tuple[Path, str], tmp_path: Path) -> None:
    from tracking_helpers import new_database

    from pipeline.tracking.pending import upload_pending

    folder, _ = trained
    result = upload_pending(Storage(str(folder / "runs" / "tiny")), new_database(tmp_path))
    assert result.status == "FINISHED"
    assert result.sent > 0
    assert result.registered is not None


def test_models_are_evaluated_without_the_report(trained: tuple[Path, str], tmp_path: Path) -> None:
    folder, _ = trained
    models, images = (str(folder / "runs/tiny"), "bicubic"), str(folder / "held_out")
    printed = minimal_job("evaluate", tmp_path, "--model", *models, "--hr", images, "--out", "out")
    assert "report.html is not written" in printed
    written = json.loads((tmp_path / "out/metrics.json").read_text())
    assert written["protocol"]["versions"].keys() == {"torch", "numpy", "pillow"}


def test_images_are_upscaled(trained: tuple[Path, str], tmp_path: Path) -> None:
    folder, _ = trained
    model, images = str(folder / "runs/tiny"), str(folder / "held_out")
    minimal_job("upscale", tmp_path, "--model", model, "--input", images, "--output", "out")
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {"image0.png", "image1.png"}


@pytest.mark.parametrize(
    ("job", "changes", "words"),
    [
        ("train_gan", {"workers": 1}, "workers=1: the package ray is not installed"),
        ("prepare_data", {"workers": 1, "data.root": "other"}, "the package ray is not installed"),
        ("train_gan", {"tracking.uri": "http://host:5000"}, "the package mlflow is not installed"),
    ],
)
def test_what_needs_a_package_names_it(
    trained: tuple[Path, str], job: str, changes: dict[str, Any], words: str
) -> None:
    folder, _ = trained
    flags = command(job, folder, fields(folder, run_name="new", **changes))[2:]
    result = run_minimal(str(JOBS / f"{job}.py"), *flags, folder=folder)
    assert result.returncode == 2, result.stderr
    assert words in result.stderr


def test_a_registered_model_needs_mlflow(tmp_path: Path) -> None:
    write_photos(tmp_path / "photos", 1, 16, seed=1)
    arguments = ("--model", "models:/esrgan-x4@champion", "--input", "photos", "--output", "out")
    result = run_minimal(
        str(JOBS / "upscale.py"), *arguments, "--tracking.uri", "http://host:5000", folder=tmp_path
    )
    assert result.returncode == 2
    assert "models:/esrgan-x4@champion: the package mlflow is not installed" in result.stderr
