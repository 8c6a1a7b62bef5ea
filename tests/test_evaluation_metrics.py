"""Metrics of an evaluation: equal to direct calls, exact means, the contract's keys."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from evaluation_helpers import (
    job,
    synthetic_image,
    user_error,
    write_generator,
    write_image,
    write_overflowing_generator,
)
from PIL import Image
from torchmetrics.functional.image.lpips import learned_perceptual_image_patch_similarity
from torchvision.models import AlexNet_Weights, alexnet

from pipeline.data.ingest.image_set import find_pairs
from pipeline.errors import UserError
from pipeline.evaluation import lpips
from pipeline.evaluation.evaluate import evaluate
from pipeline.evaluation.models import interpolated, open_model
from pipeline.evaluation.scoring import METRICS, Scorer, Settings
from pipeline.imaging import bicubic_upscale, matlab_bicubic_downscale, psnr, ssim, upscale


def run(folder: Path, *arguments: object) -> dict:
    """metrics.json of one call of the command."""
    assert not job("evaluate")([*map(str, arguments), "--out", str(folder / "out")])
    return json.loads((folder / "out" / "metrics.json").read_text())


def test_values_are_those_of_direct_calls(tmp_path: Path) -> None:
    hr = synthetic_image(64, 80)
    write_image(tmp_path / "hr" / "a.png")
    weights = write_generator(tmp_path / "g.safetensors")
    result = run(tmp_path, "--model", weights, "--hr", tmp_path / "hr")
    generator = open_model(str(weights)).generator
    assert generator is not None
    sr = upscale(generator, matlab_bicubic_downscale(hr))
    expected = {
        "psnr_y": psnr(sr, hr, 4, "y"), "ssim_y": ssim(sr, hr, 4, "y"),
        "psnr_rgb": psnr(sr, hr, 4, "rgb"), "ssim_rgb": ssim(sr, hr, 4, "rgb"),
    }  # fmt: skip
    assert result == {
        "mean": expected, "images": [{"name": "a.png", **expected}], "border": 4, "model": str(weights),
    }  # fmt: skip


def test_bicubic_on_the_reference_photo(tmp_path: Path, reference: dict[str, np.ndarray]) -> None:
    hr, lr = reference["photo_hr"], reference["photo_lr_replicate"]
    for name, image in (("hr/p.png", hr), ("lr/px4.png", lr)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(image).save(tmp_path / name)
    alone = run(tmp_path, "--model", "bicubic", "--hr", tmp_path / "hr")
    with_lr = run(tmp_path, "--model", "bicubic", "--hr", tmp_path / "hr", "--lr", tmp_path / "lr")
    assert alone["mean"] == with_lr["mean"]
    assert alone["mean"]["psnr_y"] == psnr(bicubic_upscale(lr, 4), hr, 4, "y")
    # Another kernel, or a shift by half a pixel, gives a PSNR outside this range.
    assert alone["mean"]["psnr_y"] == pytest.approx(psnr(reference["photo_up"], hr, 4, "y"), abs=0.3)


def test_several_models_are_listed_in_the_given_order(tmp_path: Path) -> None:
    write_image(tmp_path / "hr" / "a.png")
    weights = write_generator(tmp_path / "g.safetensors")
    result = run(tmp_path, "--model", "bicubic", weights, "--hr", tmp_path / "hr")
    assert [entry["model"] for entry in result["models"]] == ["bicubic", str(weights)]
    assert all(set(entry) == {"mean", "images", "border", "model"} for entry in result["models"])


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
    assert result["mean"]["psnr_y"] == psnr(bicubic_upscale(matlab_bicubic_downscale(hr), 4), hr, 4, "y")


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
    result = run(tmp_path, "--model", "bicubic", "--hr", tmp_path / "hr")
    assert result["mean"]["psnr_y"] is None
    assert result["mean"]["ssim_y"] == pytest.approx(1)
    assert "∞" in (tmp_path / "out" / "report.html").read_text()


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
    assert result["models"][1]["mean"]["psnr_y"] == psnr(mixed, original, 4, "y")


@pytest.mark.ray
def test_ray_workers_give_the_same_numbers(tmp_path: Path, ray_cluster: str) -> None:
    for seed in range(4):
        write_image(tmp_path / "hr" / f"{seed}.png", 48, 64, seed)
    models = [open_model("bicubic"), open_model(str(write_generator(tmp_path / "g.safetensors")))]
    pairs, _ = find_pairs(str(tmp_path / "hr"), None, 4)
    scorer = Scorer(models, Settings())
    assert evaluate(scorer, pairs, workers=1).as_json() == evaluate(scorer, pairs).as_json()


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


@pytest.fixture(scope="module")
def alexnet_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """AlexNet's weights drawn from a seed (244 MB), under a name with their sha256."""
    file = tmp_path_factory.mktemp("alexnet") / "weights"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        torch.save(alexnet().state_dict(), file)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    return file.rename(file.with_name(f"alexnet-owt-{digest[:8]}.pth"))


