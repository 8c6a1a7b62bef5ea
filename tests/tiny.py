"""Tiny images and a configuration that trains both stages on them in seconds."""

import sys
from pathlib import Path
from typing import Any

import forked
import numpy as np
from PIL import Image

from pipeline.config import load_config
from pipeline.training.run import TrainingResult, run_training

JOBS = Path(__file__).parent.parent / "jobs"


def write_photos(folder: Path, count: int, side: int, seed: int) -> Path:
    """Writes different smooth images with edges."""
    folder.mkdir(parents=True, exist_ok=True)
    y, x = np.mgrid[0:side, 0:side] / side
    for index in range(count):
        draws = np.random.default_rng([seed, index]).uniform(1, 12, size=(3, 2))
        waves = [np.sin(2 * np.pi * (a * y + b * x)) for a, b in draws]
        edges = [(wave > 0.6) * 60.0 for wave in waves]
        image = np.stack([90 + 60 * wave + edge for wave, edge in zip(waves, edges, strict=True)], axis=-1)
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(folder / f"image{index}.png")
    return folder


def fields(folder: Path, **changes: Any) -> dict[str, Any]:
    """Flat fields of a run below `folder`: 6 + 6 steps, in this process."""
    return {
        "run_name": "tiny",
        "storage": str(folder / "runs"),
        "workers": 0,
        "seed": 5,
        "data.source": str(folder / "photos"),
        "data.held_out": str(folder / "held_out"),
        "data.root": str(folder / "data"),
        "data.patch_px": 64,
        "data.patch_stride_px": 32,
        "model.num_block": 1,
        "model.num_feat": 8,
        "model.num_grow_ch": 4,
        "model.discriminator_num_feat": 4,
        "batch_size": 4,
        "crop_px": 32,
        "shuffle_channels": True,
        "psnr.steps": 6,
        "gan.steps": 6,
        # Independent of the weights that this machine has.
        "gan.select_by": "psnr_y",
        "perceptual.weights": "random",
        "perceptual.layers": {"conv1_2": 1.0},
        "tracking.register_model": False,  # it takes as long as the training
        "ema_decay": 0.8,
        "log_every_steps": 1,
        "checkpoint_every_steps": 2,
        "validate_every_steps": 3,
        **changes,
    }


def flags(values: dict[str, Any]) -> list[str]:
    """The same as command-line flags."""
    import json

    listed = []
    for name, value in values.items():
        listed += [f"--{name}", json.dumps(value) if isinstance(value, dict | list | tuple) else str(value)]
    return listed


def write_sets(folder: Path) -> Path:
    """Three training images, two held-out images and an MLflow database below `folder`, which is returned."""
    from tracking_helpers import new_database  # MLflow: missing in a minimal environment

    new_database(folder / "runs")
    write_photos(folder / "photos", 3, 96, seed=1)
    write_photos(folder / "held_out", 2, 64, seed=2)
    return folder


def train(folder: Path, *, accept_changes: bool = False, **changes: Any) -> TrainingResult:
    """A run of these fields in this process (its workers elsewhere, if there are some)."""
    config, _ = load_config(flags(fields(folder, **changes)), description="", environment={})
    return run_training(config, accept_changes=accept_changes)


def command(job: str, folder: Path, values: dict[str, Any]) -> list[str]:
    """A job with these fields, for a separate process; an empty file instead of the demo's, so only they decide."""
    empty = folder / "empty.yaml"
    empty.touch()
    return [sys.executable, str(JOBS / f"{job}.py"), "--config", str(empty), *flags(values)]


def run_until(arguments: list[str], text: str, environment: dict[str, str] | None = None) -> None:
    """Runs a `command` and kills it, with its children, at the first line that has `text`; fails where none has."""
    forked.run_until(arguments[1:], text, environment)
