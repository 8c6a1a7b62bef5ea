"""8-bit and 16-bit images as arrays, and as files."""

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PillowImage

Image = NDArray[np.uint8]
# uint8 or uint16: in and out of upscaling; metrics and training have 8 bits.
DeepImage = NDArray[np.unsignedinteger[Any]]


def require_image(image: DeepImage, name: str, *, deep: bool = False) -> None:
    """Raises ValueError unless `image` is uint8 (or uint16, if `deep`) (H, W, C) with at least one pixel."""
    if (
        image.dtype not in ((np.uint8, np.uint16) if deep else (np.uint8,))
        or image.ndim != 3
        or not image.size
    ):
        kinds = "uint8 or uint16" if deep else "uint8"
        raise ValueError(f"{name}: expected {kinds} (H, W, channels), got {image.dtype} {image.shape}")


def encoded(image: Image | PillowImage.Image, form: str, **options: Any) -> bytes:
    """The image, uint8 (H, W, 3), as a file of one of Pillow's formats, with its options."""
    if not isinstance(image, PillowImage.Image):
        image = PillowImage.fromarray(np.ascontiguousarray(image))
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def decoded(content: bytes) -> Image:
    """The image in a file, uint8 (H, W, 3) RGB. Raises OSError or SyntaxError for a corrupt one."""
    with PillowImage.open(io.BytesIO(content)) as image:
        return np.asarray(image.convert("RGB"))
