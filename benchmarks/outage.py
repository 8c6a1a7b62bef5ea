"""Steps per second while MLflow takes everything, and while its server is away: in turns, the same tiny run.

python benchmarks/outage.py
"""

import os
import re
import socket
import statistics
import subprocess
import tempfile
from pathlib import Path

from tiny_run import ROOT, command
from turns import as_text, cpu_name, summary

RATE = re.compile(r"([\d.]+) steps/s")
STEPS, EVERY = 600, 20


def rate(folder: Path, name: str, uri: str) -> float:
    """Median steps/s of a run in one process, the first fifth left out."""
    run_command = command(
        folder, run_name=name, workers=0, psnr__steps=STEPS, gan__steps=0, log_every_steps=EVERY,
        checkpoint_every_steps=EVERY, validate_every_steps=STEPS, tracking__uri=uri, tracking__if_away="spool",
    )  # fmt: skip
    rates = []
    with subprocess.Popen(run_command, cwd=ROOT, text=True, stdout=subprocess.PIPE) as run:
        assert run.stdout is not None
        for line in run.stdout:
            rates += [float(found) for found in RATE.findall(line)]
            if len(rates) == STEPS // EVERY:
                # Only steps count here, not the minute in which a run waits for its store at the end.
                run.kill()
    return statistics.median(rates[len(rates) // 5 :])


def main() -> None:
    """Takes turns and prints the ratio."""
    load = os.getloadavg()[0]
    with socket.socket() as closed, tempfile.TemporaryDirectory(prefix="outage-") as name:
        closed.bind(("127.0.0.1", 0))  # Bound and not listening: connections are refused.
        folder = Path(name)
        stores = {
            "there": f"sqlite:///{folder}/mlflow.db",
            "away": f"http://127.0.0.1:{closed.getsockname()[1]}",
        }
        rate(folder, "warm-up", stores["there"])
        ratios = []
        for turn in range(4):
            order = ("there", "away") if turn % 2 == 0 else ("away", "there")
            found = {kind: rate(folder, f"{kind}-{turn}", stores[kind]) for kind in order}
            ratios.append(found["away"] / found["there"])
            print(
                f"there {found['there']:.1f} steps/s, away {found['away']:.1f}: {ratios[-1]:.3f}", flush=True
            )
    print(
        f"{cpu_name()}, {os.cpu_count()} cores, load {load:.1f} before; away to there {as_text(summary(ratios), 3)}"
    )


if __name__ == "__main__":
    main()
