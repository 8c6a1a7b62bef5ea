"""Which checkpoint of a stage is the best, and by which metric."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient
from tiny import fields, flags, train, write_sets

from pipeline.config import load_config
from pipeline.errors import UserError
from pipeline.metrics import METRICS
from pipeline.model import generator_sha256
from pipeline.run_folder import TrainingResult
from pipeline.storage import Storage
from pipeline.tracking.spool import images_at, segment_steps, validations
from pipeline.training import checkpoint as checkpoints
from pipeline.training import selection
from pipeline.training.checks import check_before_start
from pipeline.training.config import TrainConfig
from pipeline.training.perception_distortion import KEY, axes_of
from pipeline.training.selection import measured_metrics, select_key, with_selection
from pipeline.training.state import Best, new_state


def load(folder: Path, **changes: Any) -> TrainConfig:
    values = fields(folder, **changes)
    if changes.get("gan.select_by", "") is None:
        del values["gan.select_by"]
    return load_config(flags(values), description="", environment={})[0].alone()


@pytest.mark.parametrize(("metric", "order"), [("psnr_y", [3, 1]), ("lpips", [2, 1])])
def test_the_best_are_those_with_the_highest_psnr_or_the_smallest_distance(
    tmp_path: Path, metric: str, order: list[int]
) -> None:
    state = new_state(load(tmp_path), "psnr", torch.device("cpu"))
    for step, value in [(1, 0.5), (2, 0.2), (3, 0.9), (4, 0.5), (5, float("nan"))]:
        state.insert_best(Best(step, value, metric), keep=2)
    assert [best.step for best in state.best] == order


@pytest.mark.parametrize(
    ("missing", "chosen"), [((), "lpips"), (("lpips",), "dists"), (("lpips", "dists"), "feature_distance")]
)
def test_the_default_of_stage_two_is_the_first_perceptual_metric_with_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: tuple[str, ...], chosen: str
) -> None:
    monkeypatch.setattr(selection, "unavailable", lambda names, folder: dict.fromkeys(missing, "no file"))
    config = with_selection(load(tmp_path, **{"gan.select_by": None}), has_held_out=True)
    assert (select_key(config, "psnr"), select_key(config, "gan")) == ("psnr_y", chosen)
    assert measured_metrics(config) == ("psnr_y", "ssim_y", "psnr_rgb", "ssim_rgb", chosen)
    assert with_selection(load(tmp_path), has_held_out=True).gan.select_by == "psnr_y"
    for changes, has_held_out in (({"gan.steps": 0}, True), ({}, False)):
        unused = load(tmp_path, **{"gan.select_by": None, **changes})
        assert with_selection(unused, has_held_out).gan.select_by is None


def test_a_resumed_stage_two_keeps_its_metric_when_others_become_available(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Storage(str(tmp_path / "run"))
    assert checkpoints.chosen_by(run) is None
    for name, metric in (("psnr-00000004", "psnr_y"), ("gan-00000006", "Set14/dists")):
        state = {"best": [{"step": 6, "value": 0.1, "metric": metric, "images": ""}]}
        run.write_bytes(f"checkpoints/{name}/state.json", json.dumps(state).encode())
        run.write_bytes(f"checkpoints/{name}/manifest.json", b"{}")
    assert checkpoints.chosen_by(run) == "Set14/dists"
    monkeypatch.setattr(selection, "unavailable", lambda names, folder: {})
    config = load(tmp_path, **{"gan.select_by": None})
    assert with_selection(config, True, checkpoints.chosen_by(run)).gan.select_by == "dists"


def test_without_weights_the_default_of_stage_two_is_psnr_with_a_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        selection, "unavailable", lambda names, folder: dict.fromkeys(names, "LPIPS: no such file")
    )
    config = with_selection(load(tmp_path, **{"gan.select_by": None}), has_held_out=True)
    assert config.gan.select_by == "psnr_y"
    assert capsys.readouterr().out.startswith("note: gan.select_by=psnr_y, which favors smooth images: no ")


def test_a_metric_that_selects_is_measured(tmp_path: Path) -> None:
    changes = {"validation.metrics": ["ssim_y"], "psnr.select_by": "psnr_rgb", "gan.select_by": "color_drift"}
    assert measured_metrics(load(tmp_path, **changes)) == ("ssim_y", "psnr_rgb", "color_drift")
    assert measured_metrics(load(tmp_path, **changes, **{"gan.steps": 0})) == ("ssim_y", "psnr_rgb")


def test_missing_weights_of_a_metric_that_selects_are_found_before_the_start(tmp_path: Path) -> None:
    changes = {"gan.select_by": "lpips", "validation.weights_folder": str(tmp_path)}
    config = load(tmp_path, **changes)
    with pytest.raises(UserError, match=rf"LPIPS: {tmp_path}/alexnet-.* does not exist"):
        check_before_start(config, Storage(config.storage) / "tiny")


@pytest.mark.parametrize(
    ("changes", "has_held_out", "key"),
    [
        ({}, True, "psnr_y"),
        ({}, False, "Set5/psnr_y"),
        ({"validation.select_on": "Set14"}, True, "Set14/psnr_y"),
        ({"validation.select_on": "held_out"}, True, "psnr_y"),
    ],
)
def test_the_set_that_decides_is_a_field_or_the_first_that_has_images(
    tmp_path: Path, changes: dict[str, Any], has_held_out: bool, key: str
) -> None:
    config = load(tmp_path, **{"validation.sets": {"Set5": "a", "Set14": "b"}, **changes})
    assert select_key(with_selection(config, has_held_out), "psnr") == key


def test_a_set_without_images_cannot_decide(tmp_path: Path) -> None:
    changes = {"validation.sets": {"Set5": "a"}, "validation.select_on": "held_out"}
    with pytest.raises(UserError, match=r"validation\.select_on=held_out: the data set has no .*; use Set5"):
        with_selection(load(tmp_path, **changes), has_held_out=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"validation.select_on": "Set14"}, "validation.select_on: Set14 is not one of held_out, Set5"),
        ({"validation.sets": {"held_out": "a"}}, "held_out is the name of the data set's held-out images"),
        ({"validation.sets": {"a/b": "a"}}, "should match pattern"),
        (
            {"validation.sets": {"Set5": {"hr": "a"}}},
            "validation.sets: {'hr': 'a'}: give a folder, or {hr: DIR",
        ),
        ({"validation.sets": {"Set5": None}}, "validation.sets: None: give a folder"),
        ({"validation.sets": "Set5"}, "validation.sets"),
    ],
)
def test_invalid_sets_are_refused_in_one_line(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        load(tmp_path, **{"validation.sets": {"Set5": "a"}, **changes})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "axes"),
    [
        ({"gan.select_by": "lpips"}, ("psnr_y", "lpips")),
        ({"validation.metrics": ["psnr_rgb", "dists"], "psnr.steps": 0, "gan.allow_random_start": True},
         ("psnr_y", "dists")),
        ({"gan.select_by": "feature_distance", "validation.sets": {"Set5": "a"}, "validation.select_on": "Set5"},
         ("Set5/psnr_y", "Set5/feature_distance")),
        ({}, None),
        ({"gan.select_by": "lpips", "gan.steps": 0}, None),
    ],
)  # fmt: skip
def test_the_figure_shows_psnr_and_the_perceptual_metric_of_the_set_that_decides(
    tmp_path: Path, changes: dict[str, Any], axes: tuple[str, str] | None
) -> None:
    assert axes_of(load(tmp_path, **changes)) == axes


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, TrainingResult]]:
    """One training, in which PSNR and feature_distance are best at different steps of stage 2, selected by each."""
    folder = write_sets(tmp_path_factory.mktemp("selected"))
    changes = {
        "psnr.steps": 20, "gan.steps": 8, "psnr.learning_rate": 2e-3, "gan.learning_rate": 1e-2,
        "gan.pixel_weight": 0.0, "gan.adversarial_weight": 0.0, "keep_checkpoints": 1, "log_every_steps": 10,
        "checkpoint_every_steps": 100, "validate_every_steps": 2,
        "validation.metrics": ["psnr_y", "feature_distance"], "tracking.register_model": True,
    }  # fmt: skip
    names = ("psnr_y", "feature_distance")
    return folder, {
        name: train(folder, run_name=name, **changes, **{"gan.select_by": name}) for name in names
    }


@pytest.mark.slow
@pytest.mark.parametrize(("metric", "choose"), [("psnr_y", max), ("feature_distance", min)])
def test_the_best_checkpoint_by_the_chosen_metric_is_kept_and_registered(
    runs: tuple[Path, dict[str, TrainingResult]], metric: str, choose: Any
) -> None:
    folder, results = runs
    run, result = Storage(str(folder / "runs" / metric)), results[metric]
    stage_two = {step: each for step, each in validations(run).items() if step > 20}
    assert list(stage_two) == [22, 24, 26, 28]
    by_psnr = max(stage_two, key=lambda step: stage_two[step]["psnr_y"])
    by_distance = min(stage_two, key=lambda step: stage_two[step]["feature_distance"])
    assert by_psnr != by_distance
    best = choose(stage_two, key=lambda step: stage_two[step][metric])
    assert result.metrics == stage_two[best]
    assert result.final_metrics == stage_two[28]
    weights = checkpoints.read(run, checkpoints.CheckpointName(best, "gan")).ema
    client = MlflowClient(f"sqlite:///{folder}/runs/mlflow.db")
    version = client.get_model_version("esrgan-x4", str(result.model_version))
    assert version.tags["esrgan.generator_sha256"] == generator_sha256(weights)
    assert version.tags["esrgan.selected_by"] == metric
    description = version.description
    assert "| images | upscaled by | PSNR (Y), dB ↑ | feature distance ↓ |" in description
    assert "| held out | bicubic | " in description
    assert f"chosen by {METRICS[metric].label} on the held-out images" in description


@pytest.mark.slow
def test_a_generator_selected_by_another_metric_does_not_replace_the_champion(
    runs: tuple[Path, dict[str, TrainingResult]],
) -> None:
    folder, results = runs
    model = MlflowClient(f"sqlite:///{folder}/runs/mlflow.db").get_registered_model("esrgan-x4")
    assert {alias: int(version) for alias, version in model.aliases.items()} == {
        "champion": results["psnr_y"].model_version,
        "challenger": results["feature_distance"].model_version,
    }


@pytest.mark.slow
def test_validations_of_stage_two_record_the_perception_distortion_figure(
    runs: tuple[Path, dict[str, TrainingResult]],
) -> None:
    folder, _ = runs
    run = Storage(str(folder / "runs" / "feature_distance"))
    figures = {step: images[KEY] for step in segment_steps(run) if KEY in (images := images_at(run, step))}
    assert list(figures) == [22, 24, 26, 28]
    assert all(figure.std() > 5 for figure in figures.values())
    artifacts = MlflowClient(f"sqlite:///{folder}/runs/mlflow.db").list_artifacts(
        str(runs[1]["feature_distance"].run_id), "images"
    )
    assert sum(f"/{KEY}+step+" in info.path and info.path.endswith(".png") for info in artifacts) == 4
