"""PSNR, SSIM and color drift of batches of images on their device, in float64.

`pipeline.imaging.psnr` and `pipeline.imaging.ssim` are the same metrics on one image with scikit-image.
"""

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.imaging import downscale_batch

SSIM_WINDOW_PX = 11
_LUMA = (65.481, 128.553, 24.966)
_COLOR_PX = 16
# Values in a strip of rows: few on a CPU, so that the five maps fit its cache; on a GPU they bound the memory.
_CPU_STRIP, _GPU_STRIP = 2**15, 2**22


def luma(images: Tensor) -> Tensor:
    """BT.601 luma, 16 to 235, not rounded, of float64 RGB (N, 3, H, W) from 0 to 255, as (N, 1, H, W)."""
    red, green, blue = images.unbind(1)
    return (16 + (red * _LUMA[0] + green * _LUMA[1] + blue * _LUMA[2]) / 255)[:, None]


def psnr(sr: Tensor, hr: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of float64 (N, C, H, W) from 0 to 255, as (N,); infinite for equal images."""
    return 10 * torch.log10(255.0**2 * sr[0].numel() / _sums((sr - hr).square()))


def ssim(sr: Tensor, hr: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004) of float64 (N, C, H, W) from 0 to 255, as (N,): the channels' mean.

    Gaussian window of 11 px, sigma 1.5, no padding: both sides have at least 11 px.
    """
    channels, height, width = sr.shape[1:]
    last = height - SSIM_WINDOW_PX + 1
    rows = max(8, (_CPU_STRIP if sr.device.type == "cpu" else _GPU_STRIP) // (channels * width))
    total = sr.new_zeros(len(sr))
    for top in range(0, last, rows):
        strip = slice(top, min(top + rows, last) + SSIM_WINDOW_PX - 1)
        total += _sums(_similarities(sr[:, :, strip], hr[:, :, strip]))
    return total / (channels * last * (width - SSIM_WINDOW_PX + 1))


def _sums(values: Tensor) -> Tensor:
    """Sums of (N, C, H, W) as (N,), rows first: torch splits one large sum by the number of its threads."""
    return values.sum(3).sum((1, 2))


def _similarities(a: Tensor, b: Tensor) -> Tensor:
    """SSIM at every position of the window."""
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    mean_a, mean_b, aa, bb, ab = _blurred(torch.stack([a, b, a * a, b * b, a * b]))
    products, squares = mean_a * mean_b, mean_a.square() + mean_b.square()
    covariance, variances = ab - products, aa + bb - squares
    return (2 * products + c1) * (2 * covariance + c2) / ((squares + c1) * (variances + c2))


def _blurred(images: Tensor) -> Tensor:
    """Gaussian filter along the last two axes, without padding."""
    radius = SSIM_WINDOW_PX // 2
    offsets = torch.arange(-radius, radius + 1, dtype=torch.float64)
    window = torch.exp(-offsets.square() / (2 * 1.5**2))
    weights = (window / window.sum()).tolist()
    # Shifted sums: on the CPU seven times as fast as torch's float64 convolution.
    for axis in (-2, -1):
        length = images.shape[axis] - 2 * radius
        result = images.narrow(axis, radius, length) * weights[radius]
        for shift in range(radius):
            for start in (shift, 2 * radius - shift):
                result.add_(images.narrow(axis, start, length), alpha=weights[shift])
        images = result
    return images


def color_drift(sr: Tensor, lr: Tensor) -> Tensor:
    """Mean absolute difference, in 8-bit levels, of the downscaled SR images' colors from those of the LR images.

    Colors are means of 16 x 16 LR pixels: single pixels also differ where an SR image is only blurred (bicubic: by 1 to
    5 levels). SR images are downscaled as MATLAB does, so that an HR image differs by 0 from its LR image.

    Args:
        sr: uint8 (N, H, W, 3).
        lr: uint8 (N, H / scale, W / scale, 3).

    Returns:
        float64 (N, 3), for each channel.
    """
    difference = downscale_batch(sr, sr.shape[1] // lr.shape[1]).double() - lr.double()
    colors = functional.avg_pool2d(
        difference.permute(0, 3, 1, 2), _COLOR_PX, ceil_mode=True, count_include_pad=False
    )
    return colors.abs().mean((2, 3))
