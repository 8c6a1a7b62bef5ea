"""prepare_data.py --verify and --show: all corruption is listed, and patches are drawn."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from evaluation_helpers import job
from PIL import Image
from tiny import write_photos

from pipeline.data import load_manifest, prepare, read_held_out
from pipeline.data.config import DataConfig
from pipeline.data.format.manifest import Manifest, encode
from pipeline.data.format.reader import CorruptPatch, PatchReader
from pipeline.data.format.verify import verify
from pipeline.errors import UserError


def make(folder: Path, codec: str = "raw", held_out: int = 1) -> Manifest:
    write_photos(folder / "photos", 2, 100, seed=1)
    write_photos(folder / "held_out", held_out, 64, seed=2)
    data = DataConfig(
        source=str(folder / "photos"), held_out=str(folder / "held_out"), root=str(folder / "data"),
        patch_px=64, patch_stride_px=32, codec=codec,
    )  # fmt: skip
    prepare(data, on_ray=False)
    return load_manifest(data.root)


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(bytes(content))


def test_an_unmodified_data_set_is_not_corrupt(tmp_path: Path) -> None:
    assert verify(make(tmp_path)) == []


@pytest.mark.parametrize("codec", ["raw", "webp"])
def test_a_flipped_byte_anywhere_in_a_shard_is_found(tmp_path: Path, codec: str) -> None:
    manifest = make(tmp_path, codec)
    shard = manifest.shards[0]
    path = tmp_path / "data" / shard.name
    whole = path.read_bytes()
    ends = [0, 3, shard.bytes - 1, shard.bytes - 6, shard.bytes - shard.footer_bytes]
    for place in [*ends, *range(5, shard.bytes, shard.bytes // 50)]:
        flip(path, place)
        found = verify(manifest)
        assert len(found) == 1 or place >= shard.bytes - shard.footer_bytes, place
        assert found, place
        path.write_bytes(whole)


def test_the_corrupt_patch_and_its_image_are_named(tmp_path: Path) -> None:
    manifest = make(tmp_path)
    path = tmp_path / "data" / manifest.shards[0].name
    reader = PatchReader(manifest)
    pixels = reader.patch(11)[0].tobytes()
    reader.close()
    flip(path, path.read_bytes().index(pixels) + 5000)
    (line,) = verify(manifest)
    assert re.search(r"row 11: column hr: .*CRC checksum.* \(patch 11, of 'image1\.png'\)", line)


def test_missing_truncated_and_held_out_files_are_named(tmp_path: Path) -> None:
    manifest = make(tmp_path)
    held_out = tmp_path / "data" / "held_out-00000.parquet"
    flip(held_out, 200)
    (line,) = verify(manifest)
    assert line == f"{held_out}: sha256 mismatch with the manifest"
    held_out.unlink()
    (line,) = verify(manifest)
    assert line == f"{held_out}: missing"
    shard = tmp_path / "data" / "patches-00000.parquet"
    shard.write_bytes(shard.read_bytes()[:-1])
    _, line = verify(manifest)[::-1]
    assert line.startswith(f"{shard}, all 18 rows: cannot be read: ends at byte")


@pytest.mark.parametrize("kind", ["shards", "held_out"])
@pytest.mark.parametrize("change", [1, -1])
def test_a_row_count_that_is_not_the_shards_is_found_and_never_read(
    tmp_path: Path, kind: str, change: int
) -> None:
    make(tmp_path, held_out=2)
    path = tmp_path / "data" / "manifest.json"
    content = json.loads(path.read_bytes())
    content[kind][0]["rows"] += change
    if kind == "shards":
        content["patches"] += change
    path.write_bytes(encode(content))
    manifest = load_manifest(str(tmp_path / "data"))
    (line,) = verify(manifest)
    assert f"has {content[kind][0]['rows'] - change} rows" in line
    if kind == "held_out":
        with pytest.raises(UserError, match="differs from the manifest"):
            read_held_out(manifest)
    else:
        reader = PatchReader(manifest)
        with pytest.raises(CorruptPatch, match="has 18 rows"):
            reader.patch(0)
        reader.close()


def test_the_command_verifies_and_draws_without_the_images(tmp_path: Path) -> None:
    manifest = make(tmp_path)
    (tmp_path / "photos").rename(tmp_path / "gone")
    flags = [
        "--data.root",
        manifest.root,
        "--json",
        str(tmp_path / "r.json"),
        "--show",
        str(tmp_path / "s.png"),
    ]
    assert not job("prepare_data")([*flags, "--verify"])
    result = json.loads((tmp_path / "r.json").read_text())
    assert (result["patches"], result["corrupt"]) == (18, [])
    with Image.open(tmp_path / "s.png") as sheet:
        assert len(np.unique(np.asarray(sheet))) > 50
    flip(tmp_path / "data" / "patches-00000.parquet", 5000)
    with pytest.raises(UserError, match=r"1 corrupt part"):
        job("prepare_data")([*flags, "--verify"])
    assert "row 0" in json.loads((tmp_path / "r.json").read_text())["corrupt"][0]


def test_verify_without_a_data_set_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"manifest\.json is missing"):
        job("prepare_data")(["--data.root", str(tmp_path), "--verify"])
