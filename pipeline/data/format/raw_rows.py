"""Byte ranges of patches: of a raw one the rows that a crop needs, without the rest; of a WebP one the cells.

A shard is a Parquet file with one row group per patch. Each of its columns is one uncompressed page: a header of about
20 bytes, then the value; a binary value begins with its length (uint32). With P = patch_px and L = P / scale:

    PAR1 | row group of patch 0 | row group of patch 1 | ... | footer | length of the footer (uint32) | PAR1

    one row group, columns in the order of PATCH_SCHEMA:
    | patch_id | source_id | y | x | hr                   | lr                   | detail | row_checksums           |
    |          |           |   |   | header               | header               |        | header                  |
    |          |           |   |   | length               | length               |        | length                  |
    |          |           |   |   | P rows of 3P bytes   | L rows of 3L bytes   |        | P + L + 1 uint64        |
    edges[0] . edges[1] .. .   .   edges[4] ............. edges[5] ............. edges[6] edges[7] ......... edges[8]

The footer gives the edges. The size of a page header varies, but a value ends at its column's end and its size is
known, so it begins at that edge minus its size. A WebP value, whose size is not known, begins with RIFF.
"""

from collections.abc import Callable, Sequence

import numpy as np
import pyarrow.parquet as pq

from pipeline.data.format.manifest import Manifest
from pipeline.data.format.row_checksums import WORD, row_checksums, unpack
from pipeline.data.format.shards import PATCH_SCHEMA

_HR, _LR, _CHECKSUMS = (PATCH_SCHEMA.get_field_index(name) for name in ("hr", "lr", "row_checksums"))


def column_edges(metadata: pq.FileMetaData, shard_bytes: int) -> np.ndarray:
    """(rows, columns + 1): the first byte of every column of every row, and the end of the last column.

    36 bytes per row for a shard below 4 GiB: a data set of a million rows is read at random, so all stay in memory.

    Raises:
        ValueError: the columns of a row are not adjacent.
    """
    columns = len(PATCH_SCHEMA)
    edges = np.empty((metadata.num_row_groups, columns + 1), np.uint32 if shard_bytes < 2**32 else np.int64)
    for row in range(metadata.num_row_groups):
        group = metadata.row_group(row)
        end = group.column(0).data_page_offset
        for column in range(columns):
            chunk = group.column(column)
            if chunk.data_page_offset != end:
                raise ValueError("the columns of a row are not adjacent")
            edges[row, column] = end
            end += chunk.total_compressed_size
        edges[row, -1] = end
    return edges


def read_rows(
    read: Callable[[int, int], np.ndarray],
    edges: Sequence[int],
    manifest: Manifest,
    patch: int,
    top: int,
    bottom: int,
    *,
    one_request: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """Rows top..bottom of a raw patch, in high-resolution pixels: uint8 (bottom - top, P, 3), and (.., L, 3) of lr.

    Args:
        read: (offset, size) to uint8 (size,).
        edges: of the patch's row, from `column_edges`.
        one_request: read one range up to the end of the row group instead of the needed ones (for an object store,
            where a request costs more than the bytes between).

    Raises:
        ValueError: a checksum mismatch; and what `read` raises.
    """
    scale, side = manifest.scale, manifest.patch_px
    small, width, small_width = side // scale, 3 * side, 3 * (side // scale)
    low, high = top // scale, bottom // scale
    hr_first = edges[_HR + 1] - (side - top) * width
    lr_first = edges[_LR + 1] - (small - low) * small_width
    hr_bytes, end = (bottom - top) * width, edges[_CHECKSUMS + 1]
    if one_request:
        data = read(hr_first, end - hr_first)
        hr, tail = data[:hr_bytes], data[lr_first - hr_first :]
    else:
        hr, tail = read(hr_first, hr_bytes), read(lr_first, end - lr_first)
    hr = hr.reshape(bottom - top, width)
    lr = tail[: (high - low) * small_width].reshape(high - low, small_width)
    sums = unpack(patch, tail[-WORD * (side + small + 1) :])
    if not np.array_equal(row_checksums(hr), sums[top:bottom]):
        raise ValueError("column hr: row checksum mismatch")
    if not np.array_equal(row_checksums(lr), sums[side + low : side + high]):
        raise ValueError("column lr: row checksum mismatch")
    return hr.reshape(-1, side, 3), lr.reshape(-1, small, 3)


def read_cells(
    read: Callable[[int, int], np.ndarray], edges: Sequence[int], manifest: Manifest
) -> tuple[bytes, bytes, np.ndarray]:
    """The columns hr and lr (WebP files) and row_checksums (uint8) of a patch, unverified: arguments as `read_rows`.

    pyarrow would parse the shard's whole footer, which takes longer than to decode the patch.
    """
    first = edges[_HR]
    data = read(first, edges[_CHECKSUMS + 1] - first)
    hr, lr = (data[edges[column] - first : edges[column + 1] - first].tobytes() for column in (_HR, _LR))
    rows = manifest.patch_px + manifest.patch_px // manifest.scale + 1
    return hr[hr.find(b"RIFF") :], lr[lr.find(b"RIFF") :], data[-WORD * rows :]
