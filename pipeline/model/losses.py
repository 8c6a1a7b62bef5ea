"""The three losses of ESRGAN's generator, and the discriminator's loss (ESRGAN, sec. 3.2 to 3.4).

Every function takes `mean`, which reduces a tensor to a scalar. Training on several workers passes a mean over the
global batch, so that the losses do not depend on the number of workers.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional

Mean = Callable[[Tensor], Tensor]


def pixel_loss(sr: Tensor, hr: Tensor, mean: Mean = torch.mean) -> Tensor:
    """L1 distance of two image batches (N, 3, H, W), a scalar in the images' units."""
    return mean((_full(sr) - _full(hr)).abs())


def perceptual_loss(
    features_sr: Mapping[str, Tensor],
    features_hr: Mapping[str, Tensor],
    weights: Mapping[str, float],
    mean: Mean = torch.mean,
) -> Tensor:
    """Weighted sum over layers of the L1 distance of VGG features before activation (ESRGAN, sec. 3.3).

    Args:
        features_sr: `VGGFeatures` of the generator's output: layer name to (N, channels, height, width).
        features_hr: the same for the target, computed without gradient.
        weights: layer name to weight; each layer must be in both.
        mean: see the module's docstring.
    """
    terms = []
    for layer, weight in weights.items():
        difference = _full(features_sr[layer]) - _full(features_hr[layer])
        terms.append(weight * mean(difference.abs()))
    return torch.stack(terms).sum()


def relativistic_losses(
    real_logits: Tensor,
    fake_logits: Tensor,
    mean: Mean = torch.mean,
    averages: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Relativistic average losses (ESRGAN, eq. 1 and 2), each the mean of its two terms.

    In the generator's loss the real logits are constants. In the discriminator's loss, gradients flow through both
    kinds of logits and through both means.

    Args:
        real_logits: the discriminator's output on real images, any shape.
        fake_logits: its output on the generator's images.
        mean: see the module's docstring.
        averages: means of all real and of all fake logits, over the global batch and with gradients; default: `mean` of
            each.

    Returns:
        (generator's loss, discriminator's loss).
    """
    real, fake = _full(real_logits), _full(fake_logits)
    constant = real.detach()
    mean_real, mean_fake = averages or (mean(real), mean(fake))
    generator_loss = (
        mean(_bce_with_real(mean_fake - constant)) + mean(_bce_with_real(fake - mean_real.detach()))
    ) / 2
    discriminator_loss = (mean(_bce_with_real(real - mean_fake)) + mean(_bce_with_real(mean_real - fake))) / 2
    return generator_loss, discriminator_loss


def _bce_with_real(logits: Tensor) -> Tensor:
    """Binary cross-entropy with logits against the label "real"; logsigmoid is numerically stable."""
    return -functional.logsigmoid(logits)


def _full(tensor: Tensor) -> Tensor:
    """float32 or float64: small differences vanish in sums of bfloat16."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()
