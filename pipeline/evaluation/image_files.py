"""Reads an image with everything that its upscaled output must keep, and encodes the output."""

import io
import struct
import warnings
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PillowImage
from PIL import PngImagePlugin

from pipeline.data.ingest.decoding import PhotoRejected, open_image, read_16_bits, read_photo
from pipeline.imaging import DeepImage, png

SUFFIXES = {"png": ".png", "jpg": ".jpg", "webp": ".webp"}
WEBP_MAX_PX, JPEG_MAX_PX = 16383, 65535

_ORIENTATION, _SUB_IFD, _WIDTH, _HEIGHT = 0x0112, 0x8769, 0xA002, 0xA003
# A TIFF's tags describe its pixels' layout or, as GeoTIFF's, their size on the ground. These describe the image: name,
# camera, density, software, date, author, copyright, and the EXIF and GPS directories.
_TIFF_KEPT = {269, 270, 271, 272, 282, 283, 296, 305, 306, 315, 316, 33432, 34665, 34853}
_SIZE_TAGS = (256, 257)
_COLOR_CHUNKS = (b"cHRM", b"cICP", b"gAMA", b"sRGB")
_SRGB_GAMMA, _SRGB_CICP = 45455, bytes((1, 13, 0))
_SRGB_PRIMARIES = np.array([31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000])


@dataclass(frozen=True)
class SourceImage:
    """A decoded image, upright."""

    rgb: DeepImage
    """uint8, or uint16 of a 16-bit PNG, (H, W, 3); hidden pixels have colors of visible ones nearby."""
    alpha: DeepImage | None
    """(H, W, 1) of the same dtype, if it has transparency."""
    gray: bool
    """The file has one channel; so will the output."""
    colorless: bool
    """Every visible pixel is gray; so will be the output's."""
    icc: bytes | None
    exif: PillowImage.Exif
    """Without the orientation, which has been applied to the pixels, and without a TIFF's structure."""
    dpi: tuple[float, float] | None = None
    color_chunks: Mapping[bytes, bytes] = field(default_factory=dict)
    """A PNG's description of its colors: gAMA, cHRM, cICP, sRGB."""


def read_source(data: bytes, max_megapixels: float) -> SourceImage:
    """Decodes a whole file; see `read_photo` for what is rejected. Transparency is kept here.

    Raises:
        PhotoRejected: with the reason.
    """
    rgb, alpha, gray = _pixels(data, max_megapixels)
    if alpha is not None:
        rgb = fill_hidden(rgb, alpha)
    image = open_image(data)
    return SourceImage(
        rgb=rgb,
        alpha=alpha,
        gray=gray,
        colorless=bool((rgb[..., :1] == rgb[..., 1:]).all()),
        icc=image.info.get("icc_profile"),
        exif=_kept_exif(image),
        dpi=_density(image),
        color_chunks={
            kind: data[first:end]
            for kind, first, end in (png.chunks(data) if png.is_png(data) else ())
            if kind in _COLOR_CHUNKS
        },
    )


def _pixels(data: bytes, max_megapixels: float) -> tuple[DeepImage, DeepImage | None, bool]:
    """Colors, alpha and whether the file has one color channel."""
    if png.has_16_bits(data):
        levels = read_16_bits(data, max_megapixels)
        colors, channels = levels.shape[2] - 1 | 1, levels.shape[2]
        rgb = np.ascontiguousarray(np.broadcast_to(levels[..., :colors], (*levels.shape[:2], 3)))
        alpha = np.ascontiguousarray(levels[..., colors:]) if channels > colors else None
        return rgb, alpha, colors == 1
    photo = read_photo(data, max_megapixels, with_alpha=True)
    return photo.pixels, photo.alpha, "gray" in photo.notes


