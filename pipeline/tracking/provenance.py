"""Provenance tags of a run: command, git commit, library versions, hardware."""

import os
import platform
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

LIBRARIES = ("torch", "torchvision", "ray", "mlflow", "pyarrow", "numpy")
PROJECT = Path(__file__).resolve().parents[2]


def provenance_tags() -> dict[str, str]:
    """Tag to value: the command, git commit and whether files differ from it, library versions, the machine."""
    source = {"mlflow.source.name": Path(sys.argv[0]).name, "mlflow.source.type": "LOCAL"}
    return {**source, **_git(), **_libraries(), **_machine()}


def _git() -> dict[str, str]:
    """Commit and dirty flag if the project is a git checkout; empty otherwise."""
    if not (PROJECT / ".git").exists():
        return {}
    commit = _output("git", "-C", str(PROJECT), "rev-parse", "HEAD")
    changes = _output("git", "-C", str(PROJECT), "status", "--porcelain")
    if commit is None or changes is None:
        return {}
    # MLflow's page shows the first of these as the run's source version.
    return {"mlflow.source.git.commit": commit, "git.commit": commit, "git.dirty": str(bool(changes)).lower()}


def _libraries() -> dict[str, str]:
    versions = {"version.python": platform.python_version()}
    for name in LIBRARIES:
        try:
            versions[f"version.{name}"] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _machine() -> dict[str, str]:
    tags = {
        "machine.system": platform.platform(),
        "machine.cpus": str(os.cpu_count()),
        "machine.memory_gib": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f}",
    }
    if shutil.which("nvidia-smi"):
        gpus = _output("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")
        if gpus:
            tags["machine.gpus"] = "; ".join(gpus.splitlines())
    return tags


def _output(*command: str) -> str | None:
    try:
        finished = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return finished.stdout.strip()
