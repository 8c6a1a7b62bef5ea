"""Stage 1 by our step and by BasicSR's sequence: equal data, steps, seed and schedule; PSNR on held-out images.

A network of 2 blocks on the demo's images. Both see the same batches in the same order and begin with the same weights;
what is left between them is rounding, which training amplifies. `--again` trains ours once more from weights that
differ in the last bit, as a measure of just that. With several seeds the mean difference is given with its standard
error.

    python benchmarks/quality.py --steps 800 --seeds 1 2 3 4 --bf16
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from both_stages import basicsr, batches_of
from torch import nn
from turns import machine

from pipeline.config import load_config
from pipeline.data import load_manifest, prepare, read_held_out
from pipeline.metrics import FIDELITY, MetricSet
from pipeline.model import RRDBNet
from pipeline.training.config import TrainConfig
from pipeline.training.schedule import stage_rate
from pipeline.training.state import new_state
from pipeline.training.step import psnr_step
from pipeline.training.validation import validate
from pipeline.training.validation_config import HELD_OUT
from pipeline.training.validation_sets import ValidationSet

DEMO = Path(__file__).resolve().parent.parent / "configs" / "demo.yaml"
CPU = torch.device("cpu")


def demo_config(root: str, steps: int, seed: int) -> TrainConfig:
    """The demo's from random weights: 2 blocks, this many steps of stage 1, with a tenth of them as warm-up."""
    flags = ["--data.root", root, "--psnr.steps", str(steps), "--seed", str(seed), "--workers", "0"]
    flags += ["--psnr.schedule.warmup_steps", str(steps // 10), "--shuffle_channels", "false"]
    flags += [
        "--gan.steps",
        "0",
        "--init.generator",
        "null",
        "--model.num_block",
        "2",
        "--psnr.learning_rate",
        "2e-3",
    ]
    config, _ = load_config(flags, description="", default_file=DEMO, environment={})
    return config.alone()


def ours(config: TrainConfig, disturbed: bool = False) -> nn.Module:
    """EMA weights after our stage 1; `disturbed`: from weights that differ by a rounding error."""
    state = new_state(config, "psnr", CPU)
    if disturbed:
        with torch.no_grad():
            for parameter in state.generator.parameters():
                parameter.mul_(1 + 2**-23)

    for step, batch in enumerate(batches_of(config, CPU)):
        psnr_step(state, batch, config, stage_rate(config, "psnr", step))
    return state.ema


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--bf16", action="store_true", help="ours in bf16 as well")
    parser.add_argument("--again", action="store_true", help="ours once more, from disturbed weights")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    facts = machine()
    results: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        prepare(demo_config(f"{folder}/data", options.steps, options.seeds[0]).data, on_ray=False)
        sets = [ValidationSet(HELD_OUT, read_held_out(load_manifest(f"{folder}/data")))]
        for seed in options.seeds:
            config = demo_config(f"{folder}/data", options.steps, seed)
            for name, way in ways_of(config, options).items():
                began = time.perf_counter()
                network = way()
                assert isinstance(network, RRDBNet)
                seconds = time.perf_counter() - began
                metrics = validate(network, sets, MetricSet(FIDELITY, CPU, config.data.scale))
                results.setdefault(name, []).append({"seed": seed, "seconds": seconds, **metrics})
                found = f"{metrics['psnr_y']:.3f} dB (Y), {metrics['psnr_rgb']:.3f} dB (RGB)"
                print(f"seed {seed}, {name}: {found}, {seconds:.0f} s", flush=True)
    ours_first, *others = results
    for name in others if len(options.seeds) > 1 else []:
        for metric in ("psnr_y", "psnr_rgb"):
            pairs = zip(results[ours_first], results[name], strict=True)
            differences = [one[metric] - other[metric] for one, other in pairs]
            error = statistics.stdev(differences) / len(differences) ** 0.5
            print(
                f"{ours_first} - {name}, {metric}: {statistics.mean(differences):+.3f} dB, standard error {error:.3f}"
            )
    text = json.dumps({"machine": facts, "arguments": sys.argv[1:], "results": results}, indent=2)
    if options.out:
        options.out.write_text(text + "\n")


def ways_of(config: TrainConfig, options: argparse.Namespace) -> dict[str, Callable[[], nn.Module]]:
    """What is trained for one seed."""
    ways: dict[str, Callable[[], nn.Module]] = {
        "ours, fp32": lambda: ours(config),
        "BasicSR's sequence, fp32": lambda: basicsr(config, CPU),
    }
    if options.bf16:
        ways["ours, bf16"] = lambda: ours(config.model_copy(update={"precision": "bf16"}))
    if options.again:
        ways["ours, disturbed in the last bit"] = lambda: ours(config, disturbed=True)
    return ways


if __name__ == "__main__":
    main()
