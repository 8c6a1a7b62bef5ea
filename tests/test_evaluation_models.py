"""Model specs: runs, checkpoints, files, labels, interpolation."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation_helpers import synthetic_image, user_error, write_generator, write_image

from pipeline.errors import UserError
from pipeline.evaluation import models
from pipeline.evaluation.models import Model, automatic_tile, interpolated, notes, open_model
from pipeline.evaluation.result import short_labels
from pipeline.model import RRDBNet, save_generator


def write_checkpoint(run: Path, name: str, seed: int) -> Path:
    folder = run / "checkpoints" / name
    weights = write_generator(folder / "generator.safetensors", seed)
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(
        json.dumps(
            {"format": 1, "files": {weights.name: {"bytes": weights.stat().st_size, "sha256": digest}}}
        )
    )
    return folder


def same(first: object, second: object) -> bool:
    a, b = first.generator.state_dict(), second.generator.state_dict()  # type: ignore[attr-defined]
    return all(torch.equal(a[key], b[key]) for key in a)


def test_a_run_opens_its_newest_finished_checkpoint(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "psnr-00000900", 1)
    newest = write_checkpoint(tmp_path, "gan-00001000", 2)
    unfinished = write_checkpoint(tmp_path, "gan-00002000", 3)
    (unfinished / "manifest.json").unlink()
    assert same(open_model(str(tmp_path)), open_model(str(newest)))


def test_a_corrupt_checkpoint_is_skipped_in_a_run_and_an_error_by_its_path(tmp_path: Path) -> None:
    valid = write_checkpoint(tmp_path, "psnr-00000001", 1)
    corrupt = write_checkpoint(tmp_path, "psnr-00000002", 2)
    content = bytearray((corrupt / "generator.safetensors").read_bytes())
    content[-1] ^= 1
    (corrupt / "generator.safetensors").write_bytes(content)
    assert same(open_model(str(tmp_path)), open_model(str(valid)))
    with pytest.raises(UserError, match="checksum"):
        open_model(str(corrupt))


@pytest.mark.parametrize("source", ["file.safetensors", "file.pth", "run", "run/checkpoints/gan-00001000"])
def test_non_finite_weights_are_an_error_in_every_command(tmp_path: Path, source: str) -> None:
    folder = tmp_path / "run" / "checkpoints" / "gan-00001000"
    generator = RRDBNet(num_feat=8, num_block=1, num_grow_ch=4)
    torch.nn.init.constant_(generator.body[0].rdb1.conv2.bias, torch.nan)
    folder.mkdir(parents=True)
    for path in (folder / "generator.safetensors", tmp_path / "file.safetensors", tmp_path / "file.pth"):
        save_generator(generator, path)
    digest = hashlib.sha256((folder / "generator.safetensors").read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(
        json.dumps({"format": 1, "files": {"generator.safetensors": {"bytes": 0, "sha256": digest}}})
    )
    image, out = write_image(tmp_path / "a.png"), tmp_path / "out"
    model = ("--model", tmp_path / source)
    for text in (
        user_error("upscale", *model, "--input", image, "--output", out),
        user_error("evaluate", *model, "--hr", image, "--out", out),
        user_error("export_model", *model, "--output", tmp_path / "g.onnx"),
    ):
        assert text.startswith(f"{tmp_path / source}: body.0.rdb1.conv2.bias holds non-finite values")
    assert not out.exists()


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_files_without_a_residual_scale_give_a_note(tmp_path: Path, suffix: str) -> None:
    model = open_model(str(write_generator(tmp_path / f"g{suffix}")))
    assert model.scale == 4
    assert bool(notes([model])) == (suffix == ".pth")


def test_interpolation_mixes_weights_as_the_paper_does(tmp_path: Path) -> None:
    a, b = (open_model(str(write_generator(tmp_path / f"{seed}.safetensors", seed))) for seed in (1, 2))
    mixed = interpolated(a, b, 0.8)
    weights = [model.generator.state_dict()["conv_first.weight"] for model in (a, b, mixed)]  # type: ignore[union-attr]
    torch.testing.assert_close(weights[2], 0.2 * weights[0] + 0.8 * weights[1])
    assert same(interpolated(a, b, 0), a)
    assert same(interpolated(a, b, 1), b)
    assert mixed.name.startswith("0.2 * ")


def test_interpolation_rejects_other_sizes_and_bicubic(tmp_path: Path) -> None:
    a = open_model(str(write_generator(tmp_path / "a.safetensors")))
    b = open_model(str(write_generator(tmp_path / "b.safetensors", num_feat=12)))
    c = open_model(str(write_generator(tmp_path / "c.safetensors", residual_scale=0.1)))
    for other in (b, c, open_model("bicubic")):
        with pytest.raises(UserError, match="--interpolate"):
            interpolated(a, other, 0.5)
    with pytest.raises(UserError, match="between 0 and 1"):
        interpolated(a, a, 1.5)


def test_bf16_stays_near_fp32(tmp_path: Path) -> None:
    path = str(write_generator(tmp_path / "g.safetensors"))
    lr = synthetic_image(24, 20)
    exact, quick = open_model(path).upscale(lr), open_model(path, precision="bf16").upscale(lr)
    assert np.abs(exact.astype(int) - quick).max() <= 4


@pytest.mark.parametrize(("has_it", "lines"), [(True, 0), (False, 1)])
def test_bf16_on_a_cpu_without_support_gives_a_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_it: bool, lines: int
) -> None:
    path = str(write_generator(tmp_path / "g.safetensors"))
    monkeypatch.setattr(models, "emulates_bf16", lambda device: not has_it)
    assert len(notes([open_model(path, precision="bf16")])) == lines
    assert notes([open_model(path)]) == []


def test_a_label_is_split_off_but_paths_with_equals_signs_are_not(tmp_path: Path) -> None:
    path = write_generator(tmp_path / "set=a" / "g.safetensors")
    assert (open_model(f"stage 1={path}").label, open_model(f"stage 1={path}").name) == ("stage 1", str(path))
    assert open_model(str(path)).label == ""


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        (["bicubic", "runs/a/checkpoints/psnr-00000800", "models:/esrgan-x4@champion"],
         ["bicubic", "psnr-00000800", "esrgan-x4@champion"]),
        (["/runs/a/checkpoints/gan-00000900", "/runs/b/checkpoints/gan-00000900", "/runs/b"],
         ["a/gan-00000900", "b/gan-00000900", "b"]),
        (["run/checkpoints/gan-00000900/generator.safetensors", "x/old.pth", "s3://bucket/new.pth"],
         ["gan-00000900", "old", "new"]),
        (["0.2 * run/checkpoints/psnr-00000800 + 0.8 * models:/m/3"], ["0.2 * psnr-00000800 + 0.8 * m/3"]),
        (["same.pth", "same.pth"], ["same", "same"]),
    ],
)  # fmt: skip
def test_labels_are_short_and_distinguish_the_models(names: list[str], labels: list[str]) -> None:
    assert short_labels([Model(name, 4) for name in names]) == labels


def test_a_label_of_the_user_is_kept() -> None:
    assert short_labels([Model("a/x.pth", 4, label="tuned"), Model("b/x.pth", 4)]) == ["tuned", "x"]


@pytest.mark.parametrize(
    ("pixels", "gpu_bytes", "tile"),
    [
        (512 * 512, None, 0),
        (512 * 512 + 1, None, 256),
        (512 * 512 + 1, 8 * 10**9, 256),  # a GPU with as little as a CPU may have
        (700 * 700, 24 * 10**9, 0),
        (800 * 800, 24 * 10**9, 678),
        (1024 * 1024, 80 * 10**9, 0),
        (1024 * 1024 + 1, 80 * 10**9, 928),
    ],
)
def test_a_tile_with_its_overlap_takes_a_quarter_of_a_gpus_memory(
    pixels: int, gpu_bytes: int | None, tile: int
) -> None:
    assert automatic_tile(pixels, gpu_bytes) == tile
    if gpu_bytes is not None and tile > 256:
        assert (tile + 96) ** 2 * 10_000 <= gpu_bytes / 4
