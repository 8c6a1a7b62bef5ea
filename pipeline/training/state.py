"""Training state: everything needed to resume, saved and loaded together."""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.metrics import METRICS, metric_of
from pipeline.model import RRDBNet, UNetDiscriminator, VGGStyleDiscriminator
from pipeline.model.seeding import seeded
from pipeline.model.trunk import use_kernels
from pipeline.training.checkpoint import Stage
from pipeline.training.config import AdamConfig, TrainConfig
from pipeline.training.discriminate import PairedDiscriminator
from pipeline.training.distributed import distribute, unwrap


@dataclass(frozen=True)
class Best:
    """One of the best validations of the current stage."""

    step: int
    value: float
    metric: str
    """The metric that `value` is of, a key of `Validation.metrics`."""
    images: str = ""
    """Digest of the images, if they belong to one of `validation.sets`."""


@dataclass(frozen=True)
class Validation:
    """Validation metrics of the EMA weights, and the step they were measured at."""

    step: int
    metrics: dict[str, float]


@dataclass
class TrainState:
    """Networks, EMA weights, optimizers and counters of a run.

    `generator` and `discriminator` are what the step calls: the discriminator in PairedDiscriminator, and both wrapped
    in DistributedDataParallel if there are several workers. Samples, crops and learning rates are functions of `step`
    and need no state.
    """

    stage: Stage
    step: int
    """Optimizer steps done, over both stages."""
    generator: nn.Module
    ema: RRDBNet
    generator_optimizer: torch.optim.Adam
    discriminator: nn.Module | None = None
    discriminator_optimizer: torch.optim.Adam | None = None
    best: tuple[Best, ...] = ()
    """The best first."""
    validation: Validation | None = None
    """The latest one."""
    bicubic: dict[str, float] = field(default_factory=dict)
    """The metrics of a validation, of bicubic upscaling: the baseline; empty before the first validation."""
    bicubic_images: str = ""
    """Digest of the images that it was measured on."""
    corrupt_patches: int = 0
    """Corrupt patches replaced so far, over all workers."""
    skipped: Tensor = field(default_factory=lambda: torch.zeros(2))
    """Skipped optimizer steps (non-finite gradients): consecutive, total."""

    @torch.no_grad()
    def count_skipped(self, finite: Tensor) -> None:
        """Counts a step as skipped if `finite` (a boolean scalar on the device) is False; does not synchronize."""
        bad = (~finite).to(self.skipped.dtype)
        self.skipped[0] = (self.skipped[0] + 1) * bad
        self.skipped[1] += bad

    def insert_best(self, result: Best, keep: int) -> None:
        """Inserts a result into the top-`keep` list (ties: the earlier step wins), unless it is NaN."""
        sign = -1 if METRICS[metric_of(result.metric)].higher_is_better else 1
        if not math.isnan(result.value):
            self.best = tuple(sorted([*self.best, result], key=lambda best: sign * best.value)[:keep])

    def _parts(self) -> dict[str, tuple[nn.Module, torch.optim.Adam]]:
        """The networks of the stage with their optimizers, by their names in a checkpoint."""
        parts = {"generator": (unwrap(self.generator), self.generator_optimizer)}
        if self.discriminator is not None and self.discriminator_optimizer is not None:
            parts["discriminator"] = unwrap(self.discriminator), self.discriminator_optimizer
        return parts

    def tensors(self) -> dict[str, Tensor]:
        """All tensors but the EMA weights, by name; not copies."""
        named: dict[str, Tensor] = {}
        for part, (network, optimizer) in self._parts().items():
            named |= {f"{part}.{name}": value for name, value in network.state_dict().items()}
            for name, parameter in network.named_parameters():
                for key, value in optimizer.state.get(parameter, {}).items():
                    named[f"{part}_optimizer.{name}.{key}"] = value
        return named | {"skipped": self.skipped}

    def scalars(self) -> dict[str, Any]:
        """The counters, as JSON values."""
        latest = self.validation
        return {
            "stage": self.stage,
            "step": self.step,
            "best": [asdict(best) for best in self.best],
            "corrupt_patches": self.corrupt_patches,
            "metrics": latest.metrics if latest else {},
            "metrics_step": latest.step if latest else None,
            "bicubic": self.bicubic,
            "bicubic_images": self.bicubic_images,
        }

    @torch.no_grad()
    def load(self, ema: dict[str, Tensor], tensors: dict[str, Tensor], scalars: dict[str, Any]) -> None:
        """Loads a checkpoint; the networks must be of its stage.

        Raises:
            UserError: names or shapes of its tensors do not match this configuration.
        """
        current = self.tensors()
        optimizer_names = {name for name in tensors if "_optimizer." in name}
        if {name for name in current if "_optimizer." not in name} != set(tensors) - optimizer_names:
            first = sorted(set(current) ^ set(tensors))[0]
            raise UserError(f"checkpoint: its tensors do not match this configuration (the first: {first})")
        for name, value in current.items():
            if "_optimizer." not in name and value.shape != tensors[name].shape:
                raise UserError(
                    f"checkpoint: {name} has the shape {list(tensors[name].shape)}, but {list(value.shape)} in this "
                    "configuration"
                )
        self.ema.load_state_dict(ema)
        for part, (network, optimizer) in self._parts().items():
            network.load_state_dict(_below(f"{part}.", tensors))
            parameters = dict(network.named_parameters())
            for name, value in _below(f"{part}_optimizer.", tensors).items():
                parameter_name, _, key = name.rpartition(".")
                parameter = parameters[parameter_name]
                optimizer.state[parameter][key] = (
                    torch.empty_like(parameter).copy_(value)
                    if value.ndim
                    else value.to(parameter.device).clone()
                )
        self.skipped.copy_(tensors["skipped"])
        self.stage, self.step = scalars["stage"], scalars["step"]
        self.corrupt_patches = scalars["corrupt_patches"]
        self.best = best_of(scalars)
        self.bicubic, self.bicubic_images = scalars["bicubic"], scalars["bicubic_images"]
        step = scalars["metrics_step"]
        self.validation = None if step is None else Validation(step, scalars["metrics"])


