"""Chooses the part of a picture that is worth showing."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.imaging import luma

Image = NDArray[np.uint8]
_DETAIL_PX = 17


@dataclass(frozen=True)
class Box:
    """A rectangle, in high-resolution pixels."""

    x: int
    y: int
    width: int
    height: int

    def of(self, image: Image, shrink: int = 1) -> Image:
        """This part of `image`, which is `shrink` times smaller than the high resolution."""
        top, left = self.y // shrink, self.x // shrink
        return image[top : top + self.height // shrink, left : left + self.width // shrink]

    def fitted(self, shape: tuple[int, ...], step: int) -> "Box":
        """The same, moved and cut so that it lies inside `shape` (H, W, ...) with corners on multiples of `step`."""
        height, width = (min(size, limit) // step * step for size, limit in zip(
            (self.height, self.width), shape[:2], strict=True))  # fmt: skip
        height, width = max(height, step), max(width, step)
        y = min(max(self.y, 0), shape[0] - height) // step * step
        x = min(max(self.x, 0), shape[1] - width) // step * step
        return Box(x, y, width, height)


def most_different(images: Sequence[Image], side_px: int, step: int) -> Box:
    """The square in which the images' detail differs most.

    Detail is luma less its mean around each pixel: a network whose colours are a little off everywhere would otherwise
    win with an empty sky.

    Args:
        images: two or more uint8 RGB images of one size.
        side_px: the square's side; smaller images give what they have.
        step: corners fall on multiples of this (the scale).
    """
    details = [_detail(luma(image)) for image in images]
    difference = np.maximum.reduce(details) - np.minimum.reduce(details)
    box = Box(0, 0, side_px, side_px).fitted(difference.shape, step)
    totals = _window_sums(difference, box.height, box.width)[::step, ::step]
    y, x = np.unravel_index(int(np.argmax(totals)), totals.shape)
    return Box(int(x) * step, int(y) * step, box.width, box.height)


def _window_sums(values: NDArray[np.floating], height: int, width: int) -> NDArray[np.float64]:
    """Sums over all windows of this size, by their upper left corner."""
    sums = np.zeros((values.shape[0] + 1, values.shape[1] + 1), np.float64)
    sums[1:, 1:] = values.cumsum(0, dtype=np.float64).cumsum(1)
    return sums[height:, width:] - sums[:-height, width:] - sums[height:, :-width] + sums[:-height, :-width]


def _detail(values: NDArray[np.float64]) -> NDArray[np.float64]:
    padded = np.pad(values, _DETAIL_PX // 2, mode="edge")
    return values - _window_sums(padded, _DETAIL_PX, _DETAIL_PX) / _DETAIL_PX**2


def enlarged(image: Image, factor: int) -> Image:
    """Every pixel as a square of `factor` pixels."""
    return image.repeat(factor, axis=0).repeat(factor, axis=1)
