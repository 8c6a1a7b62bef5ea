"""Decodes image files: either the correct pixels, or PhotoRejected with the reason."""

import io
import warnings
from dataclasses import dataclass

import numpy as np
from PIL import Image, UnidentifiedImageError

from pipeline.imaging import png

# Only formats of photos: for EPS, PDF and others Pillow starts other programs.
# Pillow opens MPO as JPEG; `MPO` itself is not a name that `Image.open` accepts.
FORMATS = ("PNG", "JPEG", "TIFF", "WEBP", "BMP", "DIB", "PPM", "GIF", "JPEG2000", "AVIF")
EXTENSIONS = frozenset((
    ".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".tif", ".tiff", ".webp", ".bmp", ".dib",
    ".ppm", ".pgm", ".pnm", ".gif", ".jp2", ".j2k", ".avif",
))  # fmt: skip
# Image formats that are not read, by extension.
UNSUPPORTED = frozenset((
    ".heic", ".heif", ".jxl", ".tga", ".psd", ".exr", ".hdr", ".dds", ".ico", ".svg", ".xcf", ".pcx", ".eps",
    ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf", ".pef", ".raw", ".qoi", ".jxr",
))  # fmt: skip
_LOSSY = frozenset(("JPEG", "MPO", "AVIF", "JPEG2000"))
_LOSSY_IN_TIFF = frozenset(("jpeg", "tiff_jpeg", "webp"))
_MOST_BYTES_PER_PIXEL = 16
_MAGIC = (png.SIGNATURE, b"\xff\xd8\xff", b"II*\0", b"MM\0*", b"BM", b"GIF8", b"P5", b"P6", b"\0\0\0\x0cjP")

# From the stored rows of each EXIF orientation to an upright image; 1 is upright.
_UPRIGHT = {
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.transpose(1, 0, 2),
    6: lambda pixels: pixels[::-1].transpose(1, 0, 2),
    7: lambda pixels: pixels[::-1, ::-1].transpose(1, 0, 2),
    8: lambda pixels: pixels.transpose(1, 0, 2)[::-1],
}


class PhotoRejected(Exception):
    """A file that is not a usable image; the text is the reason."""


@dataclass(frozen=True)
class Photo:
    """A decoded image."""

    pixels: np.ndarray  # uint8 (height, width, 3), EXIF orientation applied
    format: str
    lossy: bool
    notes: tuple[str, ...]  # conversions: "gray", "palette", "16-bit", "rotated"
    alpha: np.ndarray | None = None  # uint8 (height, width, 1), if it has transparency


def read_photo(data: bytes, max_megapixels: float = 200.0, with_alpha: bool = False) -> Photo:
    """Decodes a whole file.

    Of 16-bit RGB the upper byte is kept (as libpng's strip_16 does); gray images and opaque palettes become RGB; the
    EXIF orientation is applied. Transparency is rejected, unless `with_alpha`.

    Raises:
        PhotoRejected: with the reason.
    """
    if not data:
        raise PhotoRejected("empty file")
    reject_large_file(len(data), max_megapixels)
    if reason := png.chunk_fault(data):
        raise PhotoRejected(reason)
    image = open_image(data)
    with_alpha = with_alpha and (image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info)
    _check_header(image, max_megapixels, with_alpha)
    notes = _notes(image)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image.load()
            orientation = _orientation(image)
            mode = "RGBA" if with_alpha else "RGB"
            pixels = np.asarray(image if image.mode == mode else image.convert(mode))
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - Pillow's decoders raise anything on corrupt data
        raise PhotoRejected(_corruption(error)) from None
    # Pillow leaves missing pixels black: the last rows, or those of the last passes.
    incomplete = image.format == "PNG" and (image.info.get("interlace") or not pixels[-1].any())
    if incomplete and (reason := png.pixel_fault(data)):
        raise PhotoRejected(reason)
    if image.format in ("JPEG", "MPO") and data.rfind(b"\xff\xd9") < data.rfind(b"\xff\xda"):
        raise PhotoRejected("truncated: no end-of-image marker")
    if orientation in _UPRIGHT:
        notes = (*notes, "rotated")
    lossy = (
        image.format in _LOSSY
        or (image.format == "WEBP" and b"VP8L" not in data[:64])
        or image.info.get("compression") in _LOSSY_IN_TIFF
    )
    pixels = _upright(pixels, orientation)
    alpha = np.ascontiguousarray(pixels[..., 3:]) if with_alpha else None
    return Photo(np.ascontiguousarray(pixels[..., :3]), str(image.format), lossy, notes, alpha)


def read_16_bits(data: bytes, max_megapixels: float) -> np.ndarray:
    """uint16 (H, W, C) of a 16-bit PNG, upright; C is 1 (gray), 2 (gray, alpha), 3 or 4.

    Raises:
        PhotoRejected: with the reason.
    """
    image = open_image(data)
    reject_large_image(image, max_megapixels)
    if getattr(image, "n_frames", 1) > 1:
        raise PhotoRejected("animated")
    if reason := png.chunk_fault(data) or png.pixel_fault(data):
        raise PhotoRejected(reason)
    try:
        return _upright(png.decode_16_bits(data), _orientation(image))
    except RuntimeError as error:
        raise PhotoRejected(_corruption(error)) from None


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Stored rows turned according to EXIF's orientation, contiguous."""
    return np.ascontiguousarray(_UPRIGHT[orientation](pixels)) if orientation in _UPRIGHT else pixels


