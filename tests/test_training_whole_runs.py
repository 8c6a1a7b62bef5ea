"""Whole runs: validation on several workers, learning, scale 2, storage in an object store."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import forked
import mlflow
import numpy as np
import pytest
import tiny
import torch
from evaluation_helpers import load_generator
from gloo import run_workers
from metrics_helpers import random_backbone, write_backbone
from s3 import s3_bucket
from tiny import write_photos, write_sets
from torchvision.models import alexnet, vgg16
from tracking_helpers import new_database

from pipeline.data import HeldOutPhoto, load_manifest, read_held_out
from pipeline.imaging import bicubic_upscale, matlab_bicubic_downscale, psnr, ssim, upscale
from pipeline.metrics import METRICS, MetricSet, weights
from pipeline.model import RRDBNet, seeded
from pipeline.storage import Storage
from pipeline.tracking.spool import Metrics, read_segment, segment_steps
from pipeline.training import checkpoint as checkpoints
from pipeline.training.validation import validate
from pipeline.training.validation_sets import ValidationSet

pytestmark = pytest.mark.slow


def held_out_images(count: int) -> list[HeldOutPhoto]:
    images = []
    for index in range(count):
        draws = np.random.default_rng(index)
        hr = draws.integers(0, 256, (40 + 4 * index, 40, 3), dtype=np.uint8)
        images.append(HeldOutPhoto(f"image{index}.png", hr, matlab_bicubic_downscale(hr)))
    return images


def validation(rank: int, world_size: int, folder: str, files: dict[str, str]) -> dict[str, float]:
    """All metrics of a small network on five images of different sizes."""
    weights.BACKBONES.update(files)
    network = seeded(3, lambda: RRDBNet(8, 1, 4)).eval()
    return validate(
        network, [ValidationSet("held_out", held_out_images(5))], MetricSet(list(METRICS), folder=folder)
    )


def test_validation_is_equal_for_one_and_two_workers(tmp_path: Path) -> None:
    networks = {"lpips": alexnet, "dists": vgg16}
    files = {name: write_backbone(tmp_path, name, random_backbone(make)) for name, make in networks.items()}
    names = {name: path.name for name, path in files.items()}
    (alone,) = run_workers(1, validation, str(tmp_path), names)
    first, second = run_workers(2, validation, str(tmp_path), names)
    assert first == second == alone
    assert set(alone) == METRICS.keys() | {"color_drift_r", "color_drift_g", "color_drift_b"}


def test_validation_is_the_mean_over_images_of_each_metric() -> None:
    network, images = seeded(3, lambda: RRDBNet(8, 1, 4)).eval(), held_out_images(3)
    means = validate(network, [ValidationSet("held_out", images)], MetricSet(["ssim_y", "psnr_rgb"]))
    results = [upscale(network, image.lr) for image in images]
    pairs = [(sr, image.hr) for sr, image in zip(results, images, strict=True)]
    assert means["psnr_rgb"] == pytest.approx(np.mean([psnr(*pair, 4, "rgb") for pair in pairs]), abs=1e-10)
    assert means["ssim_y"] == pytest.approx(np.mean([ssim(*pair, 4, "y") for pair in pairs]), abs=1e-12)


def test_a_perfect_image_counts_as_100_db() -> None:
    class Copy(RRDBNet):
        """Upscales a flat image without a difference."""

        def forward(self, lr: torch.Tensor) -> torch.Tensor:
            return lr.repeat_interleave(4, 2).repeat_interleave(4, 3)

    flat = np.full((32, 32, 3), 90, np.uint8)
    images = [HeldOutPhoto("flat.png", flat, matlab_bicubic_downscale(flat))]
    means = validate(Copy(8, 1, 4), [ValidationSet("held_out", images)], MetricSet(["psnr_y", "color_drift"]))
    assert means["psnr_y"] == 100.0
    assert means["color_drift"] == 0.0


def validated_psnr(run: Storage) -> list[float]:
    """PSNR (Y) of every validation, in order."""
    return [
        record.values["validation/psnr_y"]
        for step in segment_steps(run)
        for record in read_segment(run, step).records
        if isinstance(record, Metrics) and "validation/psnr_y" in record.values
    ]


def test_psnr_rises_and_passes_bicubic(tmp_path: Path) -> None:
    """Smooth images with edges are easy: some hundred steps of a tiny network beat bicubic by a wide margin."""
    write_photos(tmp_path / "photos", 6, 128, seed=1)
    write_photos(tmp_path / "held_out", 2, 96, seed=2)
    tiny.train(
        tmp_path,
        **{
            "psnr.steps": 400, "gan.steps": 0, "psnr.learning_rate": 3e-3, "model.num_feat": 16,
            "model.num_grow_ch": 8, "batch_size": 8, "ema_decay": 0.95, "log_every_steps": 100,
            "checkpoint_every_steps": 100, "validate_every_steps": 100,
        },
    )  # fmt: skip
    values = validated_psnr(Storage(str(tmp_path / "runs" / "tiny")))
    assert values == sorted(values)
    images = read_held_out(load_manifest(str(tmp_path / "data")))
    bicubic = np.mean([psnr(bicubic_upscale(image.lr, 4), image.hr, border=4) for image in images])
    assert values[-1] > bicubic + 0.5


def test_scale_2_from_images_to_a_registered_model(tmp_path: Path) -> None:
    uri = new_database(tmp_path)
    result = tiny.train(
        write_sets(tmp_path), **{"data.scale": 2, "tracking.uri": uri, "tracking.register_model": True}
    )
    assert result.model_version == 1
    run = Storage(str(tmp_path / "runs" / "tiny"))
    best = next(
        name for name in checkpoints.listed(run)
        if checkpoints.read(run, name).scalars["metrics"] == result.metrics and name.stage == "gan"
    )  # fmt: skip
    generator, info = load_generator(Path(run.path(f"{best.folder}/generator.safetensors")))
    assert info["scale"] == "2"
    mlflow.set_tracking_uri(uri)
    lr = np.random.default_rng(0).integers(0, 256, (1, 9, 7, 3), dtype=np.uint8)
    sr = mlflow.pyfunc.load_model("models:/esrgan-x4/1").predict(lr)
    assert sr.shape == (1, 18, 14, 3)
    assert generator.scale == 2


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with s3_bucket(monkeypatch) as address:
        yield address


@pytest.mark.ray
def test_ray_train_with_storage_and_data_on_s3_gives_the_same_bits(tmp_path: Path, bucket: str) -> None:
    folder = write_sets(tmp_path)
    changes = {"tracking.uri": "none", "checkpoint_every_steps": 6}
    local = tiny.train(folder, **changes)
    # A process with a private Ray, which inherits the address of the S3 server.
    remote = tiny.fields(
        folder,
        **changes,
        workers=1,
        run_name="remote",
        storage=f"{bucket}/runs",
        **{"data.root": f"{bucket}/data"},
    )
    result = tmp_path / "result.json"
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    command = [*tiny.command("train_gan", folder, remote), "--json", str(result)]
    done = forked.run(command[1:], environment=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    finished = json.loads(result.read_text())
    assert finished["generator_sha256"] == local.generator_sha256
    assert finished["metrics"] == local.metrics
    assert [str(name) for name in checkpoints.listed(Storage(f"{bucket}/runs/remote"))][-1] == "gan-00000012"