def fill_hidden(rgb: DeepImage, alpha: DeepImage) -> DeepImage:
    """Gives pixels of alpha 0 the color of the nearest visible pixel in their row or column.

    Their stored color, often black, would bleed into the visible edge: the network sees no alpha.

    Args:
        rgb: (H, W, 3).
        alpha: (H, W, 1).
    """
    visible = alpha[..., 0] > 0
    if not visible.any():
        return rgb
    # Pixels whose row and column are hidden throughout are filled by the second pass, from the first one's.
    while not visible.all():
        (rows, row_distance), (columns, column_distance) = (_nearest(visible, axis) for axis in (0, 1))
        distance = np.minimum(row_distance, column_distance)
        vertical = (row_distance <= column_distance)[..., None]
        from_row, from_column = (
            np.take_along_axis(rgb, index.clip(0, rgb.shape[axis] - 1)[..., None], axis)
            for axis, index in enumerate((rows, columns))
        )
        rgb = np.where(vertical, from_row, from_column)
        visible = distance < max(visible.shape)
    return rgb


def _nearest(visible: NDArray[np.bool_], axis: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Index along `axis` of the nearest visible pixel, and its distance; at least max(H, W) where there is none."""
    far = 2 * max(visible.shape)
    index = np.expand_dims(np.arange(visible.shape[axis], dtype=np.int32), 1 - axis)
    before = np.maximum.accumulate(np.where(visible, index, -far), axis)
    after = np.flip(np.minimum.accumulate(np.flip(np.where(visible, index, 2 * far), axis), axis), axis)
    nearest = np.where(index - before <= after - index, before, after)
    return nearest, np.abs(index - nearest)


def encode_output(pixels: DeepImage, alpha: DeepImage | None, source: SourceImage, form: str) -> bytes:
    """A PNG, JPEG (quality 95, 4:4:4) or WebP (quality 95), with color profile, density and EXIF.

    A PNG of uint16 has 16 bits; everything else 8.

    Raises:
        PhotoRejected: the format cannot hold it.
    """
    height, width = pixels.shape[:2]
    _require_holds(form, height, width, alpha is not None, source)
    if source.colorless:
        pixels = _gray(pixels)
        # A color profile for RGB is valid in RGB files only.
        pixels = pixels if source.gray else np.repeat(pixels, 3, axis=2)
    levels = pixels if alpha is None else np.concatenate([pixels, alpha], axis=2)
    exif = source.exif
    if _SUB_IFD in exif and {_WIDTH, _HEIGHT} & exif.get_ifd(_SUB_IFD).keys():
        exif.get_ifd(_SUB_IFD).update({_WIDTH: width, _HEIGHT: height})
    if levels.dtype == np.uint16:
        if form == "png":
            return _png_of_16_bits(levels, source)
        levels = ((levels.astype(np.uint32) + 128) // 257).astype(np.uint8)
    image = PillowImage.fromarray(levels[..., 0] if levels.shape[2] == 1 else levels)
    options: dict[str, Any] = {
        "png": {"format": "PNG", "compress_level": 3, "pnginfo": _png_info(source)},
        "jpg": {"format": "JPEG", "quality": 95, "subsampling": 0},
        "webp": {"format": "WEBP", "quality": 95, "method": 4, "exact": True},
    }[form]
    if source.icc:
        options["icc_profile"] = source.icc
    if source.dpi and form != "webp":
        options["dpi"] = source.dpi
    buffer = io.BytesIO()
    try:
        image.save(buffer, exif=exif.tobytes() if len(exif) else b"", **options)
    except (struct.error, ValueError, TypeError, KeyError, OSError):
        # EXIF that Pillow reads but cannot write is dropped.
        buffer = io.BytesIO()
        image.save(buffer, **options)
    return buffer.getvalue()


def resized(pixels: DeepImage, size: Sequence[int]) -> DeepImage:
    """Lanczos to (height, width), for (H, W, C) of any dtype; rounded and clipped."""
    height, width = size
    channels = [
        np.asarray(
            PillowImage.fromarray(channel.astype(np.float32)).resize(
                (width, height), PillowImage.Resampling.LANCZOS
            )
        )
        for channel in np.moveaxis(pixels, 2, 0)
    ]
    levels = np.stack(channels, axis=2).round().clip(0, np.iinfo(pixels.dtype).max)
    return levels.astype(pixels.dtype)


def _gray(rgb: DeepImage) -> DeepImage:
    """BT.601 luma, full range, (H, W, 1)."""
    weights = np.array([19595, 38470, 7471], np.uint32)
    return ((rgb @ weights + 32768) >> 16).astype(rgb.dtype)[..., None]


def _png_of_16_bits(levels: DeepImage, source: SourceImage) -> bytes:
    chunks = dict(source.color_chunks)
    if source.icc:
        chunks.pop(b"sRGB", None)
        chunks[b"iCCP"] = b"ICC Profile\0\0" + zlib.compress(source.icc)
    if source.dpi:
        chunks[b"pHYs"] = struct.pack(">IIB", *(round(value / 0.0254) for value in source.dpi), 1)
    if len(source.exif):
        with suppress(struct.error, ValueError, TypeError, KeyError):
            chunks[b"eXIf"] = source.exif.tobytes().removeprefix(b"Exif\0\0")
    return png.encode_16_bits(levels, chunks)


def _require_holds(form: str, height: int, width: int, transparent: bool, source: SourceImage) -> None:
    """Raises PhotoRejected for what a format cannot hold."""
    if form == "jpg" and transparent:
        raise PhotoRejected("has transparency, which JPEG cannot hold; use --format png or webp")
    limit = {"jpg": JPEG_MAX_PX, "webp": WEBP_MAX_PX}.get(form)
    if limit is not None and max(height, width) > limit:
        raise PhotoRejected(f"{width} x {height} pixels are too many for {form} (at most {limit} on a side)")
    if form != "png" and (kind := _other_colors(source)):
        raise PhotoRejected(f"has colors described by {kind}, which only PNG can hold; use --format png")


def _other_colors(source: SourceImage) -> str:
    """The chunk that describes other colors than sRGB; empty if a color profile does, or none."""
    chunks = source.color_chunks
    if b"cICP" in chunks:
        return "" if chunks[b"cICP"].startswith(_SRGB_CICP) else "cICP"
    if source.icc or b"sRGB" in chunks:
        return ""
    if len(gamma := chunks.get(b"gAMA", b"")) == 4 and abs(struct.unpack(">I", gamma)[0] - _SRGB_GAMMA) > 500:
        return "gAMA"
    if len(primaries := chunks.get(b"cHRM", b"")) == 32:
        return (
            "cHRM" if np.abs(np.array(struct.unpack(">8I", primaries)) - _SRGB_PRIMARIES).max() > 500 else ""
        )
    return ""


def _png_info(source: SourceImage) -> PngImagePlugin.PngInfo:
    info = PngImagePlugin.PngInfo()
    for kind, content in source.color_chunks.items():
        info.add(kind, content)
    return info


def _density(image: PillowImage.Image) -> tuple[float, float] | None:
    try:
        x, y = (float(value) for value in image.info["dpi"])
    except (KeyError, ValueError, TypeError, ZeroDivisionError):
        return None
    return (x, y) if min(x, y) > 1 else None  # 1: Pillow's value for a TIFF without a unit


def _kept_exif(image: PillowImage.Image) -> PillowImage.Exif:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            exif = image.getexif()
            dropped = [_ORIENTATION, *_SIZE_TAGS]
            if image.format == "TIFF":
                dropped += [tag for tag in exif if tag not in _TIFF_KEPT]
            for tag in dropped:
                exif.pop(tag, None)
            return exif
        except Exception:  # noqa: BLE001 - corrupt EXIF is dropped; the pixels are valid
            return PillowImage.Exif()
