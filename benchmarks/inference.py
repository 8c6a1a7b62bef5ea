"""Upscaling: speed of channels_last and bf16 compared with the default, memory with and without tiles, a large image.

Speed is measured in turns in one process: every round runs all cases once, and ratios are taken within a round, so that
other load affects all of them equally. Memory is measured in a separate process per case. A CPU without bfloat16
arithmetic emulates it many times slower: bf16 is then measured on a smaller image.

    python benchmarks/inference.py --out benchmarks/inference.json            speed and memory, the paper's network
    python benchmarks/inference.py --large --out benchmarks/inference_large.json    100 megapixels, a tiny network

The large image shows the memory that grows with the output; a tile of the paper's network is additional (see above).
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from turns import cpu_name, has_bf16, ratios

from pipeline.imaging import upscale
from pipeline.model import RRDBNet, save_generator

# Name: channels_last, dtype, tile. The first is the baseline.
CASES = {
    "plain": (False, torch.float32, None),
    "channels_last": (True, torch.float32, None),
    "bf16": (False, torch.bfloat16, None),
    "channels_last, bf16": (True, torch.bfloat16, None),
    "channels_last, tiles of 48": (True, torch.float32, 48),
}
EMULATED_SIDE_PX = 16
PAPER = {"num_feat": 64, "num_block": 23, "num_grow_ch": 32}
TINY = {"num_feat": 8, "num_block": 1, "num_grow_ch": 4}


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def super_resolve(generator: RRDBNet, lr: np.ndarray, name: str) -> np.ndarray:
    """The SR image in the case `name`."""
    channels_last, dtype, tile = CASES[name]
    return upscale(generator, lr, tile_px=tile, dtype=dtype, channels_last=channels_last)


def run_rates(names: list[str], side: int, rounds: int) -> dict[str, dict[str, Any]]:
    """Speed relative to the baseline of the same round (median, least, most), and the largest difference in levels."""
    generator, lr = paper_network(), noise(side)
    images = {name: super_resolve(generator, lr, name).astype(np.int16) for name in names}  # also warms up
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        # Every other round is reversed: a drift of the clock does not favor the first case.
        for name in names[:: 1 if turn % 2 == 0 else -1]:
            start = time.perf_counter()
            super_resolve(generator, lr, name)
            seconds[name].append(time.perf_counter() - start)
    results = {}
    for name, times in seconds.items():
        results[name] = {
            "side_px": side,
            "speed_to_plain": ratios(seconds["plain"], times),
            "seconds": times,
            "levels_from_plain_at_most": int(np.abs(images[name] - images["plain"]).max()),
        }
    return results


def run_memory(name: str, side: int) -> dict[str, float]:
    """Peak memory above that of the process before the image."""
    generator, lr = paper_network(), noise(side)
    super_resolve(generator, lr[:16, :16].copy(), name)
    before = peak_mib()
    super_resolve(generator, lr, name)
    return {"peak_above_idle_mib": peak_mib() - before}


def paper_network() -> RRDBNet:
    torch.manual_seed(0)
    return RRDBNet(**PAPER).eval()


def noise(side: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)


def run_large() -> dict[str, float]:
    """An image of 2500 x 2500 pixels through all of jobs/upscale.py."""
    from pipeline.evaluation.config import UpscaleConfig
    from pipeline.evaluation.models import open_model
    from pipeline.evaluation.output_plan import plan
    from pipeline.evaluation.upscaling import Upscaler, Work

    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        save_generator(RRDBNet(**TINY), f"{folder}/g.safetensors")
        y, x = np.mgrid[0:2500, 0:2500]
        lr = np.stack([(x * y // 700) % 256, (x + y) % 256, (x - y) % 256], axis=-1).astype(np.uint8)
        Image.fromarray(lr).save(f"{folder}/large.png")
        del lr, x, y
        config = UpscaleConfig(
            model=f"{folder}/g.safetensors", input=f"{folder}/large.png", output=f"{folder}/out"
        )
        output, tasks = plan(config.input, config.output, config.format)
        model = open_model(config.model)
        start = time.perf_counter()
        outcome = Upscaler(model, output, config)(tasks[0])
        assert outcome == Work(tasks[0])
        return {"seconds": time.perf_counter() - start, "peak_mib": peak_mib()}


def in_new_process(case: str, side: int, rounds: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--case", case, "--side", str(side), "--rounds", str(rounds)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--side", type=int, default=96, help="side of the low-resolution image")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--large", action="store_true", help="only the large image")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case == "rates":
        quick = [name for name, (_, dtype, _) in CASES.items() if dtype == torch.float32 or has_bf16()]
        print(json.dumps(run_rates(quick, options.side, options.rounds)))
        return
    if options.case == "emulated":
        names = ["plain", *(name for name, (_, dtype, _) in CASES.items() if dtype != torch.float32)]
        print(json.dumps(run_rates(names, options.side, options.rounds)))
        return
    if options.case:
        print(json.dumps(run_large() if options.case == "large" else run_memory(options.case, options.side)))
        return
    before = os.getloadavg()[0]
    if options.large:
        results = {"large": in_new_process("large", 0, 0)}
    else:
        results = in_new_process("rates", options.side, options.rounds)
        for name, result in results.items():
            result |= in_new_process(name, options.side, 0)
        if not has_bf16():
            emulated = in_new_process("emulated", EMULATED_SIDE_PX, 3)
            results |= {name: result for name, result in emulated.items() if name != "plain"}
    machine = {
        "cpu": cpu_name(),
        "cpus": os.cpu_count(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "bf16": has_bf16(),
        "load_before": before,
    }
    text = json.dumps({"machine": machine, "arguments": sys.argv[1:], "results": results}, indent=2)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
