"""Transparency, gray and metadata of an upscaled image."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from evaluation_helpers import synthetic_image, write_generator
from PIL import Image

from pipeline.data.ingest.decoding import PhotoRejected
from pipeline.evaluation.image_files import encode_output, fill_hidden, read_source
from pipeline.evaluation.models import open_model
from pipeline.imaging import bicubic_upscale, png


def chunk(kind: bytes, content: bytes) -> bytes:
    body = kind + content
    return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))


def with_chunks(content: bytes, *added: bytes) -> bytes:
    """A PNG with chunks after its IHDR."""
    end = len(png.SIGNATURE) + 25
    return content[:end] + b"".join(added) + content[end:]


def encoded(pixels: np.ndarray, form: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form, **options)
    return buffer.getvalue()


def upscaled(content: bytes, form: str = "png") -> bytes:
    """Upscaled by bicubic, which adds no color."""
    source = read_source(content, 200.0)
    alpha = None if source.alpha is None else bicubic_upscale(source.alpha)
    return encode_output(bicubic_upscale(source.rgb), alpha, source, form)


def chunks_of(content: bytes) -> dict[bytes, bytes]:
    return {kind: content[first:end] for kind, first, end in png.chunks(content)}


def test_a_truncated_image_with_transparency_is_reported_as_that() -> None:
    with pytest.raises(PhotoRejected, match="truncated"):
        read_source(encoded(np.full((64, 64, 4), 9, np.uint8), "TIFF")[:-500], 200.0)


def test_hidden_black_does_not_bleed_into_a_bright_disc() -> None:
    y, x = np.mgrid[0:64, 0:64]
    disc = (x - 32) ** 2 + (y - 32) ** 2 < 400
    rgba = np.zeros((64, 64, 4), np.uint8)
    rgba[disc] = (250, 240, 200, 255)
    result = np.asarray(Image.open(io.BytesIO(upscaled(encoded(rgba)))))
    visible = result[result[..., 3] > 0]
    assert (visible[:, :3] == (250, 240, 200)).all()


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_hidden_pixels_take_the_colors_of_visible_ones_nearby(dtype: type) -> None:
    rgb = np.zeros((9, 11, 3), dtype)
    rgb[:, :3], rgb[:, 8:] = np.iinfo(dtype).max, 100
    alpha = np.full((9, 11, 1), 255, dtype)
    alpha[:, 3:8] = 0
    alpha[0, 0] = 1
    filled = fill_hidden(rgb, alpha)
    np.testing.assert_array_equal(filled[:, [0, 1, 2, 8, 9, 10]], rgb[:, [0, 1, 2, 8, 9, 10]])
    assert (filled[:, 3:5] == np.iinfo(dtype).max).all()
    assert (filled[:, 6:8] == 100).all()
    np.testing.assert_array_equal(fill_hidden(rgb, np.zeros_like(alpha)), rgb)


def test_pixels_without_a_visible_one_in_their_row_or_column_are_filled() -> None:
    alpha = np.zeros((7, 9, 1), np.uint8)
    alpha[2, 3] = 255
    assert (fill_hidden(np.where(alpha, 200, 0).astype(np.uint8).repeat(3, axis=2), alpha) == 200).all()


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "LA", "RGBA"])
def test_a_gray_image_has_no_color_after_any_network(tmp_path: Path, mode: str) -> None:
    gray = Image.fromarray(synthetic_image(20, 24)[..., 0]).convert(mode)
    model = open_model(str(write_generator(tmp_path / "g.safetensors")))
    buffer = io.BytesIO()
    gray.save(buffer, "PNG")
    source = read_source(buffer.getvalue(), 200.0)
    sr = model.upscale(source.rgb)
    assert (sr[..., 0] != sr[..., 1]).any(), "the network colors gray"
    alpha = None if source.alpha is None else bicubic_upscale(source.alpha)
    content = encode_output(sr, alpha, source, "png")
    output = Image.open(io.BytesIO(content))
    assert output.mode == {"P": "RGB"}.get(mode, mode)
    pixels = np.asarray(output.convert("RGB"))
    assert (pixels[..., :1] == pixels).all()


def test_a_png_keeps_gamma_primaries_cicp_and_density() -> None:
    gamma, primaries = struct.pack(">I", 100000), struct.pack(">8I", *range(30000, 38000, 1000))
    cicp, density = bytes((12, 13, 0, 1)), struct.pack(">IIB", 11811, 5906, 1)
    content = with_chunks(
        encoded(synthetic_image(8, 8)),
        chunk(b"cICP", cicp),
        chunk(b"cHRM", primaries),
        chunk(b"gAMA", gamma),
        chunk(b"pHYs", density),
    )
    kept = chunks_of(upscaled(content))
    assert (kept[b"gAMA"], kept[b"cHRM"], kept[b"cICP"]) == (gamma, primaries, cicp)
    assert kept[b"pHYs"] == density


@pytest.mark.parametrize(
    ("added", "kind"),
    [
        (chunk(b"gAMA", struct.pack(">I", 100000)), "gAMA"),
        (chunk(b"cICP", bytes((9, 16, 0, 1))), "cICP"),
        (chunk(b"cHRM", struct.pack(">8I", 31270, 32900, 64000, 33000, 21000, 71000, 15000, 6000)), "cHRM"),
    ],
)
def test_colors_that_only_png_can_describe_are_not_written_as_jpeg(added: bytes, kind: str) -> None:
    content = with_chunks(encoded(synthetic_image(8, 8)), added)
    for form in ("jpg", "webp"):
        with pytest.raises(PhotoRejected, match=f"{kind}, which only PNG"):
            upscaled(content, form)


@pytest.mark.parametrize(
    "added",
    [
        (chunk(b"gAMA", struct.pack(">I", 45455)),),
        (chunk(b"sRGB", b"\0"), chunk(b"gAMA", struct.pack(">I", 100000))),
        (chunk(b"cICP", bytes((1, 13, 0, 1))),),
    ],
)
def test_srgb_is_written_as_jpeg(added: tuple[bytes, ...]) -> None:
    content = with_chunks(encoded(synthetic_image(8, 8)), *added)
    assert Image.open(io.BytesIO(upscaled(content, "jpg"))).size == (32, 32)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "TIFF", "BMP"])
@pytest.mark.parametrize("target", ["png", "jpg"])
def test_density_is_kept(form: str, target: str) -> None:
    output = Image.open(io.BytesIO(upscaled(encoded(synthetic_image(8, 8), form, dpi=(300, 150)), target)))
    assert [round(value) for value in output.info["dpi"]] == [300, 150]


def test_exif_of_a_tiff_has_its_description_and_not_its_structure() -> None:
    exif = Image.Exif()
    exif[270], exif[315], exif[33550] = (
        "a name",
        "an author",
        (2.0, 2.0, 0.0),
    )  # the last: GeoTIFF's pixel scale
    content = encoded(synthetic_image(8, 8), "TIFF", exif=exif, compression="tiff_lzw")
    for form in ("png", "webp"):
        assert dict(Image.open(io.BytesIO(upscaled(content, form))).getexif()) == {
            270: "a name",
            315: "an author",
        }


def test_a_tiff_without_density_gets_none() -> None:
    assert "dpi" not in Image.open(io.BytesIO(upscaled(encoded(synthetic_image(8, 8), "TIFF")))).info


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("network", [False, True])
def test_a_16_bit_png_gives_a_16_bit_png(tmp_path: Path, channels: int, network: bool) -> None:
    levels = np.linspace(1000, 64000, 12 * 16 * channels).astype(np.uint16).reshape(12, 16, channels)
    profile = b"a profile"
    content = png.encode_16_bits(
        levels,
        {b"iCCP": b"name\0\0" + zlib.compress(profile), b"pHYs": struct.pack(">IIB", 11811, 5906, 1)},
    )
    np.testing.assert_array_equal(png.decode_16_bits(content), levels)
    source = read_source(content, 200.0)
    model = open_model(str(write_generator(tmp_path / "g.safetensors")) if network else "bicubic")
    sr = model.upscale(source.rgb)
    assert len(np.unique(sr)) > 256
    alpha = None if source.alpha is None else bicubic_upscale(source.alpha)
    output = encode_output(sr, alpha, source, "png")
    assert png.has_16_bits(output)
    result = png.decode_16_bits(output)
    assert result.shape == (48, 64, channels)
    if channels == 3:
        np.testing.assert_array_equal(result, sr)
    if alpha is not None:
        np.testing.assert_array_equal(result[..., -1:], alpha)
    kept = chunks_of(output)
    assert Image.open(io.BytesIO(output)).info["icc_profile"] == profile
    assert kept[b"pHYs"] == struct.pack(">IIB", 11811, 5906, 1)


def test_16_bits_differ_from_8_by_less_than_half_a_level() -> None:
    image = synthetic_image(12, 16)
    deep = bicubic_upscale(image.astype(np.uint16) * 257).astype(float) / 257
    # Rounding between the axes is to 1/257 of a level here.
    assert np.abs(deep - bicubic_upscale(image)).max() < 1.1


@pytest.mark.parametrize("form", ["jpg", "webp"])
def test_other_formats_hold_8_bits_of_a_16_bit_png(form: str) -> None:
    levels = np.full((8, 8, 3), 200 * 257 + 100, np.uint16)
    output = Image.open(io.BytesIO(upscaled(png.encode_16_bits(levels, {}), form)))
    np.testing.assert_allclose(np.asarray(output), 200, atol=1)


def test_a_transparent_color_of_16_bits_is_transparency() -> None:
    levels = np.full((8, 8, 3), 30000, np.uint16)
    levels[:4] = 7
    source = read_source(png.encode_16_bits(levels, {b"tRNS": struct.pack(">3H", 7, 7, 7)}), 200.0)
    assert source.alpha is not None
    assert (source.alpha[:4] == 0).all()
    assert (source.alpha[4:] == 65535).all()
    assert (source.rgb == 30000).all()


def test_a_truncated_16_bit_png_is_rejected() -> None:
    content = png.encode_16_bits(np.zeros((8, 8, 3), np.uint16), {})
    with pytest.raises(PhotoRejected, match="truncated"):
        read_source(content[:-20], 200.0)
    with pytest.raises(PhotoRejected, match="exceed the limit"):
        read_source(content, 0.00001)
