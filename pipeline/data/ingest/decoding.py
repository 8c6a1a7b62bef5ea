"""Reads photographs safely: either the right pixels, or PhotoRefused with the reason."""

import io
import struct
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image, UnidentifiedImageError

# EPS, PDF and the like start other programs; only formats that hold photographs are opened.
# Pillow opens MPO as JPEG; by its own name it would be an unknown format.
FORMATS = ("PNG", "JPEG", "TIFF", "WEBP", "BMP", "DIB", "PPM", "GIF", "JPEG2000", "AVIF")
EXTENSIONS = frozenset(
    (
        ".png",
        ".apng",
        ".jpg",
        ".jpeg",
        ".jpe",
        ".jfif",
        ".mpo",
        ".tif",
        ".tiff",
        ".webp",
        ".bmp",
        ".dib",
        ".ppm",
        ".pgm",
        ".pnm",
        ".gif",
        ".jp2",
        ".j2k",
        ".avif",
    )
)
_LOSSY = frozenset(("JPEG", "MPO", "AVIF", "JPEG2000"))
_LOSSY_IN_TIFF = frozenset(("jpeg", "tiff_jpeg", "webp"))
_MOST_BYTES_PER_PIXEL = 16
# Adam7's passes: first row, first column, and the distances to the next ones.
_ADAM7 = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_MAGIC = (_PNG_SIGNATURE, b"\xff\xd8\xff", b"II*\0", b"MM\0*", b"BM", b"GIF8", b"P5", b"P6", b"\0\0\0\x0cjP")

# What turns the stored rows of each EXIF orientation into an upright picture; 1 is upright.
_UPRIGHT = {
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.transpose(1, 0, 2),
    6: lambda pixels: pixels[::-1].transpose(1, 0, 2),
    7: lambda pixels: pixels[::-1, ::-1].transpose(1, 0, 2),
    8: lambda pixels: pixels.transpose(1, 0, 2)[::-1],
}


class PhotoRefused(Exception):
    """A file that is not a usable photograph; the text is the reason."""


@dataclass(frozen=True)
class Photo:
    """A decoded photograph."""

    pixels: np.ndarray  # uint8 (height, width, 3), EXIF orientation applied
    format: str
    lossy: bool
    notes: tuple[str, ...]  # what was done to it: "grey", "palette", "16-bit", "rotated"


def read_photo(data: bytes, max_megapixels: float = 200.0) -> Photo:
    """Decodes a whole file.

    Sixteen-bit RGB keeps its upper byte (as libpng's strip_16 does); grey and opaque palettes become RGB; EXIF
    orientation is applied.

    Raises:
        PhotoRefused: with the reason.
    """
    if not data:
        raise PhotoRefused("empty file")
    refuse_large_file(len(data), max_megapixels)
    if data.startswith(_PNG_SIGNATURE):
        _check_png(data)
    image = _open(data)
    _check_header(image, max_megapixels)
    notes = _notes(image)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image.load()
            orientation = _orientation(image)
            pixels = np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - Pillow's decoders raise anything on damaged data
        raise PhotoRefused(_damage(error)) from None
    if image.format == "PNG" and not pixels[-1].any():  # also what rows look like that were never there
        _require_all_rows(data)
    if image.format in ("JPEG", "MPO") and data.rfind(b"\xff\xd9") < data.rfind(b"\xff\xda"):
        raise PhotoRefused("truncated: no end-of-image marker")
    if orientation in _UPRIGHT:
        notes = (*notes, "rotated")
        pixels = np.ascontiguousarray(_UPRIGHT[orientation](pixels))
    lossy = (
        image.format in _LOSSY
        or (image.format == "WEBP" and b"VP8L" not in data[:64])
        or image.info.get("compression") in _LOSSY_IN_TIFF
    )
    return Photo(pixels, str(image.format), lossy, notes)


def refuse_large_file(size: int, max_megapixels: float) -> None:
    """Raises PhotoRefused where a file of `size` bytes is larger than any photograph within the limit."""
    if size > max_megapixels * 1e6 * _MOST_BYTES_PER_PIXEL:
        raise PhotoRefused(f"file of {size} bytes is too large for {max_megapixels:g} megapixels")


def looks_like_photo(head: bytes) -> bool:
    """Whether a file of unknown extension that begins with `head` is an image all the same."""
    return head.startswith(_MAGIC) or head[8:12] == b"WEBP" or head[4:12] in (b"ftypavif", b"ftypavis")


