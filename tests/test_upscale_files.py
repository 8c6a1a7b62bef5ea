"""What an output keeps of its input: name, orientation, transparency, profile; failures and resuming."""

import io
import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluation_helpers import (
    job,
    synthetic_image,
    user_error,
    write_generator,
    write_image,
    write_overflowing_generator,
)
from PIL import Image, ImageCms

from pipeline.evaluation.config import UpscaleConfig
from pipeline.evaluation.models import Model, open_model
from pipeline.evaluation.output_plan import Task, plan
from pipeline.evaluation.upscaling import Upscaler, Work
from pipeline.imaging import bicubic_upscale, upscale


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    return write_generator(tmp_path / "g.safetensors")


def run(tmp_path: Path, *arguments: object) -> tuple[int, dict]:
    """Exit code and result of one call."""
    result = tmp_path / "result.json"
    code = job("upscale")([*map(str, arguments), "--output", str(tmp_path / "out"), "--json", str(result)])
    return code or 0, json.loads(result.read_text())


def names(entries: list[str], root: Path) -> list[str]:
    return [str(Path(entry).relative_to(root)) for entry in entries]


def test_a_folder_keeps_its_relative_names(tmp_path: Path, weights: Path) -> None:
    for name in ("b.png", "deep/er/a.webp", "both.png", "both.jpg"):
        write_image(tmp_path / "in" / name, 20, 24)
    code, result = run(tmp_path, "--model", weights, "--input", tmp_path / "in")
    assert code == 0
    assert names(result["written"], tmp_path / "out") == [
        "b.png",
        "both.jpg.png",
        "both.png.png",
        "deep/er/a.png",
    ]
    assert Image.open(tmp_path / "out" / "deep" / "er" / "a.png").size == (96, 80)


def test_an_output_has_the_generators_pixels(tmp_path: Path, weights: Path) -> None:
    write_image(tmp_path / "a.png", 20, 24)
    run(tmp_path, "--model", weights, "--input", tmp_path / "a.png")
    generator = open_model(str(weights)).generator
    assert generator is not None
    expected = upscale(generator, synthetic_image(20, 24))
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "out" / "a.png")), expected)


def test_tiles_change_pixels_by_at_most_one_level(tmp_path: Path, weights: Path) -> None:
    write_image(tmp_path / "a.png", 150, 130)
    whole, tiled = tmp_path / "whole", tmp_path / "tiled"
    for folder, tile in ((whole, "0"), (tiled, "48")):
        job("upscale")(
            [
                "--model",
                str(weights),
                "--input",
                str(tmp_path / "a.png"),
                "--output",
                str(folder),
                "--tile",
                tile,
            ]
        )
    a, b = (np.asarray(Image.open(folder / "a.png")).astype(int) for folder in (whole, tiled))
    assert np.abs(a - b).max() <= 1


def test_orientation_is_applied_and_other_exif_kept(tmp_path: Path, weights: Path) -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "Camera"
    exif.get_ifd(0x8769)[0xA002] = 24
    image = Image.fromarray(synthetic_image(20, 24))
    image.save(tmp_path / "a.png", exif=exif)
    run(tmp_path, "--model", weights, "--input", tmp_path / "a.png")
    output = Image.open(tmp_path / "out" / "a.png")
    assert output.size == (80, 96)
    assert output.getexif().get(0x0112, 1) == 1
    assert output.getexif()[0x010F] == "Camera"
    assert output.getexif().get_ifd(0x8769)[0xA002] == 80
    generator = open_model(str(weights)).generator
    assert generator is not None
    upright = np.ascontiguousarray(np.rot90(synthetic_image(20, 24), -1))
    np.testing.assert_array_equal(np.asarray(output), upscale(generator, upright))


@pytest.mark.parametrize("form", ["png", "webp"])
def test_transparency_is_upscaled_by_bicubic(tmp_path: Path, weights: Path, form: str) -> None:
    alpha = synthetic_image(20, 24, seed=3)[..., :1]
    Image.fromarray(np.concatenate([synthetic_image(20, 24), alpha], axis=2)).save(tmp_path / "a.png")
    run(tmp_path, "--model", weights, "--input", tmp_path / "a.png", "--format", form)
    output = Image.open(tmp_path / "out" / f"a.{form}")
    assert output.mode == "RGBA"
    np.testing.assert_array_equal(np.asarray(output)[..., 3:], bicubic_upscale(alpha, 4))


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_images_beyond_pillows_own_limit_are_upscaled(
    tmp_path: Path, weights: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new(mode, (20, 20), 9).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 199)  # it raises above twice its value
    code, result = run(tmp_path, "--model", weights, "--input", tmp_path / "a.png")
    assert (code, result["failed"]) == (0, [])


