"""The configuration of the run that trains a trial's stage 1."""

from pathlib import Path
from typing import Any

import pytest
from tiny import fields, flags

from pipeline.config import load_config
from pipeline.training.config import TrainConfig
from pipeline.tuning.config import TuneConfig
from pipeline.tuning.stage_one import is_shared, stage_one_of


@pytest.mark.parametrize(
    ("field", "span", "shared"),
    [
        ("gan.learning_rate", {"low": 1e-5, "high": 1e-3}, True),
        ("model.num_block", {"low": 1, "high": 3}, True),
        ("psnr.learning_rate", {"low": 1e-4, "high": 1e-3, "step": 1e-4}, True),
        ("psnr.learning_rate", {"low": 1e-4, "high": 1e-3}, False),
        ("seed", {"low": 0, "high": 10**9}, False),
    ],
)
def test_it_is_shared_if_trials_can_have_the_same(field: str, span: Any, shared: bool) -> None:
    assert is_shared(TuneConfig.model_validate({"space": {field: span}}), TrainConfig()) is shared


@pytest.mark.parametrize("field", ["partial", "adopt_sizes"])
@pytest.mark.parametrize("has_generator", [False, True])
def test_it_has_only_the_settings_of_the_generators_weights(
    tmp_path: Path, field: str, has_generator: bool
) -> None:
    changes = {f"init.{field}": True, "init.discriminator": "d.pth"}
    if has_generator:
        changes["init.generator"] = "g.pth"
    trial = load_config(flags(fields(tmp_path, **changes)), description="", environment={})[0].alone()
    stage_one = stage_one_of(trial, trial, "0" * 64)
    assert stage_one is not None
    assert getattr(stage_one.alone().init, field) is has_generator
    assert stage_one.init.discriminator is None