@pytest.fixture
def backbone(tmp_path: Path, alexnet_weights: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a link to these weights, the only valid ones for `lpips`."""
    folder = tmp_path / "alexnet"
    folder.mkdir()
    (folder / alexnet_weights.name).symlink_to(alexnet_weights)
    monkeypatch.setattr(lpips, "BACKBONE", alexnet_weights.name)
    return folder


def test_the_lpips_backbone_is_torchvisions() -> None:
    assert AlexNet_Weights.IMAGENET1K_V1.url.rpartition("/")[2] == lpips.BACKBONE


def test_lpips_equals_torchmetrics_on_the_same_backbone(
    backbone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = alexnet()
    network.load_state_dict(torch.load(backbone / lpips.BACKBONE, weights_only=True))
    monkeypatch.setattr(torchvision.models, "alexnet", lambda weights: network)
    hr, sr = synthetic_image(64, 72), synthetic_image(64, 72, seed=1)
    one, other = (torch.from_numpy(image[4:-4, 4:-4]).permute(2, 0, 1)[None] / 255 for image in (sr, hr))
    expected = learned_perceptual_image_patch_similarity(one, other, net_type="alex", normalize=True)
    assert expected > 0.01
    assert lpips.load_lpips(str(backbone))(sr, hr, border=4) == pytest.approx(expected.item(), rel=1e-5)


def test_lpips_of_equal_images_is_zero_and_grows_with_the_distance(backbone: Path) -> None:
    distance = lpips.load_lpips(str(backbone))
    hr = synthetic_image(64, 64)
    near, far = (np.clip(hr.astype(int) + change, 0, 255).astype(np.uint8) for change in (4, 40))
    assert distance(hr, hr) == 0
    assert 0 < distance(near, hr) < distance(far, hr)


def test_lpips_names_the_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"alexnet-owt-7be5be79\.pth does not exist; .*torchvision"):
        lpips.load_lpips(str(tmp_path))


def test_lpips_is_skipped_with_a_note_if_its_file_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    write_image(tmp_path / "hr" / "a.png")
    result = run(tmp_path, "--model", "bicubic", "--hr", tmp_path / "hr", "--lpips")
    assert set(result["mean"]) == set(METRICS)
    notes = [line for line in capsys.readouterr().out.splitlines() if "LPIPS" in line]
    assert len(notes) == 1
    assert notes[0].startswith("note: LPIPS is skipped; ")


def test_lpips_reads_torch_hubs_cache(
    tmp_path: Path, backbone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    (tmp_path / "torch" / "hub").mkdir(parents=True)
    backbone.rename(tmp_path / "torch" / "hub" / "checkpoints")
    write_image(tmp_path / "hr" / "a.png")
    result = run(tmp_path, "--model", "bicubic", "--hr", tmp_path / "hr", "--lpips")
    assert set(result["mean"]) == {*METRICS, "lpips"}


def test_lpips_rejects_a_corrupt_or_another_file(backbone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    another = backbone / "resnet.pth"
    torch.save({"conv1.weight": torch.zeros(1)}, another)
    digest = hashlib.sha256(another.read_bytes()).hexdigest()[:8]
    monkeypatch.setattr(lpips, "BACKBONE", f"alexnet-owt-{digest}.pth")
    another.rename(backbone / lpips.BACKBONE)
    with pytest.raises(UserError, match=r"not torchvision's AlexNet .*features\.0\.weight"):
        lpips.load_lpips(str(backbone))
    (backbone / lpips.BACKBONE).write_bytes(b"half of it")
    with pytest.raises(UserError, match=rf"has sha256 .*, expected {digest}; it is corrupt or another file"):
        lpips.load_lpips(str(backbone))


def test_an_image_too_small_for_lpips_is_one_clear_line(tmp_path: Path, backbone: Path) -> None:
    write_image(tmp_path / "hr" / "small.png", 36, 80)
    text = user_error(
        "evaluate",
        "--model",
        "bicubic",
        "--hr",
        tmp_path / "hr",
        "--out",
        tmp_path / "out",
        "--lpips",
        backbone,
    )
    assert "small.png: --lpips needs at least 31 x 31 pixels without the border of 4" in text


def test_metrics_have_the_contracts_names() -> None:
    assert METRICS == ("psnr_y", "ssim_y", "psnr_rgb", "ssim_rgb")
