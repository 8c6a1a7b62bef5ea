"""Rate and memory of ingest: `python benchmarks/ingest.py` prints a table.

Images of DIV2K's size are mosaics of the sample images, as PNG. All files are in a temporary folder (about 4 GB) and
in the page cache. Ray is a private cluster.
"""

import argparse
import os
import platform
import resource
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["RAY_AUTH_MODE"] = "disabled"

import numpy as np
import psutil
import pyarrow
import torch
from PIL import Image, ImageOps

from pipeline.data import prepare
from pipeline.data.config import DataConfig
from pipeline.data.ingest.cutting import CutImage, Rejection, cut_image
from pipeline.data.ingest.decoding import read_photo
from pipeline.data.ingest.plan import make_plan
from pipeline.data.ingest.ray_ingest import cut_on_ray
from pipeline.data.ingest.sample_images import write_sample_photos
from pipeline.imaging import matlab_bicubic_downscale

HEIGHT, WIDTH = 1356, 2040
MEGAPIXELS = HEIGHT * WIDTH / 1e6
FEW = 8  # images of a timed run
MANY = 200  # images of the largest run for memory; a tenth of them in the smallest


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="repetitions of every rate")
    parser.add_argument("--without-ray", action="store_true", help="skip the large runs")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="ingest") as name:
        folder = Path(name)
        write_photos(folder / "few", FEW)
        results = rates(folder, arguments.rounds)
        table = [("figure", "median", "lowest to highest", "target"), *rows_of(results)]
        if not arguments.without_ray:
            table += on_ray(folder, arguments.rounds, statistics.median(results["decode"]))
    print(
        f"\n{platform.machine()}, {os.cpu_count()} cores, load {load:.1f} before; Python {platform.python_version()}, "
        f"Pillow {Image.__version__}, pyarrow {pyarrow.__version__}; images of {WIDTH} x {HEIGHT}, PNG, "
        f"patches of 480 px every 352, raw; {arguments.rounds} rounds\n"
    )
    for number, row in enumerate(table):
        print("| " + " | ".join(row) + " |")
        if number == 0:
            print("|" + "---|" * len(row))


def rates(folder: Path, rounds: int) -> dict[str, list[float]]:
    """Megapixels per CPU second of each stage, once per round."""
    files = [path.read_bytes() for path in sorted((folder / "few").iterdir())]
    images = [read_photo(data).pixels for data in files]
    jobs = make_plan(config(folder, "few")).jobs
    ways: dict[str, Callable[[], object]] = {
        "decode": lambda: [read_photo(data) for data in files],
        "degrade": lambda: [matlab_bicubic_downscale(image, 4) for image in images],
        "cut": lambda: [consume(cut_image(job, config(folder, "few"), False)) for job in jobs],
        "ingest": lambda: ingest(folder, "few", on_ray=False),
    }
    results: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            before = cpu_seconds()
            way()
            results[name].append(FEW * MEGAPIXELS / (cpu_seconds() - before))
            shutil.rmtree(folder / "data", ignore_errors=True)
    return results


def rows_of(results: dict[str, list[float]]) -> list[tuple[str, ...]]:
    """The results of `rates` as table rows."""
    texts = {
        "decode": "decoding and checking alone, Mpx/s per core",
        "degrade": "degrading alone, Mpx/s per core",
        "cut": "all but writing, Mpx/s per core",
        "ingest": "ingest in one process, Mpx/s per core",
    }
    rows = [(text, *spread(results[name]), "") for name, text in texts.items()]
    ratio = [one / other for one, other in zip(results["ingest"], results["decode"], strict=True)]
    return [*rows, ("ingest in one process to decoding alone", *spread(ratio, 2), "0.4")]


