"""benchmarks/gpu.sh: every part is in the report, and a failing one does not end the visit."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_the_report_holds_every_part(tmp_path: Path) -> None:
    # Without pytest, safetensors and so on, the tests fail; the environment is still described.
    environment = {
        **os.environ,
        "PYTHON": sys.executable,
        "DEVICE": "cpu",
        "PARTS": "environment step",
        "TINY": "1",
    }
    result = subprocess.run(
        [str(ROOT / "benchmarks" / "gpu.sh"), str(tmp_path / "out")],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    report = (tmp_path / "out" / "report.md").read_text()
    assert "## environment" in report
    assert "matrix product" in report
    assert "## step" in report
    assert "report:" in result.stdout
