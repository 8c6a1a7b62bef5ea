"""Stage 1 by our step and by BasicSR's sequence: equal data, steps, seed and schedule; PSNR on held-out photographs.

The demo's network and sample photographs. Both see the same batches in the same order and begin with the same weights;
what is left between them is rounding, which training amplifies. `--again` trains ours a third time from weights that
differ in the last bit, as a measure of just that.

    python benchmarks/quality.py --steps 300 --again
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from basicsr_step import BasicSR
from torch import nn
from turns import machine

from pipeline.config import load_config
from pipeline.data import prepare, read_held_out
from pipeline.data.feed import Feed
from pipeline.model import RRDBNet
from pipeline.training.batches import on_device
from pipeline.training.config import TrainConfig
from pipeline.training.schedule import learning_rate
from pipeline.training.state import new_state
from pipeline.training.step import Batch, StepSettings, psnr_step
from pipeline.training.validation import validate
from pipeline.training.worker import Worker

DEMO = Path(__file__).resolve().parent.parent / "configs" / "demo.yaml"
CPU = torch.device("cpu")


def demo_config(root: str, steps: int, seed: int) -> TrainConfig:
    """The demo's, with this many steps of stage 1; the warm-up keeps its share."""
    flags = ["--data.root", root, "--psnr.steps", str(steps), "--seed", str(seed), "--workers", "0"]
    flags += ["--psnr.schedule.warmup_steps", str(steps // 10), "--shuffle_channels", "false"]
    config, _ = load_config(flags, description="", default_file=DEMO, environment={})
    return TrainConfig.model_validate(config.model_dump(include=set(TrainConfig.model_fields)))


def train(config: TrainConfig, update: Callable[[Batch, float], object]) -> None:
    """Calls `update(batch, learning_rate)` with every batch of stage 1."""
    feed = Feed(config.data.root, config.seed, config.batch_size, config.crop_px)
    psnr = config.psnr
    for step, raw in enumerate(feed.batches(0, psnr.steps)):
        rate = learning_rate(psnr.schedule, psnr.learning_rate, step, psnr.steps)
        update(on_device(raw, config, Worker(), step), rate)


def ours(config: TrainConfig, disturbed: bool = False) -> nn.Module:
    """Averaged weights after our stage 1; `disturbed`: from weights that differ by a rounding error."""
    state = new_state(config, "psnr", CPU)
    if disturbed:
        with torch.no_grad():
            for parameter in state.generator.parameters():
                parameter.mul_(1 + 2**-23)

    def update(batch: Batch, rate: float) -> None:
        psnr_step(state, batch, StepSettings(rate, config.ema_decay, config.precision))

    train(config, update)
    return state.ema


def basicsr(config: TrainConfig) -> nn.Module:
    """Averaged weights after BasicSR's, in a generator of ours."""
    state = new_state(config, "psnr", CPU)
    theirs = BasicSR.like(state, config, None)
    train(config, lambda batch, rate: theirs.psnr_step(batch.lr.contiguous(), batch.hr.contiguous(), rate))
    state.ema.load_state_dict(theirs.ema.state_dict())
    return state.ema


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="of ours")
    parser.add_argument("--again", action="store_true", help="ours once more, from disturbed weights")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    facts = machine()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        config = demo_config(f"{folder}/data", options.steps, options.seed)
        prepare(config.data, on_ray=False)
        held_out = read_held_out(config.data.root)
        own = config.model_copy(update={"precision": options.precision})
        ways: dict[str, Callable[[], nn.Module]] = {
            f"ours, {options.precision}": lambda: ours(own),
            "BasicSR's sequence, fp32": lambda: basicsr(config),
        }
        if options.again:
            ways["ours, disturbed in the last bit"] = lambda: ours(own, disturbed=True)
        for name, way in ways.items():
            began = time.perf_counter()
            network = way()
            assert isinstance(network, RRDBNet)
            seconds = time.perf_counter() - began
            metrics = validate(network, held_out, config.data.scale, CPU)
            results[name] = {"seconds": seconds, **metrics}
            print(
                f"{name}: {metrics['psnr_y']:.3f} dB (Y), {metrics['psnr_rgb']:.3f} dB (RGB), {seconds:.0f} s",
                flush=True,
            )
    text = json.dumps({"machine": facts, "arguments": sys.argv[1:], "results": results}, indent=2)
    if options.out:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
