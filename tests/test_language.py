"""The configured codespell reports every term of terms.txt."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CODESPELL = shutil.which("codespell", path=Path(sys.executable).parent)


@pytest.mark.skipif(CODESPELL is None, reason="codespell is not installed; see the dev extra")
def test_every_term_is_reported() -> None:
    terms = [line.partition("->")[0] for line in (ROOT / "tests" / "terms.txt").read_text().splitlines()]
    text = "\n".join([*terms, "colour", "`damaged`", "an image"])
    done = subprocess.run(
        [str(CODESPELL), "-"], cwd=ROOT, input=text, capture_output=True, text=True, check=False
    )
    numbers = [int(line.split(":")[0]) for line in done.stdout.splitlines() if line[:1].isdigit()]
    assert numbers == list(range(1, len(terms) + 2)), done.stdout + done.stderr
