"""Upscaling: rates of channels_last and bf16 against the plain way, memory tiled against whole, and a large photograph.

Every case runs in a process of its own, so that its peak memory is its own. Ratios hold where the machine is quiet.

    python benchmarks/inference.py --out benchmarks/inference.json            rates and memory, the paper's network
    python benchmarks/inference.py --large --out benchmarks/inference_large.json    100 megapixels, a tiny network

The large photograph shows what grows with the output; a tile of the paper's network comes on top (first command).
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from pipeline.imaging import upscale
from pipeline.model import RRDBNet, save_generator

# Name: channels_last, dtype, tile. The first is the plain way.
CASES = {
    "plain": (False, torch.float32, None),
    "channels_last": (True, torch.float32, None),
    "bf16": (False, torch.bfloat16, None),
    "channels_last + bf16": (True, torch.bfloat16, None),
    "channels_last, tiles of 96": (True, torch.float32, 96),
}
PAPER = {"num_feat": 64, "num_block": 23, "num_grow_ch": 32}
TINY = {"num_feat": 8, "num_block": 1, "num_grow_ch": 4}


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def run_case(name: str, side: int, repeats: int) -> dict[str, float]:
    """Seconds of the fastest repeat, and memory above what was there before the network ran."""
    channels_last, dtype, tile = CASES[name]
    torch.manual_seed(0)
    generator = RRDBNet(**PAPER).eval()
    lr = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    upscale(generator, lr[:32, :32].copy(), dtype=dtype, channels_last=channels_last)
    before = peak_mib()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        upscale(generator, lr, tile_px=tile, dtype=dtype, channels_last=channels_last)
        seconds.append(time.perf_counter() - start)
    return {"seconds": min(seconds), "peak_above_idle_mib": peak_mib() - before}


def run_large() -> dict[str, float]:
    """A photograph of 2500 x 2500 through everything that jobs/upscale.py does."""
    from pipeline.evaluation.models import open_model
    from pipeline.evaluation.upscaling import Upscaler, plan

    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        save_generator(RRDBNet(**TINY), f"{folder}/g.safetensors")
        y, x = np.mgrid[0:2500, 0:2500]
        lr = np.stack([(x * y // 700) % 256, (x + y) % 256, (x - y) % 256], axis=-1).astype(np.uint8)
        Image.fromarray(lr).save(f"{folder}/large.png")
        del lr, x, y
        source, output, tasks = plan(f"{folder}/large.png", f"{folder}/out", "png")
        model = open_model(f"{folder}/g.safetensors")
        start = time.perf_counter()
        outcome = Upscaler(model, source, output, "png", None, 200.0)(tasks[0])
        assert "target" in outcome, outcome
        return {"seconds": time.perf_counter() - start, "peak_mib": peak_mib()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--side", type=int, default=192, help="side of the low-resolution picture")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--large", action="store_true", help="only the large photograph")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        result = (
            run_large() if options.case == "large" else run_case(options.case, options.side, options.repeats)
        )
        print(json.dumps(result))
        return
    results = {}
    for name in ["large"] if options.large else CASES:
        command = [sys.executable, __file__, "--case", name, "--side", str(options.side)]
        done = subprocess.run(
            [*command, "--repeats", str(options.repeats)], stdout=subprocess.PIPE, text=True, check=True
        )
        results[name] = json.loads(done.stdout)
        print(name, results[name], flush=True)
    if "plain" in results:
        for case in results.values():
            case["speed_to_plain"] = results["plain"]["seconds"] / case["seconds"]
    machine = {
        "cpu": platform.processor() or platform.machine(),
        "cpus": os.cpu_count(),
        "torch": torch.__version__,
    }
    text = json.dumps({"machine": machine, "arguments": sys.argv[1:], "results": results}, indent=2)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
