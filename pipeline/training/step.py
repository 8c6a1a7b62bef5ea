"""One training step of each stage, from a batch to updated weights.

Both functions return local scalars on the device (nothing waits for them); their average over workers is the value
over the global batch.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline.model.losses import perceptual_loss, pixel_loss, relativistic_losses
from pipeline.training.distributed import bare, global_means, share_mean
from pipeline.training.state import TrainState


@dataclass(frozen=True)
class Batch:
    """This worker's share of a step, on the training device."""

    lr: Tensor
    """(B, 3, H, W), float, in [0, 1]."""
    hr: Tensor
    """(B, 3, H * scale, W * scale), float, in [0, 1]."""
    global_size: int
    """Samples in the step over all workers."""


@dataclass(frozen=True)
class StepSettings:
    """What both steps need besides the state and the batch."""

    learning_rate: float
    ema_decay: float
    precision: str = "fp32"
    """`fp32`, `tf32` (what `set_precision` was given), or `bf16`: convolutions in bfloat16 while losses, logits and the
    generator's output stay in float32."""
    clip_norm: float | None = None
    """Largest gradient norm of each network."""

    def autocast(self, device: torch.device) -> AbstractContextManager[None]:
        """The context in which networks run."""
        return torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "bf16")


@dataclass(frozen=True)
class GanWeights:
    """Weights of the generator's three losses (ESRGAN, eq. 3)."""

    pixel: float
    perceptual: float
    adversarial: float


def psnr_step(state: TrainState, batch: Batch, settings: StepSettings) -> dict[str, Tensor]:
    """One update of the generator on the L1 loss (stage 1)."""
    mean = share_mean(batch.global_size)
    with settings.autocast(batch.lr.device):
        sr = state.generator(batch.lr)
    loss = pixel_loss(sr, batch.hr, mean)
    loss.backward()
    norm, finite = _gradient_norm(state.generator, settings.clip_norm)
    _update(state.generator_optimizer, settings.learning_rate, finite)
    state.count_skipped(finite)
    _average(state.ema, state.generator, settings.ema_decay)
    return {"loss_pixel": loss.detach(), "gradient_norm_generator": norm}


def gan_step(
    state: TrainState,
    batch: Batch,
    features: nn.Module | None,
    feature_weights: Mapping[str, float],
    weights: GanWeights,
    settings: StepSettings,
) -> dict[str, Tensor]:
    """One update of the generator and one of the discriminator (stage 2).

    The order is ESRGAN's: both losses are taken at the weights before the step, on the same output of the generator.
    The graph is cut at that output. So one forward of the discriminator on real and one on fake serve both losses,
    and each network's backward runs once.
    """
    assert state.discriminator is not None
    assert state.discriminator_optimizer is not None
    mean = share_mean(batch.global_size)
    discriminator = state.discriminator
    running = _buffers(discriminator)
    before = [buffer.clone() for buffer in running]

    with settings.autocast(batch.lr.device):
        sr = state.generator(batch.lr)
    cut = sr.detach().requires_grad_()

    # The generator's pixel and perceptual losses, down to the cut; VGG's graph is freed here.
    pixel = pixel_loss(cut, batch.hr, mean)
    content = weights.pixel * pixel
    perceptual = pixel.new_zeros(())
    if weights.perceptual:
        assert features is not None
        with settings.autocast(batch.lr.device):
            with torch.no_grad():
                target = features(batch.hr)
            output = features(cut)
        perceptual = perceptual_loss(output, target, feature_weights, mean)
        content = content + weights.perceptual * perceptual
    (gradient,) = torch.autograd.grad(content, cut)

    # Real and fake stay two batches: each is normalised by its own statistics.
    with settings.autocast(batch.lr.device):
        real_logits = discriminator(batch.hr)
        fake_logits = discriminator(cut)
    mean_real, mean_fake = global_means(real_logits, fake_logits)
    generator_loss, discriminator_loss = relativistic_losses(
        real_logits, fake_logits, mean, (mean_real, mean_fake)
    )
    (adversarial_gradient,) = torch.autograd.grad(generator_loss, cut, retain_graph=True)
    discriminator_loss.backward(inputs=list(discriminator.parameters()))
    sr.backward(gradient.add_(adversarial_gradient, alpha=weights.adversarial))

    generator_norm, generator_finite = _gradient_norm(state.generator, settings.clip_norm)
    discriminator_norm, discriminator_finite = _gradient_norm(discriminator, settings.clip_norm)
    finite = generator_finite & discriminator_finite
    _update(state.generator_optimizer, settings.learning_rate, finite)
    _update(state.discriminator_optimizer, settings.learning_rate, finite)
    _keep_if(finite, running, before)
    state.count_skipped(finite)
    _average(state.ema, state.generator, settings.ema_decay)

    with torch.no_grad():
        real, fake = real_logits.detach(), fake_logits.detach()
        return {
            "loss_pixel": pixel.detach(),
            "loss_perceptual": perceptual.detach(),
            "loss_adversarial": generator_loss.detach(),
            "loss_discriminator": discriminator_loss.detach(),
            "discriminator_real": mean(real),
            "discriminator_fake": mean(fake),
            # How often the discriminator ranks an image on the right side of the other kind's average.
            "discriminator_accuracy": 0.5
            * (mean((real > mean_fake).to(real.dtype)) + mean((fake < mean_real).to(real.dtype))),
            "gradient_norm_generator": generator_norm,
            "gradient_norm_discriminator": discriminator_norm,
        }


def _gradient_norm(network: nn.Module, limit: float | None) -> tuple[Tensor, Tensor]:
    """The norm of all gradients, scaled down to `limit` if larger, and whether it is finite.

    Gradients are already averages over workers, so a non-finite value anywhere shows on every worker alike.
    """
    parameters = list(network.parameters())
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    if limit is not None:
        nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return norm, torch.isfinite(norm)


def _update(optimizer: torch.optim.Optimizer, learning_rate: float, finite: Tensor) -> None:
    """One optimiser step, left out on the device where the gradients are not finite; then no gradients."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


@torch.no_grad()
def _average(ema: nn.Module, network: nn.Module, decay: float) -> None:
    """ema = decay * ema + (1 - decay) * network."""
    torch._foreach_lerp_(list(ema.parameters()), list(bare(network).parameters()), 1 - decay)


def _buffers(network: nn.Module) -> list[Tensor]:
    return list(bare(network).buffers())


@torch.no_grad()
def _keep_if(finite: Tensor, buffers: list[Tensor], before: list[Tensor]) -> None:
    """Takes back what a non-finite step did to running statistics."""
    for buffer, old in zip(buffers, before, strict=True):
        buffer.copy_(torch.where(finite, buffer, old))
