"""Which metric chooses the best checkpoint of a stage."""

from typing import get_args

from pipeline.metrics import PERCEPTUAL, unavailable
from pipeline.training.config import TrainConfig
from pipeline.training.validation_config import MetricName


def select_by(config: TrainConfig, stage: str) -> str:
    """The validation metric that chooses the best checkpoint of a stage."""
    return config.psnr.select_by if stage == "psnr" else config.gan.select_by or "psnr_y"


def measured_metrics(config: TrainConfig) -> tuple[str, ...]:
    """The metrics of every validation: those of `validation.metrics` and those that choose checkpoints."""
    stages = [stage for stage in ("psnr", "gan") if getattr(config, stage).steps]
    return tuple(dict.fromkeys([*config.validation.metrics, *(select_by(config, stage) for stage in stages)]))


def with_selection(config: TrainConfig) -> TrainConfig:
    """`config` with the default of `gan.select_by` replaced by a metric that this machine can measure."""
    if config.gan.select_by or not config.gan.steps:
        return config
    names = [name for name in PERCEPTUAL if name in get_args(MetricName)]
    reasons = unavailable(names, config.validation.weights_folder)
    chosen = next((name for name in names if name not in reasons), "psnr_y")
    if chosen == "psnr_y":
        print(
            f"note: gan.select_by=psnr_y, which favors smooth images: no perceptual metric is available "
            f"({'; '.join(reasons.values())})",
            flush=True,
        )
    return config.model_copy(update={"gan": config.gan.model_copy(update={"select_by": chosen})})
