"""Ingest: the same bytes for any way it ran; nothing corrupt is used; every rejection has its reason."""

import contextlib
import io
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from tiny import write_photos

from pipeline.data import check_source, load_manifest, prepare, read_held_out
from pipeline.data.config import DataConfig
from pipeline.data.feed import Feed
from pipeline.data.format.reader import CorruptPatch, PatchReader
from pipeline.data.ingest import prepare as prepare_module
from pipeline.data.ingest.decoding import PhotoRejected, read_photo
from pipeline.errors import UserError
from pipeline.imaging import matlab_bicubic_downscale
from pipeline.storage import Storage, only_writer


def config(folder: Path, root: str = "data", **changes: object) -> DataConfig:
    fields = {
        "source": str(folder / "photos"),
        "held_out": str(folder / "held_out"),
        "root": str(folder / root),
        "patch_px": 64,
        "patch_stride_px": 32,
        **changes,
    }
    return DataConfig.model_validate(fields)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_photos(tmp_path / "photos", 3, 100, seed=1)
    write_photos(tmp_path / "held_out", 2, 64, seed=2)
    return tmp_path


def contents(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(root.iterdir()) if path.is_file()}


def prepare_quietly(data: DataConfig, **more: bool):
    return prepare(data, on_ray=False, **more)


def test_patches_are_the_images_and_their_matlab_degradation(folder: Path) -> None:
    result = prepare_quietly(config(folder))
    assert (result.patches, result.sources, result.rejected) == (3 * 9, 5, 0)
    rows = pq.read_table(
        folder / "data" / "patches-00000.parquet", page_checksum_verification=True
    ).to_pylist()
    assert [row["patch_id"] for row in rows] == list(range(27))
    with Image.open(folder / "photos" / "image1.png") as image:
        photo = np.asarray(image)
    low = matlab_bicubic_downscale(photo, 4)
    row = next(
        row for row in rows if row["source_id"] == rows[9]["source_id"] and (row["y"], row["x"]) == (36, 32)
    )
    hr = np.frombuffer(row["hr"], np.uint8).reshape(64, 64, 3)
    lr = np.frombuffer(row["lr"], np.uint8).reshape(16, 16, 3)
    assert np.array_equal(hr, photo[36:100, 32:96])
    assert np.array_equal(lr, low[9:25, 8:24])


def test_held_out_images_are_stored_whole(folder: Path) -> None:
    prepare_quietly(config(folder))
    photos = read_held_out(load_manifest(str(folder / "data")))
    assert [photo.name for photo in photos] == ["image0.png", "image1.png"]
    with Image.open(folder / "held_out" / "image1.png") as image:
        assert np.array_equal(photos[1].hr, np.asarray(image))
    assert np.array_equal(photos[1].lr, matlab_bicubic_downscale(photos[1].hr, 4))


