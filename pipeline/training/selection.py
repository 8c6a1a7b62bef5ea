"""Which metric, on which set, chooses the best checkpoint of a stage."""

from pipeline.errors import UserError
from pipeline.metrics import PERCEPTUAL, metric_of, unavailable
from pipeline.training.config import TrainConfig
from pipeline.training.validation_config import HELD_OUT


def metric_key(set_name: str, metric: str) -> str:
    """The name of a metric on a set among a validation's metrics: `psnr_y` on the held-out images, `Set14/psnr_y`."""
    return metric if set_name == HELD_OUT else f"{set_name}/{metric}"


def select_key(config: TrainConfig, stage: str) -> str:
    """The name, among a validation's metrics, of the one that chooses the best checkpoint of a stage."""
    return metric_key(config.validation.select_on or HELD_OUT, _select_by(config, stage))


def measured_metrics(config: TrainConfig) -> tuple[str, ...]:
    """The metrics of every validation: those of `validation.metrics` and those that choose checkpoints."""
    stages = [stage for stage in ("psnr", "gan") if getattr(config, stage).steps]
    return tuple(
        dict.fromkeys([*config.validation.metrics, *(_select_by(config, stage) for stage in stages)])
    )


def with_selection(config: TrainConfig, has_held_out: bool, chosen_before: str | None = None) -> TrainConfig:
    """`config` with the defaults of `gan.select_by` and `validation.select_on` replaced by what is available here.

    Args:
        has_held_out: whether the data set has held-out images.
        chosen_before: the metric that chose the best checkpoint of stage 2 before a resume. It stays, even if its
            weights are missing now: another one would make the best checkpoints incomparable.

    Raises:
        UserError: `validation.select_on` is held_out, and there are none, but other sets.
    """
    gan, validation, names = config.gan, config.validation, list(config.validation.sets)
    if names and not has_held_out and validation.select_on == HELD_OUT:
        raise UserError(
            f"validation.select_on={HELD_OUT}: the data set has no held-out images; use {' or '.join(names)}"
        )
    if validation.select_on is None:
        chosen_set = names[0] if names and not has_held_out else HELD_OUT
        validation = validation.model_copy(update={"select_on": chosen_set})
    if gan.steps and gan.select_by is None and (names or has_held_out):
        metric = metric_of(chosen_before) if chosen_before else _default_metric(config)
        gan = gan.model_copy(update={"select_by": metric})
    return config.model_copy(update={"gan": gan, "validation": validation})


def _select_by(config: TrainConfig, stage: str) -> str:
    return config.psnr.select_by if stage == "psnr" else config.gan.select_by or "psnr_y"


def _default_metric(config: TrainConfig) -> str:
    """The first perceptual metric whose weights are available, else psnr_y with a note."""
    reasons = unavailable(PERCEPTUAL, config.validation.weights_folder)
    chosen = next((name for name in PERCEPTUAL if name not in reasons), "psnr_y")
    if chosen == "psnr_y":
        print(
            f"note: gan.select_by=psnr_y, which favors smooth images: no perceptual metric is available "
            f"({'; '.join(reasons.values())})",
            flush=True,
        )
    return chosen