def _open(data: bytes) -> Image.Image:
    limit = Image.MAX_IMAGE_PIXELS
    try:
        # Our own limit, from the header, replaces Pillow's, which only warns up to twice its value.
        Image.MAX_IMAGE_PIXELS = None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        raise PhotoRefused(_what_else(data)) from None
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001
        raise PhotoRefused(_damage(error)) from None
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _check_header(image: Image.Image, max_megapixels: float) -> None:
    width, height = image.size
    if width * height > max_megapixels * 1e6:
        raise PhotoRefused(f"{width} x {height} pixels are over the limit of {max_megapixels:g} megapixels")
    try:
        frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
    except Exception as error:  # noqa: BLE001
        raise PhotoRefused(_damage(error)) from None
    if frames > 1:
        raise PhotoRefused(f"animated or of several pages ({frames} frames)")
    mode = image.mode
    if mode == "1":
        raise PhotoRefused("1-bit image")
    if mode.startswith("I"):
        raise PhotoRefused("16-bit or 32-bit grey image")
    if mode == "F":
        raise PhotoRefused("floating-point image")
    if mode in ("RGBA", "LA", "PA", "RGBa", "La", "RGBX"):
        raise PhotoRefused("has an alpha channel")
    if "transparency" in image.info:
        raise PhotoRefused("has transparent colours")
    if mode in ("CMYK", "YCbCr", "LAB", "HSV"):
        raise PhotoRefused(f"colours are {mode}, not RGB")
    if mode not in ("RGB", "L", "P"):
        raise PhotoRefused(f"unknown pixel mode {mode}")
    if mode == "P" and image.palette is not None and image.palette.mode not in ("RGB", "L", "RGBX", "BGRX"):
        raise PhotoRefused("palette with transparency")


def _notes(image: Image.Image) -> tuple[str, ...]:
    notes = []
    if image.mode in ("L", "P"):
        notes.append("grey" if image.mode == "L" else "palette")
    if any("16" in str(tile[3]) for tile in getattr(image, "tile", ())):
        notes.append("16-bit")
    return tuple(notes)


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(0x0112, 1))
    except Exception:  # noqa: BLE001 - damaged EXIF says nothing about the pixels
        return 1


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Kind, first byte and end of what each whole chunk holds, up to IEND; its CRC follows."""
    position = len(_PNG_SIGNATURE)
    while position + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        first, end = position + 8, position + 8 + length
        if end + 4 > len(data):
            return
        yield kind, first, end
        if kind == b"IEND":
            return
        position = end + 4


def _check_png(data: bytes) -> None:
    """Checks every chunk's CRC, which Pillow does not do for pixel data, and that the file ends with IEND."""
    view, kind = memoryview(data), b""
    for kind, first, end in _png_chunks(data):
        (stored,) = struct.unpack_from(">I", data, end)
        if zlib.crc32(view[first - 4 : end]) != stored:
            raise PhotoRefused(f"damaged PNG: chunk {kind.decode('latin1')} fails its checksum")
    if kind != b"IEND":
        raise PhotoRefused("truncated PNG")


def _require_all_rows(data: bytes) -> None:
    """Refuses a PNG whose pixel data end early, although every chunk is sound; Pillow leaves the rest black."""
    width, height, depth, colour, _, _, interlaced = struct.unpack_from(">IIBBBBB", data, 16)
    bits = depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    passes = _ADAM7 if interlaced else ((0, 0, 1, 1),)
    expected = 0
    for y, x, step_y, step_x in passes:
        rows, columns = -(-(height - y) // step_y), -(-(width - x) // step_x)
        if rows > 0 and columns > 0:
            expected += rows * (1 + -(-columns * bits // 8))
    inflater, found = zlib.decompressobj(), 0
    for kind, first, end in _png_chunks(data):
        if kind == b"IDAT" and found < expected:
            try:
                found += len(inflater.decompress(data[first:end], expected - found))
            except zlib.error as error:
                raise PhotoRefused(f"damaged PNG: {error}") from None
    if found < expected:
        raise PhotoRefused(f"truncated PNG: {found} of {expected} bytes of pixel data")


def _what_else(data: bytes) -> str:
    head = data[:512].lstrip(b"\xef\xbb\xbf \t\r\n")
    if head[:1] == b"<":
        return "not an image: HTML or XML text"
    try:
        data[:512].decode("ascii")
    except UnicodeDecodeError:
        return "not an image of a known format, or its header is damaged"
    return "not an image: text"


def _damage(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    kind = "truncated" if "truncated" in text or isinstance(error, EOFError) else "damaged"
    return f"{kind}: {text[:200]}"
