"""Which checkpoint of a stage is the best, and by which metric."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import fields, flags

from pipeline.config import load_config
from pipeline.errors import UserError
from pipeline.storage import Storage
from pipeline.training import selection
from pipeline.training.checks import check_before_start
from pipeline.training.config import TrainConfig
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
