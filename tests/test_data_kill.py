"""A killed ingest resumes, and ends with the same bytes as an undisturbed one."""

import signal
from pathlib import Path

import forked
import pytest
from tiny import write_photos

# Kills itself at the n-th call of a function: before or after its work.
SCRIPT = """
import os, signal, sys
from pipeline.data import prepare
from pipeline.data.ingest import writer
from pipeline.data.config import DataConfig
from pipeline.data.format.shards import ShardWriter
from pipeline.storage import Storage

folder, root, owner, name, count, when, on_ray = sys.argv[1:]
writer._MIB = 700  # two of the small images fill a shard
if owner != "-":
    kind = {"ShardWriter": ShardWriter, "Storage": Storage}[owner]
    real = getattr(kind, name)
    calls = 0

    def killing(*arguments, **more):
        global calls
        calls += 1
        if calls == int(count) and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = real(*arguments, **more)
        if calls == int(count):
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(kind, name, killing)
data = DataConfig(source=folder + "/photos", held_out=folder + "/held_out", root=folder + "/" + root,
                  patch_px=64, patch_stride_px=32)
prepare(data, on_ray=on_ray == "ray")
"""


def run(
    folder: Path, root: str, point: tuple[str, str, int, str] = ("-", "", 0, ""), on_ray: bool = False
) -> int:
    script = folder / "ingest.py"
    script.write_text(SCRIPT)
    done = forked.run([str(script), str(folder), root, *map(str, point), "ray" if on_ray else "here"])
    return done.returncode


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_a_kill_anywhere_changes_no_byte(tmp_path: Path) -> None:
    write_photos(tmp_path / "photos", 5, 100, seed=1)
    write_photos(tmp_path / "held_out", 2, 64, seed=2)
    assert run(tmp_path, "whole") == 0
    whole = contents(tmp_path / "whole")
    assert len([name for name in whole if name.startswith("patches")]) > 1
    points = [
        ("ShardWriter", "write", 2, "before"),  # in the first shard
        (
            "ShardWriter",
            "write",
            4,
            "after",
        ),  # in a later one: both of its images written, the shard not closed
        ("ShardWriter", "finish", 2, "before"),  # not renamed yet
        ("ShardWriter", "finish", 1, "after"),  # a shard without its note
        ("Storage", "write_bytes", 1, "after"),  # a note without a next shard
        ("Storage", "remove", 1, "before"),  # the manifest is written, the notes still exist
    ]
    # The ingest into one folder is killed at one point after another.
    for point in points:
        assert run(tmp_path, "broken", point) == -signal.SIGKILL, point
    assert (tmp_path / "broken" / "manifest.json").exists()
    assert run(tmp_path, "broken") == 0
    assert contents(tmp_path / "broken") == whole


@pytest.mark.slow
@pytest.mark.ray
def test_a_kill_of_ingest_on_ray_changes_no_byte(ray_cluster: str, tmp_path: Path) -> None:
    write_photos(tmp_path / "photos", 4, 100, seed=1)
    write_photos(tmp_path / "held_out", 1, 64, seed=2)
    assert run(tmp_path, "whole") == 0
    # In the second shard.
    point = ("ShardWriter", "write", 3, "after")
    assert run(tmp_path, "broken", point, on_ray=True) == -signal.SIGKILL
    assert run(tmp_path, "broken", on_ray=True) == 0
    assert contents(tmp_path / "broken") == contents(tmp_path / "whole")
