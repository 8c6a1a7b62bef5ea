"""What a later stage needs is tried before anything starts: one line for each mistake."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
from tiny import fields, flags
from tiny_patches import write_patches

from pipeline.config import load_config
from pipeline.data import HeldOutPhoto
from pipeline.errors import UserError
from pipeline.model import LAYERS, VGGFeatures
from pipeline.storage import Storage
from pipeline.training.checks import check_before_start, perceptual_features, prepare_worker
from pipeline.training.config import TrainConfig
from pipeline.training.loop import train
from pipeline.training.run import run_training
from pipeline.training.validation_sets import ValidationSet
from pipeline.training.worker import Worker


def load(folder: Path, **changes: object) -> TrainConfig:
    return load_config(flags(fields(folder, **changes)), description="", environment={})[0].alone()


def vgg_state(layer: str) -> dict[str, torch.Tensor]:
    """VGG19's tensors up to a layer, as torchvision names them."""
    return dict(VGGFeatures([layer], "random").state_dict())


def truncated(path: Path) -> None:
    torch.save(vgg_state("conv1_2"), path)
    path.write_bytes(path.read_bytes()[:-1000])


def truncated_safetensors(path: Path) -> None:
    path.write_bytes(safetensors.torch.save(vgg_state("conv1_2"))[:-1000])


def another_network(path: Path) -> None:
    torch.save({"features.0.weight": torch.zeros(64, 3, 11, 11)}, path)


def too_shallow(path: Path) -> None:
    torch.save(vgg_state("conv1_1"), path)


def not_finite(path: Path) -> None:
    torch.save({name: tensor.log() for name, tensor in vgg_state("conv1_2").items()}, path)


def lfs_pointer(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 574673361\n")


def html(path: Path) -> None:
    path.write_text("<!DOCTYPE html><html><body>404</body></html>")


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lfs_pointer, "git-LFS pointer.*git lfs pull"),
        (html, "not readable as weights"),
        (truncated, "not readable as weights"),
        (truncated_safetensors, "not readable as weights"),
        (another_network, r"features\.0\.weight has shape \(64, 3, 11, 11\), expected \(64, 3, 3, 3\)"),
        (too_shallow, r"features\.2\.weight is missing"),
        (not_finite, "non-finite"),
    ],
)
def test_unusable_perceptual_weights_are_refused_before_the_start(
    tmp_path: Path, write: Callable[[Path], None], message: str
) -> None:
    path = tmp_path / "vgg19.pth"
    write(path)
    config = load(tmp_path, **{"perceptual.weights": str(path)})
    with pytest.raises(UserError, match=rf"perceptual\.weights: {path}.*{message}") as caught:
        check_before_start(config, Storage(config.storage) / "tiny")
    assert "\n" not in str(caught.value)


def test_a_node_without_the_perceptual_weights_is_found_before_stage_1(tmp_path: Path) -> None:
    config = load(tmp_path, **{"perceptual.weights": str(tmp_path / "elsewhere.pth")})
    run = Storage(str(tmp_path / "runs")) / "tiny"

    class NoFeed:
        def batches(self, *_: object) -> None:
            pytest.fail("training began")

    with pytest.raises(UserError, match=r"elsewhere\.pth: no such file"):
        train(config, Worker(device=torch.device("cpu")), run, NoFeed(), [])  # type: ignore[arg-type]


@pytest.mark.parametrize("changes", [{"gan.steps": 0}, {"gan.perceptual_weight": 0}])
def test_weights_that_are_not_used_may_be_missing(tmp_path: Path, changes: dict[str, object]) -> None:
    config = load(tmp_path, **{"perceptual.weights": "/no/weights.pth", **changes})
    check_before_start(config, Storage(config.storage) / "tiny")


def test_a_model_that_cannot_be_registered_is_found_before_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    run = Storage(str(tmp_path / "runs")) / "tiny"
    with pytest.raises(
        UserError, match=r"tracking\.register_model=true .*: the package onnx is not installed"
    ):
        check_before_start(load(tmp_path, **{"tracking.register_model": True}), run)
    for changes in ({}, {"tracking.register_model": True, "tracking.uri": "none"}):
        check_before_start(load(tmp_path, **changes), run)


