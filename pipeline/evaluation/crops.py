"""Chooses the crop of an image that shows the differences between models."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.imaging import Image, luma

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

    def fitted(self, shape: tuple[int, ...], multiple: int) -> "Box":
        """The box moved and cut to fit inside `shape` (H, W, ...), with corners on multiples of `multiple`."""
        height, width = (
            max(min(size, limit) // multiple * multiple, multiple)
            for size, limit in zip((self.height, self.width), shape[:2], strict=True)
        )
        y = min(max(self.y, 0), shape[0] - height) // multiple * multiple
        x = min(max(self.x, 0), shape[1] - width) // multiple * multiple
        return Box(x, y, width, height)


def most_different(images: Sequence[Image], side_px: int, multiple: int) -> Box:
    """The square in which the images' detail differs most.

    Detail is luma minus its local mean: a network with a small color shift would otherwise win with an empty sky.

    Args:
        images: two or more uint8 RGB images of one size.
        side_px: the square's side, cut to the image.
        multiple: corners are multiples of this (the scale).
    """
    details = [_detail(luma(image)) for image in images]
    difference = np.maximum.reduce(details) - np.minimum.reduce(details)
    box = Box(0, 0, side_px, side_px).fitted(difference.shape, multiple)
    inside = _window_means(difference, box.height, box.width)[::multiple, ::multiple]
    y, x = np.unravel_index(int(np.argmax(inside)), inside.shape)
    return Box(int(x) * multiple, int(y) * multiple, box.width, box.height)


def _detail(values: NDArray[np.float64]) -> NDArray[np.float64]:
    padded = np.pad(values, _DETAIL_PX // 2, mode="edge")
    return values - _window_means(padded, _DETAIL_PX, _DETAIL_PX)


def _window_means(values: NDArray[np.float64], height: int, width: int) -> NDArray[np.float64]:
    """Means of all windows inside `values`, by their upper left corner, from cumulative sums."""
    sums = np.pad(values.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    total = sums[height:, width:] - sums[:-height, width:] - sums[height:, :-width] + sums[:-height, :-width]
    return total / (height * width)
