"""Both stages by our step and by BasicSR's sequence: equal photos, batches, initial weights and schedule.

    python benchmarks/both_stages.py --out OUT --config configs/photos_x4.yaml --gan.steps 500

All flags but --out and --hr are the run's. Ours is `jobs/train_gan.py`, on a GPU as a CUDA graph; BasicSR's runs in
float32, its default (on a GPU TF32), and in its memory format. Writes OUT/ours.safetensors and OUT/basicsr.safetensors,
in 16 bits, and the report of `jobs/evaluate.py` on both and bicubic, for the data set's held-out photos, or on --hr.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from basicsr_step import BasicSR

from pipeline.config import load_config
from pipeline.data import prepare
from pipeline.model import RRDBNet, decode_generator, set_precision
from pipeline.model.weights import encode_generator
from pipeline.training.batches import feed_of, on_device
from pipeline.training.checks import perceptual_features
from pipeline.training.config import TrainConfig
from pipeline.training.model_source import GENERATOR_FILE, find_model_file
from pipeline.training.schedule import stage_rate
from pipeline.training.state import begin_gan, new_state
from pipeline.training.step import Batch
from pipeline.training.worker import Worker

JOBS = Path(__file__).resolve().parent.parent / "jobs"
EVERY = 500


def basicsr(config: TrainConfig, device: torch.device) -> RRDBNet:
    """EMA weights after both stages of BasicSR's sequence (the first alone if `gan.steps` is 0)."""
    config = config.model_copy(update={"precision": "fp32"})  # of the perceptual network's weights, too
    state = new_state(config, "psnr", device)
    batches = batches_of(config, device)
    began = time.perf_counter()
    for stage, first, count in (("psnr", 0, config.psnr.steps), ("gan", config.psnr.steps, config.gan.steps)):
        if not count:
            continue
        features = None
        if stage == "gan":
            state.step = first
            begin_gan(state, config, device)
            features = perceptual_features(config)
        theirs = BasicSR.like(state, config, features.to(device) if features else None)
        update = theirs.gan_step if stage == "gan" else theirs.psnr_step
        for step in range(first, first + count):
            batch = next(batches)
            rate = stage_rate(config, state.stage, step)
            losses = update(batch.lr.contiguous(), batch.hr.contiguous(), rate)
            if (step + 1) % EVERY == 0:
                steps_per_s = (step + 1) / (time.perf_counter() - began)
                print(
                    f"BasicSR's step {step + 1}: {steps_per_s:.1f} steps/s, pixel {losses['pixel']:.4f}",
                    flush=True,
                )
        for network in (state.ema, state.generator):
            network.load_state_dict(theirs.ema.state_dict())
    return state.ema


def batches_of(config: TrainConfig, device: torch.device) -> Iterator[Batch]:
    """The batches of all steps, of both stages."""
    worker = Worker(device=device)
    raws = feed_of(config, worker).batches(0, config.psnr.steps + config.gan.steps, device.type == "cuda")
    for step, raw in enumerate(raws):
        yield on_device(raw, config, worker, step)


def job(name: str, *arguments: str) -> None:
    """Runs a job to its end."""
    subprocess.run([sys.executable, str(JOBS / f"{name}.py"), *arguments], check=True)


def write(folder: Path, name: str, generator: RRDBNet) -> str:
    """Writes a generator in 16 bits; returns its name and file for `evaluate.py`."""
    file = folder / f"{name}.safetensors"
    file.write_bytes(encode_generator(generator, dtype=torch.float16))
    return f"{name}={file}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--hr", help="images to evaluate on")
    options, flags = parser.parse_known_args()
    loaded, _ = load_config(flags, description="", environment={})
    config = loaded.alone()
    if config.gan.loss != "relativistic" or config.gan.ms_ssim_weight or config.psnr.ms_ssim_weight:
        parser.error("BasicSR's sequence has the pixel, perceptual and relativistic losses only")
    device = torch.device("cuda" if config.use_gpu else "cpu")
    prepare(config.data, on_ray=False)
    options.out.mkdir(parents=True, exist_ok=True)

    began = time.perf_counter()
    runs = ["--storage", str(options.out / "runs"), "--tracking.uri", "none"]
    job("train_gan", *flags, *runs)
    print(f"ours: {time.perf_counter() - began:.0f} s", flush=True)
    source = str(options.out / "runs" / config.run_name)
    ours, _ = decode_generator(find_model_file(source, GENERATOR_FILE, source)[0], source)
    models = [write(options.out, "ours", ours)]

    began = time.perf_counter()
    set_precision("tf32")
    theirs = basicsr(config, device)
    print(f"BasicSR's: {time.perf_counter() - began:.0f} s", flush=True)
    models.append(write(options.out, "basicsr", theirs))
    hr = options.hr or str(config.data.held_out)
    job(
        "evaluate", "--model", "bicubic", *models, "--hr", hr, "--device", device.type,
        "--out", str(options.out / "evaluation"),
    )  # fmt: skip


if __name__ == "__main__":
    main()
