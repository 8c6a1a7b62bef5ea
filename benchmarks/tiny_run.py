"""A run or sweep of a tiny network, whose lines a script reads. For the scripts of this folder."""

import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def command(folder: Path, job: str = "train_gan", **fields: Any) -> list[str]:
    """The command of a run or sweep below `folder` on sample images.

    Args:
        folder: where data, run folder and an empty configuration file go.
        job: name of the script in jobs/.
        fields: fields that differ from the tiny run's, `__` for each dot.
    """
    values = {
        "storage": folder / "runs", "data.source": "sample", "data.root": folder / "data", "data.patch_px": 64,
        "data.patch_stride_px": 64, "model.num_block": 1, "model.num_feat": 8, "model.num_grow_ch": 4,
        "model.discriminator_num_feat": 4, "batch_size": 4, "crop_px": 32, "perceptual.weights": "random",
        "perceptual.layers": '{"conv1_2": 1.0}', "tracking.register_model": "false",
        **{name.replace("__", "."): value for name, value in fields.items()},
    }  # fmt: skip
    # An empty file instead of the demo's, so that only the flags decide.
    empty = folder / "empty.yaml"
    empty.touch()
    flags = [text for name, value in values.items() for text in (f"--{name}", str(value))]
    return [sys.executable, str(ROOT / f"jobs/{job}.py"), "--config", str(empty), *flags]
