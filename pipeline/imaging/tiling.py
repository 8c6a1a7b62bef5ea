"""Super-resolving an image of any size within bounded memory."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from pipeline.imaging.arrays import DeepImage, require_deep_image, to_tensor, to_uint8, to_uint16


def upscale(
    generator: nn.Module,
    lr: DeepImage,
    tile_px: int | None = None,
    halo_px: int = 48,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = True,
    require_finite: bool = False,
) -> DeepImage:
    """Super-resolves `lr`, whole or in tiles.

    A tile is computed with an overlap of `halo_px` on each side, which is cropped from the result: with 48, the
    difference from the whole is at most one level. Peak memory depends on the tile, not on the image.

    Args:
        generator: an RRDBNet, or a module with its `scale` and `unshuffle`; it is moved to `device`.
        lr: uint8 or uint16 RGB (H, W, 3), at least 1 x 1.
        tile_px: side of a tile, in LR pixels; None: the whole image at once.
        halo_px: overlap around each tile, in LR pixels.
        device: default: the generator's.
        dtype: float32, or bfloat16 by autocast.
        channels_last: memory format of the activations; faster, same result up to rounding.
        require_finite: raise if the output is not finite, instead of converting NaN to black.

    Returns:
        (H * scale, W * scale, 3), of the dtype of `lr`.

    Raises:
        ValueError: dtype or shape is not supported, or a size is out of range.
        FloatingPointError: `require_finite`, and the generator's output contains NaN or infinity.
    """
    require_deep_image(lr, "lr")
    if lr.shape[2] != 3:
        raise ValueError(f"lr has {lr.shape[2]} channels; the generator takes RGB")
    if (tile_px is not None and tile_px < 1) or halo_px < 0:
        raise ValueError(f"tile_px={tile_px}, halo_px={halo_px}: use at least 1 and 0")
    if device is not None:
        generator.to(device)
    target = next(generator.parameters()).device
    scale, multiple = int(generator.scale), int(generator.unshuffle)  # type: ignore[arg-type]
    height, width = lr.shape[:2]
    sr = np.empty((height * scale, width * scale, 3), lr.dtype)
    to_levels = to_uint16 if lr.dtype == np.uint16 else to_uint8
    for rows in _spans(height, tile_px, halo_px, multiple):
        for columns in _spans(width, tile_px, halo_px, multiple):
            (top, bottom, above, below), (left, right, before, after) = rows, columns
            x = to_tensor(lr[above:below, before:after]).to(target)
            # Pixel unshuffle needs multiples of its factor.
            missing = (0, -x.shape[3] % multiple, 0, -x.shape[2] % multiple)
            x = functional.pad(x, missing, mode="replicate") if any(missing) else x
            if channels_last:
                x = x.contiguous(memory_format=torch.channels_last)
            with torch.inference_mode(), torch.autocast(target.type, dtype, enabled=dtype != torch.float32):
                y = generator(x)
            y = y[
                :,
                :,
                (top - above) * scale : (bottom - above) * scale,
                (left - before) * scale : (right - before) * scale,
            ]
            if require_finite and not bool(torch.isfinite(y).all()):
                raise FloatingPointError("the generator's output holds non-finite values (NaN or infinity)")
            sr[top * scale : bottom * scale, left * scale : right * scale] = to_levels(y)[0]
    return sr


def _spans(length: int, tile: int | None, halo: int, multiple: int) -> Iterator[tuple[int, int, int, int]]:
    """Start and end of each tile along one axis, then those of its input; all starts are multiples of `multiple`."""
    tile = length if tile is None else tile + -tile % multiple
    halo += -halo % multiple
    for start in range(0, length, tile):
        end = min(start + tile, length)
        yield start, end, max(start - halo, 0), min(end + halo, length)
