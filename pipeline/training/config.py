"""Configuration schema of a training run."""

from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from pipeline.data.config import DataConfig
from pipeline.model import DISCRIMINATORS, LAYERS, LITE0_LAYERS
from pipeline.model.config import ModelConfig
from pipeline.model.losses import PixelKind
from pipeline.model.rrdbnet import UNSHUFFLE
from pipeline.section import Section
from pipeline.tracking.config import TrackingConfig
from pipeline.training.init_config import InitConfig
from pipeline.training.validation_config import MetricName, ValidationConfig

PixelLoss = Annotated[
    PixelKind,
    Field(description="Pixel loss: l1, or charbonnier (LapSRN), which is L1 with a smooth minimum."),
]


class Schedule(Section):
    """Learning rate as a function of the stage's step: linear warm-up, then one of three shapes."""

    shape: Literal["constant", "halving", "cosine"] = Field(
        "constant", description="Shape after the warm-up."
    )
    warmup_steps: int = Field(0, ge=0, description="Linear warm-up steps.")
    milestones: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (), description="halving: milestones (steps) at which the rate is halved."
    )
    period_steps: int | None = Field(
        None,
        ge=1,
        description="cosine: length of a period, after which the rate restarts. Default: the whole stage.",
    )
    final_share: float = Field(
        0.0, ge=0, le=1, description="cosine: rate at the end of a period, as a share of the peak."
    )


class PsnrStage(Section):
    """Stage 1: the generator alone, on the pixel loss (ESRGAN, sec. 4.1)."""

    steps: int = Field(1_000_000, ge=0, description="Optimizer steps of stage 1; 0 skips it.")
    learning_rate: float = Field(2e-4, gt=0, description="Peak learning rate of stage 1.")
    pixel_loss: PixelLoss = "l1"
    ms_ssim_weight: float = Field(
        0.0, ge=0, description="Weight of the MS-SSIM loss; 5 is about the ratio of Zhao et al. 2017."
    )
    schedule: Schedule = Field(
        Schedule(shape="cosine", period_steps=250_000, final_share=5e-4),
        description="Learning rate over stage 1.",
    )
    select_by: MetricName = Field(
        "psnr_y", description="Validation metric that chooses the best checkpoint of stage 1."
    )


class GanStage(Section):
    """Stage 2: generator against discriminator, from stage 1's EMA weights (ESRGAN, eq. 3)."""

    steps: int = Field(400_000, ge=0, description="Optimizer steps of stage 2; 0 skips it.")
    allow_random_start: bool = Field(
        False,
        description="Accept psnr.steps=0 without init.generator: stage 2 starts from a randomly initialized generator.",
    )
    learning_rate: float = Field(1e-4, gt=0, description="Peak learning rate of stage 2.")
    discriminator_learning_rate: float | None = Field(
        None, gt=0, description="The discriminator's peak learning rate. Default: gan.learning_rate."
    )
    schedule: Schedule = Field(
        Schedule(shape="halving", milestones=(50_000, 100_000, 200_000, 300_000)),
        description="Learning rates of both networks over stage 2.",
    )
    select_by: MetricName | None = Field(
        None,
        description="Validation metric that chooses the best checkpoint of stage 2, which is registered. Default: the "
        "first of lpips, dists and feature_distance whose weights are available, else psnr_y.",
    )
    loss: Literal["relativistic", "vanilla"] = Field(
        "relativistic",
        description="Adversarial loss. relativistic: relativistic average (ESRGAN, sec. 3.2). vanilla: the original "
        "one, as in Real-ESRGAN.",
    )
    pixel_loss: PixelLoss = "l1"
    pixel_weight: float = Field(1e-2, ge=0, description="Weight of the pixel loss.")
    ms_ssim_weight: float = Field(0.0, ge=0, description="Weight of the MS-SSIM loss.")
    perceptual_weight: float = Field(1.0, ge=0, description="Weight of the perceptual loss.")
    adversarial_weight: float = Field(5e-3, ge=0, description="Weight of the adversarial loss.")


