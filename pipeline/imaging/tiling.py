"""Super-resolving an image of any size within bounded memory."""

import copy
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.imaging.arrays import DeepImage, require_image

HALO_PX = 48
# Start and end of a tile along one axis, then those of its input; first the rows, then the columns.
Span = tuple[int, int, int, int]
Tile = tuple[Span, Span]


def upscale(
    generator: nn.Module,
    lr: DeepImage,
    tile_px: int | None = None,
    halo_px: int = HALO_PX,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = True,
    require_finite: bool = False,
    progress: Callable[[list[Tile]], Iterable[Tile]] = iter,
) -> DeepImage:
    """Super-resolves `lr`, whole or in tiles.

    A tile is computed with an overlap of `halo_px` on each side, which is cropped from the result: by default, the
    difference from the whole is at most one level. Peak memory depends on the tile and the image's 8-bit pixels.

    Args:
        generator: an RRDBNet (as it is, or `prepared`), or a module with its `scale` and `unshuffle`; it is moved to
            `device`.
        lr: uint8 or uint16 RGB (H, W, 3), at least 1 x 1.
        tile_px: side of a tile, in LR pixels; None: the whole image at once.
        halo_px: overlap around each tile, in LR pixels.
        device: default: the generator's.
        dtype: float32, or bfloat16 or float16 by autocast.
        channels_last: memory format of the activations; faster, same result up to rounding.
        progress: receives all tiles, and yields them as they are computed.
        require_finite: raise if the output is not finite, instead of converting NaN to black.

    Returns:
        (H * scale, W * scale, 3), of the dtype of `lr`.

    Raises:
        ValueError: dtype or shape is not supported, or a size is out of range.
        FloatingPointError: `require_finite`, and the generator's output contains NaN or infinity.
    """
    require_image(lr, "lr", deep=True)
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
    pixels = torch.from_numpy(np.require(lr, requirements=["C", "W"])).to(target)
    tiles = [
        (rows, columns)
        for rows in _spans(height, tile_px, halo_px, multiple)
        for columns in _spans(width, tile_px, halo_px, multiple)
    ]
    for (top, bottom, above, below), (left, right, before, after) in progress(tiles):
        if left == 0:
            # A row of tiles is collected on the device, so that the host waits once for it and not for every tile.
            band = torch.empty((bottom - top) * scale, width * scale, 3, dtype=pixels.dtype, device=target)
            finite = torch.ones((), dtype=torch.bool, device=target)
        x = pixels[above:below, before:after].permute(2, 0, 1)[None].float().div_(np.iinfo(lr.dtype).max)
        # Pixel unshuffle needs multiples of its factor.
        missing = (0, -x.shape[3] % multiple, 0, -x.shape[2] % multiple)
        x = functional.pad(x, missing, mode="replicate") if any(missing) else x
        x = x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
        with torch.inference_mode(), torch.autocast(target.type, dtype, enabled=dtype != torch.float32):
            y = generator(x)
        y = y[
            :,
            :,
            (top - above) * scale : (bottom - above) * scale,
            (left - before) * scale : (right - before) * scale,
        ]
        finite &= torch.isfinite(y).all()
        band[:, left * scale : right * scale] = _to_levels(y, band.dtype)[0]
        if right == width:
            if require_finite and not bool(finite):
                raise FloatingPointError("the generator's output holds non-finite values (NaN or infinity)")
            torch.from_numpy(sr[top * scale : bottom * scale]).copy_(band)
    return sr


def _to_levels(images: Tensor, dtype: torch.dtype) -> Tensor:
    """Float (N, C, H, W) in about [0, 1] to uint8 or uint16 (N, H, W, C): clamped, rounded half to even; NaN to 0."""
    levels = images.float().nan_to_num(0.0).clamp(0, 1).mul(torch.iinfo(dtype).max).round().to(dtype)
    return levels.permute(0, 2, 3, 1)


def prepared(generator: nn.Module, device: torch.device | str, dtype: torch.dtype) -> nn.Module:
    """A copy of an RRDBNet for inference: on the device, channels-last, its convolutions' weights in `dtype`.

    Autocast would cast, and a GPU reorder, all weights for every tile. The last convolution stays in float32.
    """
    copied = copy.deepcopy(generator).eval().requires_grad_(False)
    copied.to(device).to(memory_format=torch.channels_last)
    if dtype != torch.float32:
        for name, module in copied.named_modules():
            if isinstance(module, nn.Conv2d) and name != "conv_last":
                module.to(dtype)
    return copied


def _spans(length: int, tile: int | None, halo: int, multiple: int) -> Iterator[Span]:
    """Start and end of each tile along one axis, then those of its input; all starts are multiples of `multiple`."""
    tile = length if tile is None else tile + -tile % multiple
    halo += -halo % multiple
    for start in range(0, length, tile):
        end = min(start + tile, length)
        yield start, end, max(start - halo, 0), min(end + halo, length)
