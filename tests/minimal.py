"""Runs commands as if only the packages that training on one machine needs were installed."""

import itertools
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import forked

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


def _block() -> None:
    """Hides the blocked packages from the imports and the version requests of this process."""
    blocked, version = blocked_packages(), metadata.version
    loaded = [name for name in sys.modules if name.split(".")[0] in blocked_modules()]  # torch imports tqdm
    sys.modules.update(dict.fromkeys([*blocked_modules(), *loaded]))

    def installed_version(name: str) -> str:
        if name.lower().replace("_", "-") in blocked:
            raise metadata.PackageNotFoundError(name)
        return version(name)

    metadata.version = installed_version


def run_minimal(*program: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs a script and its arguments in a process without the blocked packages: neither modules nor versions."""
    return forked.run([*program], folder, prepare=_block)
