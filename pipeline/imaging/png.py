"""What Pillow lacks of PNG: checksums of pixel data, missing rows, the chunks as they are, and 16-bit color."""

import struct
import warnings
import zlib
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from numpy.typing import NDArray

SIGNATURE = b"\x89PNG\r\n\x1a\n"
# Adam7's passes: first row, first column, and the strides of both.
_ADAM7 = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))


def is_png(data: bytes) -> bool:
    """Whether a file is a PNG, by its first bytes."""
    return data.startswith(SIGNATURE)


def has_16_bits(data: bytes) -> bool:
    """Whether a file is a PNG of 16 bits for each channel."""
    return is_png(data) and data[24:25] == b"\x10"


def decode_16_bits(data: bytes) -> NDArray[np.uint16]:
    """(H, W, C) of a 16-bit PNG with valid chunks; C is 1 (gray), 2 (gray, alpha), 3 or 4. Pillow keeps 8 bits.

    Raises:
        RuntimeError: the pixel data are corrupt.
    """
    from torchvision.io import ImageReadMode, decode_png

    encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    with warnings.catch_warnings():
        # Deprecated in favor of a package that needs FFmpeg; constraints.txt pins a version that has it.
        warnings.simplefilter("ignore", DeprecationWarning)
        pixels: NDArray[np.uint16] = decode_png(encoded, ImageReadMode.UNCHANGED).numpy().transpose(1, 2, 0)
    transparent = next((data[first:end] for kind, first, end in chunks(data) if kind == b"tRNS"), None)
    if transparent is not None and pixels.shape[2] in (1, 3):
        color = np.frombuffer(transparent, ">u2")
        opaque = (pixels != color).any(axis=2, keepdims=True).astype(np.uint16) * 0xFFFF
        pixels = np.concatenate([pixels, opaque], axis=2)
    return np.ascontiguousarray(pixels)


def encode_16_bits(pixels: NDArray[np.uint16], ancillary: Mapping[bytes, bytes]) -> bytes:
    """A 16-bit PNG of (H, W, C), C as in `decode_16_bits`; `ancillary` chunks, by kind, precede IDAT."""
    height, width, channels = pixels.shape
    rows = np.frombuffer(pixels.astype(">u2").tobytes(), np.uint8).reshape(height, -1)
    filtered = np.empty((height, rows.shape[1] + 1), np.uint8)
    filtered[:, 0] = 2  # Up: the difference from the row above
    filtered[0, 1:] = rows[0]
    np.subtract(rows[1:], rows[:-1], out=filtered[1:, 1:])
    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    parts = [
        (b"IHDR", header),
        *ancillary.items(),
        (b"IDAT", zlib.compress(filtered.tobytes(), 4)),
        (b"IEND", b""),
    ]
    return SIGNATURE + b"".join(
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in parts
    )


def chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Kind, first byte and end of the content of each complete chunk, up to IEND; its CRC follows."""
    position = len(SIGNATURE)
    while position + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        first, end = position + 8, position + 8 + length
        if end + 4 > len(data):
            return
        yield kind, first, end
        if kind == b"IEND":
            return
        position = end + 4


def chunk_fault(data: bytes) -> str:
    """Why a PNG's chunks are corrupt or incomplete; empty if they are valid, or for another format.

    Pillow does not check the CRC of pixel data.
    """
    if not is_png(data):
        return ""
    view, kind = memoryview(data), b""
    for kind, first, end in chunks(data):
        (stored,) = struct.unpack_from(">I", data, end)
        if zlib.crc32(view[first - 4 : end]) != stored:
            return f"corrupt PNG: checksum mismatch in chunk {kind.decode('latin1')}"
    return "" if kind == b"IEND" else "truncated PNG"


def pixel_fault(data: bytes) -> str:
    """Why the pixel data of a PNG with valid chunks are corrupt or end early; empty if they are complete."""
    width, height, depth, color, _, _, interlaced = struct.unpack_from(">IIBBBBB", data, 16)
    bits = depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[color]
    expected = 0
    for y, x, y_stride, x_stride in _ADAM7 if interlaced else ((0, 0, 1, 1),):
        rows, columns = len(range(y, height, y_stride)), len(range(x, width, x_stride))
        expected += rows * (1 + -(-columns * bits // 8)) if columns else 0
    inflater, count = zlib.decompressobj(), 0
    for kind, first, end in chunks(data):
        if kind == b"IDAT" and count < expected:
            try:
                count += len(inflater.decompress(data[first:end], expected - count))
            except zlib.error as error:
                return f"corrupt PNG: {error}"
    return f"truncated PNG: {count} of {expected} bytes of pixel data" if count < expected else ""
