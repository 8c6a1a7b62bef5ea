"""When the loop logs, validates and saves."""

import pytest

from pipeline.training.config import TrainConfig
from pipeline.training.schedule import Due, due

CONFIG = TrainConfig.model_validate(
    {
        "psnr": {"steps": 25},
        "gan": {"steps": 16},
        "log_every_steps": 4,
        "checkpoint_every_steps": 6,
        "validate_every_steps": 20,
    }
)
NOTHING, LOG, SAVE, VALIDATE = (
    Due(False, False, False),
    Due(True, False, False),
    Due(True, False, True),
    Due(True, True, True),
)


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (1, NOTHING),
        (4, LOG),
        (6, SAVE),  # a checkpoint ends an interval
        (12, SAVE),  # both at once
        (20, VALIDATE),  # a validation is saved
        (25, VALIDATE),  # the end of stage 1
        (26, NOTHING),  # steps are counted over both stages
        (40, VALIDATE),
        (41, VALIDATE),  # the end
    ],
)
def test_what_is_due_after_a_step(step: int, expected: Due) -> None:
    assert due(CONFIG, step) == expected


def test_the_end_of_a_run_with_one_stage_is_validated() -> None:
    config = TrainConfig.model_validate({"psnr": {"steps": 7}, "gan": {"steps": 0}, "log_every_steps": 100})
    assert [step for step in range(1, 8) if due(config, step) != NOTHING] == [7]
    assert due(config, 7) == VALIDATE
