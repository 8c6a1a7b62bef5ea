"""Metrics of an evaluation: equal to direct calls, exact means, the contract's keys."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation_helpers import (
    job,
    synthetic_image,
    user_error,
    write_generator,
    write_image,
    write_overflowing_generator,
)
from metrics_helpers import random_backbone, use_backbone, write_backbone
from PIL import Image
from torchvision.models import alexnet

from pipeline.data.ingest.image_set import find_pairs
from pipeline.errors import UserError
from pipeline.evaluation.evaluate import evaluate
from pipeline.evaluation.models import interpolated, open_model
from pipeline.evaluation.ray_workers import map_on_ray
from pipeline.evaluation.scoring import Scorer, Settings
from pipeline.imaging import bicubic_upscale, matlab_bicubic_downscale, psnr, ssim, upscale
from pipeline.metrics import CONSISTENCY_AND_DETAIL, FIDELITY, MetricSet


def run(folder: Path, *arguments: object, report: bool = False) -> dict:
    """metrics.json of one call of the command; the report takes longer than the metrics of an image."""
    with pytest.MonkeyPatch.context() as patch:
        if not report:
            patch.setattr("pipeline.evaluation.report.render_report", lambda evaluation: "")
        assert not job("evaluate")([*map(str, arguments), "--out", str(folder / "out")])
    return json.loads((folder / "out" / "metrics.json").read_text())


def test_values_are_those_of_direct_calls(tmp_path: Path) -> None:
    hr = synthetic_image(64, 80)
    write_image(tmp_path / "hr" / "a.png")
    weights = write_generator(tmp_path / "g.safetensors")
    result = run(tmp_path, "--model", weights, "--hr", tmp_path / "hr")
    mean = result["mean"]
    generator = open_model(str(weights)).generator
    assert generator is not None
    lr = matlab_bicubic_downscale(hr)
    sr = upscale(generator, lr)
    expected = {
        "psnr_y": psnr(sr, hr, 4, "y"), "ssim_y": ssim(sr, hr, 4, "y"),
        "psnr_rgb": psnr(sr, hr, 4, "rgb"), "ssim_rgb": ssim(sr, hr, 4, "rgb"),
        "lr_psnr": psnr(matlab_bicubic_downscale(sr), lr, 0, "rgb"),
    }  # fmt: skip
    assert {name: mean[name] for name in expected} == pytest.approx(expected, abs=1e-10)
    assert 0 < mean["detail_ratio"] < 1
    assert result["bicubic"]["psnr_y"] == pytest.approx(psnr(bicubic_upscale(lr), hr, 4, "y"), abs=1e-10)
    assert result["images"] == [{"name": "a.png", **result["mean"]}]
    assert (result["border"], result["model"]) == (4, str(weights))


def test_bicubic_on_the_reference_photo(tmp_path: Path, reference: dict[str, np.ndarray]) -> None:
    hr, lr = reference["photo_hr"], reference["photo_lr_replicate"]
    for name, image in (("hr/p.png", hr), ("lr/px4.png", lr)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(image).save(tmp_path / name)
    alone = run(tmp_path, "--model", "bicubic", "--hr", tmp_path / "hr")
    with_lr = run(tmp_path, "--model", "bicubic", "--hr", tmp_path / "hr", "--lr", tmp_path / "lr")
    assert alone["mean"] == with_lr["mean"]
    assert alone["mean"]["psnr_y"] == pytest.approx(psnr(bicubic_upscale(lr, 4), hr, 4, "y"))
    # Another kernel, or a shift by half a pixel, gives a PSNR outside this range.
    assert alone["mean"]["psnr_y"] == pytest.approx(psnr(reference["photo_up"], hr, 4, "y"), abs=0.3)


def test_several_models_are_listed_in_the_given_order(tmp_path: Path) -> None:
    write_image(tmp_path / "hr" / "a.png")
    weights = write_generator(tmp_path / "g.safetensors")
    result = run(tmp_path, "--model", "bicubic", weights, "--hr", tmp_path / "hr")
    assert [entry["model"] for entry in result["models"]] == ["bicubic", str(weights)]
    assert all({"mean", "images", "border", "model"} <= set(entry) for entry in result["models"])


def test_bicubic_is_in_every_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_image(tmp_path / "hr" / "a.png")
    weights = write_generator(tmp_path / "g.safetensors")
    for models in ([weights], ["bicubic", weights]):
        result = run(tmp_path, "--model", *models, "--hr", tmp_path / "hr", report=True)
        lines = [line.split()[:2] for line in capsys.readouterr().out.splitlines()]
        assert lines.count(["bicubic", f"{result['bicubic']['psnr_y']:.2f}"]) == 1
        assert (tmp_path / "out" / "report.html").read_text().count(">bicubic</td>") == 1


def test_the_mean_is_over_images_and_written_to_json(tmp_path: Path) -> None:
    for seed in range(3):
        write_image(tmp_path / "hr" / f"{seed}.png", 48 + 4 * seed, 64, seed)
    result = run(tmp_path, "--model", "bicubic", "--hr", tmp_path / "hr", "--json", tmp_path / "mean.json")
    values = [image["psnr_y"] for image in result["images"]]
    assert result["mean"]["psnr_y"] == pytest.approx(sum(values) / 3, abs=1e-12)
    assert json.loads((tmp_path / "mean.json").read_text()) == result["mean"]


def test_sizes_that_do_not_divide_are_cut_and_gray_becomes_rgb(tmp_path: Path) -> None:
    (tmp_path / "hr").mkdir()
    gray = synthetic_image(67, 83)[..., 0]
    Image.fromarray(gray).save(tmp_path / "hr" / "a.png")
    result = run(tmp_path, "--model", "bicubic", "--hr", tmp_path / "hr")
    hr = np.repeat(gray[:64, :80, None], 3, axis=2)
    assert result["mean"]["psnr_y"] == pytest.approx(
        psnr(bicubic_upscale(matlab_bicubic_downscale(hr), 4), hr, 4, "y")
    )


def test_rejected_images_are_listed_and_excluded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_image(tmp_path / "hr" / "good.png")
    (tmp_path / "hr" / "page.png").write_text("<html>")
    write_image(tmp_path / "hr" / "tiny.png", 16, 16)
    result = run(tmp_path, "--model", "bicubic", "--hr", tmp_path / "hr")
    assert [image["name"] for image in result["images"]] == ["good.png"]
    assert {Path(each["path"]).name for each in result["refused"]} == {"page.png", "tiny.png"}
    assert "HTML" in capsys.readouterr().out


def test_infinite_psnr_of_equal_images_is_null_in_json(tmp_path: Path) -> None:
    flat = np.full((48, 48, 3), 90, np.uint8)
    (tmp_path / "hr").mkdir()
    Image.fromarray(flat).save(tmp_path / "hr" / "flat.png")
    result = run(tmp_path, "--model", "bicubic", "--hr", tmp_path / "hr", report=True)
    assert result["mean"]["psnr_y"] is None
    assert result["mean"]["ssim_y"] == pytest.approx(1)
    assert "∞" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.slow
def test_tiles_change_a_metric_by_less_than_its_printed_digits(tmp_path: Path) -> None:
    write_image(tmp_path / "hr" / "a.png", 320, 400)
    weights = write_generator(tmp_path / "g.safetensors")
    whole = run(tmp_path, "--model", weights, "--hr", tmp_path / "hr", "--tile", 0)["mean"]
    tiled = run(tmp_path, "--model", weights, "--hr", tmp_path / "hr", "--tile", 32)["mean"]
    assert tiled["psnr_y"] == pytest.approx(whole["psnr_y"], abs=2e-3)


def test_limit_takes_the_first_names(tmp_path: Path) -> None:
    for name in "cab":
        write_image(tmp_path / "hr" / f"{name}.png")
    result = run(tmp_path, "--model", "bicubic", "--hr", tmp_path / "hr", "--limit", 2)
    assert [image["name"] for image in result["images"]] == ["a.png", "b.png"]


def test_an_interpolated_network_is_evaluated_with_the_others(tmp_path: Path) -> None:
    hr = write_image(tmp_path / "hr" / "a.png", 64, 80)
    a, b = (str(write_generator(tmp_path / f"{seed}.safetensors", seed)) for seed in (1, 2))
    result = run(tmp_path, "--model", "bicubic", "--interpolate", a, b, "0.8", "--hr", hr.parent)
    assert [entry["model"] for entry in result["models"]] == ["bicubic", f"0.2 * {a} + 0.8 * {b}"]
    original = synthetic_image(64, 80)
    mixed = interpolated(open_model(a), open_model(b), 0.8).upscale(matlab_bicubic_downscale(original))
    assert result["models"][1]["mean"]["psnr_y"] == pytest.approx(psnr(mixed, original, 4, "y"))


@pytest.mark.ray
def test_ray_workers_give_the_same_numbers(tmp_path: Path, ray_cluster: str) -> None:
    for seed in range(4):
        write_image(tmp_path / "hr" / f"{seed}.png", 48, 64, seed)
    models = [open_model("bicubic"), open_model(str(write_generator(tmp_path / "g.safetensors")))]
    pairs, _ = find_pairs(str(tmp_path / "hr"), None, 4)
    scorer = Scorer(models, Settings(), MetricSet([*FIDELITY, "feature_distance"]))
    assert evaluate(scorer, pairs, workers=1).as_json() == evaluate(scorer, pairs).as_json()


@pytest.mark.ray
def test_an_error_on_a_ray_worker_is_raised_without_its_traceback(ray_cluster: str) -> None:
    def refuse(name: str) -> None:
        raise UserError(f"{name}: too small")

    with pytest.raises(UserError, match=r"^a\.png: too small$"):
        list(map_on_ray(refuse, ["a.png"], 1))


def test_a_model_with_non_finite_output_is_an_error_without_results(tmp_path: Path) -> None:
    weights = write_overflowing_generator(tmp_path / "g.safetensors")
    write_image(tmp_path / "hr" / "bright.png")
    Image.new("RGB", (80, 64)).save(tmp_path / "hr" / "dark.png")
    text = user_error(
        "evaluate", "--model", "bicubic", weights, "--hr", tmp_path / "hr", "--out", tmp_path / "out"
    )
    assert "bright.png" in text
    assert f"{weights} computes non-finite values" in text
    assert not (tmp_path / "out").exists()


def test_a_gpu_with_too_little_memory_is_an_error_with_a_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(MetricSet, "measure", full)
    image = write_image(tmp_path / "hr" / "a.png")
    text = user_error("evaluate", "--model", "bicubic", "--hr", image.parent, "--out", tmp_path / "out")
    assert text == f"{image}: the GPU has too little memory; lower --tile, or use --device cpu"


@pytest.fixture
def lpips_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with seeded weights of AlexNet, the only valid ones for LPIPS; torch hub's cache is empty."""
    folder = tmp_path / "weights"
    folder.mkdir()
    use_backbone(monkeypatch, "lpips", write_backbone(folder, "alexnet", random_backbone(alexnet)))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return folder


