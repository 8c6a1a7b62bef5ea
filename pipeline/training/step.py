"""One training step of each stage, from a batch to updated weights.

Both functions return this worker's scalars as tensors on the device, without a host synchronization. Their mean over
workers is the value over the global batch.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline.model.device import join_side_stream, side_stream
from pipeline.model.losses import (
    ms_ssim_loss,
    perceptual_loss,
    pixel_loss,
    relativistic_losses,
    vanilla_losses,
)
from pipeline.training.config import GanStage, PsnrStage, TrainConfig
from pipeline.training.distributed import global_means, share_mean, unwrap
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


def psnr_step(
    state: TrainState, batch: Batch, config: TrainConfig, learning_rate: float | Tensor
) -> dict[str, Tensor]:
    """One update of the generator on the pixel loss, and MS-SSIM if it has a weight (stage 1).

    A step with a non-finite gradient changes nothing but the count of skipped steps.

    Args:
        learning_rate: a tensor on the device if the step is captured as a CUDA graph, which would keep a number.

    Returns:
        Losses and gradient_norm_generator, each a scalar.
    """
    mean = share_mean(batch.global_size)
    with _autocast(config, batch.lr.device):
        sr = state.generator(batch.lr)
    loss, losses = _image_losses(sr, batch.hr, mean, 1.0, config.psnr)
    loss.backward()
    norm, finite = _gradient_norm(state.generator, config.adam.clip_norm)
    _update(state.generator_optimizer, learning_rate, finite)
    state.count_skipped(finite)
    _update_ema(state.ema, state.generator, config.ema_decay, finite)
    return losses | {"gradient_norm_generator": norm}


def gan_step(
    state: TrainState,
    batch: Batch,
    features: nn.Module | None,
    config: TrainConfig,
    learning_rate: float | Tensor,
) -> dict[str, Tensor]:
    """One update of the generator and one of the discriminator (stage 2).

    As in BasicSR's ESRGAN model, both losses are taken on the same output of the generator, at the discriminator's
    weights before the step. One pass of the discriminator on real and fake images serves both losses, and each
    network's backward pass runs once.

    A step with a non-finite gradient in either network changes nothing but the count of skipped steps.

    Args:
        features: the network of the perceptual loss, image to features by layer; unused if its weight is 0.
        learning_rate: the generator's; a tensor as for `psnr_step`.

    Returns:
        Losses, mean logits, the discriminator's accuracy (0 to 1) and gradient norms, each a scalar.
    """
    assert state.discriminator is not None
    assert state.discriminator_optimizer is not None
    mean, gan = share_mean(batch.global_size), config.gan
    discriminator = state.discriminator
    # Batch norm's running statistics, or spectral norm's singular vectors: each forward pass updates them.
    buffers = list(unwrap(discriminator).buffers())
    saved_buffers = [buffer.clone() for buffer in buffers]

    # On a GPU the perceptual loss is computed while the generator and the discriminator are, whose kernels are short.
    device = batch.lr.device
    target: dict[str, Tensor] = {}
    if gan.perceptual_weight:
        assert features is not None
        with side_stream(device), _autocast(config, device), torch.no_grad():
            target = features(batch.hr)
    with _autocast(config, device):
        sr = state.generator(batch.lr)

    # Gradient of the losses on pixels and features at the generator's output; this frees their graph.
    cut = sr.detach().requires_grad_()
    with side_stream(device):
        content, losses = _image_losses(cut, batch.hr, mean, gan.pixel_weight, gan)
        perceptual = content.new_zeros(())
        if gan.perceptual_weight:
            assert features is not None
            with _autocast(config, device):
                output = features(cut)
            perceptual = perceptual_loss(output, target, config.perceptual.layers, mean)
            content = content + gan.perceptual_weight * perceptual
        (gradient,) = torch.autograd.grad(content, cut)

    # The fake logits are returned twice: the generator's loss must not reach the discriminator's parameters, nor the
    # discriminator's loss the generator.
    with _autocast(config, device):
        real, fake, fake_for_generator = discriminator(batch.hr, sr)
    join_side_stream(device)
    if gan.loss == "relativistic":
        mean_real, mean_fake, mean_for_generator = global_means(real, fake, fake_for_generator)
        _, discriminator_loss = relativistic_losses(real, fake, mean, (mean_real, mean_fake))
        generator_loss, _ = relativistic_losses(
            real, fake_for_generator, mean, (mean_real, mean_for_generator)
        )
    else:
        mean_real = mean_fake = real.new_zeros(())
        _, discriminator_loss = vanilla_losses(real, fake, mean)
        generator_loss, _ = vanilla_losses(real, fake_for_generator, mean)
    total = discriminator_loss + gan.adversarial_weight * generator_loss
    torch.autograd.backward([total, sr], [None, gradient])

    generator_norm, generator_finite = _gradient_norm(state.generator, config.adam.clip_norm)
    discriminator_norm, discriminator_finite = _gradient_norm(discriminator, config.adam.clip_norm)
    finite = generator_finite & discriminator_finite
    discriminator_share = (gan.discriminator_learning_rate or gan.learning_rate) / gan.learning_rate
    _update(state.generator_optimizer, learning_rate, finite)
    _update(state.discriminator_optimizer, learning_rate * discriminator_share, finite)
    _restore_unless(finite, buffers, saved_buffers)
    state.count_skipped(finite)
    _update_ema(state.ema, state.generator, config.ema_decay, finite)

    with torch.no_grad():
        return losses | {
            "loss_perceptual": perceptual.detach(),
            "loss_adversarial": generator_loss.detach(),
            "loss_discriminator": discriminator_loss.detach(),
            "discriminator_real": mean(real),
            "discriminator_fake": mean(fake),
            # Share of images whose logit is on the correct side: of the other kind's mean, or of 0 (vanilla).
            "discriminator_accuracy": 0.5
            * (mean((real > mean_fake).to(real.dtype)) + mean((fake < mean_real).to(real.dtype))),
            "gradient_norm_generator": generator_norm,
            "gradient_norm_discriminator": discriminator_norm,
        }


def _autocast(config: TrainConfig, device: torch.device) -> AbstractContextManager[None]:
    """The context of the networks' forward passes."""
    return torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16")


