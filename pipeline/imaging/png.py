"""What Pillow lacks of PNG: checksums of pixel data, missing rows, and the chunks as they are."""

import struct
import zlib
from collections.abc import Iterator

SIGNATURE = b"\x89PNG\r\n\x1a\n"
# Adam7's passes: first row, first column, and the strides of both.
_ADAM7 = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))


def is_png(data: bytes) -> bool:
    """Whether a file is a PNG, by its first bytes."""
    return data.startswith(SIGNATURE)


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
