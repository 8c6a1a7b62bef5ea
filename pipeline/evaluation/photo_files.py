"""Reads a photograph with all that an enlarged copy must keep, and writes the copy."""

import io
import struct
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from pipeline.data.ingest.decoding import FORMATS, PhotoRejected, read_photo

Pixels = NDArray[np.uint8]
SUFFIXES = {"png": ".png", "jpg": ".jpg", "webp": ".webp"}
WEBP_MAX_PX, JPEG_MAX_PX = 16383, 65535

_ORIENTATION, _SUB_IFD, _WIDTH, _HEIGHT = 0x0112, 0x8769, 0xA002, 0xA003


@dataclass(frozen=True)
class SourcePhoto:
    """A photograph, upright."""

    rgb: Pixels
    """(H, W, 3)."""
    alpha: Pixels | None
    """(H, W, 1), where it has transparency."""
    grey: bool
    """It was a grey picture; the copy is one, too."""
    icc: bytes | None
    exif: Image.Exif
    """Orientation 1: it has been applied to the pixels."""


def read_source(data: bytes, max_megapixels: float) -> SourcePhoto:
    """Decodes a whole file; see `read_photo` for what is refused. Transparency is kept here.

    Raises:
        PhotoRejected: with the reason.
    """
    try:
        photo = read_photo(data, max_megapixels)
        rgb, alpha, grey = photo.pixels, None, "gray" in photo.notes
    except PhotoRejected as refusal:
        found = _with_transparency(data, max_megapixels)
        if found is None:
            raise refusal
        rgb, alpha, grey = found
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        try:
            exif = image.getexif()
            exif.pop(_ORIENTATION, None)
        except Exception:  # noqa: BLE001 - damaged EXIF is left out; the pixels are sound
            exif = Image.Exif()
    return SourcePhoto(rgb, alpha, grey, image.info.get("icc_profile"), exif)


def write_copy(pixels: Pixels, alpha: Pixels | None, source: SourcePhoto, form: str) -> bytes:
    """An 8-bit PNG, JPEG (quality 95, full colour resolution) or WebP (quality 95), with profile and EXIF.

    Raises:
        PhotoRejected: the format cannot hold it.
    """
    height, width = pixels.shape[:2]
    if form == "jpg" and alpha is not None:
        raise PhotoRejected("has transparency, which JPEG cannot hold; use --format png or webp")
    limit = {"jpg": JPEG_MAX_PX, "webp": WEBP_MAX_PX}.get(form)
    if limit is not None and max(height, width) > limit:
        raise PhotoRejected(f"{width} x {height} pixels are too many for {form} (at most {limit} on a side)")
    image = Image.fromarray(pixels)
    if source.grey:
        image = image.convert("L")
    if alpha is not None:
        image.putalpha(Image.fromarray(alpha[..., 0]))
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
        # EXIF that Pillow reads but cannot write is not worth a photograph.
        buffer = io.BytesIO()
        image.save(buffer, **options)
    return buffer.getvalue()


def _with_transparency(data: bytes, max_megapixels: float) -> tuple[Pixels, Pixels, bool] | None:
    """Colours, alpha and whether they are grey, of a sound picture with transparency; None for any other."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            if image.mode not in ("RGBA", "LA", "PA") and "transparency" not in image.info:
                return None
            if image.width * image.height > max_megapixels * 1e6 or getattr(image, "n_frames", 1) > 1:
                return None
            grey = image.mode in ("LA", "L")
            # For PNG this checks every chunk's CRC; afterwards a file must be opened anew.
            image.verify()
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            image.load()
            pixels = np.asarray(ImageOps.exif_transpose(image).convert("RGBA"))
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001 - Pillow's decoders raise anything on damaged data
        return None
    return np.ascontiguousarray(pixels[..., :3]), np.ascontiguousarray(pixels[..., 3:]), grey
