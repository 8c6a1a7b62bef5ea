"""Super-resolving an image of any size within bounded memory."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from pipeline.imaging.arrays import Image, require_image, to_tensor, to_uint8


def upscale(
    generator: nn.Module,
    lr: Image,
    tile_px: int | None = None,
    halo_px: int = 48,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = True,
) -> Image:
    """The generator's image of `lr`, whole or tile by tile.

    A tile is computed with `halo_px` more pixels on each side, which are cut off: with 48, tiles differ from the
    whole by less than one level. Memory follows the tile, not the image.

    Args:
        generator: an RRDBNet, or a module with its `scale` and `unshuffle`; it is moved to `device`.
        lr: uint8 RGB (H, W, 3), at least 1 x 1.
        tile_px: side of a tile in `lr`'s pixels; none: the whole at once.
        halo_px: pixels around a tile that it may look at.
        device: where to compute; by default where the generator is.
        dtype: float32, or bfloat16 by autocast.
        channels_last: memory format of the activations; faster, equal up to rounding.

    Returns:
        uint8 (H * scale, W * scale, 3).

    Raises:
        ValueError: another type or shape, or sizes out of range.
    """
    require_image(lr, "lr")
    if lr.shape[2] != 3:
        raise ValueError(f"lr has {lr.shape[2]} channels; the generator takes RGB")
    if (tile_px is not None and tile_px < 1) or halo_px < 0:
        raise ValueError(f"tile_px={tile_px}, halo_px={halo_px}: use at least 1 and 0")
    if device is not None:
        generator.to(device)
    place = next(generator.parameters()).device
    scale, step = int(generator.scale), int(generator.unshuffle)  # type: ignore[arg-type]
    height, width = lr.shape[:2]
    sr = np.empty((height * scale, width * scale, 3), np.uint8)
    for rows in _spans(height, tile_px, halo_px, step):
        for columns in _spans(width, tile_px, halo_px, step):
            (top, bottom, above, below), (left, right, before, after) = rows, columns
            x = to_tensor(lr[above:below, before:after]).to(place)
            # Folding pixels into channels needs whole folds.
            missing = (0, -x.shape[3] % step, 0, -x.shape[2] % step)
            x = functional.pad(x, missing, mode="replicate") if any(missing) else x
            if channels_last:
                x = x.contiguous(memory_format=torch.channels_last)
            with torch.inference_mode(), torch.autocast(place.type, dtype, enabled=dtype != torch.float32):
                y = generator(x)
            y = y[
                :,
                :,
                (top - above) * scale : (bottom - above) * scale,
                (left - before) * scale : (right - before) * scale,
            ]
            sr[top * scale : bottom * scale, left * scale : right * scale] = to_uint8(y)[0]
    return sr


def _spans(length: int, tile: int | None, halo: int, step: int) -> Iterator[tuple[int, int, int, int]]:
    """Start and end of each tile along one axis, then start and end of what it looks at; starts fall on `step`."""
    tile = length if tile is None else tile + -tile % step
    halo += -halo % step
    for start in range(0, length, tile):
        end = min(start + tile, length)
        yield start, end, max(start - halo, 0), min(end + halo, length)
