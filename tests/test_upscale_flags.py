"""Short flags, a file as output, the output's scale, and the format of each input."""

from pathlib import Path

import numpy as np
import pytest
from evaluation_helpers import job, synthetic_image, user_error, write_generator, write_image
from PIL import Image

from pipeline.evaluation.image_files import resized
from pipeline.evaluation.models import open_model
from pipeline.imaging import png


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    write_image(tmp_path / "in" / "a.png", 20, 24)
    return write_generator(tmp_path / "g.safetensors")


def upscale(*arguments: object) -> int | None:
    return job("upscale")([str(argument) for argument in arguments])


def size(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


def test_short_flags_and_a_file_as_output(tmp_path: Path, weights: Path) -> None:
    out = tmp_path / "new" / "b.jpg"
    assert upscale("-n", weights, "-i", tmp_path / "in" / "a.png", "-o", out, "-s", 2.5, "-t", 16) == 0
    assert size(out) == (60, 50)
    assert [path.name for path in out.parent.iterdir()] == ["b.jpg"]
    assert Image.open(out).format == "JPEG"


def test_a_file_that_exists_is_overwritten_on_request_only(tmp_path: Path, weights: Path) -> None:
    arguments = ("-n", weights, "-i", tmp_path / "in" / "a.png", "-o", tmp_path / "b.png")
    assert upscale(*arguments) == 0
    before = (tmp_path / "b.png").read_bytes()
    assert "the file exists; --overwrite replaces it" in user_error("upscale", *arguments)
    (tmp_path / "b.png").write_bytes(b"")
    assert upscale(*arguments, "--overwrite") == 0
    assert (tmp_path / "b.png").read_bytes() == before


@pytest.mark.parametrize(
    ("source", "output", "form", "message"),
    [
        ("in", "b.png", "png", "a file, but --input is a folder"),
        ("in/a.png", "in/a.png", "png", "is the input"),
        ("in/a.png", "b.jpg", "webp", "another format than --format webp"),
    ],
)
def test_a_file_that_cannot_be_the_output(
    tmp_path: Path, weights: Path, source: str, output: str, form: str, message: str
) -> None:
    text = user_error(
        "upscale", "-n", weights, "-i", tmp_path / source, "-o", tmp_path / output, "--format", form
    )
    assert message in text


def test_an_existing_folder_named_like_an_image_is_a_folder(tmp_path: Path, weights: Path) -> None:
    (tmp_path / "out.png").mkdir()
    assert upscale("-n", weights, "-i", tmp_path / "in", "-o", tmp_path / "out.png") == 0
    assert size(tmp_path / "out.png" / "a.png") == (96, 80)


def test_the_outputs_scale_is_lanczos_of_the_models_result(tmp_path: Path, weights: Path) -> None:
    assert upscale("-n", weights, "-i", tmp_path / "in", "-o", tmp_path / "out", "--outscale", 3) == 0
    sr = Image.fromarray(open_model(str(weights)).upscale(synthetic_image(20, 24)))
    expected = np.asarray(sr.resize((72, 60), Image.Resampling.LANCZOS)).astype(int)
    assert np.abs(np.asarray(Image.open(tmp_path / "out" / "a.png")) - expected).max() <= 1
    text = user_error("upscale", "-n", weights, "-i", tmp_path / "in", "-o", tmp_path / "out")
    assert "outscale 3.0 is now None" in text


def test_the_scale_of_16_bits_and_of_transparency(tmp_path: Path) -> None:
    deep = resized(np.full((8, 8, 4), 40000, np.uint16), (5, 6))
    assert (deep.shape, deep.dtype, deep.min(), deep.max()) == ((5, 6, 4), np.uint16, 40000, 40000)
    levels = np.full((12, 16, 4), 30000, np.uint16)
    (tmp_path / "a.png").write_bytes(png.encode_16_bits(levels, {}))
    assert upscale("-n", "bicubic", "-i", tmp_path / "a.png", "-o", tmp_path / "b.png", "-s", 1.5) == 0
    result = png.decode_16_bits((tmp_path / "b.png").read_bytes())
    assert (result.shape, result.min(), result.max()) == ((18, 24, 4), 30000, 30000)


def test_format_auto_keeps_each_inputs_format(tmp_path: Path, weights: Path) -> None:
    for name in ("b.JPEG", "c.webp", "d.bmp", "a.jpg"):
        write_image(tmp_path / "in" / name, 20, 24)
    assert upscale("-n", weights, "-i", tmp_path / "in", "-o", tmp_path / "out", "--format", "auto") == 0
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["a.jpg", "a.png", "b.jpg", "c.webp", "d.png", "upscale.json"]
    for name in names[:-1]:
        assert Image.open(tmp_path / "out" / name).format == {"jpg": "JPEG", "webp": "WEBP"}.get(
            name[2:], "PNG"
        )


@pytest.mark.parametrize("scale", ["0", "-1", "17", "nan", "big"])
def test_a_scale_out_of_range(tmp_path: Path, weights: Path, scale: str) -> None:
    text = user_error("upscale", "-n", weights, "-i", tmp_path / "in", "-o", tmp_path / "out", "-s", scale)
    assert f"--outscale='{scale}'" in text


def test_tiles_of_one_large_image_are_counted(
    tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("pipeline.progress.LINE_EVERY_S", 0.0)
    arguments = ("-n", weights, "-i", tmp_path / "in" / "a.png", "-o", tmp_path / "out")
    assert upscale(*arguments, "-t", 8) == 0
    assert "/9 tiles" in capsys.readouterr().err
    assert upscale(*arguments, "-t", 0, "--overwrite") == 0
    assert "tiles" not in capsys.readouterr().err
