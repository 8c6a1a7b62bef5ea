"""The configuration of the run that trains a trial's stage 1."""

from pathlib import Path

import pytest
from tiny import fields, flags

from pipeline.config import load_config
from pipeline.tuning.stage_one import stage_one_of


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
