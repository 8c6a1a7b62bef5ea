"""Imports point downwards and have no cycles; the core needs neither Ray nor MLflow."""

import ast
import functools
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DATA = "data data.config data.format data.ingest data.feed"
# Packages and single modules of pipeline/, from the lowest layer to the highest, and what each may import. The rows
# of a layer are as in CONTRIBUTING.md.
LAYERS = {
    # Base: errors, configuration sections, files.
    "errors": "",
    "section": "errors",
    "progress": "",
    "storage": "errors",
    "json_file": "errors storage",
    "run_folder": "json_file",
    # Core: torch, numpy and Pillow only.
    "imaging": "",
    "model": "errors section",
    "metrics": "errors imaging model",
    # Data: the data set on disk, its ingest, its batches; `pipeline.data` itself re-exports.
    "data.config": "section",
    "data.format": "errors progress storage imaging",
    "data.ingest": "errors progress storage imaging data.config data.format",
    "data.feed": "errors storage data.format",
    "data": "data.config data.format data.ingest",
    # Tracking and training.
    "tracking": "errors section storage json_file run_folder imaging model metrics",
    "training": "errors section storage json_file run_folder imaging model metrics tracking " + DATA,
    # On top of training.
    "tuning": "errors section storage json_file run_folder imaging model metrics data tracking training",
    "evaluation": "errors section progress storage json_file run_folder imaging model metrics tracking training "
    + DATA,
    # Used by jobs/ only.
    "command": "errors section json_file",
    "config": "errors section command training tuning",
}
RAY_FILES = {
    "pipeline/training/ray_compat.py",
    "pipeline/training/ray_cluster.py",
    "pipeline/training/ray_trainer.py",
    "pipeline/data/ingest/ray_ingest.py",
    "pipeline/data/feed/ray_feed.py",
    "pipeline/evaluation/ray_workers.py",
}
RAY_FOLDERS = ("pipeline/tuning/", "jobs/")


def modules() -> list[Path]:
    return sorted((ROOT / "pipeline").rglob("*.py"))


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(path) for path in modules()}


def package_of(module: str) -> str:
    """The row of LAYERS that a module belongs to; the longest that matches."""
    rows = [row for row in LAYERS if f"{module}.".startswith(f"pipeline.{row}.")]
    return max(rows, key=len)


def statements(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes, those in functions too, except for what only a type checker executes."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            continue
        yield node
        yield from statements(node)


@functools.cache
def imported(path: Path, source: str | None = None) -> set[str]:
    """The modules that a file imports; `from package import module` counts as the module."""
    names: set[str] = set()
    for node in statements(ast.parse(path.read_text() if source is None else source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                member = f"{node.module}.{alias.name}"
                names.add(member if member in MODULES else str(node.module))
    return names


def cycle(graph: dict[str, set[str]]) -> list[str]:
    """One cycle of a graph; empty if there is none."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def test_every_module_has_a_layer() -> None:
    assert all(package_of(module) for module in MODULES - {"pipeline"})


def test_layers_point_downwards() -> None:
    lower: set[str] = set()
    for row, targets in LAYERS.items():
        assert set(targets.split()) <= lower, row
        lower.add(row)


def test_imports_point_downwards() -> None:
    for path in modules():
        if name_of(path) != "pipeline":
            package = package_of(name_of(path))
            packages = {package_of(name) for name in imported(path) if name.startswith("pipeline.")}
            assert packages - {package} <= set(LAYERS[package].split()), path


def test_no_module_imports_itself_through_others() -> None:
    assert cycle({name_of(path): imported(path) & MODULES for path in modules()}) == []


def test_no_package_imports_itself_through_others() -> None:
    graph: dict[str, set[str]] = {row: set() for row in LAYERS}
    for path in modules():
        if name_of(path) != "pipeline":
            package = package_of(name_of(path))
            graph[package] |= {package_of(name) for name in imported(path) & MODULES} - {package}
    assert cycle(graph) == []


def test_cycles_and_imports_in_functions_are_detected() -> None:
    source = """
from typing import TYPE_CHECKING
from pipeline import errors
if TYPE_CHECKING:
    import pipeline.config
def function():
    from pipeline.training import checkpoint
    from pipeline.model import RRDBNet
"""
    assert imported(Path(), source) == {
        "typing", "pipeline.errors", "pipeline.training.checkpoint", "pipeline.model"
    }  # fmt: skip
    assert set(cycle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}})) == {"a", "b", "c"}


def test_ray_is_imported_only_at_the_edge() -> None:
    for path in modules():
        name = str(path.relative_to(ROOT))
        uses_ray = any(module.split(".")[0] == "ray" for module in imported(path))
        assert not uses_ray or name in RAY_FILES or name.startswith(RAY_FOLDERS), path


def test_internals_of_ray_are_imported_in_one_module() -> None:
    users = [
        path.name
        for path in modules()
        if any(name.startswith("ray.") and ("._" in name or ".core." in name) for name in imported(path))
    ]
    assert users == ["ray_compat.py"]


def test_mlflow_is_imported_only_in_tracking() -> None:
    for path in modules():
        uses_mlflow = any(module.split(".")[0] == "mlflow" for module in imported(path))
        assert not uses_mlflow or path.parts[-2] == "tracking", path


@pytest.mark.slow
def test_core_imports_without_ray_mlflow_or_pydantic() -> None:
    code = (
        "import sys\n"
        "for name in ('ray', 'mlflow', 'pydantic', 'pyarrow'):\n"
        "    sys.modules[name] = None\n"
        "import pipeline.model, pipeline.imaging, pipeline.metrics\n"
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
