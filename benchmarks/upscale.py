"""Upscaling a folder against inference alone: images per second of both, in turns.

    python benchmarks/upscale.py --device cuda --precision bf16        the paper's network, photos of 480 x 640
    python benchmarks/upscale.py --device cpu --tiny

The folder's photos are decoded, upscaled, and encoded as PNG; inference has the decoded photos in memory. The folder
holds copies of a few photos. It must take many times as long as encoding one image, which is waited for at the end.
"""

import argparse
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.evaluation.config import UpscaleConfig
from pipeline.evaluation.models import open_model
from pipeline.evaluation.output_plan import plan
from pipeline.evaluation.upscaling import Upscaler
from pipeline.model import RRDBNet, save_generator, seeded

DISTINCT = 32
PAPER = {"num_feat": 64, "num_block": 23, "num_grow_ch": 32}
TINY = {"num_feat": 16, "num_block": 2, "num_grow_ch": 8}


def main() -> None:
    """Prints medians, and all of it as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", nargs="+", default=["bf16", "fp16", "tf32"])
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="A small network, small photos, fp32.")
    options = parser.parse_args()
    sizes, shape = (TINY, (96, 128)) if options.tiny else (PAPER, (480, 640))
    precisions = ["fp32"] if options.tiny else options.precision
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "in").mkdir()
        weights = root / "g.safetensors"
        save_generator(seeded(0, lambda: RRDBNet(**sizes)), weights)
        photos = [photo(seed, *shape) for seed in range(min(options.images, DISTINCT))]
        for index in range(options.images):
            file = root / "in" / f"{index:03d}.png"
            if index < DISTINCT:
                Image.fromarray(photos[index]).save(file)
            else:
                shutil.copy(root / "in" / f"{index % DISTINCT:03d}.png", file)
        for precision in precisions:
            model = open_model(str(weights), device=options.device, precision=precision)
            model.upscale(photos[0])
            inference, folder_rates = [], []
            for turn in range(options.rounds):
                began = time.perf_counter()
                for pixels in photos:
                    model.upscale(pixels)
                inference.append(len(photos) / (time.perf_counter() - began))
                out = str(root / f"out-{precision}-{turn}")
                config = UpscaleConfig(model=str(weights), input=str(root / "in"), output=out)
                output, tasks = plan(config.input, config.output, config.format)
                upscaler = Upscaler(model, output, config)
                began = time.perf_counter()
                failed = [outcome.error for outcome in upscaler.all(tasks) if outcome.error]
                folder_rates.append(len(tasks) / (time.perf_counter() - began))
                assert not failed, failed
            shares = [a / b for a, b in zip(folder_rates, inference, strict=True)]
            result = {
                "device": options.device,
                "precision": precision,
                "inference_per_s": statistics.median(inference),
                "folder_per_s": statistics.median(folder_rates),
                "folder_to_inference": statistics.median(shares),
            }
            print(json.dumps(result), flush=True)


def photo(seed: int, height: int, width: int) -> np.ndarray:
    """A photo-like image: waves, edges, and noise, which PNG cannot compress."""
    draws = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width] / height
    waves = [np.sin(2 * np.pi * (a * y + b * x)) for a, b in draws.uniform(1, 12, (3, 2))]
    image = np.stack([90 + 60 * wave + 60 * (wave > 0.6) for wave in waves], axis=-1)
    return (image + draws.normal(0, 4, image.shape)).clip(0, 255).astype(np.uint8)


if __name__ == "__main__":
    main()
