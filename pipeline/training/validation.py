"""Validation on whole held-out images, distributed over the workers."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.data import HeldOutPhoto
from pipeline.imaging import bicubic_upscale, psnr, ssim, upscale
from pipeline.model import RRDBNet
from pipeline.training.distributed import rank, sum_in_place, world_size

METRICS = ("psnr_y", "ssim_y", "psnr_rgb", "ssim_rgb")
TILE_PX = 512  # LR pixels; larger images are upscaled in tiles
STRIPS = 4  # comparison strips per validation
_CROP_PX = 48  # side of the crop in a strip, in LR pixels

Image = NDArray[np.uint8]


def validate(
    generator: RRDBNet, photos: Sequence[HeldOutPhoto], scale: int, device: torch.device
) -> dict[str, float]:
    """Means over images of PSNR (dB) and SSIM, on Y and RGB, with a border of `scale` pixels.

    Images are assigned to ranks by size, the largest first, to balance the load. The result is the same on all ranks
    and does not depend on their number: each image is measured by one rank, and means are taken in the images' order.
    """
    by_size = sorted(range(len(photos)), key=lambda index: -photos[index].hr.size)
    values = torch.zeros(len(photos), len(METRICS), dtype=torch.float64)
    for index in by_size[rank() :: world_size()]:
        values[index] = torch.tensor(
            _image_metrics(generator, photos[index], scale, device), dtype=torch.float64
        )
    values = values.to(device)
    sum_in_place([values])
    return dict(zip(METRICS, values.mean(0).tolist(), strict=True))


def _image_metrics(generator: RRDBNet, photo: HeldOutPhoto, scale: int, device: torch.device) -> list[float]:
    sr = upscale(generator, photo.lr, tile_px=TILE_PX, device=device)
    # Identical images have infinite PSNR; 100 dB keeps the mean finite.
    return [
        min(psnr(sr, photo.hr, border=scale, channel="y"), 100.0),
        ssim(sr, photo.hr, border=scale, channel="y"),
        min(psnr(sr, photo.hr, border=scale, channel="rgb"), 100.0),
        ssim(sr, photo.hr, border=scale, channel="rgb"),
    ]


def comparison_strips(
    generators: Sequence[RRDBNet], photos: Sequence[HeldOutPhoto], scale: int, device: torch.device
) -> dict[str, Image]:
    """For each of the first images by name: LR, bicubic, each generator's SR, HR side by side, uint8 (H, W, 3).

    All show the same crop, the one with the most detail, at the size of the HR image.
    """
    strips = {}
    for photo in photos[:STRIPS]:
        y, x = _most_detailed(photo.lr)
        lr = np.ascontiguousarray(photo.lr[y : y + _CROP_PX, x : x + _CROP_PX])
        hr = photo.hr[scale * y : scale * (y + _CROP_PX), scale * x : scale * (x + _CROP_PX)]
        results = [upscale(generator, lr, device=device) for generator in generators]
        nearest = lr.repeat(scale, axis=0).repeat(scale, axis=1)
        strips[photo.name] = _strip([nearest, bicubic_upscale(lr, scale), *results, hr])
    return strips


def _most_detailed(lr: Image) -> tuple[int, int]:
    """Corner of the square crop whose neighboring pixels differ most."""
    gray = lr.mean(axis=2)
    stride = _CROP_PX // 2
    corners = [
        (y, x)
        for y in range(0, max(1, lr.shape[0] - _CROP_PX + 1), stride)
        for x in range(0, max(1, lr.shape[1] - _CROP_PX + 1), stride)
    ]

    def detail(corner: tuple[int, int]) -> float:
        crop = gray[corner[0] : corner[0] + _CROP_PX, corner[1] : corner[1] + _CROP_PX]
        return float(np.abs(np.diff(crop, axis=0)).mean() + np.abs(np.diff(crop, axis=1)).mean())

    return max(corners, key=detail)


def _strip(images: Sequence[Image]) -> Image:
    gap = np.full((images[0].shape[0], 4, 3), 255, np.uint8)
    return np.concatenate([part for image in images for part in (image, gap)][:-1], axis=1)