def best_of(scalars: dict[str, Any]) -> tuple[Best, ...]:
    """The best validations in a checkpoint's state, the best first."""
    return tuple(Best(**best) for best in scalars["best"])


def of_metric(bests: Iterable[Best], metric: str, images: str) -> tuple[Best, ...]:
    """Those of `metric` on `images`: others are not comparable."""
    return tuple(best for best in bests if (best.metric, best.images) == (metric, images))


def new_state(config: TrainConfig, stage: Stage, device: torch.device) -> TrainState:
    """A state at the beginning of `stage`, with weights initialized from the seed, for this worker group."""

    generator = _placed(seeded(config.seed, lambda: build_generator(config)), config, device)
    use_kernels(generator)
    ema = _placed(build_generator(config), config, device)
    use_kernels(ema)  # in validations
    ema.load_state_dict(generator.state_dict())
    ema.requires_grad_(False)
    lr_px = config.crop_px // config.data.scale
    example = torch.zeros(1, 3, lr_px, lr_px, device=device)
    state = TrainState(
        stage=stage,
        step=0,
        generator=distribute(generator, example),
        ema=ema,
        generator_optimizer=_adam(generator, config.adam),
        skipped=torch.zeros(2, device=device),
    )
    if stage == "gan":
        _add_discriminator(state, config, device)
    return state


def build_generator(config: TrainConfig) -> RRDBNet:
    """The configured generator, with weights from torch's global random state. Raises UserError: no such scale."""
    size = config.model
    try:
        return RRDBNet(
            size.num_feat, size.num_block, size.num_grow_ch, size.residual_scale, scale=config.data.scale
        )
    except ValueError as error:
        raise UserError(f"data.{error}; choose another scale") from None


def build_discriminator(config: TrainConfig) -> nn.Module:
    """The configured discriminator, with weights from torch's global random state."""
    feat = config.model.discriminator_num_feat
    if config.model.discriminator == "unet":
        return UNetDiscriminator(num_feat=feat)
    return VGGStyleDiscriminator(input_px=config.crop_px, num_feat=feat)


def begin_gan(state: TrainState, config: TrainConfig, device: torch.device) -> None:
    """Turns the end of stage 1 into the beginning of stage 2.

    The generator starts from the EMA weights of stage 1, with new optimizers.
    """
    generator = unwrap(state.generator)
    generator.load_state_dict(state.ema.state_dict())
    state.generator_optimizer = _adam(generator, config.adam)
    state.stage, state.best = "gan", ()
    _add_discriminator(state, config, device)


def _add_discriminator(state: TrainState, config: TrainConfig, device: torch.device) -> None:
    # Different seed from the generator's, so that the initial weights are uncorrelated.
    network = _placed(seeded(config.seed + 1, lambda: build_discriminator(config)), config, device)
    example = torch.zeros(1, 3, config.crop_px, config.crop_px, device=device)
    state.discriminator = distribute(PairedDiscriminator(network), example, example)
    state.discriminator_optimizer = _adam(network, config.adam)


def _placed(network: Any, config: TrainConfig, device: torch.device) -> Any:
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    return network.to(device, memory_format=layout)


def _adam(network: nn.Module, config: AdamConfig) -> torch.optim.Adam:
    parameters = list(network.parameters())
    # Capturable: the step count stays on the device, so that the optimizer can be part of a CUDA graph.
    return torch.optim.Adam(
        parameters, betas=(config.beta1, config.beta2), fused=True, capturable=parameters[0].is_cuda
    )


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