def test_requested_metrics_follow_psnr_and_ssim(tmp_path: Path, lpips_folder: Path) -> None:
    image = write_image(tmp_path / "hr" / "a.png")
    chosen = ["lpips", "color_drift", "psnr_y"]
    arguments = ["--metrics", *chosen, "--weights-folder", lpips_folder]
    result = run(tmp_path, "--model", "bicubic", "--hr", image.parent, *arguments)
    colors = ["color_drift_r", "color_drift_g", "color_drift_b"]
    assert list(result["mean"]) == [*FIDELITY, *CONSISTENCY_AND_DETAIL, "lpips", "color_drift", *colors]
    hr = synthetic_image(64, 80)
    lr = matlab_bicubic_downscale(hr)
    metrics = MetricSet([*FIDELITY, *CONSISTENCY_AND_DETAIL, *chosen], folder=str(lpips_folder))
    (expected,) = metrics.measure(bicubic_upscale(lr)[None], hr[None], lr[None])
    assert result["images"] == [{"name": "a.png", **expected}]


def test_without_names_the_metrics_with_weights_are_computed_and_the_others_noted(
    tmp_path: Path, lpips_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_image(tmp_path / "hr" / "a.png")
    arguments = ["--model", "bicubic", "--hr", tmp_path / "hr", "--metrics"]
    result = run(tmp_path, *arguments)
    assert set(result["mean"]) >= {*FIDELITY, "feature_distance", "color_drift"}
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    assert [note.split(";")[0] for note in notes] == ["note: lpips is skipped", "note: dists is skipped"]
    (tmp_path / "torch" / "hub").mkdir(parents=True)
    (tmp_path / "torch" / "hub" / "checkpoints").symlink_to(lpips_folder)
    assert "lpips" in run(tmp_path, *arguments)["mean"]


def test_by_default_the_perceptual_metrics_with_weights_are_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    write_image(tmp_path / "hr" / "a.png")
    arguments = ["--model", "bicubic", "--hr", tmp_path / "hr"]
    assert list(run(tmp_path, *arguments)["mean"]) == [*FIDELITY, *CONSISTENCY_AND_DETAIL, "feature_distance"]
    assert "note:" not in capsys.readouterr().out
    monkeypatch.setattr(
        "pipeline.evaluation.evaluate.unavailable", lambda names, _: dict.fromkeys(names, "no weights")
    )
    assert list(run(tmp_path, *arguments)["mean"]) == [*FIDELITY, *CONSISTENCY_AND_DETAIL]
    assert "note: lpips is skipped; no weights" in capsys.readouterr().out


def test_a_requested_metric_without_weights_is_one_clear_line(tmp_path: Path, lpips_folder: Path) -> None:
    image = write_image(tmp_path / "hr" / "a.png")
    arguments = ["--model", "bicubic", "--hr", image.parent, "--out", tmp_path / "out", "--metrics", "dists"]
    assert "DISTS: " in user_error("evaluate", *arguments)
    assert "--metrics" in user_error("evaluate", *arguments[:-1], "niqe")
    assert not (tmp_path / "out").exists()


def test_an_image_too_small_for_a_metric_is_one_clear_line(tmp_path: Path, lpips_folder: Path) -> None:
    image = write_image(tmp_path / "hr" / "small.png", 36, 80)
    arguments = ["--metrics", "lpips", "--weights-folder", lpips_folder, "--out", tmp_path / "out"]
    text = user_error("evaluate", "--model", "bicubic", "--hr", image.parent, *arguments)
    assert "small.png: 80 x 36 pixels are too few for lpips with a border of 4 (at least 39)" in text


def test_intervals_and_comparisons_are_in_the_results_of_several_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed in range(5):
        write_image(tmp_path / "hr" / f"{seed}.png", 48 + 4 * seed, 64, seed)
    weights = write_generator(tmp_path / "g.safetensors")
    result = run(tmp_path, "--model", "bicubic", weights, "--hr", tmp_path / "hr")
    bicubic, network = result["models"]
    for entry in (bicubic, network):
        assert entry["interval"].keys() == entry["mean"].keys()
        for name, (low, high) in entry["interval"].items():
            assert low < entry["mean"][name] < high
    assert "against_first" not in bicubic
    compared = network["against_first"]["psnr_y"]
    assert compared["difference"] == pytest.approx(network["mean"]["psnr_y"] - bicubic["mean"]["psnr_y"])
    assert compared["interval"][0] < compared["difference"] < compared["interval"][1] < 0
    assert (compared["wins"], compared["losses"]) == (0, 5)
    printed = capsys.readouterr().out
    assert re.search(r"^g, psnr_y +-\d+\.\d\d +-\d+\.\d\d to -\d+\.\d\d +0 of 5$", printed, re.MULTILINE)
