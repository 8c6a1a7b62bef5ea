"""Compares a low-resolution file with its reduced HR image: another image, or one shifted by whole pixels."""

import numpy as np
from numpy.typing import NDArray

from pipeline.imaging.arrays import Image
from pipeline.imaging.bicubic import matlab_bicubic_downscale
from pipeline.imaging.metrics import luma

_SHIFT_PX = 2
# Smaller or flatter images do not suffice.
_LEAST_PX, _LEAST_STD = 24, 2.0
# The same image correlates by more than 0.9, also after blur, noise and JPEG; other images hardly at all.
_LEAST_CORRELATION = 0.5


def pair_fault(hr: Image, lr: Image, scale: int) -> str:
    """Why `lr` is not the reduced `hr`; empty if it is, or if that is not clear.

    Noise, blur, compression and a shift of less than a pixel, which other resampling methods cause, are not faults.

    Args:
        hr: uint8 RGB (H * scale, W * scale, 3).
        lr: uint8 RGB (H, W, 3).
        scale: 2, 3 or 4.
    """
    if min(lr.shape[:2]) < _LEAST_PX:
        return ""
    inside = slice(_SHIFT_PX, -_SHIFT_PX)
    reference = luma(matlab_bicubic_downscale(hr, scale))[inside, inside]
    levels = luma(lr)
    if reference.std() < _LEAST_STD or levels.std() < _LEAST_STD:
        return ""
    shifts = [(y, x) for y in range(2 * _SHIFT_PX + 1) for x in range(2 * _SHIFT_PX + 1)]
    height, width = reference.shape
    correlations = {
        (y - _SHIFT_PX, x - _SHIFT_PX): _correlation(reference, levels[y : y + height, x : x + width])
        for y, x in shifts
    }
    best = max(correlations, key=lambda shift: correlations[shift])
    if correlations[best] < _LEAST_CORRELATION:
        found = f"correlation {correlations[best]:.2f} with the reduced HR image"
        return f"its low-resolution file shows another image ({found})"
    if best != (0, 0) and 1 - correlations[best] < (1 - correlations[0, 0]) / 2:
        down, right = best
        return f"its low-resolution file is shifted by {right} pixels to the right and {down} down"
    return ""


def _correlation(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    deviation = float(a.std() * b.std())
    return float(((a - a.mean()) * (b - b.mean())).mean()) / deviation if deviation else 0.0
