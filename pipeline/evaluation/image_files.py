"""Reads an image with everything that its upscaled output must keep, and encodes the output."""

import io
import struct
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image as PillowImage
from PIL import ImageOps

from pipeline.data.ingest.decoding import PhotoRejected, open_image, read_photo
from pipeline.imaging import Image

SUFFIXES = {"png": ".png", "jpg": ".jpg", "webp": ".webp"}
WEBP_MAX_PX, JPEG_MAX_PX = 16383, 65535

_ORIENTATION, _SUB_IFD, _WIDTH, _HEIGHT = 0x0112, 0x8769, 0xA002, 0xA003


@dataclass(frozen=True)
class SourceImage:
    """A decoded image, upright."""

    rgb: Image
    """(H, W, 3)."""
    alpha: Image | None
    """(H, W, 1), if it has transparency."""
    gray: bool
    """The file has one channel; so will the output."""
    icc: bytes | None
    exif: PillowImage.Exif
    """Without the orientation, which has been applied to the pixels."""


def read_source(data: bytes, max_megapixels: float) -> SourceImage:
    """Decodes a whole file; see `read_photo` for what is rejected. Transparency is kept here.

    Raises:
        PhotoRejected: with the reason.
    """
    try:
        photo = read_photo(data, max_megapixels)
        rgb, alpha, gray = photo.pixels, None, "gray" in photo.notes
    except PhotoRejected as error:
        transparent = _with_transparency(data, max_megapixels)
        if transparent is None:
            raise error
        rgb, alpha, gray = transparent
    image = open_image(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            exif = image.getexif()
            exif.pop(_ORIENTATION, None)
        except Exception:  # noqa: BLE001 - corrupt EXIF is dropped; the pixels are valid
            exif = PillowImage.Exif()
    return SourceImage(rgb, alpha, gray, image.info.get("icc_profile"), exif)


def encode_output(pixels: Image, alpha: Image | None, source: SourceImage, form: str) -> bytes:
    """An 8-bit PNG, JPEG (quality 95, 4:4:4) or WebP (quality 95), with color profile and EXIF.

    Raises:
        PhotoRejected: the format cannot hold it.
    """
    height, width = pixels.shape[:2]
    if form == "jpg" and alpha is not None:
        raise PhotoRejected("has transparency, which JPEG cannot hold; use --format png or webp")
    limit = {"jpg": JPEG_MAX_PX, "webp": WEBP_MAX_PX}.get(form)
    if limit is not None and max(height, width) > limit:
        raise PhotoRejected(f"{width} x {height} pixels are too many for {form} (at most {limit} on a side)")
    image = PillowImage.fromarray(pixels)
    if source.gray:
        image = image.convert("L")
    if alpha is not None:
        image.putalpha(PillowImage.fromarray(alpha[..., 0]))
    exif = source.exif
    details = exif.get_ifd(_SUB_IFD)
    if _WIDTH in details or _HEIGHT in details:
        details[_WIDTH], details[_HEIGHT] = width, height
    options: dict[str, Any] = {
        "png": {"format": "PNG", "compress_level": 3},
        "jpg": {"format": "JPEG", "quality": 95, "subsampling": 0},
        "webp": {"format": "WEBP", "quality": 95, "method": 4, "exact": True},
    }[form]
    if source.icc:
        options["icc_profile"] = source.icc
    buffer = io.BytesIO()
    try:
        image.save(buffer, exif=exif.tobytes() if len(exif) else b"", **options)
    except (struct.error, ValueError, TypeError, KeyError, OSError):
        # EXIF that Pillow reads but cannot write is dropped.
        buffer = io.BytesIO()
        image.save(buffer, **options)
    return buffer.getvalue()


def _with_transparency(data: bytes, max_megapixels: float) -> tuple[Image, Image, bool] | None:
    """Colors, alpha and whether they are gray, of a valid image with transparency; None for any other."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = open_image(data)
            if image.mode not in ("RGBA", "LA", "PA") and "transparency" not in image.info:
                return None
            if image.width * image.height > max_megapixels * 1e6 or getattr(image, "n_frames", 1) > 1:
                return None
            gray = image.mode in ("LA", "L")
            # For PNG this checks every chunk's CRC; afterwards the file must be reopened.
            image.verify()
            image = open_image(data)
            image.load()
            pixels = np.asarray(ImageOps.exif_transpose(image).convert("RGBA"))
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001 - Pillow's decoders raise anything on corrupt data
        return None
    return np.ascontiguousarray(pixels[..., :3]), np.ascontiguousarray(pixels[..., 3:]), gray
