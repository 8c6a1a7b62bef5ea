"""The three losses of ESRGAN's generator, and its discriminator's (sec. 3.2 to 3.4).

Every function takes `mean`, which reduces a tensor to a scalar. A trainer on several workers passes a mean over the
global batch, so that the losses do not depend on how the batch is spread.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional

Mean = Callable[[Tensor], Tensor]


def pixel_loss(sr: Tensor, hr: Tensor, mean: Mean = torch.mean) -> Tensor:
    """L1 distance of two image batches (N, 3, H, W), in units of their range."""
    return mean((_full(sr) - _full(hr)).abs())


def perceptual_loss(
    features_sr: Mapping[str, Tensor],
    features_hr: Mapping[str, Tensor],
    weights: Mapping[str, float],
    mean: Mean = torch.mean,
) -> Tensor:
    """Weighted sum over layers of the L1 distance of VGG features before activation (ESRGAN, sec. 3.3).

    Args:
        features_sr: what `VGGFeatures` gave for the generator's output.
        features_hr: the same for the target, computed without gradient.
        weights: layer name to weight; each layer must be in both.
        mean: see the module.
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

    In the generator's loss the real logits count as constants. In the discriminator's, gradients flow through both
    kinds of logits and through both means.

    Args:
        real_logits: the discriminator's output on photographs, any shape.
        fake_logits: its output on the generator's images.
        mean: see the module.
        averages: means of all real and of all fake logits, over the global batch and with gradients; by default
            `mean` of each.

    Returns:
        (generator's loss, discriminator's loss).
    """
    real, fake = _full(real_logits), _full(fake_logits)
    constant = real.detach()
    mean_real, mean_fake = averages or (mean(real), mean(fake))
    generator_loss = (mean(_surprise(mean_fake - constant)) + mean(_surprise(fake - mean_real.detach()))) / 2
    discriminator_loss = (mean(_surprise(real - mean_fake)) + mean(_surprise(mean_real - fake))) / 2
    return generator_loss, discriminator_loss


def _surprise(logits: Tensor) -> Tensor:
    """Cross-entropy of "true", -log sigmoid(x), exact where softplus switches to a line."""
    return -functional.logsigmoid(logits)


def _full(tensor: Tensor) -> Tensor:
    """At least float32: sums of bfloat16 lose the small differences that losses are made of."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()
