"""MATLAB's bicubic `imresize` on 8-bit images, the degradation and the baseline of super-resolution papers.

On uint8, MATLAB resizes along the first axis, rounds half up to uint8, then resizes along the second axis and rounds
again. The kernel is Keys' cubic convolution with a = -0.5, widened by the scale when downscaling (antialiasing), with
normalized weights. With replicated edges the result equals published low-resolution sets bit for bit.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.imaging.arrays import DeepImage, Image, require_image

Edge = Literal["replicate", "symmetric"]
Floats = NDArray[np.floating[Any]]
BLOCK_UNITS = 8
STRIP_PX = 512


def matlab_bicubic_downscale(hr: Image, scale: int = 4, edge: Edge = "replicate") -> Image:
    """`imresize(hr, 1 / scale)` of uint8 (H, W, C), as uint8 (H / scale, W / scale, C).

    Gray images have the shape (H, W, 1).

    Args:
        hr: the image; H and W are multiples of `scale`.
        scale: 2, 3 or 4.
        edge: padding: the outermost pixel is repeated (as in published sets), or the image is mirrored.

    Raises:
        ValueError: H or W is not a multiple of `scale`, or the scale, edge, dtype or shape is not supported.
    """
    _check(hr, scale, edge)
    result: Image = _resize(hr, _downscaling(scale), edge)
    return result


def float_bicubic_downscale(hr: Image, scale: int = 4, edge: Edge = "symmetric") -> Image:
    """Like `matlab_bicubic_downscale` without rounding between the axes, as in BasicSR's `imresize`.

    About a tenth of the pixels differ from MATLAB's by one or two levels.
    """
    _check(hr, scale, edge)
    taps = _downscaling(scale)
    result: Image = _filter_columns_rounded(_filter_rows(hr, taps, edge, np.float64), taps, edge, np.uint8)
    return result


def bicubic_upscale(lr: DeepImage, scale: int = 4, edge: Edge = "replicate") -> DeepImage:
    """`imresize(lr, scale)` of uint8 or uint16 (H, W, C), as (H * scale, W * scale, C); scale 2, 3 or 4.

    Raises:
        ValueError: the scale, edge, dtype or shape is not supported.
    """
    require_image(lr, "lr", deep=True)
    _check_options(scale, edge)
    return _resize(lr, _upscaling(scale), edge)


def downscale_batch(images: Tensor, scale: int) -> Tensor:
    """`matlab_bicubic_downscale` with replicated edges, bit for bit, of uint8 (N, H, W, C) on its device.

    H and W are multiples of `scale`: 2, 3 or 4.
    """
    taps = _downscaling(scale)
    for axis in (1, 2):
        length = images.shape[axis]
        end = length - taps.before - scale + taps.weights.shape[1]
        index = torch.arange(-taps.before, end, device=images.device)
        # Float32 is exact here: see `_resize`.
        padded = images.index_select(axis, index.clamp_(0, length - 1)).float()
        total = torch.zeros((), device=images.device)
        for start, weight in enumerate(taps.weights[0].tolist()):
            if weight:
                rows = index.new_tensor(range(start, start + length - scale + 1, scale))
                total = total + weight * padded.index_select(axis, rows)
        images = (total + 0.5).floor_().clamp_(0, 255).to(torch.uint8)
    return images


@dataclass(frozen=True)
class _Taps:
    """A polyphase filter along one axis: each unit of `stride` input rows gives `weights.shape[0]` output rows.

    `weights` has the shape (output rows of a unit, input rows read); the first one is `before` rows ahead of the unit.
    """

    weights: Floats
    stride: int
    before: int

    def block(self, units: int) -> Floats:
        """The weights of that many units as one banded matrix, so that BLAS does the loop."""
        outputs, inputs = self.weights.shape
        matrix = np.zeros((outputs * units, self.stride * (units - 1) + inputs))
        for unit in range(units):
            start = self.stride * unit
            matrix[outputs * unit : outputs * (unit + 1), start : start + inputs] = self.weights
        return matrix


@cache
def _downscaling(scale: int) -> _Taps:
    # Output row i is centered on input row scale * i + (scale - 1) / 2; the support is two output rows to each side.
    before = 2 * scale - (scale + 1) // 2
    distance = np.arange(-before, scale + before) - (scale - 1) / 2
    weights = _cubic(distance / scale)
    return _Taps((weights / weights.sum())[None], scale, before)


@cache
def _upscaling(scale: int) -> _Taps:
    # Output row scale * i + p is centered on input row i + (p + 0.5) / scale - 0.5: the five rows around i.
    centers = (np.arange(scale) + 0.5) / scale - 0.5
    weights = _cubic(np.arange(-2, 3)[None] - centers[:, None])
    return _Taps(weights / weights.sum(1, keepdims=True), 1, 2)


def _cubic(x: Floats) -> Floats:
    """Keys' cubic convolution kernel with a = -0.5."""
    x = np.abs(x)
    near = 1.5 * x**3 - 2.5 * x**2 + 1
    far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return np.where(x <= 1, near, np.where(x <= 2, far, 0.0))


