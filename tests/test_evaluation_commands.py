"""Bad input of evaluate.py and export_model.py: a one-line error and exit code 2."""

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from evaluation_helpers import (
    exit_code,
    job,
    load_generator,
    synthetic_image,
    user_error,
    write_generator,
    write_image,
)

from pipeline.evaluation.models import interpolated, open_model
from pipeline.model import generator_sha256


@pytest.fixture
def image_set(tmp_path: Path) -> Path:
    write_image(tmp_path / "hr" / "a.png")
    return tmp_path


def test_missing_and_empty_folders(image_set: Path) -> None:
    out = ("--out", image_set / "out")
    assert "no such folder" in user_error("evaluate", "--model", "bicubic", "--hr", image_set / "no", *out)
    (image_set / "empty").mkdir()
    assert "no images" in user_error("evaluate", "--model", "bicubic", "--hr", image_set / "empty", *out)
    assert "--lr" in user_error(
        "evaluate", "--model", "bicubic", "--hr", image_set / "hr", "--lr", image_set / "no", *out
    )
    assert not (image_set / "out" / "metrics.json").exists()


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("missing.pth", None, "no such file"),
        ("page.pth", b"<!doctype html><html></html>", "not readable as weights"),
        ("notes.txt", b"x", "weights are .safetensors, .pth.tar, .pth"),
        ("nowhere", None, "no such file or folder"),
    ],
)
def test_files_that_are_not_models(image_set: Path, name: str, content: bytes | None, expected: str) -> None:
    if content is not None:
        (image_set / name).write_bytes(content)
    text = user_error(
        "evaluate", "--model", image_set / name, "--hr", image_set / "hr", "--out", image_set / "out"
    )
    assert expected in text
    assert name in text


def test_a_folder_without_a_checkpoint(image_set: Path) -> None:
    assert "checkpoint" in user_error(
        "evaluate", "--model", image_set / "hr", "--hr", image_set / "hr", "--out", image_set / "out"
    )


def test_registered_models_need_a_tracking_server(image_set: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ESRGAN_TRACKING__URI", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    arguments = (
        "--model",
        "models:/esrgan-x4@champion",
        "--hr",
        image_set / "hr",
        "--out",
        image_set / "out",
    )
    assert "tracking" in user_error("evaluate", *arguments)


def test_mismatched_sizes(image_set: Path) -> None:
    write_image(image_set / "lr" / "a.png", 20, 20)
    text = user_error(
        "evaluate",
        "--model",
        "bicubic",
        "--hr",
        image_set / "hr",
        "--lr",
        image_set / "lr",
        "--out",
        image_set / "out",
    )
    assert "80 x 64" in text
    assert "20 x 20" in text


def test_an_output_that_cannot_be_written(image_set: Path) -> None:
    (image_set / "file").write_text("")
    arguments = ("--model", "bicubic", "--hr", image_set / "hr")
    assert "--out" in user_error("evaluate", *arguments, "--out", image_set / "file" / "out")
    text = user_error(
        "evaluate", *arguments, "--out", image_set / "out", "--json", image_set / "no" / "x.json"
    )
    assert "--json" in text


@pytest.mark.parametrize(
    "extra",
    [("--border", "-1"), ("--tile", "-1"), ("--limit", "0"), ("--crop", "a.png"), ("--crop", "b.png:0,0,8,8"),
     ("--interpolate", "bicubic", "bicubic", "x"), ("--device", "abacus")],
)  # fmt: skip
def test_flags_out_of_range(image_set: Path, extra: tuple[str, ...]) -> None:
    arguments = ("--model", "bicubic", "--hr", image_set / "hr", "--out", image_set / "out")
    assert extra[0] in user_error("evaluate", *arguments, *extra)


def test_models_of_different_scales(image_set: Path) -> None:
    weights = write_generator(image_set / "x2.safetensors", scale=2)
    other = write_generator(image_set / "x4.safetensors")
    assert "one scale" in user_error(
        "evaluate", "--model", weights, other, "--hr", image_set / "hr", "--out", image_set / "out"
    )


