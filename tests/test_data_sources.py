"""Images are found in any folder and by any name; low-resolution files are paired by name."""

import io
import json
import os
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.data import load_manifest, prepare
from pipeline.data.config import DataConfig
from pipeline.data.format.reader import PatchReader
from pipeline.data.ingest.cutting import match_degradation
from pipeline.data.ingest.decoding import PhotoRejected, read_photo
from pipeline.data.ingest.plan import pair_by_name
from pipeline.data.ingest.sources import PhotoFile, find_license, list_source
from pipeline.errors import UserError
from pipeline.imaging import float_bicubic_downscale, matlab_bicubic_downscale


def pixels_of(seed: int, height: int = 96, width: int = 96) -> np.ndarray:
    """Smooth enough that degradations differ in rounding alone, rough enough that they differ."""
    noise = np.random.default_rng(seed).integers(0, 256, (height // 4, width // 4, 3), np.uint8)
    return np.asarray(Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC))


def encoded(pixels: np.ndarray, form: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form, **options)
    return buffer.getvalue()


def made(source: Path | str, root: Path, **changes: object) -> dict[str, dict[str, object]]:
    """Prepares a data set; gives its sources by path."""
    fields = {"source": str(source), "root": str(root), "patch_px": 64, "patch_stride_px": 32, **changes}
    prepare(DataConfig.model_validate(fields), on_ray=False)
    return {entry["path"]: entry for entry in json.loads((root / "manifest.json").read_text())["sources"]}


def names(source: Path | str) -> list[str]:
    return [photo.name for photo in list_source(str(source)).photos]


def test_names_of_every_kind_are_found_in_one_order(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    odd = ["ZWEI.PNG", "a b.JpEg", "naïve 写真.png", "line\nbreak.png", "x.png/deep.png", "no_extension"]
    for number, name in enumerate(odd):
        path = photos / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(pixels_of(number), "JPEG" if "JpEg" in name else "PNG"))
    raw = os.fsencode(photos) + b"/not\xffutf8.png"
    Path(os.fsdecode(raw)).write_bytes(encoded(pixels_of(10)))
    (photos / "notes.txt").write_text("not an image")
    (photos / ".hidden.png").write_bytes(encoded(pixels_of(11)))
    expected = sorted([*odd, os.fsdecode(b"not\xffutf8.png")])
    assert names(photos) == expected
    assert list(made(photos, tmp_path / "data")) == expected


def test_links_are_followed_once_and_unreadable_files_are_rejected(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for seed in range(20):
        (photos / f"{seed:02d}.png").write_bytes(encoded(pixels_of(seed)))
    (photos / "loop").symlink_to(photos, target_is_directory=True)
    (photos / "broken.png").symlink_to(tmp_path / "nowhere.png")
    os.mkfifo(photos / "pipe.png")
    made(photos, tmp_path / "data")
    rejected = {entry["path"]: entry["reason"] for entry in load_manifest(str(tmp_path / "data")).rejected}
    assert rejected == {"broken.png": "broken link", "pipe.png": "not a regular file"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_without_permission_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded(pixels_of(0)))
    (tmp_path / "a.png").chmod(0)
    (photo,) = list_source(str(tmp_path)).photos
    with pytest.raises(PhotoRejected, match="cannot be read"):
        photo.read()


def test_a_zip_and_a_glob_give_what_the_folder_gives(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    (photos / "deep").mkdir(parents=True)
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        for number, name in enumerate(["deep/a.png", "b.png"]):
            (photos / name).write_bytes(encoded(pixels_of(number)))
            archive.write(photos / name, name)
        archive.writestr("__MACOSX/b.png", b"resource fork")
    (photos / "c.bmp").write_bytes(encoded(pixels_of(5), "BMP"))
    made(f"{photos}/**/*.png", tmp_path / "glob")
    made(tmp_path / "photos.zip", tmp_path / "zip")
    assert names(tmp_path / "photos.zip") == names(f"{photos}/**/*.png") == ["b.png", "deep/a.png"]
    shards = [(tmp_path / kind / "patches-00000.parquet").read_bytes() for kind in ("glob", "zip")]
    assert shards[0] == shards[1]


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA])
def test_a_corrupt_member_of_a_zip_is_rejected(tmp_path: Path, method: int) -> None:
    archive = tmp_path / "photos.zip"
    with zipfile.ZipFile(archive, "w", method) as file:
        file.writestr("a.png", encoded(pixels_of(0)))
        file.writestr("b.png", encoded(pixels_of(1)))
    content = bytearray(archive.read_bytes())
    content[35:200] = b"\x07" * 165  # from the first byte of the first member on
    archive.write_bytes(bytes(content))
    assert list(made(archive, tmp_path / "data", max_rejected_share=0.5)) == ["b.png"]


def test_a_png_with_too_few_rows_is_rejected_and_a_black_border_is_not() -> None:
    pixels = pixels_of(0).copy()
    pixels[-20:] = 0
    for interlaced in (0, 1):
        whole = png_of(pixels, interlaced)
        assert np.array_equal(read_photo(whole).pixels, pixels)
    with pytest.raises(PhotoRejected, match=r"truncated PNG: .* bytes of pixel data"):
        read_photo(png_of(pixels, 0, rows=len(pixels) - 20))


@pytest.mark.parametrize("height", [1, 3, 63, 64])
def test_an_interlaced_png_without_its_last_pass_is_rejected(height: int) -> None:
    pixels = np.full((height, 5, 3), 200, np.uint8)
    assert np.array_equal(read_photo(png_of(pixels, 1)).pixels, pixels)
    with pytest.raises(PhotoRejected, match=r"truncated PNG: .* bytes of pixel data"):
        read_photo(png_of(pixels, 1, passes=5 if height == 1 else 6))


def png_of(pixels: np.ndarray, interlaced: int, rows: int | None = None, passes: int = 7) -> bytes:
    """A PNG with valid chunks, of all rows or passes or only the first ones."""
    height, width = pixels.shape[:2]
    adam7 = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
    lines = b""
    for y, x, step_y, step_x in adam7[:passes] if interlaced else ((0, 0, 1, 1),):
        part = pixels[:rows][y::step_y, x::step_x]
        if part.size:
            lines += b"".join(b"\0" + row.tobytes() for row in part)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, interlaced)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


