"""All that a run knows between two steps, as one value that is saved and loaded in one place."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.model import RRDBNet, UNetDiscriminator, VGGStyleDiscriminator
from pipeline.model.seeding import seeded
from pipeline.training.config import AdamConfig, TrainConfig
from pipeline.training.distributed import bare, distribute, with_global_batch_norm

Stage = Literal["psnr", "gan"]


@dataclass(frozen=True)
class Best:
    """One of the best validations so far within a stage."""

    step: int
    value: float
    metric: str | None = None
    """Name of what `value` measures; older runs have not noted it, and had one only."""


@dataclass(frozen=True)
class Validation:
    """Validation metrics of the EMA weights, and the step they were measured at."""

    step: int
    metrics: dict[str, float]


@dataclass
class TrainState:
    """Networks, averaged weights, optimisers and counters of a run.

    `generator` and `discriminator` are what the step calls: wrapped for data-parallel training where there are several
    workers. Samples, crops and learning rates are functions of `step`, so they need no state of their own.
    """

    stage: Stage
    step: int
    """Updates done over both stages."""
    generator: nn.Module
    ema: RRDBNet
    generator_optimizer: torch.optim.Adam
    discriminator: nn.Module | None = None
    discriminator_optimizer: torch.optim.Adam | None = None
    best: tuple[Best, ...] = ()
    """The best first."""
    validation: Validation | None = None
    """The latest one."""
    damaged: int = 0
    """Damaged patches met so far, over all workers."""
    skipped: Tensor = field(default_factory=lambda: torch.zeros(2))
    """Steps left out for non-finite gradients: in a row, and altogether."""

    @torch.no_grad()
    def count_skipped(self, finite: Tensor) -> None:
        """Counts a step that was left out, on the device."""
        bad = (~finite).to(self.skipped.dtype)
        self.skipped[0] = (self.skipped[0] + 1) * bad
        self.skipped[1] += bad

    def rank(self, one: Best, keep: int) -> None:
        """Puts a validation in its place among the best `keep`; of equal ones the earlier counts for more."""
        self.best = tuple(sorted([*self.best, one], key=lambda best: -best.value)[:keep])

    def tensors(self) -> dict[str, Tensor]:
        """Everything but the averaged weights, by name; the tensors are the live ones."""
        named = {f"generator.{name}": value for name, value in bare(self.generator).state_dict().items()}
        named |= _optimizer_tensors("generator_optimizer", bare(self.generator), self.generator_optimizer)
        if self.discriminator is not None and self.discriminator_optimizer is not None:
            network = bare(self.discriminator)
            named |= {f"discriminator.{name}": value for name, value in network.state_dict().items()}
            named |= _optimizer_tensors("discriminator_optimizer", network, self.discriminator_optimizer)
        return named | {"skipped": self.skipped}

    def scalars(self) -> dict[str, Any]:
        """The counters, as JSON values."""
        latest = self.validation
        return {
            "stage": self.stage,
            "step": self.step,
            "best": [asdict(one) for one in self.best],
            "damaged": self.damaged,
            "metrics": latest.metrics if latest else {},
            "metrics_step": latest.step if latest else None,
        }

    @torch.no_grad()
    def load(self, ema: dict[str, Tensor], tensors: dict[str, Tensor], scalars: dict[str, Any]) -> None:
        """Takes over saved values; the networks must be of the saved stage.

        Raises:
            UserError: names or shapes differ from this configuration's.
        """
        mine = self.tensors()
        optimizer_names = {name for name in tensors if "_optimizer." in name}
        if set(mine) - {n for n in mine if "_optimizer." in n} != set(tensors) - optimizer_names:
            odd = sorted(set(mine) ^ set(tensors))[0]
            raise UserError(f"checkpoint: its tensors are not this configuration's (for one: {odd})")
        for name, value in mine.items():
            if "_optimizer." not in name and value.shape != tensors[name].shape:
                raise UserError(
                    f"checkpoint: {name} has the shape {list(tensors[name].shape)}, but {list(value.shape)} in this "
                    "configuration"
                )
        self.ema.load_state_dict(ema)
        bare(self.generator).load_state_dict(_below("generator.", tensors))
        _load_optimizer(
            self.generator_optimizer, bare(self.generator), _below("generator_optimizer.", tensors)
        )
        if self.discriminator is not None and self.discriminator_optimizer is not None:
            network = bare(self.discriminator)
            network.load_state_dict(_below("discriminator.", tensors))
            _load_optimizer(
                self.discriminator_optimizer, network, _below("discriminator_optimizer.", tensors)
            )
        self.skipped.copy_(tensors["skipped"])
        self.stage, self.step, self.damaged = scalars["stage"], scalars["step"], scalars["damaged"]
        self.best = best_of(scalars)
        # Checkpoints of older versions have metrics without their step.
        step = scalars.get("metrics_step")
        self.validation = None if step is None else Validation(step, scalars["metrics"])


def best_of(scalars: dict[str, Any]) -> tuple[Best, ...]:
    """The best validations that a checkpoint's counters name, the best first; older runs named one or none."""
    named = scalars["best"] or []
    return tuple(Best(**one) for one in ([named] if isinstance(named, dict) else named))