def reject_large_image(image: Image.Image, max_megapixels: float) -> None:
    """Raises PhotoRejected: the image has more pixels than the limit."""
    width, height = image.size
    if width * height > max_megapixels * 1e6:
        raise PhotoRejected(f"{width} x {height} pixels exceed the limit of {max_megapixels:g} megapixels")


def reject_large_file(size: int, max_megapixels: float) -> None:
    """Raises PhotoRejected: a file of `size` bytes is larger than any image within the limit."""
    if size > max_megapixels * 1e6 * _MOST_BYTES_PER_PIXEL:
        raise PhotoRejected(f"file of {size} bytes is too large for {max_megapixels:g} megapixels")


def looks_like_photo(head: bytes) -> bool:
    """Whether a file of unknown extension is an image, from its first bytes."""
    return head.startswith(_MAGIC) or head[8:12] == b"WEBP" or head[4:12] in (b"ftypavif", b"ftypavis")


def open_image(data: bytes) -> Image.Image:
    """The image before its pixels are decoded, of any size: callers check it. Raises PhotoRejected."""
    limit = Image.MAX_IMAGE_PIXELS
    try:
        # max_megapixels replaces Pillow's limit, which only warns up to twice its value.
        Image.MAX_IMAGE_PIXELS = None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        raise PhotoRejected(_what_else(data)) from None
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001
        raise PhotoRejected(_corruption(error)) from None
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _check_header(image: Image.Image, max_megapixels: float, with_alpha: bool) -> None:
    reject_large_image(image, max_megapixels)
    try:
        frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
    except Exception as error:  # noqa: BLE001
        raise PhotoRejected(_corruption(error)) from None
    if frames > 1:
        raise PhotoRejected(f"animated or several pages ({frames} frames)")
    if with_alpha:
        return
    mode = image.mode
    if mode == "1":
        raise PhotoRejected("1-bit image")
    if mode.startswith("I"):
        raise PhotoRejected("16-bit or 32-bit gray image")
    if mode == "F":
        raise PhotoRejected("floating-point image")
    if mode in ("RGBA", "LA", "PA", "RGBa", "La", "RGBX"):
        raise PhotoRejected("has an alpha channel")
    if "transparency" in image.info:
        raise PhotoRejected("has transparent colors")
    if mode in ("CMYK", "YCbCr", "LAB", "HSV"):
        raise PhotoRejected(f"color mode {mode}, not RGB")
    if mode not in ("RGB", "L", "P"):
        raise PhotoRejected(f"unknown pixel mode {mode}")
    if mode == "P" and image.palette is not None and image.palette.mode not in ("RGB", "L", "RGBX", "BGRX"):
        raise PhotoRejected("palette with transparency")


def _notes(image: Image.Image) -> tuple[str, ...]:
    notes = []
    if image.mode in ("L", "LA", "P"):
        notes.append("palette" if image.mode == "P" else "gray")
    if any("16" in str(tile[3]) for tile in getattr(image, "tile", ())):
        notes.append("16-bit")
    return tuple(notes)


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(0x0112, 1))
    except Exception:  # noqa: BLE001 - corrupt EXIF does not affect the pixels
        return 1


_OTHER_FORMATS = (
    (b"8BPS", "Photoshop"), (b"\x76\x2f\x31\x01", "OpenEXR"), (b"\xff\x0a", "JPEG XL"), (b"\0\0\0\x0cJXL ", "JPEG XL"),
    (b"#?RADIANCE", "Radiance HDR"), (b"DDS ", "DDS"), (b"qoif", "QOI"), (b"\0\0\1\0", "icon"), (b"%PDF", "PDF"),
)  # fmt: skip
_HEIF_BRANDS = (b"heic", b"heix", b"hevc", b"heif", b"mif1", b"msf1")


def _what_else(data: bytes) -> str:
    known = next((name for magic, name in _OTHER_FORMATS if data.startswith(magic)), "")
    if data[4:8] == b"ftyp":
        known = "HEIC" if data[8:12] in _HEIF_BRANDS else "Canon raw" if data[8:11] == b"crx" else known
    if known:
        return f"{known} is not supported; convert it to PNG"
    head = data[:512].lstrip(b"\xef\xbb\xbf \t\r\n")
    if head[:1] == b"<":
        return "not an image: HTML or XML text"
    try:
        data[:512].decode("ascii")
    except UnicodeDecodeError:
        return "not an image of a known format, or its header is corrupt"
    return "not an image: text"


def _corruption(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    kind = "truncated" if "truncated" in text or isinstance(error, EOFError) else "corrupt"
    return f"{kind}: {text[:200]}"