def test_a_jpeg_inside_a_tiff_is_lossy() -> None:
    file = io.BytesIO()
    Image.fromarray(pixels_of(0)).save(file, "TIFF", compression="jpeg")
    assert read_photo(file.getvalue()).lossy


@pytest.mark.parametrize("kind", ["folder", "glob", "zip"])
def test_a_license_is_found_next_to_the_images(tmp_path: Path, kind: str) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "LICENSE.txt").write_text("CC0")
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        archive.write(tmp_path / "photos" / "LICENSE.txt", "photos/LICENSE.txt")
    sources = {"folder": "photos", "glob": "photos/*.png", "zip": "photos.zip"}
    assert find_license(str(tmp_path / sources[kind])) == "CC0"
    (tmp_path / "LICENSE").write_text("of other files")
    assert find_license(f"{tmp_path}/*/*.png") is None


def test_accepted_forms_are_noted(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "lossy.jpg").write_bytes(encoded(pixels_of(0), "JPEG", quality=90))
    (photos / "lossy.webp").write_bytes(encoded(pixels_of(1), "WEBP", quality=80))
    (photos / "exact.webp").write_bytes(encoded(pixels_of(2), "WEBP", lossless=True))
    (photos / "gray.png").write_bytes(encoded(pixels_of(3)[:, :, 0]))
    (photos / "odd_size.png").write_bytes(encoded(pixels_of(4)[:91, :94]))
    sources = made(photos, tmp_path / "data")
    assert [name for name, entry in sources.items() if entry["lossy"]] == ["lossy.jpg", "lossy.webp"]
    assert sources["gray.png"]["notes"] == ["gray"]
    assert (sources["odd_size.png"]["height"], sources["odd_size.png"]["patches"]) == (91, 2 * 2)


