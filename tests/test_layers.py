"""Imports point downwards, and the core stays free of Ray and MLflow."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# A room may import itself and what stands before it in its list.
ALLOWED = {
    "errors": set(),
    "section": set(),
    "storage": {"errors"},
    "json_file": {"errors", "storage"},
    "run_folder": {"json_file"},
    "model": {"errors", "section"},
    "imaging": {"errors", "section", "model"},
    "data": {"errors", "section", "storage", "imaging"},
    "tracking": {"json_file", "run_folder", "errors", "section", "storage", "model", "imaging"},
    "training": {
        "json_file",
        "run_folder",
        "errors",
        "section",
        "storage",
        "model",
        "imaging",
        "data",
        "tracking",
    },
    "tuning": {
        "json_file",
        "run_folder",
        "errors",
        "section",
        "storage",
        "config",
        "training",
        "tracking",
        "data",
    },
    "evaluation": {
        "json_file",
        "run_folder",
        "errors",
        "section",
        "storage",
        "model",
        "imaging",
        "data",
        "tracking",
        "training",
    },
    "config": {"errors", "section", "training", "tuning"},
    "command": {"errors"},
}
# The same for the parts of pipeline/data.
ALLOWED_IN_DATA = {
    "config": set(),
    "format": set(),
    "ingest": {"config", "format"},
    "feed": {"format"},
    "__init__": {"config", "format", "ingest"},
}
RAY_FILES = {
    "pipeline/training/ray_compat.py",
    "pipeline/training/ray_trainer.py",
    "pipeline/data/ingest/ray_ingest.py",
    "pipeline/data/feed/ray_feed.py",
}
RAY_FOLDERS = ("pipeline/tuning/", "jobs/")


def modules() -> list[Path]:
    return sorted((ROOT / "pipeline").rglob("*.py"))


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_downwards(path: Path) -> None:
    parts = path.relative_to(ROOT / "pipeline").with_suffix("").parts
    room = parts[0]
    if room == "__init__":
        return
    rooms = {name.split(".")[1] for name in imported(path) if name.startswith("pipeline.")}
    assert rooms - {room} <= ALLOWED[room]


DATA_MODULES = [path for path in modules() if path.relative_to(ROOT / "pipeline").parts[0] == "data"]


@pytest.mark.parametrize("path", DATA_MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_ingest_and_feed_import_the_format_and_not_each_other(path: Path) -> None:
    part = path.relative_to(ROOT / "pipeline" / "data").with_suffix("").parts[0]
    # A name that is imported from the package itself would hide which part it comes from.
    parts = {name.split(".")[2] for name in imported(path) if name.startswith("pipeline.data.")}
    assert parts - {part} <= ALLOWED_IN_DATA[part]


def test_no_module_of_data_imports_itself_through_others() -> None:
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in DATA_MODULES}
    edges = {name: imported(path) & names.keys() for name, path in names.items()}
    while leaves := {name for name, targets in edges.items() if not targets & edges.keys()}:
        edges = {name: targets for name, targets in edges.items() if name not in leaves}
    assert not edges


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_ray_stands_only_at_the_edge(path: Path) -> None:
    name = str(path.relative_to(ROOT))
    uses_ray = any(module.split(".")[0] == "ray" for module in imported(path))
    at_the_edge = name in RAY_FILES or name.startswith(RAY_FOLDERS) or "spread" in name
    assert at_the_edge or not uses_ray


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_mlflow_stands_only_in_tracking(path: Path) -> None:
    uses_mlflow = any(module.split(".")[0] == "mlflow" for module in imported(path))
    assert not uses_mlflow or path.parts[-2] == "tracking"


def test_core_imports_without_ray_mlflow_or_pydantic() -> None:
    code = (
        "import sys\n"
        "for name in ('ray', 'mlflow', 'pydantic', 'pyarrow'):\n"
        "    sys.modules[name] = None\n"
        "import pipeline.model, pipeline.imaging\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_nothing_unpickles() -> None:
    for path in [*modules(), *(ROOT / "jobs").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                weights_only = [keyword.value for keyword in node.keywords if keyword.arg == "weights_only"]
                assert weights_only, f"{path}: torch.load without weights_only"
                assert ast.unparse(weights_only[0]) == "True"
            if isinstance(node, ast.Call):
                assert not ast.unparse(node.func).endswith(
                    ("pickle.load", "pickle.loads", "Unpickler", "joblib.load")
                ), path
