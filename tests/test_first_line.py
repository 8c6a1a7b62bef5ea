"""The first line of a command comes before the libraries that take seconds to import."""

import subprocess
import sys
from pathlib import Path

import pytest

JOBS = Path(__file__).parent.parent / "jobs"
# Prints the modules that were imported when the first line was printed, and ends there.
PROBE = """
import builtins, runpy, sys
def first_line(text, **options):
    heavy = {"torch", "ray", "mlflow"} & set(sys.modules)
    builtins.written = sys.stdout.write(f"{text}|{sorted(heavy)}")
    raise SystemExit(0)
builtins.print = first_line
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize(
    ("job", "line"),
    [
        ("upscale", "upscaling images"),
        ("evaluate", "evaluating models"),
        ("export_model", "exporting a model"),
        ("train_gan", "training"),
        ("tune_gan", "sweep"),
        ("prepare_data", "preparing data"),
        ("promote", "promoting a model"),
        ("send_metrics", "sending a run to MLflow"),
        ("demo", "demo"),
    ],
)
def test_the_first_line_is_printed_before_torch_is_imported(job: str, line: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROBE, str(JOBS / f"{job}.py")],
        capture_output=True, text=True, cwd=JOBS.parent, check=False,
    )  # fmt: skip
    assert done.stdout.startswith(f"{line}: loading "), done.stderr
    assert done.stdout.endswith("|[]")