class PerceptualConfig(Section):
    """Features of the perceptual loss: VGG19's before activation (ESRGAN, sec. 3.3), or EfficientNet-Lite0's."""

    weights: str = Field(
        "imagenet",
        description="`imagenet` (torchvision's VGG19), `efficientnet_lite0` (of the extra `features`), `random` (a "
        "seeded VGG19, for tests), or the path of a VGG19 state dict.",
    )
    sha256: str | None = Field(
        None, pattern="^[0-9a-f]{64}$", description="Expected sha256 of the file in perceptual.weights."
    )
    layers: dict[str, Annotated[float, Field(ge=0)]] = Field(
        {"conv5_4": 1.0},
        min_length=1,
        description="Layers whose output is compared, with their weights: VGG19's convolutions, or "
        "EfficientNet-Lite0's `stem` and `block1` to `block7`.",
    )

    @model_validator(mode="after")
    def _layers_fit(self) -> "PerceptualConfig":
        layers: Iterable[str] = LITE0_LAYERS if self.weights == "efficientnet_lite0" else LAYERS
        unknown = [name for name in self.layers if name not in layers]
        if unknown:
            raise ValueError(
                f"layers has {', '.join(unknown)}, which weights={self.weights} lacks; it has {', '.join(layers)}"
            )
        return self


class AdamConfig(Section):
    """Adam, for both networks."""

    beta1: float = Field(0.9, ge=0, lt=1, description="Adam's first decay rate.")
    beta2: float = Field(
        0.99, ge=0, lt=1, description="Second decay rate: 0.99 as in BasicSR, 0.999 in the paper."
    )
    clip_norm: float | None = Field(
        None, gt=0, description="Largest gradient norm of each network; none: no clipping."
    )


class FaultConfig(Section):
    """Timeouts, retries and limits."""

    max_restarts: int = Field(
        10, ge=0, description="Failures without a new checkpoint in between that are retried."
    )
    max_failed_saves: int = Field(
        2, ge=0, description="Consecutive checkpoint failures tolerated (e.g. disk full)."
    )
    collective_timeout_s: float = Field(
        120.0, gt=0, description="Timeout of collectives, in seconds; a worker that does not answer is lost."
    )
    worker_start_timeout_s: float = Field(
        600.0,
        gt=0,
        description="Timeout for starting the worker processes, in seconds; an elastic group waits at most 30 s and is "
        "then planned again with the nodes that are present.",
    )
    max_skipped_steps: int = Field(
        10,
        ge=0,
        description="Consecutive steps with non-finite gradients that are skipped before training fails.",
    )


def _single(value: object) -> object:
    """A flag gives a list even for one number."""
    return value[0] if isinstance(value, list | tuple) and len(value) == 1 else value


