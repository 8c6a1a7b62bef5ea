"""Steps per second of a tiny run with a reachable and with an unreachable MLflow server, in turns.

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
    """Median steps/s of a run in one process, without the first fifth."""
    run_command = command(
        folder, run_name=name, workers=0, psnr__steps=STEPS, gan__steps=0, log_every_steps=EVERY,
        checkpoint_every_steps=EVERY, validate_every_steps=STEPS, tracking__uri=uri, tracking__if_unreachable="spool",
    )  # fmt: skip
    rates = []
    with subprocess.Popen(run_command, cwd=ROOT, text=True, stdout=subprocess.PIPE) as run:
        assert run.stdout is not None
        for line in run.stdout:
            rates += [float(value) for value in RATE.findall(line)]
            if len(rates) == STEPS // EVERY:
                # Only steps are measured, not the minute in which a run waits for the server at the end.
                run.kill()
    return statistics.median(rates[len(rates) // 5 :])


def main() -> None:
    """Takes turns and prints the ratio."""
    load = os.getloadavg()[0]
    with socket.socket() as closed, tempfile.TemporaryDirectory(prefix="outage-") as name:
        closed.bind(("127.0.0.1", 0))  # Bound and not listening: connections are refused.
        folder = Path(name)
        uris = {
            "reachable": f"sqlite:///{folder}/mlflow.db",
            "unreachable": f"http://127.0.0.1:{closed.getsockname()[1]}",
        }
        rate(folder, "warm-up", uris["reachable"])
        ratios = []
        for turn in range(4):
            order = ("reachable", "unreachable") if turn % 2 == 0 else ("unreachable", "reachable")
            rates = {kind: rate(folder, f"{kind}-{turn}", uris[kind]) for kind in order}
            ratios.append(rates["unreachable"] / rates["reachable"])
            shown = ", ".join(f"{kind} {rates[kind]:.1f} steps/s" for kind in uris)
            print(f"{shown}: {ratios[-1]:.3f}", flush=True)
    ratio = as_text(summary(ratios), 3)
    print(f"{cpu_name()}, {os.cpu_count()} cores, load {load:.1f} before; unreachable to reachable {ratio}")


if __name__ == "__main__":
    main()