def test_sixteen_bit_rgb_keeps_its_upper_byte() -> None:
    import struct
    import zlib

    values = np.random.default_rng(0).integers(0, 65536, (5, 7, 3)).astype(">u2")

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + row.tobytes() for row in values)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 7, 5, 16, 2, 0, 0, 0))
    png = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    photo = read_photo(png)
    assert photo.notes == ("16-bit",)
    assert np.array_equal(photo.pixels, (values >> 8).astype(np.uint8))


def test_a_file_too_large_for_any_image_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "good.png").write_bytes(encoded(pixels_of(0)))
    with (tmp_path / "huge.png").open("wb") as file:
        file.truncate(1 << 40)  # takes no space
    made(tmp_path, tmp_path / "data", max_rejected_share=0.5)
    (entry,) = load_manifest(str(tmp_path / "data")).rejected
    assert entry["reason"] == f"file of {1 << 40} bytes is too large for 200 megapixels"


def test_flat_patches_are_excluded_by_min_detail(tmp_path: Path) -> None:
    pixels = pixels_of(0, 64, 192).copy()
    pixels[:, :128] = 100
    (tmp_path / "photo.png").write_bytes(encoded(pixels))
    every = made(f"{tmp_path}/*.png", tmp_path / "all", patch_stride_px=64)
    some = made(f"{tmp_path}/*.png", tmp_path / "some", patch_stride_px=64, min_detail=1.0)
    assert (every["photo.png"]["patches"], some["photo.png"]["patches"]) == (3, 1)
    manifest = load_manifest(str(tmp_path / "some"))
    reader = PatchReader(manifest)
    assert reader.row(0, 0)["x"] == 128
    reader.close()
    with pytest.raises(UserError, match=r"data\.min_detail=200\.0: every patch has a lower score"):
        made(f"{tmp_path}/*.png", tmp_path / "none", min_detail=200.0)


