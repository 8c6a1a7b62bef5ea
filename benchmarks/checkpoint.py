"""What a checkpoint at full size costs the training thread: 23 blocks and the VGG-style discriminator, stage 2.

    python benchmarks/checkpoint.py --device cpu --rounds 7

The pause is the call that copies the live tensors and hands them to the writing thread. While that thread writes, it
takes a core, disk and memory bandwidth from training; that is measured too, as steps that end during a write against
steps that do not. With `--batch 16 --device cuda` the step is the recipe's, in bf16 as a CUDA graph. On a CPU a step
takes so long that the share means little; the step time at which the pause would be 2 % of 500 steps is printed too.

The writing thread also shares Python's global lock with the training thread. `lost_to_the_lock_s` is what a write takes
from a thread that computes for 1 ms and waits for 9 ms in turns, as the training thread does on a GPU.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from gpu_step import Bench
from step import make_config, our_step
from turns import as_text, machine, summary

from pipeline.storage import Storage
from pipeline.training.checkpointer import Checkpointer
from pipeline.training.run_log import RunLog
from pipeline.training.worker import Worker

STEPS = 500
COMPUTING_S, WAITING_S, TOLERANCE_S = 0.001, 0.009, 0.0005
SHARE = 0.02


def measure(options: argparse.Namespace, folder: str) -> dict[str, Any]:
    """Pauses, writing times, and step times with and without a write."""
    device = torch.device(options.device)
    if device.type == "cuda":
        bench = Bench(
            argparse.Namespace(device="cuda", tiny=False, batch=options.batch), "gan", "bf16", "auto"
        )
        config, step, state = bench.config, bench.step, bench.state
    else:
        config = make_config(options.blocks, options.batch, 128)
        step, state, _ = our_step(config, "gan", device, "fp32")

    def timed_step() -> float:
        began = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    for _ in range(6 if device.type == "cuda" else 1):  # captures the graph
        timed_step()
    undisturbed = [timed_step() for _ in range(options.rounds)]
    pauses, writes, disturbed, lost = [], [], [], []
    count = 0
    run = Storage(folder) / "run"
    with Checkpointer(config, run, state, RunLog(config, Worker(device=device), run)) as checkpointer:
        for number in range(1, options.rounds + 1):
            began = time.perf_counter()
            state.step = config.psnr.steps + number
            checkpointer.save()
            pauses.append(time.perf_counter() - began)
            pending = checkpointer._pending
            assert pending is not None
            if number % 2:
                lost.append(late_until(pending))
                checkpointer.finish()
                writes.append(time.perf_counter() - began - pauses[-1])
            else:
                # Training continues while the thread writes.
                while True:
                    seconds = timed_step()
                    if pending.done():
                        break
                    disturbed.append(seconds)
                checkpointer.finish()
        count = sum(value.nbytes for value in [*state.ema.state_dict().values(), *state.tensors().values()])
    step_s = statistics.median(undisturbed)
    pause_s = statistics.median(pauses)
    # A write may be shorter than a step: then it slows down a part of one.
    slowdown_s = 0.0
    if disturbed:
        extra = statistics.median(disturbed) / step_s - 1
        slowdown_s = max(0.0, extra) * statistics.median(writes)
    return {
        "mib": count / 2**20,
        "pause_s": summary(pauses),
        "write_s": summary(writes),
        "lost_to_the_lock_s": summary(lost),
        "step_s": summary(undisturbed),
        "step_while_writing_s": summary(disturbed) if disturbed else None,
        "share_of_500_steps": pause_s / (STEPS * step_s),
        "share_with_slower_steps": (pause_s + slowdown_s) / (STEPS * step_s),
        "pause_is_2_percent_at_step_s": pause_s / (STEPS * SHARE),
    }


def late_until(pending: Future[None]) -> float:
    """Seconds by which turns of computing and waiting were late in sum, until a write is done."""
    late = 0.0
    while not pending.done():
        began = time.perf_counter()
        while time.perf_counter() < began + COMPUTING_S:
            pass
        time.sleep(WAITING_S)
        late += max(0.0, time.perf_counter() - began - COMPUTING_S - WAITING_S - TOLERANCE_S)
    return late


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--blocks", type=int, default=23)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--storage", help="folder to write below; default: the system's temporary one")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.device == "cuda" and options.blocks != 23:
        parser.error("--blocks: the step on a GPU is the paper's, with 23")
    torch.set_num_threads(1)
    facts = machine(options.device)
    with tempfile.TemporaryDirectory(dir=options.storage) as folder:
        result = measure(options, folder)
    print(
        f"{result['mib']:.0f} MiB: pause {as_text(result['pause_s'])} s, written in {as_text(result['write_s'])} s, "
        f"{as_text(result['lost_to_the_lock_s'], 3)} s lost to the lock; "
        f"{result['share_of_500_steps']:.4%} of {STEPS} steps of {result['step_s']['median']:.4f} s"
    )
    text = json.dumps({"machine": facts, "arguments": sys.argv[1:], "results": result}, indent=2)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
