"""Bicubic as a baseline of validations."""

from pathlib import Path
from types import SimpleNamespace

from pipeline.storage import Storage
from pipeline.training.config import TrainConfig
from pipeline.training.run_log import RunLog
from pipeline.training.state import Validation
from pipeline.training.validator import Validator, comparison, is_below
from pipeline.training.worker import Worker

BICUBIC = {"psnr_y": 25.0, "ssim_y": 0.5, "Set5/psnr_y": 28.0}


def test_a_set_whose_psnr_is_worse_than_bicubics_is_below() -> None:
    assert is_below({"psnr_y": 24.9, "ssim_y": 0.9}, BICUBIC)
    assert is_below({"psnr_y": 25.5, "Set5/psnr_y": 27.0}, BICUBIC)
    assert not is_below({"psnr_y": 25.1, "ssim_y": 0.1, "Set5/psnr_y": 28.0}, BICUBIC)


def test_without_psnr_on_y_nothing_is_below() -> None:
    assert not is_below({"lpips": 0.9}, {"lpips": 0.5})


def test_metrics_that_bicubic_was_not_measured_by_are_omitted() -> None:
    text = comparison({"psnr_y": 24.5, "lpips": 0.1}, BICUBIC)
    assert text == "psnr_y 24.5000 (bicubic 25.0000)"


def test_stage_two_that_begins_below_bicubic_is_a_warning(tmp_path: Path) -> None:
    config, run = TrainConfig(use_gpu=False), Storage(str(tmp_path))
    log = RunLog(config, Worker(), run)
    state = SimpleNamespace(validation=Validation(7, {"psnr_y": 24.0}), step=7, bicubic=BICUBIC)
    validator = Validator(config, Worker(), run, [], log)
    validator.begin_stage_two(state)  # type: ignore[arg-type]
    (event,) = log.take()
    assert event.text == (  # type: ignore[union-attr]
        "warning: below bicubic: stage 2 starts from a generator with psnr_y 24.0000 (bicubic 25.0000)"
    )


def test_metrics_are_compared_by_name() -> None:
    text = comparison({"psnr_y": 24.5, "ssim_y": 0.1}, BICUBIC)
    assert text == "psnr_y 24.5000 (bicubic 25.0000), ssim_y 0.1000 (bicubic 0.5000)"