@pytest.mark.parametrize("codec", ["raw", "webp"])
def test_every_codec_is_lossless(tmp_path: Path, codec: str) -> None:
    (tmp_path / "photo.png").write_bytes(encoded(pixels_of(0)))
    made(f"{tmp_path}/*.png", tmp_path / "data", codec=codec)
    manifest = load_manifest(str(tmp_path / "data"))
    reader = PatchReader(manifest)
    low = matlab_bicubic_downscale(pixels_of(0), 4)
    hr, lr = reader.patch(3)
    assert np.array_equal(hr, pixels_of(0)[32:96, 32:96])
    assert np.array_equal(lr, low[8:24, 8:24])
    hr, lr = reader.crop(3, 8, 20, 16)
    assert np.array_equal(hr, pixels_of(0)[40:56, 52:68])
    assert np.array_equal(lr, low[10:14, 13:17])
    reader.close()


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_scales_and_mirrored_edges(tmp_path: Path, scale: int) -> None:
    (tmp_path / "photo.png").write_bytes(encoded(pixels_of(0)[:94, :95]))
    for edge in ("replicate", "symmetric"):
        made(f"{tmp_path}/*.png", tmp_path / edge, scale=scale, patch_px=36, patch_stride_px=12, edge=edge)
        manifest = load_manifest(str(tmp_path / edge))
        reader = PatchReader(manifest)
        cut = pixels_of(0)[: 94 // scale * scale, : 95 // scale * scale]
        low = matlab_bicubic_downscale(cut, scale, edge=edge)
        side = 36 // scale
        assert np.array_equal(reader.patch(0)[1], low[:side, :side])
        assert np.array_equal(reader.patch(manifest.patches - 1)[1], low[-side:, -side:])
        reader.close()


def low_by_pillow(hr: np.ndarray, scale: int) -> np.ndarray:
    size = (hr.shape[1] // scale, hr.shape[0] // scale)
    return np.asarray(Image.fromarray(hr).resize(size, Image.Resampling.BICUBIC))


def low_by_area(hr: np.ndarray, scale: int) -> np.ndarray:
    blocks = hr.reshape(hr.shape[0] // scale, scale, hr.shape[1] // scale, scale, 3).mean(axis=(1, 3))
    return np.floor(blocks + 0.5).astype(np.uint8) if scale == 2 else np.rint(blocks).astype(np.uint8)


@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("matlab_uint8", lambda hr, scale: matlab_bicubic_downscale(hr, scale)),
        ("matlab_uint8", lambda hr, scale: matlab_bicubic_downscale(hr, scale, edge="symmetric")),
        ("matlab_float", lambda hr, scale: float_bicubic_downscale(hr, scale)),
        ("other", low_by_pillow),
        ("other", low_by_area),
        ("other", lambda hr, scale: hr[::scale, ::scale]),
    ],
)
def test_the_degradation_of_given_files_is_recognized(
    scale: int, name: str, make: Callable[[np.ndarray, int], np.ndarray]
) -> None:
    hr = pixels_of(3, 96, 144)
    assert match_degradation(hr, make(hr, scale), scale) == name


def test_basicsr_float_version_is_recognized(reference: dict[str, np.ndarray]) -> None:
    assert match_degradation(reference["photo_hr"], reference["photo_lr_float"], 4) == "matlab_float"


def test_given_low_resolution_is_stored_checked_and_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos, low = tmp_path / "photos", tmp_path / "low"
    photos.mkdir()
    low.mkdir()
    for number in range(4):
        (photos / f"{number:04d}.png").write_bytes(encoded(pixels_of(number)))
    (low / "0000x4.png").write_bytes(encoded(matlab_bicubic_downscale(pixels_of(0), 4)))
    (low / "0001_x4.png").write_bytes(encoded(low_by_pillow(pixels_of(1), 4)))
    (low / "0002.png").write_bytes(encoded(pixels_of(2)[:20, :24]))
    sources = made(photos, tmp_path / "data", lr_dir=str(low), max_rejected_share=0.5)
    manifest = load_manifest(str(tmp_path / "data"))
    assert manifest.degradation["matches"] == {"matlab_uint8": 1, "other": 1}
    assert sources["0001.png"]["degradation"] == "other"
    assert [entry["reason"] for entry in manifest.rejected] == [
        "its low-resolution file 0002.png has 24 x 20 pixels, not 24 x 24",
        "no low-resolution file of its name in data.lr_dir",
    ]
    assert "1 x other of 2" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"its low resolution was files, now data\.lr_dir is None"):
        made(photos, tmp_path / "data", max_rejected_share=0.5)
    reader = PatchReader(manifest)
    assert np.array_equal(reader.patch(4)[1], low_by_pillow(pixels_of(1), 4)[:16, :16])
    reader.close()


def test_ambiguous_pairs_are_an_error() -> None:
    def files(*given: str, folder: str = "/hr") -> list[PhotoFile]:
        return [PhotoFile(name, "file", folder, 1) for name in given]

    with pytest.raises(UserError, match=r"a/1\.png and b/1\.png have the same name"):
        pair_by_name(files("1.png"), files("a/1.png", "b/1.png"), 4)
    with pytest.raises(
        UserError, match=r"no file is paired with an image by name; expected names like 1x4\.png"
    ):
        pair_by_name(files("1.png"), files("2.png"), 4)
    with pytest.raises(UserError, match=r"1x4\.png belongs to /hr/1\.png and to /other/1\.png"):
        pair_by_name(files("1.png") + files("1.png", folder="/other"), files("1x4.png"), 4)
