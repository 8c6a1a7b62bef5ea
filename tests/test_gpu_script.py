"""benchmarks/gpu.sh: every part is in the report, a failing one does not end the visit, all GPU tests are run."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent


def visit(folder: Path, **environment: str) -> tuple[int, str]:
    """Tries the script on the CPU; its exit code and report."""
    inherited = {
        name: value for name, value in os.environ.items() if name not in {"PARTS", "WHEELS", "PHOTOS"}
    }
    result = subprocess.run(
        [str(ROOT / "benchmarks" / "gpu.sh"), str(folder / "out")],
        env={**inherited, "PYTHON": sys.executable, "DEVICE": "cpu", "TINY": "1", **environment},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "report:" in result.stdout
    return result.returncode, (folder / "out" / "report.md").read_text()


def program(path: Path, *lines: str) -> str:
    path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    path.chmod(0o755)
    return str(path)


@pytest.mark.slow
def test_the_report_holds_every_part(tmp_path: Path) -> None:
    for use, side in (("train", 128), ("held_out", 160)):
        (tmp_path / "photos" / use).mkdir(parents=True)
        for index in range(3):
            pixels = np.random.default_rng(index).integers(0, 256, (192, side + 96, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / use / f"{use}{index}.png")
    code, report = visit(
        tmp_path, PARTS="environment step train upscale stages", PHOTOS=str(tmp_path / "photos")
    )
    assert [line for line in report.splitlines() if line.startswith("## ")] == [
        "## environment", "## step", "## train", "## upscale", "## stages"
    ]  # fmt: skip
    assert report.count(": exit code 0, ") == 5, report
    assert "matrix product" in report
    assert code == 0


def test_a_failing_part_does_not_end_the_visit(tmp_path: Path) -> None:
    code, report = visit(tmp_path, PYTHON=program(tmp_path / "python", "echo no torch here", "exit 3"))
    assert report.count("exit code 3") == report.count("\n## ") == 7
    assert code == 1


@pytest.mark.parametrize(
    ("parts", "message"),
    [("step steps", "PARTS: unknown part steps"), ("stages", "PHOTOS: the part stages")],
)
def test_a_wrong_choice_of_parts_is_one_line_and_exit_code_2(
    tmp_path: Path, parts: str, message: str
) -> None:
    result = subprocess.run(
        [str(ROOT / "benchmarks" / "gpu.sh"), str(tmp_path / "out")],
        env={**os.environ, "PARTS": parts, "PHOTOS": ""}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 2
    assert result.stderr.startswith(message)


def test_every_file_with_tests_of_a_gpu_is_run() -> None:
    script = (ROOT / "benchmarks" / "gpu.sh").read_text()
    marked = {path for path in ROOT.glob("tests/test_*.py") if "mark.gpu" in path.read_text()}
    needs_mlflow = {ROOT / "tests" / "test_tracking_model.py"}
    assert len(marked) > 8
    for path in marked - set(ROOT.glob("tests/test_gpu_*.py")) - needs_mlflow:
        assert f"tests/{path.name}" in script


@pytest.mark.slow
def test_the_tests_need_none_of_the_projects_pytest_plugins(tmp_path: Path) -> None:
    python = program(
        tmp_path / "python", f'exec {sys.executable} "$@" -p no:timeout -p no:xdist --collect-only'
    )
    code, report = visit(tmp_path, PYTHON=python, PARTS="tests")
    assert code == 0, report
