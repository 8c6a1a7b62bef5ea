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


def blocked_packages() -> list[str]:
    """All other dependencies."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    dependencies = [*project["dependencies"], *itertools.chain(*project["optional-dependencies"].values())]
    # An extra may name this project.
    return sorted({re.split(r"[\[<>=]", each)[0] for each in dependencies} - NEEDED - {project["name"]})


def blocked_modules() -> list[str]:
    """Their top-level modules."""
    return [MODULES.get(name, name).replace("-", "_") for name in blocked_packages()]


def run_minimal(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs a script (the first argument) in a process without the blocked packages: neither modules nor versions."""
    code = (
        "import runpy, sys\n"
        "from importlib import metadata\n"
        f"sys.modules.update(dict.fromkeys({blocked_modules()!r}))\n"
        f"blocked, version = {blocked_packages()!r}, metadata.version\n"
        "def installed_version(name):\n"
        "    if name.lower().replace('_', '-') in blocked:\n"
        "        raise metadata.PackageNotFoundError(name)\n"
        "    return version(name)\n"
        "metadata.version = installed_version\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
