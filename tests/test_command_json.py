"""Keys of the object that commands write to --json.

Those of tune_gan are in test_tuning.py, which needs Ray, and those of promote and send_metrics in
test_tracking_commands.py.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from evaluation_helpers import job, write_generator, write_image
from tiny import fields, flags, write_sets

METRICS = {"psnr_y", "ssim_y", "psnr_rgb", "ssim_rgb"}
# Perceptual metrics too, if their weights are found.
EVALUATED = METRICS | {"lr_psnr", "detail_ratio"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny data set and a run on it, made by the commands."""
    folder = write_sets(tmp_path_factory.mktemp("json"))
    (folder / "empty.yaml").touch()
    return folder


def result(folder: Path, name: str, *arguments: str | Path) -> dict[str, Any]:
    """The object that a successful call writes."""
    file = folder / f"{name}.json"
    assert not job(name)([*map(str, arguments), "--json", str(file)])
    return json.loads(file.read_text())


def configuration(folder: Path) -> list[str]:
    steps = {"psnr.steps": 1, "gan.steps": 1}
    return ["--config", str(folder / "empty.yaml"), *flags(fields(folder, **steps))]


def test_train_gan(folder: Path) -> None:
    written = result(folder, "train_gan", *configuration(folder))
    assert written.keys() >= {
        "run_name", "run_id", "stage", "step", "generator_sha256", "checkpoint", "model_version", "metrics"
    }  # fmt: skip
    assert (written["run_name"], written["stage"], written["step"]) == ("tiny", "gan", 2)
    assert written["metrics"].keys() == METRICS


def test_prepare_data(folder: Path) -> None:
    if not (folder / "data" / "manifest.json").exists():
        result(folder, "train_gan", *configuration(folder))
    written = result(folder, "prepare_data", *configuration(folder), "--show", folder / "patches.png")
    assert written.keys() == {"patches", "sources", "rejected", "manifest_sha256"}
    assert (written["sources"], written["rejected"]) == (5, 0)


def test_evaluate_with_one_model_and_with_several(tmp_path: Path) -> None:
    image = write_image(tmp_path / "a.png")
    arguments = ("--hr", image, "--out", tmp_path / "out")
    assert result(tmp_path, "evaluate", "--model", "bicubic", *arguments).keys() >= EVALUATED
    weights = write_generator(tmp_path / "g.safetensors")
    entries = result(tmp_path, "evaluate", "--model", "bicubic", weights, *arguments)["models"]
    assert [entry["model"] for entry in entries] == ["bicubic", str(weights)]
    assert all(entry["mean"].keys() >= EVALUATED for entry in entries)


def test_upscale(tmp_path: Path) -> None:
    image = write_image(tmp_path / "a.png", 20, 24)
    written = result(
        tmp_path, "upscale", "--model", "bicubic", "--input", image, "--output", tmp_path / "out"
    )
    assert written == {"written": [str(tmp_path / "out" / "a.png")], "skipped": [], "failed": []}