def test_jpeg_rejects_transparency(tmp_path: Path, weights: Path) -> None:
    Image.new("RGBA", (20, 20), (9, 9, 9, 99)).save(tmp_path / "a.png")
    code, result = run(tmp_path, "--model", weights, "--input", tmp_path / "a.png", "--format", "jpg")
    assert code == 1
    assert "transparency" in result["failed"][0]["reason"]


@pytest.mark.parametrize("form", ["png", "jpg", "webp"])
def test_the_color_profile_is_kept(tmp_path: Path, weights: Path, form: str) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.fromarray(synthetic_image(20, 24)).save(tmp_path / "a.jpg", icc_profile=profile)
    run(tmp_path, "--model", weights, "--input", tmp_path / "a.jpg", "--format", form)
    assert Image.open(tmp_path / "out" / f"a.{form}").info["icc_profile"] == profile


def test_gray_stays_gray(tmp_path: Path, weights: Path) -> None:
    Image.fromarray(synthetic_image(20, 24)[..., 0]).save(tmp_path / "a.png")
    run(tmp_path, "--model", weights, "--input", tmp_path / "a.png")
    assert Image.open(tmp_path / "out" / "a.png").mode == "L"


def test_the_smallest_image(tmp_path: Path, weights: Path) -> None:
    Image.new("RGB", (1, 1), (10, 200, 30)).save(tmp_path / "a.png")
    run(tmp_path, "--model", weights, "--input", tmp_path / "a.png")
    assert Image.open(tmp_path / "out" / "a.png").size == (4, 4)


