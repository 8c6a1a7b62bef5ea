"""SIGKILL for a random worker, at random moments, in one run of both stages: the same bits, and how long it takes.

    python benchmarks/kills.py --kills 20

Trains a tiny network twice on two workers of a private Ray: undisturbed, and with the kills. Prints whether the final
weights are equal, how many steps were repeated after each kill, and the seconds from each kill to the next step in
parts.
"""

import argparse
import json
import os
import random
import re
import signal
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
from tiny_run import ROOT, command
from turns import as_text, cpu_name, summary

from pipeline.storage import Storage
from pipeline.training import faults

EVERY_STEPS = 20
STEPS = 700
PROGRESS = re.compile(r"\] step (\d+)/")
RESUMED = re.compile(r"resuming at step (\d+) ")


@dataclass
class Recovery:
    """One kill and what followed; times in seconds since the epoch."""

    step: int
    """The newest step that was seen before the kill."""
    killed: float
    resumed_from: int = -1
    resumed: float = 0.0
    """When the new worker group had loaded the checkpoint."""
    next_step: float = 0.0


def start(folder: Path, name: str) -> subprocess.Popen[str]:
    """A run of both stages with a private Ray, which logs every step."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "RAY_DEDUP_LOGS": "0"}
    environment.pop("RAY_ADDRESS", None)
    run = command(
        folder, run_name=name, workers=2, psnr__steps=STEPS // 2, gan__steps=STEPS - STEPS // 2, log_every_steps=1,
        checkpoint_every_steps=EVERY_STEPS, validate_every_steps=STEPS // 2,
    )  # fmt: skip
    return subprocess.Popen(
        run, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def kill_a_worker(driver: int, chance: random.Random) -> float:
    """SIGKILL for one of the training workers below `driver`; when."""
    workers = [
        process
        for process in psutil.Process(driver).children(recursive=True)
        if "RayTrainWorker" in " ".join(process.cmdline())
    ]
    chance.choice(sorted(workers, key=lambda process: process.pid)).send_signal(signal.SIGKILL)
    return time.time()


def disturbed(folder: Path, kills: int, seed: int) -> list[Recovery]:
    """Runs with kills, each a random number of steps after the group had resumed and saved a checkpoint."""
    chance = random.Random(seed)
    recoveries: list[Recovery] = []
    due = chance.randint(1, 2 * EVERY_STEPS)
    with start(folder, "disturbed") as run:
        assert run.stdout is not None
        for line in run.stdout:
            if found := RESUMED.search(line):
                recoveries[-1].resumed_from, recoveries[-1].resumed = int(found[1]), time.time()
            elif found := PROGRESS.search(line):
                step = int(found[1])
                if recoveries and not recoveries[-1].next_step:
                    if not recoveries[-1].resumed:
                        continue  # The last lines of the group that was killed.
                    recoveries[-1].next_step = time.time()
                    # A later checkpoint is between two kills, so that the run makes progress.
                    due = recoveries[-1].resumed_from + EVERY_STEPS + chance.randint(1, 12)
                if step >= due and len(recoveries) < kills:
                    recoveries.append(Recovery(step, kill_a_worker(run.pid, chance)))
        assert run.wait() == 0
    return recoveries


def main() -> None:
    """Runs both and prints a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="kills-") as name:
        folder = Path(name)
        with start(folder, "undisturbed") as run:
            output = run.communicate()[0]
            assert run.returncode == 0, output[-2000:]
        recoveries = disturbed(folder, options.kills, options.seed)
        results = [
            json.loads((folder / "runs" / run_name / "result.json").read_text())
            for run_name in ("undisturbed", "disturbed")
        ]
        noticed = [fault.time_ms / 1000 for fault in faults.load(Storage(str(folder / "runs/disturbed")))]
    print(f"{cpu_name()}, {os.cpu_count()} cores, load {load:.1f} before; {len(recoveries)} kills")
    print(f"final weights equal: {results[0]['generator_sha256'] == results[1]['generator_sha256']}")
    print(f"metrics equal: {results[0]['metrics'] == results[1]['metrics']}")
    repeated = [each.step - each.resumed_from for each in recoveries]
    print(f"steps repeated: {min(repeated)} to {max(repeated)} (a checkpoint every {EVERY_STEPS})")
    parts = {
        "kill to next step": [each.next_step - each.killed for each in recoveries],
        "  Ray Train notices": [at - each.killed for at, each in zip(noticed, recoveries, strict=True)],
        "  new processes, checkpoint loaded": [
            each.resumed - at for at, each in zip(noticed, recoveries, strict=True)
        ],
        "  first step": [each.next_step - each.resumed for each in recoveries],
    }
    for part, seconds in parts.items():
        print(f"{part:36} {as_text(summary(seconds), 1)} s")


if __name__ == "__main__":
    main()
