"""MATLAB's bicubic `imresize` on 8-bit images, the degradation and the baseline of super-resolution papers.

On uint8, MATLAB resizes along the rows' axis first, rounds half up to uint8, then resizes along the columns' axis and
rounds again. The kernel is Keys' with a = -0.5, widened by the scale when shrinking (antialiasing), its weights
normalised. Published low-resolution sets come out bit for bit with replicated edges.
"""

from functools import cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.imaging.arrays import Image, require_image

Edge = Literal["replicate", "symmetric"]
_NUMPY_EDGE: dict[str, Literal["edge", "symmetric"]] = {"replicate": "edge", "symmetric": "symmetric"}
Floats = NDArray[np.floating[Any]]


def matlab_bicubic_downscale(hr: Image, scale: int = 4, edge: Edge = "replicate") -> Image:
    """`imresize(hr, 1 / scale)` of uint8 (H, W, C), as uint8 (H / scale, W / scale, C).

    Grey images come as (H, W, 1).

    Args:
        hr: the image; H and W are multiples of `scale`.
        scale: 2, 3 or 4.
        edge: what lies beyond the edges: the outermost pixel again (as in published sets), or the mirrored image.

    Raises:
        ValueError: sizes that do not divide, another scale or edge, another type or shape.
    """
    _check(hr, scale, edge)
    return _both_axes(hr, _shrinking(scale), edge)


def float_bicubic_downscale(hr: Image, scale: int = 4, edge: Edge = "symmetric") -> Image:
    """The same without the rounding between the axes, as BasicSR's Python function does it.

    Sets made that way differ from MATLAB's by a level or two on a tenth of the pixels.
    """
    _check(hr, scale, edge)
    taps = _shrinking(scale)
    return _rounded(_along_axis1(_along_axis0(hr.astype(np.float64), taps, edge), taps, edge))


def bicubic_upscale(lr: Image, scale: int = 4, edge: Edge = "replicate") -> Image:
    """`imresize(lr, scale)` of uint8 (H, W, C), as uint8 (H * scale, W * scale, C); scale 2, 3 or 4.

    Raises:
        ValueError: another scale or edge, another type or shape.
    """
    require_image(lr, "lr")
    _check_options(scale, edge)
    return _both_axes(lr, _growing(scale), edge)


class _Taps:
    """A filter along one axis: every `step` input rows give the next few output rows.

    `weights` is (output rows of a unit, input rows that they read), which begin `before` rows ahead of the unit.
    """

    def __init__(self, weights: Floats, step: int, before: int) -> None:
        self.weights = weights
        self.step = step
        self.before = before

    def block(self, units: int, dtype: Any) -> Floats:
        """The weights of that many units as one band matrix: a matrix product is the fastest loop there is."""
        outputs, inputs = self.weights.shape
        matrix = np.zeros((outputs * units, self.step * (units - 1) + inputs), dtype)
        for unit in range(units):
            start = self.step * unit
            matrix[outputs * unit : outputs * (unit + 1), start : start + inputs] = self.weights
        return matrix


@cache
def _shrinking(scale: int) -> _Taps:
    # Output row i is centred on input row scale * i + (scale - 1) / 2 and reads two output rows to each side.
    before = 2 * scale - scale // 2
    distance = np.arange(-before, 4 * scale + scale % 2 - before) - (scale - 1) / 2
    weights = _cubic(distance / scale)
    return _Taps((weights / weights.sum())[None], scale, before)


@cache
def _growing(scale: int) -> _Taps:
    # Output row scale * i + p is centred on input row i + (p + 0.5) / scale - 0.5: the five rows around i.
    centres = (np.arange(scale) + 0.5) / scale - 0.5
    weights = _cubic(np.arange(-2, 3)[None] - centres[:, None])
    return _Taps(weights / weights.sum(1, keepdims=True), 1, 2)


def _cubic(x: Floats) -> Floats:
    """Keys' cubic convolution kernel with a = -0.5."""
    x = np.abs(x)
    near = 1.5 * x**3 - 2.5 * x**2 + 1
    far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return np.where(x <= 1, near, np.where(x <= 2, far, 0.0))


def _both_axes(image: Image, taps: _Taps, edge: Edge) -> Image:
    return _rounded(_along_axis1(_rounded(_along_axis0(image, taps, edge)), taps, edge))


def _along_axis1(image: NDArray[Any], taps: _Taps, edge: Edge) -> Floats:
    turned = np.ascontiguousarray(image.transpose(1, 0, 2))
    return _along_axis0(turned, taps, edge).transpose(1, 0, 2)


def _along_axis0(image: NDArray[Any], taps: _Taps, edge: Edge) -> Floats:
    height = image.shape[0]
    dtype = np.float64
    extra = taps.weights.shape[1] - taps.step - taps.before
    padded = np.pad(image, ((taps.before, max(extra, 0)), (0, 0), (0, 0)), mode=_NUMPY_EDGE[edge])
    units = height // taps.step
    rows = padded.reshape(padded.shape[0], -1).astype(dtype)
    outs = taps.weights.shape[0]
    result = np.zeros((units, outs, rows.shape[1]), dtype)
    for out in range(outs):
        for k in range(taps.weights.shape[1]):
            result[:, out] += taps.weights[out, k] * rows[k : k + taps.step * (units - 1) + 1 : taps.step]
    return result.reshape(units * outs, *image.shape[1:])


def _rounded(values: Floats) -> Image:
    """Half up, as MATLAB does, to 0 ... 255."""
    return np.clip(np.floor(values + 0.5), 0, 255).astype(np.uint8)


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
    if edge not in _NUMPY_EDGE:
        raise ValueError(f"edge={edge!r}: use 'replicate' or 'symmetric'")
