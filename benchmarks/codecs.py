"""Size and reading rate of each codec: `python benchmarks/codecs.py` prints a table.

The same patches in every codec, in a temporary folder and in the page cache; one process.
"""

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import pyarrow
from ingest import write_photos
from PIL import Image

from pipeline.data import load_manifest, prepare
from pipeline.data.config import DataConfig
from pipeline.data.format.reader import PatchReader

CODECS = ("raw", "webp")
PHOTOS, READ, CROP = 4, 60, 128


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="repetitions of every reading")
    rounds = parser.parse_args().rounds
    load = os.getloadavg()[0]
    print(
        "| codec | stored bytes per high-resolution pixel | crops of 128 px/s | whole patches/s | writing, patches/s |"
    )
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(prefix="codecs") as folder:
        write_photos(Path(folder) / "photos", PHOTOS)
        for codec in CODECS:
            data = DataConfig(source=f"{folder}/photos", root=f"{folder}/{codec}", codec=codec)
            began = time.process_time()
            prepare(data, on_ray=False)
            written = time.process_time() - began
            manifest = load_manifest(data.root)
            stored = sum(shard.bytes for shard in manifest.shards) / (manifest.patches * manifest.patch_px**2)
            reader = PatchReader(manifest)
            draws = np.random.default_rng(0)
            patches = draws.integers(0, manifest.patches, READ).tolist()
            offsets = (draws.integers(0, (manifest.patch_px - CROP) // 4 + 1, (READ, 2)) * 4).tolist()

            def crops(
                reader: PatchReader = reader, patches: list[int] = patches, offsets: list = offsets
            ) -> None:
                for patch, (y, x) in zip(patches, offsets, strict=True):
                    reader.crop(patch, y, x, CROP)

            def whole(reader: PatchReader = reader, patches: list[int] = patches) -> None:
                for patch in patches:
                    reader.patch(patch)

            cells = (
                codec,
                f"{stored:.2f}",
                rate(crops, rounds),
                rate(whole, rounds),
                f"{manifest.patches / written:.0f}",
            )
            print("| " + " | ".join(cells) + " |", flush=True)
            reader.close()
    print(
        f"\n{platform.machine()}, {os.cpu_count()} cores, load {load:.1f} before; Python {platform.python_version()}, "
        f"Pillow {Image.__version__}, pyarrow {pyarrow.__version__}; patches of 480 px, LR (x4) and row checksums "
        f"included; per CPU second of one process; medians of {rounds} rounds, lowest to highest"
    )


def rate(work: Callable[[], None], rounds: int) -> str:
    """Readings per CPU second."""
    work()
    values = []
    for _ in range(rounds):
        began = time.process_time()
        work()
        values.append(READ / (time.process_time() - began))
    return f"{statistics.median(values):.0f} ({min(values):.0f} to {max(values):.0f})"


if __name__ == "__main__":
    main()