@pytest.mark.parametrize("changes", [{}, {"init.generator": "compact-x4"}])
def test_a_scale_that_the_generator_lacks_is_refused_before_the_start(
    tmp_path: Path, changes: dict[str, object]
) -> None:
    sizes = {"data.scale": 3, "data.patch_px": 96, "crop_px": 96}
    with pytest.raises(UserError, match=r"data\.scale=3: RRDBNet exists for scale 4, 2 and 1"):
        run_training(load(tmp_path, **sizes, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"crop_px": 64}, r"crop_px=64: the patches in .* have 32 pixels"),
        ({"data.scale": 2}, r"data\.scale=2: .* was made for scale 4"),
    ],
)
def test_an_existing_data_set_that_does_not_fit_is_refused_before_ray_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, object], message: str
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")  # nothing listens there
    write_patches(tmp_path / "data", 3, side=32)
    with pytest.raises(UserError, match=message):
        run_training(load(tmp_path, workers=1, **changes))


def test_every_layer_of_vgg19_survives_the_smallest_crop() -> None:
    features = VGGFeatures(LAYERS, "random")
    smallest = next(item.ge for item in TrainConfig.model_fields["crop_px"].metadata if hasattr(item, "ge"))
    with torch.no_grad():
        outputs = features(torch.rand(1, 3, smallest, smallest))
    assert all(min(output.shape) > 0 for output in outputs.values())


def test_features_in_bf16_keep_rounded_weights_and_compute_the_same_bits(tmp_path: Path) -> None:
    config = load(tmp_path, precision="bf16", **{"perceptual.layers": {"conv2_2": 1.0}})
    exact = perceptual_features(config.model_copy(update={"precision": "fp32"}))
    rounded = perceptual_features(config)
    assert exact is not None
    assert rounded is not None
    assert {weight.dtype for weight in rounded.parameters()} == {torch.bfloat16}
    assert rounded.mean.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        images = torch.rand(2, 3, 32, 32)
        assert torch.equal(rounded(images)["conv2_2"], exact(images)["conv2_2"])


def test_missing_weights_of_a_validation_metric_are_found_before_the_start(tmp_path: Path) -> None:
    changes = {"validation.metrics": ["psnr_y", "lpips"], "validation.weights_folder": str(tmp_path)}
    config = load(tmp_path, **changes)
    with pytest.raises(
        UserError, match=rf"LPIPS: {tmp_path}/alexnet-owt-7be5be79\.pth does not exist; download"
    ):
        check_before_start(config, Storage(config.storage) / "tiny")


def test_an_unknown_validation_metric_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"validation\.metrics.*niqe.*'psnr_y'"):
        load(tmp_path, **{"validation.metrics": ["niqe"]})


def test_held_out_images_too_small_for_a_metric_are_found_before_the_first_step(tmp_path: Path) -> None:
    config = load(tmp_path, **{"perceptual.weights": "random"})
    run = Storage(str(tmp_path / "runs")) / "tiny"
    hr = np.zeros((16, 40, 3), np.uint8)

    class NoFeed:
        def batches(self, *_: object) -> None:
            pytest.fail("training began")

    sets = [ValidationSet("held_out", [HeldOutPhoto("small.png", hr, hr[::4, ::4])])]
    with pytest.raises(UserError, match=r"small\.png: 40 x 16 pixels are too few for ssim_y"):
        train(config, Worker(device=torch.device("cpu")), run, NoFeed(), sets)  # type: ignore[arg-type]


@pytest.mark.parametrize(("use_gpu", "needed"), [(True, 2**30), (False, 2**26)])
def test_several_workers_need_shared_memory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, use_gpu: bool, needed: int
) -> None:
    monkeypatch.setattr("pipeline.training.checks.require_gpu", lambda *words: None)
    free = SimpleNamespace(free=needed - 1)
    monkeypatch.setattr("shutil.disk_usage", lambda path: free)
    assert "enlarge it" in prepare_worker(use_gpu, True, str(tmp_path), None)
    assert prepare_worker(use_gpu, False, str(tmp_path), None) == ""
    free.free = needed
    assert prepare_worker(use_gpu, True, str(tmp_path), None) == ""