def by_metric(bests: Iterable[Best], metric: str) -> tuple[Best, ...]:
    """Those that `metric` has measured: values of another one cannot be compared with."""
    return tuple(replace(best, metric=metric) for best in bests if best.metric in (None, metric))


def new_state(config: TrainConfig, stage: Stage, device: torch.device) -> TrainState:
    """A state at the beginning of `stage`, its weights drawn from the seed, ready for this group of workers."""
    size = config.model

    def build() -> RRDBNet:
        return RRDBNet(
            size.num_feat, size.num_block, size.num_grow_ch, size.residual_scale, scale=config.data.scale
        )

    generator = _placed(seeded(config.seed, build), config, device)
    ema = _placed(build(), config, device)
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


def begin_gan(state: TrainState, config: TrainConfig, device: torch.device) -> None:
    """Turns the end of stage 1 into the beginning of stage 2.

    The generator starts from the averaged weights (what stage 1 hands over), with fresh optimisers.
    """
    generator = bare(state.generator)
    generator.load_state_dict(state.ema.state_dict())
    state.generator_optimizer = _adam(generator, config.adam)
    state.stage, state.best = "gan", ()
    _add_discriminator(state, config, device)


def _add_discriminator(state: TrainState, config: TrainConfig, device: torch.device) -> None:
    feat = config.model.discriminator_num_feat

    def build() -> nn.Module:
        if config.model.discriminator == "unet":
            return UNetDiscriminator(num_feat=feat)
        return VGGStyleDiscriminator(input_px=config.crop_px, num_feat=feat)

    # Another seed than the generator's: equal draws in both networks would be related.
    network = with_global_batch_norm(_placed(seeded(config.seed + 1, build), config, device))
    example = torch.zeros(1, 3, config.crop_px, config.crop_px, device=device)
    state.discriminator = distribute(network, example)
    state.discriminator_optimizer = _adam(network, config.adam)


def _placed(network: Any, config: TrainConfig, device: torch.device) -> Any:
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    return network.to(device, memory_format=layout)


def _adam(network: nn.Module, config: AdamConfig) -> torch.optim.Adam:
    return torch.optim.Adam(network.parameters(), betas=(config.beta1, config.beta2), fused=True)


def _optimizer_tensors(prefix: str, network: nn.Module, optimizer: torch.optim.Adam) -> dict[str, Tensor]:
    return {
        f"{prefix}.{name}.{key}": value
        for name, parameter in network.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def _load_optimizer(optimizer: torch.optim.Adam, network: nn.Module, tensors: dict[str, Tensor]) -> None:
    for name, parameter in network.named_parameters():
        saved = {
            key: tensors[f"{name}.{key}"]
            for key in ("step", "exp_avg", "exp_avg_sq")
            if f"{name}.{key}" in tensors
        }
        if saved:
            optimizer.state[parameter] = {
                key: torch.empty_like(parameter).copy_(value)
                if value.ndim
                else value.to(parameter.device).clone()
                for key, value in saved.items()
            }


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
