"""Run identity: which changes of the configuration are reported on resume."""

from pathlib import Path

import pytest

from pipeline.run_folder import IDENTITY, InitialWeights
from pipeline.storage import Storage
from pipeline.training.config import TrainConfig
from pipeline.training.identity import claim, diff, identity_of

ONE, BOTH = {"conv3_4": 1.0}, {"conv3_4": 1.0, "conv5_4": 1.0}


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (BOTH, BOTH, []),
        # conv5_4 is also in the default configuration.
        (ONE, BOTH, ["perceptual.layers.conv5_4 was None, now 1.0"]),
        (BOTH, ONE, ["perceptual.layers.conv5_4 was 1.0, now None"]),
    ],
)
def test_an_added_or_removed_perceptual_layer_is_a_change(
    old: dict[str, float], new: dict[str, float], expected: list[str]
) -> None:
    before, now = (
        identity_of(TrainConfig.model_validate({"perceptual": {"layers": layers}}), "0" * 64)
        for layers in (old, new)
    )
    assert diff(before, now) == expected


def test_a_field_that_was_added_since_has_its_default_in_an_old_run() -> None:
    new = identity_of(TrainConfig(), "0" * 64)
    old = identity_of(TrainConfig(), "0" * 64)
    del old.fields["gan"]["pixel_weight"], old.fields["precision"]
    assert diff(old, new) == []


def test_the_source_of_equal_weights_is_the_present_one(tmp_path: Path) -> None:
    run = Storage(str(tmp_path))
    earlier, present = (
        identity_of(TrainConfig(), "0" * 64, {"generator": InitialWeights(source, "1" * 64)})
        for source in ("models:/x4@champion", "/weights/copy.safetensors")
    )
    old = claim(run, None, earlier, [])
    new = claim(run, old, present, diff(old, present))
    assert new.initial["generator"].source == "/weights/copy.safetensors"
    assert new.key == old.key
    assert IDENTITY.read(run) == new