def test_bad_images_are_reported_and_the_others_written(
    tmp_path: Path, weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_image(tmp_path / "in" / "good.png", 20, 24)
    (tmp_path / "in" / "page.png").write_text("<html>")
    content = (tmp_path / "in" / "good.png").read_bytes()
    (tmp_path / "in" / "cut.png").write_bytes(content[: len(content) // 2])
    code, result = run(tmp_path, "--model", weights, "--input", tmp_path / "in")
    assert code == 1
    assert names(result["written"], tmp_path / "out") == ["good.png"]
    assert [Path(entry["path"]).name for entry in result["failed"]] == ["cut.png", "page.png"]
    assert "page.png: not an image" in capsys.readouterr().err


def test_an_image_with_non_finite_output_fails_and_the_others_are_written(tmp_path: Path) -> None:
    weights = write_overflowing_generator(tmp_path / "g.safetensors")
    write_image(tmp_path / "in" / "bright.png", 20, 24)
    Image.new("RGB", (24, 20)).save(tmp_path / "in" / "dark.png")
    for precision, hint in (("fp32", "another model"), ("bf16", "--precision fp32")):
        code, result = run(
            tmp_path, "--model", weights, "--input", tmp_path / "in", "--precision", precision, "--overwrite"
        )
        assert code == 1
        assert names(result["written"], tmp_path / "out") == ["dark.png"]
        assert [Path(entry["path"]).name for entry in result["failed"]] == ["bright.png"]
        assert "non-finite values" in result["failed"][0]["reason"]
        assert hint in result["failed"][0]["reason"]
    assert not (tmp_path / "out" / "bright.png").exists()


def test_running_again_skips_existing_outputs_and_resumes(tmp_path: Path, weights: Path) -> None:
    write_image(tmp_path / "in" / "a.png", 20, 24)
    run(tmp_path, "--model", weights, "--input", tmp_path / "in")
    for name in "bc":
        write_image(tmp_path / "in" / f"{name}.png", 20, 24)
    before = (tmp_path / "out" / "a.png").stat().st_mtime_ns
    code, result = run(tmp_path, "--model", weights, "--input", tmp_path / "in")
    assert code == 0
    assert names(result["skipped"], tmp_path / "out") == ["a.png"]
    assert names(result["written"], tmp_path / "out") == ["b.png", "c.png"]
    assert (tmp_path / "out" / "a.png").stat().st_mtime_ns == before
    code, result = run(tmp_path, "--model", weights, "--input", tmp_path / "in", "--overwrite")
    assert len(result["written"]) == 3


def test_a_full_disk_is_a_one_line_error_and_leaves_no_partial_output(
    tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "ab":
        write_image(tmp_path / "in" / f"{name}.png", 20, 24)
    replace = Path.replace

    def full(self: Path, target: Path) -> Path:
        if target.name == "b.png":
            raise OSError(28, "No space left on device")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", full)
    text = user_error("upscale", "--model", weights, "--input", tmp_path / "in", "--output", tmp_path / "out")
    assert "No space left" in text
    assert "1 were written" in text
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.png", "upscale.json"]


def test_an_output_folder_below_the_input_is_not_upscaled(tmp_path: Path, weights: Path) -> None:
    write_image(tmp_path / "a.png", 20, 24)
    for _ in range(2):
        code, result = run(tmp_path, "--model", weights, "--input", tmp_path)
        assert code == 0
    assert names(result["skipped"], tmp_path / "out") == ["a.png"]


def test_bad_input_is_a_one_line_error(tmp_path: Path, weights: Path) -> None:
    write_image(tmp_path / "in" / "a.png", 20, 24)
    out = ("--output", tmp_path / "out")
    assert "no such" in user_error("upscale", "--model", weights, "--input", tmp_path / "no", *out)
    (tmp_path / "empty").mkdir()
    assert "no images" in user_error("upscale", "--model", weights, "--input", tmp_path / "empty", *out)
    (tmp_path / "page.pth").write_text("<html>")
    assert "weights" in user_error(
        "upscale", "--model", tmp_path / "page.pth", "--input", tmp_path / "in", *out
    )
    text = user_error("upscale", "--model", weights, "--input", tmp_path / "in", "--output", tmp_path / "in")
    assert "input's folder" in text
    text = user_error("upscale", "--model", weights, "--input", tmp_path / "in", "--output", weights / "out")
    assert "--output" in text
    assert "--tile" in user_error(
        "upscale", "--model", weights, "--input", tmp_path / "in", *out, "--tile", "-3"
    )
    assert "--format" in user_error(
        "upscale", "--model", weights, "--input", tmp_path / "in", *out, "--format", "gif"
    )


@pytest.mark.ray
def test_ray_workers_write_the_same_files(tmp_path: Path, weights: Path, ray_cluster: str) -> None:
    for seed in range(4):
        write_image(tmp_path / "in" / f"{seed}.png", 20, 24, seed)
    (tmp_path / "in" / "bad.png").write_bytes(b"")
    code, result = run(tmp_path, "--model", weights, "--input", tmp_path / "in", "--workers", 1)
    assert code == 1
    assert len(result["written"]) == 4
    assert [entry["reason"] for entry in result["failed"]] == ["empty file"]
    first = np.asarray(Image.open(io.BytesIO((tmp_path / "out" / "0.png").read_bytes())))
    np.testing.assert_array_equal(first, open_model(str(weights)).upscale(synthetic_image(20, 24, 0)))


@pytest.mark.ray
def test_more_workers_than_cpus_are_an_error(tmp_path: Path, weights: Path, ray_cluster: str) -> None:
    write_image(tmp_path / "in" / "a.png", 20, 24)
    arguments = (
        "--model",
        weights,
        "--input",
        tmp_path / "in",
        "--output",
        tmp_path / "out",
        "--workers",
        "64",
    )
    assert "--workers 64" in user_error("upscale", *arguments)


def test_images_are_read_and_written_while_another_is_upscaled(
    tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in").mkdir()
    for index in range(5):
        Image.fromarray(synthetic_image(20, 24, index)).save(tmp_path / "in" / f"{index}.png")
    config = UpscaleConfig(model=str(weights), input=str(tmp_path / "in"), output=str(tmp_path / "out"))
    output, tasks = plan(config.input, config.output, config.format)
    upscaler = Upscaler(open_model(config.model), output, config)
    read, written = [threading.Event() for _ in tasks], [threading.Event() for _ in tasks]
    numbers = {task.target: index for index, task in enumerate(tasks)}
    calls = iter(range(len(tasks)))
    upscale_image, read_task, write_work = Model.upscale, Upscaler.read, Upscaler.write

    def upscaled(self: Model, lr: np.ndarray, *more: Any) -> np.ndarray:
        number = next(calls)
        # These would never be set if one image were finished before the next.
        assert number + 1 == len(tasks) or read[number + 1].wait(60)
        assert number == 0 or written[number - 1].wait(60)
        return upscale_image(self, lr, *more)

    def reading(self: Upscaler, task: Task) -> Work:
        work = read_task(self, task)
        read[numbers[task.target]].set()
        return work

    def writing(self: Upscaler, work: Work) -> Work:
        outcome = write_work(self, work)
        written[numbers[work.task.target]].set()
        return outcome

    monkeypatch.setattr(Model, "upscale", upscaled)
    monkeypatch.setattr(Upscaler, "read", reading)
    monkeypatch.setattr(Upscaler, "write", writing)
    assert [outcome.task for outcome in upscaler.all(tasks)] == tasks
    assert len(list((tmp_path / "out").glob("*.png"))) == 5
