"""The training step on a GPU through the loop's `Stepper`, compared with BasicSR's sequence in turns in one process.

    python benchmarks/gpu_step.py --out OUT
    python benchmarks/gpu_step.py --device cpu --tiny --out OUT      tries the script

Writes OUT/step.json. Also: share of time that the GPU is idle within a step, kernels per step, host synchronizations,
agreement of graph and eager steps, and the network alone on an image of 480 x 640 (`traiNNer-redux`: 4.66 images/s on
an RTX 4090 in fp16).
"""

import argparse
import gc
import json
import statistics
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from step import LAYER, basicsr_step
from turns import machine

from pipeline.data.feed import RawBatch
from pipeline.model import RRDBNet, set_precision
from pipeline.model.trunk import use_kernels
from pipeline.training.checks import perceptual_features
from pipeline.training.config import TrainConfig
from pipeline.training.state import begin_gan, new_state
from pipeline.training.stepper import Stepper
from pipeline.training.worker import Worker

STEPS, TINY_STEPS = 20, 2
PLAN = [
    ("gan", "ours", "bf16", "auto"), ("gan", "basicsr", "tf32", "off"), ("psnr", "ours", "bf16", "auto"),
    ("psnr", "basicsr", "tf32", "off"), ("gan", "ours", "tf32", "auto"), ("psnr", "ours", "tf32", "auto"),
    ("gan", "ours", "bf16", "off"), ("gan", "ours", "fp32", "auto"),
]  # fmt: skip


class Bench:
    """Steps of one configuration."""

    def __init__(self, options: argparse.Namespace, stage: str, precision: str, graph: str) -> None:
        self.device = torch.device(options.device)
        self.config = make_config(options, precision, graph)
        set_precision(precision)
        self.state = new_state(self.config, "psnr", self.device)
        self.features = None
        if stage == "gan":
            self.state.step = self.config.psnr.steps
            begin_gan(self.state, self.config, self.device)
            self.features = perceptual_features(self.config)
            assert self.features is not None
            self.features.to(self.device, memory_format=torch.channels_last)
        self.stepper = Stepper(self.config, Worker(device=self.device), self.features)
        self.raw = random_batch(self.config, self.device)

    def step(self) -> dict[str, torch.Tensor]:
        """One step."""
        losses, _ = self.stepper(self.state, self.raw)
        self.state.step += 1
        return losses


def make_config(options: argparse.Namespace, precision: str, graph: str) -> TrainConfig:
    """The paper's sizes, or small ones."""
    small = {"num_block": 1, "num_feat": 16, "num_grow_ch": 16, "discriminator_num_feat": 4}
    return TrainConfig.model_validate(
        {
            "batch_size": 2 if options.tiny else options.batch,
            "crop_px": 32 if options.tiny else 128,
            "precision": precision,
            "cuda_graph": graph,
            "perceptual": {"weights": "random", "layers": {LAYER: 1.0}},
            "model": small if options.tiny else {},
        }
    )


def random_batch(config: TrainConfig, device: torch.device) -> RawBatch:
    """Noise, in pinned memory for a GPU."""
    draws = np.random.default_rng(0)
    arrays = []
    for side in (config.crop_px // config.data.scale, config.crop_px):
        pixels = torch.from_numpy(draws.integers(0, 256, (config.batch_size, side, side, 3), np.uint8))
        arrays.append((pixels.pin_memory() if device.type == "cuda" else pixels).numpy())
    return RawBatch(*arrays, 0)


def timed(step: Callable[[], object], device: torch.device, rounds: int, steps: int) -> dict[str, float]:
    """Milliseconds per step, and of the host until its last launch; medians over rounds of `steps` steps."""
    for _ in range(min(6, steps)):
        step()
    whole, host = [], []
    for _ in range(rounds):
        synchronize(device)
        began = time.perf_counter()
        for _ in range(steps):
            step()
        host.append((time.perf_counter() - began) / steps * 1e3)
        synchronize(device)
        whole.append((time.perf_counter() - began) / steps * 1e3)
    return {"ms": statistics.median(whole), "ms_min": min(whole), "host_ms": statistics.median(host)}


def synchronize(device: torch.device) -> None:
    """Waits for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def steps(options: argparse.Namespace, report: Callable[..., None]) -> None:
    """Both stages: BasicSR's sequence in TF32, this project's step in three forms."""
    device = torch.device(options.device)
    for stage, who, precision, graph in PLAN:
        name = f"{stage}, {who}, {precision}, {'graph' if graph == 'auto' else 'eager'}"
        try:
            bench: Bench | None = Bench(options, stage, precision, graph)
            assert bench is not None
            torch.backends.cudnn.benchmark = True
            step: Callable[[], object] = bench.step
            if who == "basicsr":
                step = basicsr_step(bench.config, bench.state, bench.features, device, precision)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            row: dict[str, Any] = timed(step, device, *((1, TINY_STEPS) if options.tiny else (4, STEPS)))
            if device.type == "cuda":
                row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
            report(name, **row)
            if device.type == "cuda" and who == "ours" and graph == "auto" and precision == "bf16":
                report(f"{name}, waits", host_synchronizations=waits(step))
                report(f"{name}, profile", **profiled(step, Path(options.out) / f"profile_{stage}.txt"))
        except Exception:  # noqa: BLE001 - the other rows are still measured
            report(f"{name}, failed", error=traceback.format_exc()[-600:])
        bench = step = None  # type: ignore[assignment]
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def profiled(step: Callable[[], object], file: Path) -> dict[str, float]:
    """Kernels of a step, and the share of five steps in which none runs."""
    for _ in range(2):
        step()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(5):
            step()
        torch.cuda.synchronize()
    kernels = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    spans = sorted((event.time_range.start, event.time_range.end) for event in kernels)
    busy, until = 0.0, spans[0][0]
    for start, end in spans:  # streams overlap
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    file.write_text(
        profile.key_averages().table(
            sort_by="self_device_time_total", row_limit=70, max_name_column_width=110
        )
    )
    return {"kernels": len(kernels) / 5, "idle_share": 1 - busy / (until - spans[0][0])}


def waits(step: Callable[[], object]) -> int:
    """1 if a step waits for the device."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    except RuntimeError:
        return 1
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return 0


def inference(options: argparse.Namespace, report: Callable[..., None]) -> None:
    """The network alone on 480 x 640 pixels."""
    device = torch.device(options.device)
    sizes = {"num_block": 1, "num_feat": 16, "num_grow_ch": 16} if options.tiny else {}
    height, width = (24, 32) if options.tiny else (480, 640)
    for dtype in (torch.float16, torch.bfloat16):
        network = RRDBNet(**sizes).to(device, dtype).to(memory_format=torch.channels_last).eval()
        use_kernels(network)
        image = torch.rand(1, 3, height, width, device=device).to(dtype, memory_format=torch.channels_last)
        with torch.inference_mode():
            row = timed(
                lambda network=network, image=image: network(image),  # type: ignore[misc]
                device,
                1,
                TINY_STEPS if options.tiny else STEPS,
            )
        report(f"inference, {dtype}", images_per_s=1e3 / row["ms"], **row)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"machine": machine(options.device)}

    def report(name: str, **values: Any) -> None:
        results[name] = values
        shown = {key: round(value, 4) if isinstance(value, float) else value for key, value in values.items()}
        print(f"{name}: {shown}", flush=True)
        (options.out / "step.json").write_text(json.dumps(results, indent=2) + "\n")

    steps(options, report)
    inference(options, report)


if __name__ == "__main__":
    main()
