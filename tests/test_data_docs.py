"""docs/data.md: its reader reads what we write, and its description of row checksums is exact."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from tiny_patches import pixels, write_patches

PAGE = Path(__file__).resolve().parent.parent / "docs" / "data.md"


@pytest.mark.parametrize("codec", ["raw", "webp"])
def test_the_reader_on_the_page_reads_a_data_set(tmp_path: Path, codec: str) -> None:
    write_patches(tmp_path, 11, codec=codec)
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    space: dict[str, Any] = {}
    exec(code, space)
    found = list(space["patches"](tmp_path))
    assert [number for number, _, _ in found] == list(range(11))
    for number, hr, lr in found:
        expected = pixels(number, 32, 4)
        assert np.array_equal(hr, expected[0])
        assert np.array_equal(lr, expected[1])


def splitmix64(value: int) -> int:
    bits = (1 << 64) - 1
    value = (value + 0x9E3779B97F4A7C15) & bits
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & bits
    value = (value ^ value >> 27) * 0x94D049BB133111EB & bits
    return value ^ value >> 31


def check(words: list[int]) -> int:
    return sum(word * (splitmix64(index) | 1) for index, word in enumerate(words)) % (1 << 64)


def words_of(data: bytes) -> list[int]:
    return [int.from_bytes(data[place : place + 8], "little") for place in range(0, len(data), 8)]


def test_row_checksums_are_what_the_page_describes(tmp_path: Path) -> None:
    write_patches(tmp_path, 3, side=36)  # lr rows of 27 bytes: not a multiple of 8
    row = pq.read_table(tmp_path / "patches-00000.parquet").to_pylist()[2]
    hr, lr = pixels(2, 36, 4)
    expected = [check(words_of(line.tobytes())) for image in (hr, lr) for line in image]
    expected.append(check([*expected, 2]))
    assert words_of(row["row_checksums"]) == expected


def test_parquet_pages_are_what_the_page_describes(tmp_path: Path) -> None:
    write_patches(tmp_path, 3)
    metadata = pq.read_metadata(tmp_path / "patches-00000.parquet")
    assert metadata.num_row_groups == metadata.num_rows == 3
    for place in range(metadata.num_columns):
        chunk = metadata.row_group(1).column(place)
        assert chunk.compression == "UNCOMPRESSED"
        assert set(chunk.encodings) == {"PLAIN", "RLE"}  # RLE: of levels, and there are none
        assert chunk.statistics is None
        assert metadata.schema.column(place).max_definition_level == 0
