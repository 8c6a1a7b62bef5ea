"""End-to-end demo on sample images: data, a job on a private Ray cluster, a registered model, evaluation."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psutil

from pipeline import command
from pipeline.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "configs" / "demo.yaml"
START_TIMEOUT_S = 120


def main(argv: list[str]) -> int:
    """Runs all commands; stops all processes that it has started, also on Ctrl-C and SIGTERM."""
    command.announce("demo: loading libraries and the configuration")
    from pipeline.config import load_config

    parser = command.make_parser(__doc__ or "")
    parser.add_argument(
        "--out", default=str(ROOT / "demo"), metavar="DIR", help="Output folder (default: demo/)."
    )
    options = parser.parse_args(argv)
    out = Path(options.out).resolve()
    config, _ = load_config([], description="", default_file=CONFIG, environment={})
    run = out / "runs" / config.run_name
    tracking_uri = f"sqlite:///{out}/runs/mlflow.db"
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "ESRGAN_STORAGE": str(out / "runs"),
        "ESRGAN_DATA__ROOT": str(out / "data"),
        # Explicit, because a token file in the home directory would change the mode.
        "RAY_AUTH_MODE": "disabled",
        "PYTHONUNBUFFERED": "1",
    }
    environment.pop("RAY_ADDRESS", None)
    _require_free_cpus(config.worker_range[1])
    began = time.monotonic()

    # As with Ctrl-C: an exception, so that each `finally` stops its processes.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    with private_ray(environment) as (address, dashboard):
        environment["RAY_ADDRESS"] = address
        _print_title("images to patches")
        _call([sys.executable, "jobs/prepare_data.py", "--config", str(CONFIG)], environment)
        _print_title("training: ray job submit -- python jobs/train_gan.py")
        submit = ["ray", "job", "submit", "--address", dashboard, "--", "python", "jobs/train_gan.py"]
        _call(submit, {**environment, "RAY_ADDRESS": dashboard})
    environment.pop("RAY_ADDRESS")

    _print_title("evaluation on the held-out images")
    stage_one = run / "checkpoints" / f"psnr-{config.psnr.steps:08d}"
    model = trained_model(run, config.tracking.model_name)
    evaluate = [sys.executable, "jobs/evaluate.py"]
    given = f"{config.init.generator}={config.init.generator}"
    evaluate += ["--model", "bicubic", given, f"stage 1={stage_one}", f"stage 2={model}"]
    evaluate += ["--hr", str(out / "data" / "photos" / "held_out"), "--out", str(out / "evaluation")]
    evaluate += ["--metrics", *config.validation.metrics]
    _call([*evaluate, "--tracking.uri", tracking_uri], environment)

    print(
        f"{config.init.generator} came with the project (models/); stages 1 and 2 were trained now, from it."
    )
    minutes = (time.monotonic() - began) / 60
    programs = Path(sys.executable).parent
    print(f"\nDone in {minutes:.1f} minutes. Results:")
    print(f"  figure      {out}/evaluation/comparison.png")
    print(f"  report      {out}/evaluation/report.html")
    print(f"  run         {run}")
    print(f"  model       {model} in {tracking_uri}")
    print(f"  MLflow      {programs}/mlflow ui --backend-store-uri {tracking_uri}")
    print(f"  try it      {programs}/python jobs/upscale.py --model {model} --tracking.uri {tracking_uri} "
          "--input YOUR_IMAGES --output DIR")  # fmt: skip
    return 0


def trained_model(run: Path, name: str) -> str:
    """The version that a run has registered, which need not be the champion; without one the run's folder."""
    from pipeline.run_folder import RESULT
    from pipeline.storage import Storage

    result = RESULT.read(Storage(str(run)))
    if result is None or result.model_version is None:
        return str(run)
    return f"models:/{name}/{result.model_version}"


@contextmanager
def private_ray(environment: dict[str, str]) -> Iterator[tuple[str, str]]:
    """Starts a private local Ray cluster, on free ports and in its own folder; stops all of its processes on exit.

    Yields:
        Its address (host:port), and that of its dashboard, which accepts jobs.
    """
    # Ray's sockets need a short path.
    folder = tempfile.mkdtemp(prefix="er-", dir="/tmp")
    names = (
        "port",
        "dashboard-port",
        "dashboard-agent-listen-port",
        "ray-client-server-port",
        "metrics-export-port",
    )
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    flags = {
        **ports,
        "node-ip-address": "127.0.0.1",
        "dashboard-host": "127.0.0.1",
        "temp-dir": folder,
        "min-worker-port": 0,
        "max-worker-port": 0,
        "object-store-memory": 512 * 2**20,
    }
    start = ["ray", "start", "--head", "--block", "--disable-usage-stats"]
    start += [f"--{name}={value}" for name, value in flags.items()]
    log = Path(folder) / "start.log"
    with log.open("w") as output:
        ray = subprocess.Popen(
            start, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        dashboard = f"http://127.0.0.1:{ports['dashboard-port']}"
        _wait_for(dashboard, ray, log)
        yield f"127.0.0.1:{ports['port']}", dashboard
    finally:
        # A second Ctrl-C must not interrupt the stopping.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        _stop(ray, folder)
        shutil.rmtree(folder, ignore_errors=True)
        signal.signal(signal.SIGINT, signal.default_int_handler)


def free_ports(count: int) -> list[int]:
    """Ports without a listener."""
    with ExitStack() as stack:
        servers = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [server.getsockname()[1] for server in servers]


def _wait_for(dashboard: str, ray: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while time.monotonic() < deadline and ray.poll() is None:
        try:
            with opener.open(f"{dashboard}/api/jobs/", timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    tail = " ".join(log.read_text().split()[-60:])
    raise RuntimeError(f"Ray did not start within {START_TIMEOUT_S} s: {tail}")


def _stop(ray: subprocess.Popen[bytes], folder: str) -> None:
    """Ends `ray start --block`, and all processes with our folder in their command line or environment."""
    ray.terminate()
    try:
        ray.wait(timeout=20)
    except subprocess.TimeoutExpired:
        ray.kill()
    _end([process for process in psutil.process_iter() if _belongs_to(process, folder)])


def _belongs_to(process: psutil.Process, folder: str) -> bool:
    try:
        in_arguments = any(folder in argument for argument in process.cmdline())
        return in_arguments or process.environ().get("RAY_TMPDIR", "") == folder
    except psutil.Error:
        return False


def _end(processes: list[psutil.Process]) -> None:
    """Terminates processes, and kills those that are still running after ten seconds."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.terminate()
    _, alive = psutil.wait_procs(processes, timeout=10)
    for process in alive:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def _require_free_cpus(workers: int) -> None:
    cpus = os.cpu_count() or 1
    if cpus < workers:
        raise UserError(f"the demo trains on {workers} CPUs, and this machine has {cpus}")


def _print_title(title: str) -> None:
    print(f"\n== {title}", flush=True)


def _call(arguments: list[str], environment: dict[str, str]) -> None:
    """Runs a command to its end. Exits with its code if it fails; if interrupted, ends it with all its children."""
    process = psutil.Popen(arguments, cwd=ROOT, env=environment)
    try:
        code = process.wait()
    except BaseException:
        with suppress(psutil.NoSuchProcess):
            _end([*process.children(recursive=True), process])
        raise
    if code:
        sys.exit(code)


if __name__ == "__main__":
    command.run(main)
