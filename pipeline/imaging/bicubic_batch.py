"""MATLAB's bicubic downscaling of batches of images on their device."""

import torch
from torch import Tensor

from pipeline.imaging.bicubic import downscaling_taps


def downscale_batch(images: Tensor, scale: int) -> Tensor:
    """`matlab_bicubic_downscale` with replicated edges, bit for bit, of uint8 (N, H, W, C) on any device.

    Args:
        images: H and W are multiples of `scale`.
        scale: 2, 3 or 4.

    Returns:
        uint8 (N, H / scale, W / scale, C).
    """
    for axis in (1, 2):
        images = _filtered(images, scale, axis)
    return images


def _filtered(images: Tensor, scale: int, axis: int) -> Tensor:
    """Filters one axis and rounds half up."""
    weights, before = downscaling_taps(scale)
    length = images.shape[axis]
    index = torch.arange(-before, length - before - scale + len(weights), device=images.device)
    # Float32 is exact here: see `_resize` in pipeline/imaging/bicubic.py.
    padded = images.index_select(axis, index.clamp_(0, length - 1)).float()
    total = torch.zeros((), device=images.device)
    for start, weight in enumerate(weights):
        if weight:
            rows = index.new_tensor(range(start, start + length - scale + 1, scale))
            total = total + weight * padded.index_select(axis, rows)
    return (total + 0.5).floor_().clamp_(0, 255).to(torch.uint8)