def on_ray(folder: Path, rounds: int, decoding: float) -> list[tuple[str, ...]]:
    """The rate of an ingest on Ray, and the peak memory of its processes, for a tenth of the images and for all.

    Measuring memory takes CPU time (the kernel walks through every page), so rates are measured in separate runs.
    """
    import ray

    ray.init(address="local", include_dashboard=False, object_store_memory=1 << 30, log_to_driver=False)
    try:
        for image in cut_on_ray(make_plan(config(folder, "few")).jobs, config(folder, "few"), False):
            consume(image)  # starts the workers and their imports
        peaks, parts = [], []
        for count in (MANY // 10, MANY):
            shutil.rmtree(folder / "many", ignore_errors=True)
            write_photos(folder / "many", count)
            with Peak() as peak:
                ingest(folder, "many", on_ray=True)
            shutil.rmtree(folder / "data")
            peaks.append(peak.mib)
            parts.append(peak.parts)
        per_core, wall_clock = [], []
        for _ in range(rounds):
            began, cpu = time.monotonic(), cpu_seconds_of_all()
            ingest(folder, "many", on_ray=True)
            wall_clock.append(MANY * MEGAPIXELS / (time.monotonic() - began))
            per_core.append(MANY * MEGAPIXELS / (cpu_seconds_of_all() - cpu))
            shutil.rmtree(folder / "data")
        return [
            (
                f"ingest of {MANY} images on Ray, Mpx/s per core, Ray's own CPU included",
                *spread(per_core),
                "",
            ),
            ("ingest on Ray to decoding alone", *spread([rate / decoding for rate in per_core], 2), "0.4"),
            ("the same wall-clock, Mpx/s", *spread(wall_clock), ""),
            (f"peak memory, {MANY // 10} images on Ray", f"{peaks[0]:.0f} MiB", parts[0], ""),
            (f"peak memory, {MANY} images on Ray", f"{peaks[1]:.0f} MiB", parts[1], ""),
            ("peak memory, 10x the data to 1x", f"{peaks[1] / peaks[0]:.2f}", "", "flat"),
        ]
    finally:
        ray.shutdown()


class Peak:
    """The most memory that this process and those below it have at once; what they share counts once."""

    def __enter__(self) -> "Peak":
        self.mib, self.parts = 0.0, ""
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        me = psutil.Process()
        while not self._over.wait(0.5):
            own, others = mib_of([me]), mib_of(me.children(recursive=True))
            if own + others > self.mib:
                self.mib, self.parts = own + others, f"{own:.0f} writing, {others:.0f} Ray and its workers"


def mib_of(processes: list[psutil.Process]) -> float:
    """Proportional memory of processes, in MiB."""
    total = 0
    for process in processes:
        try:
            total += process.memory_full_info().pss
        except psutil.Error:
            continue
    return total / 2**20


def consume(image: CutImage | Rejection) -> None:
    """Computes the patches of an image."""
    assert isinstance(image, CutImage)
    for _ in image.tables:
        pass


def ingest(folder: Path, photos: str, on_ray: bool) -> None:
    """A whole ingest into a new folder."""
    prepare(config(folder, photos), on_ray=on_ray)


def config(folder: Path, photos: str) -> DataConfig:
    """The published patch size."""
    return DataConfig(source=str(folder / photos), root=str(folder / "data"))


def write_photos(folder: Path, count: int) -> None:
    """Different images of DIV2K's size: mosaics of the sample images at their own resolution."""
    with tempfile.TemporaryDirectory() as samples:
        write_sample_photos(samples)
        parts = []
        for path in sorted(Path(samples).rglob("*.png")):
            with Image.open(path) as image:
                parts.append(image.convert("RGB").crop((0, 0, 408, 300)))
    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(count):
        mosaic = Image.new("RGB", (WIDTH, 1500))
        for y in range(0, 1500, 300):
            for x in range(0, WIDTH, 408):
                part = parts[random.integers(len(parts))]
                mosaic.paste(ImageOps.mirror(part) if random.integers(2) else part, (x, y))
        mosaic.crop((0, 0, WIDTH, HEIGHT)).save(folder / f"{number:04d}.png")


def cpu_seconds() -> float:
    """CPU time of this process."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def cpu_seconds_of_all() -> float:
    """CPU time of this process and its children, including Ray's."""
    me = psutil.Process()
    total = 0.0
    for process in [me, *me.children(recursive=True)]:
        try:
            times = process.cpu_times()
        except psutil.Error:
            continue
        total += times.user + times.system
    return total


def spread(values: list[float], digits: int = 1) -> tuple[str, str]:
    """Median, and the range."""
    return (
        f"{statistics.median(values):.{digits}f}",
        f"{min(values):.{digits}f} to {max(values):.{digits}f}",
    )


if __name__ == "__main__":
    main()
