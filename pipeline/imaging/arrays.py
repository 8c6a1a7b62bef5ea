"""8-bit and 16-bit images as arrays and as tensors."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Image = NDArray[np.uint8]
# uint8 or uint16: in and out of upscaling; metrics and training have 8 bits.
DeepImage = NDArray[np.unsignedinteger[Any]]


def require_image(image: DeepImage, name: str) -> None:
    """Raises ValueError unless `image` is uint8 (H, W, C) with at least one pixel."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.size == 0:
        raise ValueError(f"{name}: expected uint8 (H, W, channels), got {image.dtype} {image.shape}")


def require_deep_image(image: DeepImage, name: str) -> None:
    """Raises ValueError unless `image` is uint8 or uint16 (H, W, C) with at least one pixel."""
    if image.dtype != np.uint16:
        require_image(image, name)
    elif image.ndim != 3 or image.size == 0:
        raise ValueError(f"{name}: expected uint16 (H, W, channels), got {image.shape}")


def to_tensor(images: DeepImage) -> Tensor:
    """uint8 or uint16 (H, W, C) or (N, H, W, C) to float32 (N, C, H, W) in [0, 1].

    Raises:
        ValueError: dtype or number of dimensions is not supported.
    """
    if images.dtype not in (np.uint8, np.uint16) or images.ndim not in (3, 4):
        raise ValueError(f"expected uint8 (H, W, C) or (N, H, W, C), got {images.dtype} {images.shape}")
    batch = images if images.ndim == 4 else images[None]
    # One copy: contiguous, and writable, as torch requires.
    return (
        torch.from_numpy(np.array(batch.transpose(0, 3, 1, 2), order="C"))
        .float()
        .div_(np.iinfo(images.dtype).max)
    )


def to_uint8(images: Tensor) -> Image:
    """Float (N, C, H, W) in about [0, 1] to uint8 (N, H, W, C): clamped, rounded half to even.

    NaN becomes 0.
    """
    return to_levels(images, torch.uint8).contiguous().cpu().numpy()


def to_levels(images: Tensor, dtype: torch.dtype) -> Tensor:
    """As `to_uint8`, on the device and in uint8 or uint16."""
    levels = images.detach().float().nan_to_num(0.0).clamp(0, 1).mul(torch.iinfo(dtype).max).round().to(dtype)
    return levels.permute(0, 2, 3, 1)
