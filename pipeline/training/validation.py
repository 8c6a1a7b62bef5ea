"""Validation on whole held-out images, distributed over the workers."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.data import HeldOutPhoto
from pipeline.imaging import bicubic_upscale, upscale
from pipeline.metrics import MetricSet
from pipeline.model import RRDBNet
from pipeline.training.distributed import rank, sum_in_place, world_size

TILE_PX = 512  # LR pixels; larger images are upscaled in tiles
BATCH_PX = 2**22  # HR pixels that a GPU measures at once
STRIPS = 4  # comparison strips per validation
_CROP_PX = 48  # side of the crop in a strip, in LR pixels

Image = NDArray[np.uint8]


def validate(generator: RRDBNet, photos: Sequence[HeldOutPhoto], metrics: MetricSet) -> dict[str, float]:
    """Means over images of the metrics.

    Batches of images are assigned to ranks by size, the largest first, to balance the load. The result is the same on
    all ranks and does not depend on their number: each batch is measured by one rank, and means are taken in the
    images' order.
    """
    values = torch.zeros(len(photos), len(metrics.columns), dtype=torch.float64)
    for batch in _batches(photos, metrics.device)[rank() :: world_size()]:
        chosen = [photos[index] for index in batch]
        sr = [upscale(generator, photo.lr, tile_px=TILE_PX, device=metrics.device) for photo in chosen]
        hr, lr = [photo.hr for photo in chosen], [photo.lr for photo in chosen]
        for index, measured in zip(batch, metrics.measure(*map(np.stack, (sr, hr, lr))), strict=True):
            row = [measured[name] for name in metrics.columns]
            values[index] = torch.tensor(row, dtype=torch.float64)
    # Identical images have infinite PSNR; 100 dB keeps the mean finite.
    values = values.to(metrics.device).nan_to_num(nan=float("nan"), posinf=100.0)
    sum_in_place([values])
    return dict(zip(metrics.columns, values.mean(0).tolist(), strict=True))


def _batches(photos: Sequence[HeldOutPhoto], device: torch.device) -> list[list[int]]:
    """Indices of images of one size that are measured together, the largest batch first.

    On the CPU every image is a batch, which balances the ranks best.
    """
    limit = BATCH_PX if device.type == "cuda" else 0
    sizes: dict[tuple[int, ...], list[int]] = {}
    for index, photo in enumerate(photos):
        sizes.setdefault(photo.hr.shape, []).append(index)
    batches = []
    for (height, width, _), indices in sizes.items():
        count = max(1, limit // (height * width))
        batches += [indices[start : start + count] for start in range(0, len(indices), count)]
    return sorted(batches, key=lambda batch: -len(batch) * photos[batch[0]].hr.size)


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
