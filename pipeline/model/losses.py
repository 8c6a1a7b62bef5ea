"""The losses of ESRGAN's generator and discriminator (ESRGAN, sec. 3.2 to 3.4), and alternatives to them.

Every function takes `mean`, which reduces a tensor to a scalar. Training on several workers passes a mean over the
global batch, so that the losses do not depend on the number of workers.
"""

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

Mean = Callable[[Tensor], Tensor]


PixelKind = Literal["l1", "charbonnier"]
CHARBONNIER_EPSILON = 1e-3
"""In the images' units (LapSRN, Lai et al. 2017, sec. 3.2)."""
# MS-SSIM's constants (Wang et al. 2003, sec. 3.2): weights of the five scales, a Gaussian window, C1 and C2 for images
# in [0, 1].
SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
WINDOW_PX, WINDOW_SIGMA = 11, 1.5
C1, C2 = 0.01**2, 0.03**2


def pixel_loss(sr: Tensor, hr: Tensor, mean: Mean = torch.mean, kind: PixelKind = "l1") -> Tensor:
    """Distance of two image batches (N, 3, H, W), a scalar in the images' units.

    l1: the mean of |d|; charbonnier: of sqrt(d^2 + 0.001^2), which is L1 with a smooth minimum.
    """
    difference = _full(sr) - _full(hr)
    if kind == "charbonnier":
        return mean((difference.square() + CHARBONNIER_EPSILON**2).sqrt())
    return mean(difference.abs())


def ms_ssim_loss(sr: Tensor, hr: Tensor, mean: Mean = torch.mean) -> Tensor:
    """1 - MS-SSIM (Wang et al. 2003; as a loss: Zhao et al. 2017), from 0 (equal images) to 1.

    The window is 11 pixels and does not leave the image. Images of less than 176 pixels have fewer than the five
    scales (128: four, 64: three); their weights are divided by their sum.

    Args:
        sr: image batch (N, C, H, W) in [0, 1], H and W at least 11.
        hr: the same shape.
        mean: see the module's docstring; it reduces one value for each image.
    """
    sr, hr = _full(sr), _full(hr)
    count = 1
    while count < len(SCALE_WEIGHTS) and min(sr.shape[2:]) >> count >= WINDOW_PX:
        count += 1
    total = sum(SCALE_WEIGHTS[:count])
    product = sr.new_ones(())
    for scale, weight in enumerate(SCALE_WEIGHTS[:count]):
        if scale:
            sr, hr = functional.avg_pool2d(sr, 2), functional.avg_pool2d(hr, 2)
        luminance, contrast_structure = _ssim_terms(sr, hr)
        term = contrast_structure * luminance if scale == count - 1 else contrast_structure
        # Images of negative correlation: the power is undefined below 0, and has an infinite slope at 0.
        product = product * term.mean((1, 2, 3)).clamp(min=1e-6) ** (weight / total)
    return 1 - mean(product)


def _ssim_terms(sr: Tensor, hr: Tensor) -> tuple[Tensor, Tensor]:
    """Luminance, and contrast times structure, of every window: (N, C, H - 10, W - 10)."""
    moments = _windowed(torch.cat([sr, hr, sr * sr, hr * hr, sr * hr], 1))
    mean_sr, mean_hr, square_sr, square_hr, product = moments.chunk(5, 1)
    means, mean_squares = mean_sr * mean_hr, mean_sr.square() + mean_hr.square()
    luminance = (2 * means + C1) / (mean_squares + C1)
    contrast_structure = (2 * (product - means) + C2) / (square_sr + square_hr - mean_squares + C2)
    return luminance, contrast_structure


def _windowed(images: Tensor) -> Tensor:
    """Gaussian-weighted mean of every window that is inside the images.

    Products with banded matrices: in TF32, in which a GPU may compute convolutions, the differences of these moments
    would be rounding errors.
    """
    rows, columns = (_gaussian_bands(size, images) for size in images.shape[2:])
    return rows @ images @ columns.T


def _gaussian_bands(size: int, like: Tensor) -> Tensor:
    """(size - 10, size): row i holds the window's weights for the pixels i to i + 10."""
    pixels = torch.arange(size, device=like.device)
    offsets = pixels - pixels[: size - WINDOW_PX + 1, None]
    weights = torch.exp(-(((offsets - WINDOW_PX // 2).to(like.dtype) / WINDOW_SIGMA) ** 2) / 2)
    weights = weights * ((offsets >= 0) & (offsets < WINDOW_PX))
    return weights / weights.sum(1, keepdim=True)


def perceptual_loss(
    features_sr: Mapping[str, Tensor],
    features_hr: Mapping[str, Tensor],
    weights: Mapping[str, float],
    mean: Mean = torch.mean,
) -> Tensor:
    """Weighted sum over layers of the L1 distance of features, in the paper VGG19's before activation (sec. 3.3).

    Args:
        features_sr: `VGGFeatures` or `Lite0Features` of the generator's output: layer name to (N, channels, H, W).
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


def vanilla_losses(
    real_logits: Tensor, fake_logits: Tensor, mean: Mean = torch.mean
) -> tuple[Tensor, Tensor]:
    """The original GAN losses (Goodfellow et al. 2014), the generator's not saturating, as in Real-ESRGAN.

    Arguments are those of `relativistic_losses`.

    Returns:
        (generator's loss: -log D(fake), discriminator's loss: -log D(real) - log(1 - D(fake))).
    """
    real, fake = _full(real_logits), _full(fake_logits)
    return mean(_bce_with_real(fake)), mean(_bce_with_real(real)) + mean(_bce_with_real(-fake))


def _bce_with_real(logits: Tensor) -> Tensor:
    """Binary cross-entropy with logits against the label "real"; logsigmoid is numerically stable."""
    return -functional.logsigmoid(logits)


def _full(tensor: Tensor) -> Tensor:
    """float32 or float64: small differences vanish in sums of bfloat16."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()
