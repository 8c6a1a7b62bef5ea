"""Positions of patches in an image. All lengths are in high-resolution pixels."""

from pipeline.data.config import DataConfig
from pipeline.errors import UserError


def check_geometry(config: DataConfig) -> None:
    """Checks that patches fit the scale and have no gaps between them. Raises UserError."""
    for field in ("patch_px", "patch_stride_px"):
        value = getattr(config, field)
        if value % config.scale:
            raise UserError(
                f"data.{field}={value} is not a multiple of data.scale={config.scale}; use {cut(value, config.scale)}"
            )
    if config.patch_stride_px > config.patch_px:
        raise UserError(
            f"data.patch_stride_px={config.patch_stride_px} is larger than data.patch_px={config.patch_px}: "
            "pixels between patches would be lost"
        )


def cut(length: int, scale: int) -> int:
    """The largest multiple of `scale` not above `length`."""
    return length - length % scale


def origins(length: int, patch_px: int, stride_px: int) -> list[int]:
    """Offsets of patches along a side of `length`: every `stride_px`, and one flush with the far end.

    `length` must be a multiple of the scale and at least `patch_px`; then every offset is a multiple of the scale.
    """
    last = length - patch_px
    offsets = list(range(0, last + 1, stride_px))
    if offsets[-1] != last:
        offsets.append(last)
    return offsets


def grid(height: int, width: int, patch_px: int, stride_px: int) -> list[tuple[int, int]]:
    """(y, x) of the upper left corner of every patch, row by row."""
    return [(y, x) for y in origins(height, patch_px, stride_px) for x in origins(width, patch_px, stride_px)]


def expected_bytes(height: int, width: int, config: DataConfig) -> int:
    """Raw bytes of the patches of one image, low resolution included; 0 if it is too small."""
    height, width = cut(height, config.scale), cut(width, config.scale)
    if min(height, width) < config.patch_px:
        return 0
    patches = len(origins(height, config.patch_px, config.patch_stride_px)) * len(
        origins(width, config.patch_px, config.patch_stride_px)
    )
    return patches * patch_bytes(config.patch_px, config.scale)


def patch_bytes(patch_px: int, scale: int) -> int:
    """Raw bytes of one HR/LR pair."""
    return 3 * (patch_px**2 + (patch_px // scale) ** 2)