def _resize(image: NDArray[Any], taps: _Taps, edge: Edge) -> NDArray[Any]:
    # For 8 bits, float32 is exact here, in any order of summation: at scale 2 and 4 the weights are integer multiples
    # of 1/4096, so every sum fits into 24 bits; at scale 3 they are multiples of 1/81, so no sum is within 1/162 of a
    # half.
    levels = image.dtype.type
    rows = _filter_rows(image, taps, edge, np.float32 if levels is np.uint8 else np.float64)
    return _filter_columns_rounded(_round(rows, levels), taps, edge, levels)


def _filter_columns_rounded(rows: Floats, taps: _Taps, edge: Edge, levels: type[Any]) -> NDArray[Any]:
    height, width, channels = rows.shape
    result = np.empty((height, taps.weights.shape[0] * (width // taps.stride), channels), levels)
    # In strips that fit the cache; a whole upscaled image in float32 would need four times the memory.
    for top in range(0, height, STRIP_PX):
        result[top : top + STRIP_PX] = _round(_filter_columns(rows[top : top + STRIP_PX], taps, edge), levels)
    return result


def _filter_rows(image: NDArray[Any], taps: _Taps, edge: Edge, dtype: type[np.floating[Any]]) -> Floats:
    """Filters (H, W, C) along its first axis."""
    height, width, channels = image.shape
    flat = image.reshape(height, width * channels)
    outputs, units = taps.weights.shape[0], height // taps.stride
    result = np.empty((outputs * units, width * channels), dtype)
    for start, matrix in _blocks(units, taps, dtype):
        first = taps.stride * start - taps.before
        rows = flat[_padded_index(first, first + matrix.shape[1], height, edge)].astype(dtype)
        np.matmul(matrix, rows, out=result[outputs * start : outputs * start + matrix.shape[0]])
    return result.reshape(-1, width, channels)


def _filter_columns(image: Floats, taps: _Taps, edge: Edge) -> Floats:
    """Filters (H, W, C) along its second axis."""
    height, width, channels = image.shape
    outputs, units = taps.weights.shape[0], width // taps.stride
    result = np.empty((height, outputs * units * channels), image.dtype)
    for start, matrix in _blocks(units, taps, image.dtype.type, channels):
        first = taps.stride * start - taps.before
        columns = image[:, _padded_index(first, first + matrix.shape[1] // channels, width, edge)]
        left = outputs * start * channels
        np.matmul(columns.reshape(height, -1), matrix.T, out=result[:, left : left + matrix.shape[0]])
    return result.reshape(height, -1, channels)


def _blocks(
    units: int, taps: _Taps, dtype: type[np.floating[Any]], channels: int = 1
) -> Iterator[tuple[int, Floats]]:
    """First unit and weights of each block of at most BLOCK_UNITS units.

    For rows of interleaved channels the weights are interleaved with zeros, which is faster than a transpose.
    """
    spread = np.eye(channels)
    full = np.kron(taps.block(BLOCK_UNITS), spread).astype(dtype)
    for start in range(0, units, BLOCK_UNITS):
        count = min(BLOCK_UNITS, units - start)
        yield start, full if count == BLOCK_UNITS else np.kron(taps.block(count), spread).astype(dtype)


def _padded_index(start: int, end: int, length: int, edge: Edge) -> slice | NDArray[np.intp]:
    """Indices of the rows `start` to `end` of the padded image."""
    if start >= 0 and end <= length:
        return slice(start, end)
    index = np.arange(start, end)
    if edge == "replicate":
        return index.clip(0, length - 1)
    index %= 2 * length
    return np.minimum(index, 2 * length - 1 - index)


def _round(values: Floats, levels: type[Any]) -> Floats:
    """Rounds half up, as MATLAB does, and clips to the range of `levels`; in place."""
    values += 0.5
    np.floor(values, out=values)
    return np.clip(values, 0, np.iinfo(levels).max, out=values)


def _check(hr: Image, scale: int, edge: str) -> None:
    require_image(hr, "hr")
    _check_options(scale, edge)
    height, width = hr.shape[:2]
    if height % scale or width % scale:
        raise ValueError(
            f"{height} x {width} pixels are not multiples of scale={scale}; "
            f"cut the image to {height - height % scale} x {width - width % scale}"
        )


def _check_options(scale: int, edge: str) -> None:
    if scale not in (2, 3, 4):
        raise ValueError(f"scale={scale}: use 2, 3 or 4")
    if edge not in ("replicate", "symmetric"):
        raise ValueError(f"edge={edge!r}: use 'replicate' or 'symmetric'")