class TrainConfig(Section):
    """All fields of a training run."""

    run_name: str = Field(
        "esrgan",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$",
        description="Name of the run and of its folder in `storage`; the same name again resumes it.",
    )
    seed: int = Field(0, ge=0, lt=2**63, description="Seed of initial weights, samples, crops and flips.")
    storage: str = Field(
        "runs", description="Folder (absolute in a Ray job) or s3:// prefix for run folders."
    )
    workers: Annotated[int | tuple[int, int], BeforeValidator(_single)] = Field(
        1,
        description="Training workers; [min, max] for an elastic group; 0 runs in this process, without Ray Train.",
    )
    use_gpu: bool = Field(False, description="One GPU for each worker.")
    cpus_per_worker: float = Field(1.0, gt=0, description="CPUs that each worker reserves.")
    wait_for_nodes_s: float = Field(
        0.0,
        ge=0,
        description="How long to wait for nodes that are started on demand, in seconds.",
    )
    data: DataConfig = Field(DataConfig(), description="The data set.")
    model: ModelConfig = Field(ModelConfig(), description="Network sizes.")
    init: InitConfig = Field(InitConfig(), description="Initial weights.")
    batch_size: int = Field(16, ge=1, description="Patches in a step, over all workers.")
    crop_px: int = Field(128, ge=16, description="Side of the high-resolution crop, in pixels.")
    shuffle_channels: bool = Field(
        False,
        description="Randomly permute the color channels of every patch, for data sets with few colors.",
    )
    psnr: PsnrStage = Field(PsnrStage(), description="Stage 1.")
    gan: GanStage = Field(GanStage(), description="Stage 2.")
    perceptual: PerceptualConfig = Field(PerceptualConfig(), description="Perceptual features.")
    adam: AdamConfig = Field(AdamConfig(), description="Optimizer.")
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = Field(0.999, description="Decay of the EMA weights.")
    precision: Literal["fp32", "tf32", "bf16"] = Field(
        "fp32",
        description="fp32: IEEE float32. tf32: GPUs (Ampere or newer) round the inputs of convolutions to 10 bits, "
        "which is faster. bf16: convolutions in bfloat16; losses, logits and the last convolution stay in float32.",
    )
    deterministic: bool = Field(
        False,
        description="Use deterministic algorithms: a GPU computes the same bits on every run and after a resume, but "
        "is slower. A CPU always does.",
    )
    cuda_graph: Literal["auto", "off"] = Field(
        "auto",
        description="auto: one worker on a GPU captures the training step as a CUDA graph, which is several times "
        "faster. off: operation by operation, as on CPUs and with several workers.",
    )
    channels_last: bool = Field(
        True, description="Keep activations channels-last: faster, same result up to rounding."
    )
    log_every_steps: int = Field(100, ge=1, description="Logging interval, in steps.")
    checkpoint_every_steps: int = Field(5000, ge=1, description="Checkpoint interval, in steps.")
    validate_every_steps: int = Field(5000, ge=1, description="Validation interval, in steps.")
    validation: ValidationConfig = Field(ValidationConfig(), description="Validation.")
    keep_checkpoints: int = Field(
        2, ge=1, description="Number of newest checkpoints to keep, in addition to the best."
    )
    keep_best_checkpoints: int = Field(
        1, ge=1, description="Number of best checkpoints of a stage to keep, by its select_by."
    )
    tracking: TrackingConfig = Field(TrackingConfig(), description="MLflow.")
    faults: FaultConfig = Field(FaultConfig(), description="Timeouts, retries and limits.")

    @model_validator(mode="after")
    def _sizes_fit(self) -> "TrainConfig":
        multiple = self.data.scale * UNSHUFFLE.get(self.data.scale, 1)
        if self.crop_px % multiple:
            raise ValueError(
                f"crop_px={self.crop_px} is not a multiple of {multiple}, which data.scale={self.data.scale} needs; "
                f"use {self.crop_px - self.crop_px % multiple}"
            )
        if self.crop_px > self.data.patch_px:
            raise ValueError(
                f"crop_px={self.crop_px} is larger than data.patch_px={self.data.patch_px}; lower it"
            )
        low, high = self.worker_range
        if not 0 <= low <= high or (high > 0 and low == 0):
            raise ValueError(f"workers={self.workers}: give 0, a number, or [min, max] with 1 <= min <= max")
        if self.batch_size < high:
            raise ValueError(
                f"batch_size={self.batch_size} is smaller than workers={high}; every worker needs a patch"
            )
        if self.psnr.steps + self.gan.steps == 0:
            raise ValueError("psnr.steps=0 and gan.steps=0: nothing to train")
        if (self.init.partial or self.init.adopt_sizes) and not (
            self.init.generator or self.init.discriminator
        ):
            name = "partial" if self.init.partial else "adopt_sizes"
            raise ValueError(
                f"init.{name}=true: no weights are given; set init.generator or init.discriminator"
            )
        if self.init.discriminator and not self.gan.steps:
            raise ValueError(
                f"init.discriminator={self.init.discriminator}: gan.steps=0 trains no discriminator; set gan.steps, or "
                "remove it"
            )
        if self.gan.steps:
            self._require_stage_two()
        return self

    def _require_stage_two(self) -> None:
        """Checks what stage 2 needs, so that it does not fail after all of stage 1. Raises ValueError."""
        name = self.model.discriminator
        network = DISCRIMINATORS[name]
        multiple = network.multiple_of
        if self.crop_px % multiple:
            raise ValueError(
                f"crop_px={self.crop_px} is not a multiple of {multiple}, which model.discriminator={name} needs; "
                f"use {max(multiple, self.crop_px - self.crop_px % multiple)}"
            )
        least = network.least_batch(self.crop_px)
        if self.batch_size < least:
            raise ValueError(
                f"batch_size={self.batch_size}: batch norm in model.discriminator={name} needs at least {least} "
                f"patches of crop_px={self.crop_px}; use batch_size={least}"
            )
        if self.psnr.steps == 0 and not (self.init.generator or self.gan.allow_random_start):
            raise ValueError(
                "psnr.steps=0: stage 2 would start from a random generator; set init.generator or psnr.steps, or set "
                "gan.allow_random_start=true if that is intended"
            )

    def alone(self) -> "TrainConfig":
        """These fields only, without those that a larger configuration (a sweep's) adds."""
        return TrainConfig.model_validate(self.model_dump(include=set(TrainConfig.model_fields)))

    @property
    def worker_range(self) -> tuple[int, int]:
        """Minimum and maximum number of workers."""
        return self.workers if isinstance(self.workers, tuple) else (self.workers, self.workers)