def test_two_runs_give_the_same_bytes_and_a_complete_set_is_not_modified(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = prepare_quietly(config(folder, "one")), prepare_quietly(config(folder, "two"))
    assert first == second
    assert contents(folder / "one") == contents(folder / "two")
    assert prepare_quietly(config(folder, "one")) == first
    assert "complete, nothing to do" in capsys.readouterr().out


@pytest.mark.parametrize("images", [1, 3, 4])
def test_an_interrupted_ingest_resumes_and_ends_with_the_same_bytes(
    folder: Path, monkeypatch: pytest.MonkeyPatch, images: int
) -> None:
    # Small images do not fill a shard of a MiB; a low limit closes several.
    monkeypatch.setattr("pipeline.data.ingest.writer._MIB", 400)
    prepare_quietly(config(folder, "whole"))
    real = prepare_module.cut_image
    done = []

    def interrupted(job, data, paired):
        if len(done) == images:
            raise KeyboardInterrupt
        done.append(job.index)
        return real(job, data, paired)

    monkeypatch.setattr(prepare_module, "cut_image", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare_quietly(config(folder, "broken"))
    assert not (folder / "broken" / "manifest.json").exists()
    monkeypatch.setattr(prepare_module, "cut_image", real)
    prepare_quietly(config(folder, "broken"))
    assert contents(folder / "broken") == contents(folder / "whole")
    assert len([name for name in contents(folder / "whole") if name.startswith("patches")]) > 1


@pytest.mark.parametrize(
    ("limits", "reason"),
    [({"strict": True}, r"bad\.png: .* \(--strict\)"), ({"share": 0.0}, "1 of 6 images were rejected")],
)
def test_a_resumed_ingest_is_checked_against_its_limits_before_it_cuts(
    folder: Path, monkeypatch: pytest.MonkeyPatch, limits: dict, reason: str
) -> None:
    monkeypatch.setattr("pipeline.data.ingest.writer._MIB", 1)
    (folder / "photos" / "bad.png").write_bytes(b"hello there")
    real = prepare_module.cut_image

    def interrupted(job, data, paired):
        if job.index == 5:
            raise KeyboardInterrupt
        return real(job, data, paired)

    monkeypatch.setattr(prepare_module, "cut_image", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare_quietly(config(folder, max_rejected_share=0.5))
    monkeypatch.setattr(prepare_module, "cut_image", lambda *arguments: pytest.fail("cuts an image"))
    data = config(folder, max_rejected_share=limits.get("share", 0.5))
    with pytest.raises(UserError, match=reason):
        prepare_quietly(data, strict=limits.get("strict", False))


def test_a_shard_is_closed_between_images(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.data.ingest.writer._MIB", 1)
    prepare_quietly(config(folder))
    manifest = load_manifest(str(folder / "data"))
    assert [shard.rows for shard in manifest.shards] == [9, 9, 9]
    assert [shard.rows for shard in manifest.held_out] == [1, 1]
    first = [entry["first_patch"] for entry in manifest.sources if entry["set"] == "train"]
    assert first == manifest.first_ids.tolist()


@pytest.mark.ray
@pytest.mark.slow
def test_ray_gives_the_same_bytes(ray_cluster: str, folder: Path) -> None:
    (folder / "photos" / "bad.png").write_bytes(b"hello there")  # rejected
    (folder / "photos" / "flat.png").write_bytes(png(np.full((80, 80, 3), 9, np.uint8)))  # without patches
    fields = {"min_detail": 0.1, "max_rejected_share": 0.5}
    prepare_quietly(config(folder, "here", **fields))
    prepare(config(folder, "ray", **fields))
    assert contents(folder / "ray") == contents(folder / "here")


@pytest.mark.parametrize("codec", ["raw", "webp"])
def test_a_flipped_byte_in_any_patch_is_caught(folder: Path, codec: str) -> None:
    data = config(folder, codec, codec=codec)
    prepare_quietly(data)
    manifest = load_manifest(data.root)
    path = Path(data.root) / manifest.shards[0].name
    whole = path.read_bytes()
    valid = [PatchReader(manifest).patch(patch)[0].copy() for patch in range(manifest.patches)]
    for offset in range(100, len(whole), len(whole) // 40):
        corrupt = bytearray(whole)
        corrupt[offset] ^= 0x20
        path.write_bytes(bytes(corrupt))
        reader = PatchReader(manifest)
        for patch in range(manifest.patches):
            with contextlib.suppress(CorruptPatch):
                assert np.array_equal(reader.patch(patch)[0], valid[patch])
        reader.close()


def test_a_batch_never_contains_corrupt_pixels(folder: Path) -> None:
    data = config(folder)
    prepare_quietly(data)
    feed = Feed(data.root, seed=0, batch_size=8, crop_px=32)
    valid = [batch.hr for batch in feed.batches(0, 4)]
    path = Path(data.root) / "patches-00000.parquet"
    content = bytearray(path.read_bytes())
    for offset in range(2000, len(content) - 20000, 30000):
        content[offset] ^= 0xFF
    path.write_bytes(bytes(content))
    corrupt = list(feed.batches(0, 4))
    assert sum(batch.corrupt for batch in corrupt) > 0
    second = list(feed.batches(0, 4))
    for one, other in zip(corrupt, second, strict=True):
        assert (one.hr == other.hr).all()
    assert any((one.hr != before).any() for one, before in zip(corrupt, valid, strict=True))


def png(array: np.ndarray, mode: str | None = None, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array, mode).save(buffer, "PNG", **options)
    return buffer.getvalue()


COLOR = np.random.default_rng(0).integers(0, 255, (70, 80, 3), dtype=np.uint8)


def rejected_files() -> dict[str, tuple[bytes, str]]:
    jpeg = io.BytesIO()
    Image.fromarray(COLOR).save(jpeg, "JPEG")
    tiff = io.BytesIO()
    Image.fromarray(np.ones((70, 80), np.float32)).save(tiff, "TIFF")
    cmyk = io.BytesIO()
    Image.fromarray(COLOR).convert("CMYK").save(cmyk, "JPEG")
    gif = io.BytesIO()
    frames = [Image.fromarray(np.roll(COLOR, shift, 0)) for shift in (0, 20)]
    frames[0].save(gif, "GIF", save_all=True, append_images=frames[1:])
    whole = png(COLOR)
    bad = bytearray(whole)
    bad[len(bad) // 2] ^= 0xFF
    gray16 = np.full((70, 80), 4000, np.uint16)
    palette = io.BytesIO()
    Image.fromarray(COLOR).convert("P").save(palette, "PNG", transparency=3)
    return {
        "truncated.png": (whole[:-200], "truncated"),
        "truncated.jpg": (jpeg.getvalue()[:-400], "truncated"),
        "corrupt.png": (bytes(bad), "corrupt"),
        "header.png": (whole[:33], "truncated"),
        "empty.png": (b"", "empty"),
        "page.png": (b"<html><body>404</body></html>", "HTML"),
        "text.png": (b"hello there", "text"),
        "gray16.png": (png(gray16), "16-bit"),
        "float.tiff": (tiff.getvalue(), "floating-point"),
        "onebit.png": (png(COLOR[:, :, 0] > 100), "1-bit"),
        "alpha.png": (png(np.dstack([COLOR, COLOR[:, :, :1]])), "alpha"),
        "palette.png": (palette.getvalue(), "transparent"),
        "cmyk.jpg": (cmyk.getvalue(), "CMYK"),
        "animated.gif": (gif.getvalue(), "animated"),
    }


@pytest.mark.parametrize("name", list(rejected_files()))
def test_unusable_images_are_rejected_with_the_reason(name: str) -> None:
    content, reason = rejected_files()[name]
    with pytest.raises(PhotoRejected) as caught:
        read_photo(content)
    assert reason.lower() in str(caught.value).lower()


def test_a_decompression_bomb_is_rejected_from_its_header() -> None:
    with pytest.raises(PhotoRejected, match="exceed the limit"):
        read_photo(png(np.zeros((1500, 1000, 3), np.uint8)), max_megapixels=1.0)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    from PIL import ImageOps

    image = Image.fromarray(COLOR)
    image.getexif()[0x0112] = orientation
    buffer = io.BytesIO()
    image.save(buffer, "PNG", exif=image.getexif())
    with Image.open(io.BytesIO(buffer.getvalue())) as stored:
        expected = np.asarray(ImageOps.exif_transpose(stored))
    assert np.array_equal(read_photo(buffer.getvalue()).pixels, expected)


def test_gray_and_opaque_palette_become_rgb() -> None:
    gray = read_photo(png(COLOR[:, :, 0])).pixels
    assert np.array_equal(gray, np.repeat(COLOR[:, :, :1], 3, axis=2))
    flat = np.zeros((70, 80, 3), np.uint8)
    flat[:35] = (10, 200, 30)
    buffer = io.BytesIO()
    Image.fromarray(flat).convert("P", palette=Image.Palette.ADAPTIVE).save(buffer, "PNG")
    assert np.array_equal(read_photo(buffer.getvalue()).pixels, flat)


def test_the_ingest_skips_rejected_images_and_the_manifest_lists_them(folder: Path) -> None:
    for name, (content, _) in rejected_files().items():
        (folder / "photos" / name).write_bytes(content)
    (folder / "photos" / "folder.png").mkdir()
    (folder / "photos" / "odd näme\n.png").write_bytes(png(COLOR))
    (folder / "photos" / "same.png").write_bytes((folder / "photos" / "image0.png").read_bytes())
    result = prepare_quietly(config(folder, max_rejected_share=0.9))
    assert result.sources == 2 + 4
    rejected = json.loads((folder / "data" / "manifest.json").read_text())["rejected"]
    assert {entry["path"] for entry in rejected} == {*rejected_files(), "same.png"}
    assert "same pixels as image0.png" in next(e["reason"] for e in rejected if e["path"] == "same.png")


def test_too_many_rejections_or_strict_end_the_ingest(folder: Path) -> None:
    (folder / "photos" / "bad.png").write_bytes(b"hello there")
    with pytest.raises(UserError, match=r"1 of 6 images were rejected.*bad\.png"):
        prepare_quietly(config(folder, max_rejected_share=0.0))
    with pytest.raises(UserError, match=r"bad\.png.*--strict"):
        prepare_quietly(config(folder, "strict", max_rejected_share=0.5), strict=True)


def test_an_existing_data_set_is_checked_against_the_same_limits(folder: Path) -> None:
    bad = folder / "photos" / "bad.png"
    bad.write_bytes(b"hello there")
    prepare_quietly(config(folder, max_rejected_share=0.5))
    with pytest.raises(UserError, match=r"data\.root=.*: bad\.png: .*--strict"):
        prepare_quietly(config(folder, max_rejected_share=0.5), strict=True)
    with pytest.raises(UserError, match=r"data\.root=.*: 1 of 6 images were rejected"):
        prepare_quietly(config(folder, max_rejected_share=0.1))
    (folder / "held_out" / "bad.png").write_bytes(b"another one of that name")
    prepare_quietly(config(folder, "two", max_rejected_share=0.5))
    prepare_quietly(config(folder, "two", max_rejected_share=0.5))
    (folder / "held_out" / "bad.png").unlink()
    bad.write_bytes((folder / "photos" / "image0.png").read_bytes())
    with pytest.raises(UserError, match=r"bad\.png is new or changed"):
        prepare_quietly(config(folder, max_rejected_share=0.5))


def test_a_held_out_set_without_a_usable_image_is_an_error(folder: Path) -> None:
    for photo in (folder / "held_out").iterdir():
        photo.write_bytes(b"hello there")
    with pytest.raises(UserError, match=r"data\.held_out=.*none of 2 images is usable.*not an image"):
        prepare_quietly(config(folder, max_rejected_share=0.5))


def test_files_of_others_in_the_folder_are_not_modified(folder: Path) -> None:
    own = folder / "data"
    (own / "patches-dir.parquet").mkdir(parents=True)
    for name in ("patches-of-mine.parquet", ".notes.partial"):
        (own / name).write_bytes(b"precious")
    (own / "patches-00000.parquet").write_bytes(b"of another ingest")
    prepare_quietly(config(folder))
    names = {path.name for path in own.iterdir()}
    assert names >= {"patches-dir.parquet", "patches-of-mine.parquet", ".notes.partial"}
    load_manifest(str(own))


def test_a_second_ingest_into_the_same_folder_is_refused(folder: Path) -> None:
    with (
        only_writer(Storage(str(folder / "data")), "another"),
        pytest.raises(UserError, match=r"data\.root=.*another process is preparing this data set"),
    ):
        prepare_quietly(config(folder))
    prepare_quietly(config(folder))
    assert not (folder / "data" / ".lock").exists()


def test_the_same_image_in_both_sets_is_an_error(folder: Path) -> None:
    (folder / "held_out" / "copy.png").write_bytes((folder / "photos" / "image2.png").read_bytes())
    with pytest.raises(UserError, match=r"image2\.png has the same pixels as copy\.png in the held-out set"):
        prepare_quietly(config(folder))


def test_other_settings_or_images_in_the_same_folder_are_refused(folder: Path) -> None:
    prepare_quietly(config(folder))
    with pytest.raises(UserError, match=r"data\.patch_stride_px was 32, now 16"):
        prepare_quietly(config(folder, patch_stride_px=16))
    write_photos(folder / "photos", 4, 100, seed=1)
    with pytest.raises(UserError, match=r"image3\.png is new"):
        prepare_quietly(config(folder))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": None}, "data.source is not set"),
        ({"source": "/no/such"}, "data.source=/no/such: no such folder"),
        ({"held_out": "/no/such"}, "data.held_out=/no/such"),
        ({"patch_px": 66}, "data.patch_px=66"),
        ({"patch_stride_px": 128}, "data.patch_stride_px=128"),
        ({"root": "/proc/data"}, "data.root=/proc/data"),
    ],
)
def test_invalid_input_is_found_before_ingest_starts(
    folder: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError) as caught:
        check_source(
            config(folder, **changes) if "root" not in changes else config(folder, str(changes["root"]))
        )
    assert message in str(caught.value)
    assert not (folder / "data").exists()
