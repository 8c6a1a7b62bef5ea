"""PSNR and SSIM of two images, as papers compute them, and of batches, with their detail ratio, on their device."""

from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.imaging.arrays import Image, require_image

Channel = Literal["y", "rgb"]
SSIM_WINDOW_PX = 11
_LUMA = (65.481, 128.553, 24.966)
# Values in a strip of rows: few on a CPU, so that the five maps fit its cache; on a GPU they bound the memory.
_CPU_STRIP, _GPU_STRIP = 2**15, 2**22
# Variance of rounding to whole levels: with it, two flat images have the detail ratio 1.
_ROUNDING = 1 / 12


def psnr(sr: Image, hr: Image, border: int = 4, channel: Channel = "y") -> float:
    """Peak signal-to-noise ratio in dB; infinite for equal images.

    Args:
        sr: uint8 (H, W, 3).
        hr: ground truth, of the same shape.
        border: pixels excluded at each edge; papers exclude `scale` pixels.
        channel: "y": BT.601 luma (16 to 235, not rounded); "rgb": over all three channels.

    Raises:
        ValueError: shapes differ, dtype or channel is not supported, or the border covers the image.
    """
    return float(batch_psnr(*_prepared(sr, hr, border, channel, least_px=1)))


def ssim(sr: Image, hr: Image, border: int = 4, channel: Channel = "y") -> float:
    """Structural similarity (Wang et al. 2004), at most 1: Gaussian window of 11 px, sigma 1.5, no padding.

    Arguments and errors as for `psnr`; "rgb" is the mean over the three channels.
    """
    return float(batch_ssim(*_prepared(sr, hr, border, channel, least_px=SSIM_WINDOW_PX)))


def luma(image: Image) -> NDArray[np.float64]:
    """BT.601 luma of uint8 RGB (H, W, 3), 16 to 235, not rounded, as MATLAB's rgb2ycbcr before its rounding."""
    return 16 + image.astype(np.float64) @ np.array(_LUMA) / 255


def planes(images: Tensor, channel: str) -> Tensor:
    """uint8 RGB (N, H, W, 3) as float64 (N, C, H, W): `luma` for "y", the three channels for "rgb"."""
    levels = images.permute(0, 3, 1, 2).double()
    if channel != "y":
        return levels
    red, green, blue = levels.unbind(1)
    return (16 + (red * _LUMA[0] + green * _LUMA[1] + blue * _LUMA[2]) / 255)[:, None]


def batch_psnr(sr: Tensor, hr: Tensor) -> Tensor:
    """`psnr` of float64 (N, C, H, W) from 0 to 255, as (N,)."""
    return 10 * torch.log10(255.0**2 * sr[0].numel() / _sums((sr - hr).square()))


def batch_ssim(sr: Tensor, hr: Tensor) -> Tensor:
    """`ssim` of float64 (N, C, H, W) from 0 to 255, as (N,): the channels' mean. Both sides have at least 11 px."""
    return _strip_sums(_similarities, sr, hr) / _positions(sr)


def detail_ratio(sr: Tensor, hr: Tensor) -> Tensor:
    """Energy of the SR images' detail as a share of the HR images', of float64 (N, 1, H, W) from 0 to 255, as (N,).

    Detail is what SSIM's Gaussian removes. At 1/8 cycle a pixel, the finest that an LR image holds at x4, it halves
    the amplitude. Both sides have at least 11 px.
    """
    sr_energy, hr_energy = (_strip_sums(_detail_energy, images) / _positions(images) for images in (sr, hr))
    return (sr_energy + _ROUNDING) / (hr_energy + _ROUNDING)


def _positions(images: Tensor) -> int:
    """Number of values of (N, C, H, W) at the window's positions, of each image."""
    return images[0, :, SSIM_WINDOW_PX - 1 :, SSIM_WINDOW_PX - 1 :].numel()


def _strip_sums(values: Callable[..., Tensor], *images: Tensor) -> Tensor:
    """Sums over channels and positions of the window of `values`, computed strip by strip of (N, C, H, W), as (N,)."""
    channels, height, width = images[0].shape[1:]
    last = height - SSIM_WINDOW_PX + 1
    rows = max(8, (_CPU_STRIP if images[0].device.type == "cpu" else _GPU_STRIP) // (channels * width))
    total = images[0].new_zeros(len(images[0]))
    for top in range(0, last, rows):
        strip = slice(top, min(top + rows, last) + SSIM_WINDOW_PX - 1)
        total += _sums(values(*(each[:, :, strip] for each in images)))
    return total


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


def _detail_energy(images: Tensor) -> Tensor:
    """Squared difference from the blurred images, at every position of the window."""
    inside = slice(SSIM_WINDOW_PX // 2, -(SSIM_WINDOW_PX // 2))
    return (images[..., inside, inside] - _blurred(images)).square()


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


def _prepared(sr: Image, hr: Image, border: int, channel: str, least_px: int) -> list[Tensor]:
    """Both as `planes` (1, C, H, W) without the border."""
    require_image(sr, "sr")
    require_image(hr, "hr")
    if sr.shape != hr.shape or sr.shape[2] != 3:
        raise ValueError(f"sr {sr.shape} and hr {hr.shape}: expected two RGB images of the same size")
    if channel not in ("y", "rgb"):
        raise ValueError(f"channel={channel!r}: use 'y' or 'rgb'")
    if border < 0 or min(sr.shape[:2]) < 2 * border + least_px:
        raise ValueError(
            f"{sr.shape[0]} x {sr.shape[1]} pixels with border={border}: at least {least_px} px must remain"
        )
    inside = slice(border, sr.shape[0] - border), slice(border, sr.shape[1] - border)
    # Copies: torch requires writable memory.
    return [planes(torch.from_numpy(np.array(image[inside], order="C"))[None], channel) for image in (sr, hr)]
