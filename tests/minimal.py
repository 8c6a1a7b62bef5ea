"""Runs commands as if only the packages that training on one machine needs were installed."""

import itertools
import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
NEEDED = {
    "torch", "torchvision", "numpy", "pillow", "pyarrow", "pydantic", "pydantic-settings", "pyyaml", "safetensors",
}  # fmt: skip
MODULES = {"scikit-image": "skimage", "scikit-learn": "sklearn"}


def blocked_modules() -> list[str]:
    """Top-level modules of all other dependencies."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    dependencies = [*project["dependencies"], *itertools.chain(*project["optional-dependencies"].values())]
    names = {re.split(r"[\[<>=]", each)[0] for each in dependencies} - NEEDED
    return sorted(MODULES.get(name, name).replace("-", "_") for name in names)


def run_minimal(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs a script (the first argument) in a process that cannot import the blocked modules."""
    code = (
        "import runpy, sys\n"
        f"sys.modules.update(dict.fromkeys({blocked_modules()!r}))\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
