"""benchmarks/gpu.sh: every part is in the report, and a failing one does not end the visit."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_the_report_holds_every_part(tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "PYTHON": sys.executable,
        "DEVICE": "cpu",
        "PARTS": "environment step train upscale",
        "TINY": "1",
    }
    result = subprocess.run(
        [str(ROOT / "benchmarks" / "gpu.sh"), str(tmp_path / "out")],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    report = (tmp_path / "out" / "report.md").read_text()
    assert [line for line in report.splitlines() if line.startswith("## ")] == [
        "## environment", "## step", "## train", "## upscale"
    ]  # fmt: skip
    assert report.count(": exit code 0, ") == 4, report
    assert "matrix product" in report
    assert "report:" in result.stdout
    assert result.returncode == 0


def test_a_failing_part_does_not_end_the_visit(tmp_path: Path) -> None:
    failing = tmp_path / "python"
    failing.write_text("#!/bin/sh\necho no torch here\nexit 3\n")
    failing.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(failing), "DEVICE": "cpu", "TINY": "1"}
    result = subprocess.run(
        [str(ROOT / "benchmarks" / "gpu.sh"), str(tmp_path / "out")],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    report = (tmp_path / "out" / "report.md").read_text()
    assert report.count("exit code 3") == report.count("\n## ") == 7
    assert result.returncode == 1
