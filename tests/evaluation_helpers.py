"""Small generators, images and commands for the tests of evaluation and upscaling."""

import importlib.util
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.errors import UserError
from pipeline.model import RRDBNet, decode_generator, save_generator

ROOT = Path(__file__).parent.parent


def write_generator(path: Path, seed: int = 0, **sizes: Any) -> Path:
    """A tiny generator whose outputs are near mid-gray with structure."""
    torch.manual_seed(seed)
    generator = RRDBNet(**{"num_feat": 8, "num_block": 1, "num_grow_ch": 4, **sizes})
    with torch.no_grad():
        generator.conv_last.bias.fill_(0.5)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_generator(generator, path)
    return path


def load_generator(path: str | Path) -> tuple[RRDBNet, dict[str, str]]:
    """The generator in a file, and information on it."""
    return decode_generator(Path(path), str(path))


def write_overflowing_generator(path: Path) -> Path:
    """Finite weights whose output is mid-gray for a black image, and not finite for any other."""
    generator = RRDBNet(num_feat=8, num_block=1, num_grow_ch=4)
    with torch.no_grad():
        for name, tensor in generator.named_parameters():
            tensor.fill_(0.0 if name.endswith("bias") else 1e30)
        generator.conv_last.bias.fill_(0.5)
    save_generator(generator, path)
    return path


def synthetic_image(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Waves and an edge, uint8 RGB."""
    y, x = np.mgrid[0:height, 0:width] / 32
    a, b, c = np.random.default_rng(seed).uniform(0.5, 3, 3)
    waves = [np.sin(a * y + b * x), np.cos(b * y - c * x), np.sin(c * (x + y))]
    levels = np.stack([120 + 80 * wave + 40 * (waves[0] > 0.5) for wave in waves], axis=-1)
    return levels.clip(0, 255).astype(np.uint8)


def write_image(path: Path, height: int = 64, width: int = 80, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(synthetic_image(height, width, seed)).save(path)
    return path


def job(name: str) -> Callable[[list[str]], int | None]:
    """The `main` of jobs/NAME.py."""
    spec = importlib.util.spec_from_file_location(f"job_{name}", ROOT / "jobs" / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def exit_code(name: str, *arguments: str | Path) -> Any:
    """The exit code of jobs/NAME.py, run as a program in this process: importing torch and Ray again takes seconds."""
    program = str(ROOT / "jobs" / f"{name}.py")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [program, *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(program, run_name="__main__")
    return ended.value.code


def user_error(name: str, *arguments: str | Path) -> str:
    """The line of the UserError that a command raises."""
    with pytest.raises(UserError) as caught:
        job(name)([str(argument) for argument in arguments])
    text = str(caught.value)
    assert "\n" not in text
    return text
