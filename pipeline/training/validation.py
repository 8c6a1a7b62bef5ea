"""Validation on whole held-out images, distributed over the workers."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial

import numpy as np
import torch

from pipeline.imaging import Image, bicubic_upscale, upscale
from pipeline.imaging.panels import nearest_upscale
from pipeline.metrics import MetricSet
from pipeline.model import RRDBNet
from pipeline.training.distributed import rank, sum_in_place, world_size
from pipeline.training.validation_sets import ValidationImage, ValidationSet

TILE_PX = 512  # LR pixels; larger images are upscaled in tiles
BATCH_PX = 2**22  # HR pixels that a GPU measures at once
STRIPS = 4  # comparison strips of a set
CROP_PX = 48  # side of the crop in a strip, in LR pixels


def validate(
    generator: RRDBNet, sets: Sequence[ValidationSet], metrics: MetricSet, half: bool = False
) -> dict[str, float]:
    """Means of the metrics over the images of each set, by `ValidationSet.key`.

    `half`: a GPU computes images in float16, which has TF32's 10 bits; those that overflow again, in float32's range.

    Batches of images are assigned to ranks by size, the largest first, to balance the load. The result is the same on
    all ranks and does not depend on their number: each batch is measured by one rank, and means are taken in the
    images' order.
    """
    return _means(lambda lr: _upscaled(generator, lr, metrics.device, half), sets, metrics)


def _upscaled(generator: RRDBNet, lr: Image, device: torch.device, half: bool) -> Image:
    compute = partial(upscale, generator, lr, TILE_PX, device=device)
    if half and device.type == "cuda":
        with suppress(FloatingPointError):
            return compute(dtype=torch.float16, require_finite=True)
    return compute()


def bicubic_baseline(sets: Sequence[ValidationSet], metrics: MetricSet, scale: int) -> dict[str, float]:
    """`validate` of bicubic upscaling."""
    return _means(lambda lr: bicubic_upscale(lr, scale), sets, metrics)


def _means(
    upscaled: Callable[[Image], Image], sets: Sequence[ValidationSet], metrics: MetricSet
) -> dict[str, float]:
    images = [image for each in sets for image in each.images]
    values = torch.zeros(len(images), len(metrics.columns), dtype=torch.float64)
    for batch in own_batches(images, metrics.device):
        chosen = [images[index] for index in batch]
        sr = [upscaled(image.lr) for image in chosen]
        hr, lr = [image.hr for image in chosen], [image.lr for image in chosen]
        for index, measured in zip(batch, metrics.measure(*map(np.stack, (sr, hr, lr))), strict=True):
            row = [measured[name] for name in metrics.columns]
            values[index] = torch.tensor(row, dtype=torch.float64)
    # Identical images have infinite PSNR; 100 dB keeps the mean finite.
    values = values.to(metrics.device).nan_to_num(nan=float("nan"), posinf=100.0)
    sum_in_place([values])
    means: dict[str, float] = {}
    first = 0
    for each in sets:
        end = first + len(each.images)
        mean = values[first:end].mean(0).tolist()
        means |= {each.key(name): value for name, value in zip(metrics.columns, mean, strict=True)}
        first = end
    return means


def own_batches(images: Sequence[ValidationImage], device: torch.device) -> list[list[int]]:
    """Indices of the images that this rank measures; those of a batch have one size, and the largest is the first.

    On the CPU every image is a batch, which balances the ranks best.
    """
    limit = BATCH_PX if device.type == "cuda" else 0
    sizes: dict[tuple[int, int], list[int]] = {}
    for index, image in enumerate(images):
        sizes.setdefault(image.shape, []).append(index)
    batches = []
    for (height, width), indices in sizes.items():
        count = max(1, limit // (height * width))
        batches += [indices[start : start + count] for start in range(0, len(indices), count)]

    def pixels(batch: list[int]) -> int:
        height, width = images[batch[0]].shape
        return len(batch) * height * width

    return sorted(batches, key=pixels, reverse=True)[rank() :: world_size()]


def comparison_strips(
    generators: Sequence[RRDBNet], sets: Sequence[ValidationSet], scale: int, device: torch.device
) -> dict[str, Image]:
    """For each of the first images of each set: LR, bicubic, each generator's SR, HR side by side, uint8 (H, W, 3).

    All show the same crop, the one with the most detail, at the size of the HR image. Their names are those of the
    images, by `ValidationSet.key`.
    """
    strips = {}
    for each in sets:
        for image in each.images[:STRIPS]:
            crops = detailed_crops(image, generators, scale, device)
            gap = np.full((crops[0].shape[0], 4, 3), 255, np.uint8)
            strips[each.key(image.name)] = np.hstack([part for crop in crops for part in (gap, crop)][1:])
    return strips


def detailed_crops(
    image: ValidationImage, generators: Sequence[RRDBNet], scale: int, device: torch.device
) -> list[Image]:
    """LR, bicubic, each generator's SR, HR of the crop with the most detail, all at the size of the HR crop."""
    y, x = _most_detailed(image.lr)
    lr = np.ascontiguousarray(image.lr[y : y + CROP_PX, x : x + CROP_PX])
    hr = image.hr[scale * y : scale * (y + CROP_PX), scale * x : scale * (x + CROP_PX)]
    results = [upscale(generator, lr, device=device) for generator in generators]
    return [nearest_upscale(lr, scale), bicubic_upscale(lr, scale), *results, hr]


def _most_detailed(lr: Image) -> tuple[int, int]:
    """Corner of the square crop whose neighboring pixels differ most."""
    gray = lr.mean(axis=2)
    stride = CROP_PX // 2
    corners = [
        (y, x)
        for y in range(0, max(1, lr.shape[0] - CROP_PX + 1), stride)
        for x in range(0, max(1, lr.shape[1] - CROP_PX + 1), stride)
    ]

    def detail(corner: tuple[int, int]) -> float:
        crop = gray[corner[0] : corner[0] + CROP_PX, corner[1] : corner[1] + CROP_PX]
        return float(np.abs(np.diff(crop, axis=0)).mean() + np.abs(np.diff(crop, axis=1)).mean())

    return max(corners, key=detail)
