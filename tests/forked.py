"""Scripts in processes forked from one that has imported torch: importing it takes seconds of CPU time."""

import atexit
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest

# The packages of a minimal environment (tests/minimal.py), and pytest, which every child imports.
IMPORTED = [
    "pytest", "torch", "torchvision", "PIL.Image", "pyarrow.parquet", "pydantic_settings", "yaml", "safetensors.torch",
]  # fmt: skip

# One server per process, started with the first child; torch.multiprocessing uses the same.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(IMPORTED)


def _run_script(
    program: list[str],
    folder: Path,
    environment: dict[str, str],
    outputs: tuple[str, str],
    prepare: Callable[[], None] | None,
) -> None:
    """Runs a script with its arguments as the leader of a process group."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for descriptor, path in enumerate(outputs, start=1):
        with Path(path).open("ab") as output:
            os.dup2(output.fileno(), descriptor)
    # The server's streams have the buffers of other files.
    sys.stdout, sys.stderr = (os.fdopen(number, "w", 1, closefd=False) for number in (1, 2))
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    if prepare is not None:
        prepare()
    sys.argv = program
    try:
        runpy.run_path(program[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # multiprocessing does not call them; Ray stops its processes in one


def start(
    program: list[str],
    outputs: tuple[str, str],
    folder: Path | None = None,
    environment: dict[str, str] | None = None,
    prepare: Callable[[], None] | None = None,
) -> ForkServerProcess:
    """Starts a script with its arguments as the leader of a process group, which appends to two files."""
    arguments = (program, folder or Path.cwd(), environment or dict(os.environ), outputs, prepare)
    process = CONTEXT.Process(target=_run_script, args=arguments)
    process.start()
    return process


def run(
    program: list[str],
    folder: Path | None = None,
    environment: dict[str, str] | None = None,
    prepare: Callable[[], None] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Runs a script with its arguments to its end; the process calls `prepare` first."""
    with tempfile.TemporaryDirectory() as temporary:
        outputs = f"{temporary}/stdout", f"{temporary}/stderr"
        process = start(program, outputs, folder, environment, prepare)
        process.join()
        assert process.exitcode is not None
        return subprocess.CompletedProcess(
            program, process.exitcode, *(Path(output).read_text() for output in outputs)
        )


def run_until(program: list[str], text: str, environment: dict[str, str] | None = None) -> None:
    """Runs a script and kills it, with its children, at the first line that has `text`; fails where none has."""
    with tempfile.TemporaryDirectory() as temporary:
        fifo = Path(temporary) / "lines"
        os.mkfifo(fifo)
        process = start(program, (str(fifo), str(fifo)), environment=environment)
        assert process.pid is not None
        log = []
        with fifo.open() as lines:
            for line in lines:
                log.append(line)
                if text in line:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.join()
                    return
        process.join()
    pytest.fail(f"never printed {text!r}: {''.join(log)}")