def _image_losses(
    sr: Tensor, hr: Tensor, mean: Callable[[Tensor], Tensor], pixel_weight: float, stage: PsnrStage | GanStage
) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum of the losses on pixels, and each of them by its name in the records."""
    pixel = pixel_loss(sr, hr, mean, stage.pixel_loss)
    total, losses = pixel_weight * pixel, {"loss_pixel": pixel.detach()}
    if stage.ms_ssim_weight:
        ms_ssim = ms_ssim_loss(sr, hr, mean)
        total, losses["loss_ms_ssim"] = total + stage.ms_ssim_weight * ms_ssim, ms_ssim.detach()
    return total, losses


def _gradient_norm(network: nn.Module, limit: float | None) -> tuple[Tensor, Tensor]:
    """The norm of all gradients before clipping to `limit`, and whether it is finite; both scalars on the device.

    Gradients are already means over workers, so all workers get the same values.
    """
    parameters = list(network.parameters())
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    if limit is not None:
        nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return norm, torch.isfinite(norm)


def _update(optimizer: torch.optim.Optimizer, learning_rate: float | Tensor, finite: Tensor) -> None:
    """One optimizer step, skipped on the device if `finite` is false; clears the gradients."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    # The hook of torch.amp.GradScaler: a fused Adam reads this tensor in its kernel and then updates neither weights
    # nor moments nor its step count. Reading `finite` on the host instead would wait for the device in every step.
    optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


@torch.no_grad()
def _update_ema(ema: nn.Module, network: nn.Module, decay: float, finite: Tensor) -> None:
    """ema = decay * ema + (1 - decay) * network if `finite`, else no change."""
    averages: list[Tensor] = list(ema.parameters())
    parameters: list[Tensor] = list(unwrap(network).parameters())
    weight = finite.to(averages[0].dtype) * (1 - decay)
    if not weight.is_cuda:
        torch._foreach_lerp_(averages, parameters, [weight] * len(averages))
        return
    # A few kernels for all tensors, instead of one for each.
    changes = torch._foreach_sub(parameters, averages)
    torch._foreach_mul_(changes, weight)
    torch._foreach_add_(averages, changes)


@torch.no_grad()
def _restore_unless(finite: Tensor, buffers: list[Tensor], saved: list[Tensor]) -> None:
    """Undoes a non-finite step's changes of `buffers`."""
    for buffer, old in zip(buffers, saved, strict=True):
        buffer.copy_(torch.where(finite, buffer, old))