def test_every_image_rejected(image_set: Path) -> None:
    (image_set / "bad").mkdir()
    (image_set / "bad" / "a.png").write_bytes(b"")
    assert "empty file" in user_error(
        "evaluate", "--model", "bicubic", "--hr", image_set / "bad", "--out", image_set / "out"
    )


def test_the_program_exits_with_2_after_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("evaluate", "--model", "bicubic", "--hr", "/nowhere", "--out", "/tmp") == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: --hr /nowhere")
    assert printed.count("\n") == 1


@pytest.mark.parametrize("output", ["model.ckpt", "no/model.pth"])
def test_export_rejects_other_files(tmp_path: Path, output: str) -> None:
    weights = write_generator(tmp_path / "g.safetensors")
    assert "--output" in user_error("export_model", "--model", weights, "--output", tmp_path / output)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_spandrel_loads_the_export_as_esrgan_x4(tmp_path: Path, suffix: str) -> None:
    spandrel = pytest.importorskip("spandrel", reason="spandrel is not installed; the dev extra brings it")
    weights = write_generator(tmp_path / "g.safetensors", num_block=2)
    exported = tmp_path / f"export{suffix}"
    job("export_model")(["--model", str(weights), "--output", str(exported)])
    loaded = spandrel.ModelLoader().load_from_file(exported)
    assert loaded.architecture.name == "ESRGAN"
    assert loaded.scale == 4
    lr = synthetic_image(24, 20)
    with torch.inference_mode():
        sr = loaded(torch.from_numpy(lr).permute(2, 0, 1)[None] / 255)[0].permute(1, 2, 0) * 255
    assert np.abs(sr.clamp(0, 255).round().numpy() - open_model(str(weights)).upscale(lr)).max() <= 1


def test_export_writes_the_interpolated_network(tmp_path: Path) -> None:
    sources = [
        str(write_generator(tmp_path / f"{seed}.safetensors", seed, num_grow_ch=32)) for seed in (1, 2)
    ]
    output = tmp_path / "mixed.safetensors"
    job("export_model")(["--interpolate", *sources, "0.8", "--output", str(output)])
    written, metadata = load_generator(output)
    expected = interpolated(*map(open_model, sources), 0.8).generator
    assert expected is not None
    digests = [generator_sha256(load_generator(source)[0].state_dict()) for source in sources]
    assert generator_sha256(written.state_dict()) == generator_sha256(expected.state_dict())
    assert metadata["interpolation"] == f"0.2 * {digests[0]} + 0.8 * {digests[1]}"


def test_export_writes_onnx_for_floating_point_images(tmp_path: Path) -> None:
    weights = write_generator(tmp_path / "g.safetensors")
    for images, expected in (("uint8", "uint8"), ("fp32", "float"), ("fp16", "float16")):
        arguments = ["--model", str(weights), "--output", str(tmp_path / "g.onnx"), "--onnx", images]
        job("export_model")(arguments)
        session = onnxruntime.InferenceSession(tmp_path / "g.onnx", providers=["CPUExecutionProvider"])
        assert session.get_inputs()[0].type == f"tensor({expected})"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), "either --model M or --interpolate A B ALPHA"),
        (("--model", "a.pth", "--interpolate", "a.pth", "b.pth", "0.5"), "either --model M or --interpolate"),
        (("--interpolate", "bicubic", "WEIGHTS", "0.5"), "bicubic has no weights"),
        (("--interpolate", "WEIGHTS", "WEIGHTS", "1.5"), "not between 0 and 1"),
        (("--interpolate", "WEIGHTS", "OTHER", "0.5"), "different sizes"),
        (("--model", "WEIGHTS", "--onnx", "fp16"), "not an .onnx file"),
    ],
)
def test_export_rejects_sources_that_do_not_fit(
    tmp_path: Path, arguments: tuple[str, ...], expected: str
) -> None:
    files = {
        "WEIGHTS": str(write_generator(tmp_path / "a.safetensors")),
        "OTHER": str(write_generator(tmp_path / "b.safetensors", num_feat=12)),
    }
    output = tmp_path / "out.pth"
    given = [files.get(argument, argument) for argument in arguments]
    assert expected in user_error("export_model", *given, "--output", output)
    assert not output.exists()
