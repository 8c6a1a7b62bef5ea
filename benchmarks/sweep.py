"""What a sweep costs beyond training: seconds per trial, the driver's memory, and processes that are left.

python benchmarks/sweep.py             one worker: trials train in Ray Tune's process
python benchmarks/sweep.py --workers 2 trials on Ray Train
"""

import argparse
import itertools
import os
import statistics
import subprocess
import tempfile
from pathlib import Path

import psutil
from mlflow import MlflowClient
from tiny_run import ROOT, command
from turns import cpu_name

STEPS = 20


def trial_overheads(folder: Path) -> list[float]:
    """Seconds from a trial's start to the next one's, less those from its first to its last point."""
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    experiment = client.search_experiments(filter_string="name = 'sweep'")[0]
    runs = client.search_runs([experiment.experiment_id], "run_name LIKE 'trial-%'", order_by=["start_time"])
    overheads = []
    for run, following in itertools.pairwise(runs):
        points = client.get_metric_history(run.info.run_id, "loss/pixel")
        times = [point.timestamp for point in points]
        overheads.append((following.info.start_time - run.info.start_time - (max(times) - min(times))) / 1000)
    return overheads


def main() -> None:
    """Runs the sweep and prints the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--trials", type=int, default=12)
    options = parser.parse_args()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="sweep-") as name:
        folder = Path(name)
        sweep = command(
            folder, job="tune_gan", workers=options.workers, psnr__steps=0, gan__steps=STEPS, log_every_steps=1,
            gan__allow_random_start="true", validate_every_steps=STEPS, checkpoint_every_steps=STEPS,
            tracking__uri=f"sqlite:///{folder}/mlflow.db", tracking__experiment="sweep", tune__name="sweep",
            tune__trials=options.trials, tune__space='{"gan.pixel_weight": {"low": 0.1, "high": 1.0}}',
        )  # fmt: skip
        memory, started = [], set()
        # Without RAY_ADDRESS the command starts a private Ray.
        environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
        with subprocess.Popen(sweep, cwd=ROOT, text=True, stdout=subprocess.PIPE, env=environment) as driver:
            assert driver.stdout is not None
            process = psutil.Process(driver.pid)
            for line in driver.stdout:
                if " finished at step " in line:
                    memory.append(process.memory_info().rss / 1e6)
                    started |= set(process.children(recursive=True))
        left = [each.name() for each in psutil.wait_procs(list(started), timeout=10)[1]]
        overheads = trial_overheads(folder)
    print(f"{cpu_name()}, {os.cpu_count()} cores, load {load:.1f} before; exit code {driver.returncode}")
    low, middle, high = min(overheads), statistics.median(overheads), max(overheads)
    print(f"overhead per trial: median {middle:.1f} s, {low:.1f} to {high:.1f} s")
    growth = memory[-1] - memory[0]
    print(f"the driver's memory grew by {growth:.0f} MB over {len(memory)} trials; processes left: {left}")


if __name__ == "__main__":
    main()
