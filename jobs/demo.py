"""The whole way once, on sample photographs: data, a job on a private Ray, evaluation, a model, a picture."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from pipeline import command
from pipeline.config import load_config, make_parser
from pipeline.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "configs" / "demo.yaml"
START_TIMEOUT_S = 120


def main(argv: list[str]) -> int:
    """Runs all parts one after the other; what was started is stopped, also on Ctrl-C."""
    parser = make_parser(__doc__ or "")
    parser.add_argument(
        "--out", default=str(ROOT / "demo"), metavar="DIR", help="Where everything goes (default: demo/)."
    )
    options = parser.parse_args(argv)
    out = Path(options.out).resolve()
    config, _ = load_config([], description="", default_file=CONFIG, environment={})
    run = out / "runs" / config.run_name
    store = f"sqlite:///{out}/runs/mlflow.db"
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "ESRGAN_STORAGE": str(out / "runs"),
        "ESRGAN_DATA__ROOT": str(out / "data"),
        # An explicit mode: a token file left in the home directory must not change what happens here.
        "RAY_AUTH_MODE": "disabled",
        "PYTHONUNBUFFERED": "1",
    }
    environment.pop("RAY_ADDRESS", None)
    _require_free_cpus(config.worker_range[1])
    began = time.monotonic()

    # SIGTERM ends the demo as Ctrl-C does: through the `finally` of what it started.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    with private_ray(environment) as (address, dashboard):
        environment["RAY_ADDRESS"] = address
        _step("photographs to patches")
        _call([sys.executable, "jobs/prepare_data.py", "--config", str(CONFIG)], environment)
        _step("training: ray job submit -- python jobs/train_gan.py")
        submit = ["ray", "job", "submit", "--address", dashboard, "--", "python", "jobs/train_gan.py"]
        _call(submit, {**environment, "RAY_ADDRESS": dashboard})
    environment.pop("RAY_ADDRESS")

    _step("evaluation on the held-out photographs")
    stage_one = run / "checkpoints" / f"psnr-{config.psnr.steps:08d}"
    champion = f"models:/{config.tracking.model_name}@champion"
    evaluate = [sys.executable, "jobs/evaluate.py"]
    evaluate += ["--model", "bicubic", f"stage 1={stage_one}", f"stage 2={champion}"]
    evaluate += ["--hr", str(out / "data" / "photos" / "held_out"), "--out", str(out / "evaluation")]
    _call([*evaluate, "--tracking.uri", store], environment)

    minutes = (time.monotonic() - began) / 60
    here = Path(sys.executable).parent
    print(f"\nDone in {minutes:.1f} minutes. What there is now:")
    print(f"  picture     {out}/evaluation/comparison.png")
    print(f"  report      {out}/evaluation/report.html")
    print(f"  run         {run}")
    print(f"  model       {champion} in {store}")
    print(f"  MLflow      {here}/mlflow ui --backend-store-uri {store}")
    print(f"  try it      {here}/python jobs/upscale.py --model {champion} --tracking.uri {store} "
          "--input YOUR_PHOTOS --output DIR")  # fmt: skip
    return 0


@contextmanager
def private_ray(environment: dict[str, str]) -> Iterator[tuple[str, str]]:
    """A Ray of our own: free ports, its own folder, all its processes gone at the end.

    Yields:
        Its address (host:port), and that of its dashboard, which takes jobs.
    """
    # Ray's sockets need a short path.
    folder = tempfile.mkdtemp(prefix="er-", dir="/tmp")
    ports = free_ports(5)
    names = (
        "port",
        "dashboard-port",
        "dashboard-agent-listen-port",
        "ray-client-server-port",
        "metrics-export-port",
    )
    start = ["ray", "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--temp-dir={folder}"]
    start += [f"--{name}={port}" for name, port in zip(names, ports, strict=True)]
    start += [
        "--min-worker-port=0",
        "--max-worker-port=0",
        "--dashboard-host=127.0.0.1",
        "--disable-usage-stats",
    ]
    start += [f"--object-store-memory={512 * 2**20}"]
    log = Path(folder) / "start.log"
    with log.open("w") as output:
        ray = subprocess.Popen(
            start, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        dashboard = f"http://127.0.0.1:{ports[1]}"
        _wait_for(dashboard, ray, log)
        yield f"127.0.0.1:{ports[0]}", dashboard
    finally:
        # A second Ctrl-C must not leave half of it running.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        _stop(ray, folder)
        shutil.rmtree(folder, ignore_errors=True)
        signal.signal(signal.SIGINT, signal.default_int_handler)


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def _wait_for(dashboard: str, ray: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while time.monotonic() < deadline:
        if ray.poll() is not None:
            break
        try:
            with opener.open(f"{dashboard}/api/jobs/", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    tail = " ".join(log.read_text().split()[-60:])
    raise RuntimeError(f"Ray did not start within {START_TIMEOUT_S} s: {tail}")


def _stop(ray: subprocess.Popen[bytes], folder: str) -> None:
    """Ends `ray start --block` and whatever else names our folder in its command line; no other Ray does."""
    ray.terminate()
    try:
        ray.wait(timeout=20)
    except subprocess.TimeoutExpired:
        ray.kill()
    left = [process for process in psutil.process_iter() if _names(process, folder)]
    for process in left:
        with _gone_is_fine():
            process.terminate()
    _, alive = psutil.wait_procs(left, timeout=10)
    for process in alive:
        with _gone_is_fine():
            process.kill()


def _names(process: psutil.Process, folder: str) -> bool:
    try:
        in_arguments = any(folder in argument for argument in process.cmdline())
        return in_arguments or process.environ().get("RAY_TMPDIR", "") == folder
    except psutil.Error:
        return False


@contextmanager
def _gone_is_fine() -> Iterator[None]:
    try:
        yield
    except psutil.NoSuchProcess:
        return


def _require_free_cpus(workers: int) -> None:
    cpus = os.cpu_count() or 1
    if cpus < workers:
        raise UserError(f"the demo trains on {workers} CPUs, and this machine has {cpus}")


def _step(title: str) -> None:
    print(f"\n== {title}", flush=True)


def _call(arguments: list[str], environment: dict[str, str]) -> None:
    code = subprocess.run(arguments, cwd=ROOT, env=environment, check=False).returncode
    if code:
        sys.exit(code)


if __name__ == "__main__":
    command.run(main)
