"""Wrong inputs of evaluate.py and export_model.py: one clear line, exit code 2."""

import subprocess
import sys
from pathlib import Path

import pytest
from enlarging import ROOT, job, picture, refusal, write_generator, write_picture


@pytest.fixture
def set_(tmp_path: Path) -> Path:
    write_picture(tmp_path / "hr" / "a.png")
    return tmp_path


def test_missing_and_empty_folders(set_: Path) -> None:
    out = ("--out", set_ / "out")
    assert "there is no such folder" in refusal("evaluate", "--model", "bicubic", "--hr", set_ / "no", *out)
    (set_ / "empty").mkdir()
    assert "no pictures there" in refusal("evaluate", "--model", "bicubic", "--hr", set_ / "empty", *out)
    assert "--lr" in refusal("evaluate", "--model", "bicubic", "--hr", set_ / "hr", "--lr", set_ / "no", *out)
    assert not (set_ / "out" / "metrics.json").exists()


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("missing.pth", None, "no such file"),
        ("page.pth", b"<!doctype html><html></html>", "not readable as weights"),
        ("notes.txt", b"x", "weights are .safetensors or .pth"),
        ("nowhere", None, "no such file or folder"),
    ],
)
def test_models_that_are_none(set_: Path, name: str, content: bytes | None, expected: str) -> None:
    if content is not None:
        (set_ / name).write_bytes(content)
    text = refusal("evaluate", "--model", set_ / name, "--hr", set_ / "hr", "--out", set_ / "out")
    assert expected in text
    assert name in text


def test_a_folder_without_a_checkpoint(set_: Path) -> None:
    assert "checkpoint" in refusal(
        "evaluate", "--model", set_ / "hr", "--hr", set_ / "hr", "--out", set_ / "out"
    )


def test_registered_models_need_a_store(set_: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ESRGAN_TRACKING__URI", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    arguments = ("--model", "models:/esrgan-x4@champion", "--hr", set_ / "hr", "--out", set_ / "out")
    assert "tracking" in refusal("evaluate", *arguments)


def test_sizes_that_do_not_belong_together(set_: Path) -> None:
    write_picture(set_ / "lr" / "a.png", 20, 20)
    text = refusal(
        "evaluate", "--model", "bicubic", "--hr", set_ / "hr", "--lr", set_ / "lr", "--out", set_ / "out"
    )
    assert "80 x 64" in text
    assert "20 x 20" in text


def test_an_output_that_cannot_be_written(set_: Path) -> None:
    (set_ / "file").write_text("")
    arguments = ("--model", "bicubic", "--hr", set_ / "hr")
    assert "--out" in refusal("evaluate", *arguments, "--out", set_ / "file" / "out")
    text = refusal("evaluate", *arguments, "--out", set_ / "out", "--json", set_ / "no" / "x.json")
    assert "--json" in text


@pytest.mark.parametrize(
    "extra",
    [("--border", "-1"), ("--tile", "-1"), ("--limit", "0"), ("--crop", "a.png"), ("--crop", "b.png:0,0,8,8"),
     ("--interpolate", "bicubic", "bicubic", "x"), ("--device", "abacus")],
)  # fmt: skip
def test_flags_out_of_range(set_: Path, extra: tuple[str, ...]) -> None:
    arguments = ("--model", "bicubic", "--hr", set_ / "hr", "--out", set_ / "out")
    assert extra[0] in refusal("evaluate", *arguments, *extra)


def test_models_of_different_scales(set_: Path) -> None:
    weights = write_generator(set_ / "x2.safetensors", scale=2)
    other = write_generator(set_ / "x4.safetensors")
    assert "one scale" in refusal(
        "evaluate", "--model", weights, other, "--hr", set_ / "hr", "--out", set_ / "out"
    )


def test_every_picture_refused(set_: Path) -> None:
    (set_ / "bad").mkdir()
    (set_ / "bad" / "a.png").write_bytes(b"")
    assert "empty file" in refusal(
        "evaluate", "--model", "bicubic", "--hr", set_ / "bad", "--out", set_ / "out"
    )


def test_the_program_exits_with_2_after_one_line() -> None:
    result = subprocess.run(
        [sys.executable, "jobs/evaluate.py", "--model", "bicubic", "--hr", "/nowhere", "--out", "/tmp"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 2
    assert result.stderr.startswith("error: --hr /nowhere")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("output", ["model.ckpt", "no/model.pth"])
def test_export_refuses_other_files(tmp_path: Path, output: str) -> None:
    weights = write_generator(tmp_path / "g.safetensors")
    assert "--output" in refusal("export_model", "--model", weights, "--output", tmp_path / output)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_spandrel_opens_the_export_as_esrgan_x4(tmp_path: Path, suffix: str) -> None:
    spandrel = pytest.importorskip("spandrel", reason="spandrel is not installed; the dev extra brings it")
    import numpy as np
    import torch

    from pipeline.evaluation.models import open_model
    from pipeline.imaging import to_tensor, to_uint8

    weights = write_generator(tmp_path / "g.safetensors", num_block=2)
    exported = tmp_path / f"export{suffix}"
    job("export_model")(["--model", str(weights), "--output", str(exported)])
    theirs = spandrel.ModelLoader().load_from_file(exported)
    assert theirs.architecture.name == "ESRGAN"
    assert theirs.scale == 4
    lr = picture(24, 20)
    with torch.inference_mode():
        sr = to_uint8(theirs(to_tensor(lr)))[0]
    assert np.abs(sr.astype(int) - open_model(str(weights)).upscale(lr)).max() <= 1
