"""The demo leaves no processes behind when it is stopped during a command."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from pipeline.run_folder import RESULT, TrainingResult
from pipeline.storage import Storage

sys.path.insert(0, str(Path(__file__).parent.parent / "jobs"))
import demo as demo_job

JOBS = Path(__file__).parent.parent / "jobs"

DEMO = """
import contextlib, pathlib, signal, sys
sys.path.insert(0, sys.argv.pop(1))
import demo
folder = pathlib.Path(sys.argv.pop(1))

@contextlib.contextmanager
def private_ray(environment):
    try:
        yield "address", "dashboard"
    finally:
        (folder / "ray-stopped").touch()

# A background process of a shell inherits an ignored SIGINT.
signal.signal(signal.SIGINT, signal.default_int_handler)
demo.private_ray, demo.ROOT, demo._require_free_cpus = private_ray, folder, lambda workers: None
demo.command.run(demo.main)
"""

COMMAND = """
import os, signal, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
with open("pids", "w") as fifo:
    fifo.write(f"{os.getpid()} {child.pid}")
signal.pause()
"""


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_demo_leaves_no_processes(tmp_path: Path, number: int, code: int) -> None:
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "prepare_data.py").write_text(COMMAND)
    os.mkfifo(tmp_path / "pids")
    arguments = [sys.executable, "-c", DEMO, str(JOBS), str(tmp_path), "--out", str(tmp_path / "out")]
    log = tmp_path / "log"
    with log.open("w") as output, subprocess.Popen(arguments, stdout=output, stderr=output) as demo:
        # Opening a FIFO waits for its writer: the command is running.
        command_and_child = [psutil.Process(int(pid)) for pid in (tmp_path / "pids").read_text().split()]
        demo.send_signal(number)
        demo.wait(timeout=300)
    running = [process for process in command_and_child if is_running(process)]
    for process in running:
        process.kill()
    assert demo.returncode == code, log.read_text()
    assert (tmp_path / "ray-stopped").exists()
    assert len(command_and_child) == 2
    assert not running


def test_the_evaluated_model_is_that_of_the_demos_run(tmp_path: Path) -> None:
    assert demo_job.trained_model(tmp_path, "x4") == str(tmp_path)
    result = TrainingResult("demo", "id", "gan", 20, "0" * 64, "checkpoints/gan-00000020", 3, {}, {})
    RESULT.write(Storage(str(tmp_path)), result)
    assert demo_job.trained_model(tmp_path, "x4") == "models:/x4/3"


def is_running(process: psutil.Process) -> bool:
    """Whether it still runs; in a container without an init process it may remain as a zombie."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
