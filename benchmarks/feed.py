"""Rate and memory of the feed: `python benchmarks/feed.py` prints a table of ratios, measured in one run.

All files are in a temporary folder and in the page cache. Ray is a private cluster with all CPUs of the machine. The
object store is moto's server in a separate process on this machine.
"""

import argparse
import io
import os
import platform
import resource
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import psutil
import pyarrow as pa
import torch
from PIL import Image

from pipeline.data.feed import Feed, RawBatch
from pipeline.data.feed.fetch import fetch, flipped, opened, put_flipped
from pipeline.data.feed.samples import Samples
from pipeline.data.format import manifest as manifests
from pipeline.data.format.manifest import Shard, load_manifest
from pipeline.data.format.row_checksums import pack, patch_checksums
from pipeline.data.format.shards import PATCH_SCHEMA, ShardWriter
from pipeline.imaging import matlab_bicubic_downscale
from pipeline.storage import Storage

PATCH, SCALE, CROP, BATCH = 480, 4, 128, 16
PATCHES, ROWS = 128, 32


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="repetitions of every measurement")
    parser.add_argument("--without-ray", action="store_true", help="skip the measurements that need Ray")
    parser.add_argument("--memory-of", metavar="ROOT", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_of:
        print(grown_mib(arguments.memory_of))
        return
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="feed") as folder:
        patches = make_patches()
        root = write_data(Path(folder) / "data", patches, ROWS)
        feed = Feed(root, seed=1, batch_size=BATCH, crop_px=CROP)
        table = [("figure", "median", "lowest to highest", "target")]
        table += rates(feed, patches, arguments.rounds, not arguments.without_ray)
        # moto reads a whole object for each range of it, so these objects are small.
        table += from_s3(Path(write_data(Path(folder) / "small", patches, 8)), arguments.rounds)
        table += memory(Path(folder), patches, not arguments.without_ray)
        table += first_batches(Path(folder), arguments.rounds)
    print(
        f"\n{platform.machine()}, {os.cpu_count()} cores, load {load:.1f} before; Python {platform.python_version()}, "
        f"torch {torch.__version__}; {PATCHES} patches of {PATCH} px (raw), batches of {BATCH} crops of {CROP} px; "
        f"{arguments.rounds} rounds\n"
    )
    for number, row in enumerate(table):
        print("| " + " | ".join(row) + " |")
        if number == 0:
            print("|" + "---|" * len(row))


def rates(
    feed: Feed, patches: list[tuple[np.ndarray, np.ndarray]], rounds: int, with_ray: bool
) -> list[tuple[str, ...]]:
    """Patches per second of every way, one after the other in each round; and the CPU time of a feed."""
    samples = Samples(len(patches), PATCH, SCALE, feed.seed, BATCH, CROP)
    pngs = [png(hr) for hr, _ in patches]
    small_pngs = [png(lr) for _, lr in patches]
    ways: dict[str, Callable[[], tuple[float, float]]] = {
        "memory": lambda: timed(from_memory(patches, samples, step) for step in range(60)),
        "png": lambda: timed(from_png(pngs, small_pngs, samples, step) for step in range(6)),
        "thread": lambda: from_feed(feed, 150),
    }
    results: dict[str, list[float]] = {}
    cost: dict[str, list[float]] = {}
    steps: dict[str, list[float]] = {}
    reader, order = opened(load_manifest(feed.root), feed.seed, BATCH, CROP)
    with closing(reader), ray_or_not(with_ray):
        ways["fetch"] = lambda: timed(fetch(reader, order, step, 0, BATCH) for step in range(60))
        if with_ray:
            from pipeline.data.feed.ray_feed import RayFeed

            ray_feed = RayFeed(feed.root, seed=feed.seed, batch_size=BATCH, crop_px=CROP)
            ways["ray"] = lambda: from_feed(ray_feed, 2400, cpu_seconds_of_all)
        feeds: dict[str, Feed] = {"thread": feed} | ({"ray": ray_feed} if with_ray else {})
        for _ in range(rounds):
            for name, way in ways.items():
                rate, seconds = way()
                results.setdefault(name, []).append(rate)
                cost.setdefault(name, []).append(seconds)
            for name, one in ({"none": None} | feeds).items():
                steps.setdefault(name, []).append(small_operations(one))

    def ratio(one: str, other: str, values: dict[str, list[float]] = results) -> tuple[str, str]:
        return spread([a / b for a, b in zip(values[one], values[other], strict=True)])

    rows: list[tuple[str, ...]] = [
        (f"{name}, patches/s", *spread(rate, 0), "") for name, rate in results.items()
    ]
    rows += [
        ("fetch to arrays in memory", *ratio("fetch", "memory"), "0.5"),
        ("fetch to decoding PNG (BasicSR's way)", *ratio("fetch", "png"), "20"),
    ]
    for name, least in (("thread", "0.95"), ("ray", "0.8")):
        if name in feeds:
            rows += [
                (f"{name} feed to fetch", *ratio(name, "fetch"), least),
                (
                    f"step of small operations, {name} feed to none",
                    *ratio(name, "none", steps),
                    "at most 1.1",
                ),
                (f"CPU seconds per 1000 patches, {name} feed", *spread(cost[name]), "reported"),
            ]
    return [*rows, ("CPU seconds per 1000 patches, fetch", *spread(cost["fetch"]), "reported")]


def timed(
    batches: Iterator[RawBatch], cpu_seconds: Callable[[], float] = time.process_time
) -> tuple[float, float]:
    """(patches per second, CPU seconds per 1000 patches); the first batch does not count."""
    next(batches)
    began, cpu = time.perf_counter(), cpu_seconds()
    count = sum(1 for _ in batches) * BATCH
    return count / (time.perf_counter() - began), 1000 * (cpu_seconds() - cpu) / count


def from_feed(
    feed: Feed, steps: int, cpu_seconds: Callable[[], float] = time.process_time
) -> tuple[float, float]:
    """The same, through a feed."""
    with closing(feed.batches(0, steps)) as batches:
        return timed(batches, cpu_seconds)


def from_memory(patches: list[tuple[np.ndarray, np.ndarray]], samples: Samples, step: int) -> RawBatch:
    """The bound: `fetch` without reading and verifying."""
    hr = np.empty((BATCH, CROP, CROP, 3), np.uint8)
    lr = np.empty((BATCH, CROP // SCALE, CROP // SCALE, 3), np.uint8)
    draws = samples.of_step(step)
    for index, (patch, y, x, flips) in enumerate(
        zip(draws.patch.tolist(), draws.y.tolist(), draws.x.tolist(), draws.flips.tolist(), strict=True)
    ):
        large, small = patches[patch]
        put_flipped(hr[index], large[y : y + CROP, x : x + CROP], flips)
        y, x = y // SCALE, x // SCALE
        put_flipped(lr[index], small[y : y + CROP // SCALE, x : x + CROP // SCALE], flips)
    return RawBatch(lr, hr, 0)


def from_png(pngs: list[bytes], small_pngs: list[bytes], samples: Samples, step: int) -> RawBatch:
    """BasicSR's order of work: decode both PNGs to float, crop, flip, stack."""
    draws = samples.of_step(step)
    pairs = []
    for patch, y, x, flips in zip(
        draws.patch.tolist(), draws.y.tolist(), draws.x.tolist(), draws.flips.tolist(), strict=True
    ):
        images = []
        for data, one, two, side in (
            (pngs[patch], y, x, CROP),
            (small_pngs[patch], y // SCALE, x // SCALE, CROP // SCALE),
        ):
            with Image.open(io.BytesIO(data)) as image:
                pixels = np.asarray(image).astype(np.float32) / 255
            pixels = flipped(pixels[one : one + side, two : two + side], flips)
            images.append(torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))))
        pairs.append(images)
    hr, lr = (torch.stack(images).numpy() for images in zip(*pairs, strict=True))
    return RawBatch(lr, hr, 0)  # its order of work ends in NCHW floats


def small_operations(feed: Feed | None) -> float:
    """Median seconds of a step of many small operations, with a concurrent feed, or on one constant batch."""
    weights = [torch.randn(48, 48) for _ in range(8)]
    durations = []
    batches = feed.batches(0, 150) if feed else constant(150)
    with closing(batches):
        for batch in batches:
            began = time.perf_counter()
            values = (
                torch.from_numpy(batch.lr)[..., 0]
                .reshape(-1, 32)
                .float()[:48, :1]
                .expand(48, 48)
                .contiguous()
            )
            for turn in range(1500):  # about 10 ms, most of it in the interpreter
                values = torch.tanh(values @ weights[turn % 8])
            durations.append(time.perf_counter() - began)
    return statistics.median(durations[20:])


def constant(steps: int) -> Iterator[RawBatch]:
    """The same batch at every step."""
    images = np.zeros((BATCH, CROP, CROP, 3), np.uint8)
    batch = RawBatch(images[:, ::SCALE, ::SCALE], images, 0)
    for _ in range(steps):
        yield batch


def from_s3(root: Path, rounds: int) -> list[tuple[str, ...]]:
    """The thread feed from an object store: its rate, and the waiting time of a device with 20 steps/s."""
    results: dict[str, list[float]] = {"rate": [], "cost": [], "idle": []}
    with s3_server() as address:
        store = Storage(address)
        for path in root.iterdir():
            store.write_bytes(path.name, path.read_bytes())
        feed = Feed(store.uri, seed=1, batch_size=BATCH, crop_px=CROP)
        for _ in range(rounds):
            rate, seconds = from_feed(feed, 60)
            results["rate"].append(rate)
            results["cost"].append(seconds)
            results["idle"].append(idle_share(feed, 100, 0.05))
    return [
        ("thread feed from s3, patches/s", *spread(results["rate"], 0), "reported"),
        (
            "CPU seconds per 1000 patches, thread feed from s3, without the server",
            *spread(results["cost"]),
            "reported",
        ),
        (
            "share of waiting, s3 feed at 20 steps/s of 16 (step: a pause)",
            *spread(results["idle"], 3),
            "at most 0.05",
        ),
    ]


def idle_share(feed: Feed, steps: int, step_s: float) -> float:
    """The share of time that steps of `step_s` wait for batches, after the first five."""
    waited = 0.0
    with closing(feed.batches(0, steps)) as batches:
        for step in range(steps):
            began = time.perf_counter()
            next(batches)
            if step >= 5:
                waited += time.perf_counter() - began
            time.sleep(step_s)
    return waited / (waited + (steps - 5) * step_s)


@contextmanager
def s3_server() -> Iterator[str]:
    """moto's server in another process, and the environment to reach it; yields the URI of an empty bucket."""
    import boto3

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    names = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    os.environ.update(names)
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            while True:
                try:
                    socket.create_connection(("127.0.0.1", port)).close()
                    break
                except ConnectionRefusedError:
                    if server.poll() is not None:
                        raise
                    time.sleep(0.1)
            boto3.client("s3").create_bucket(Bucket="patches")
            yield "s3://patches/set"
        finally:
            server.terminate()
            for name in names:
                os.environ.pop(name)


def memory(
    folder: Path, patches: list[tuple[np.ndarray, np.ndarray]], with_ray: bool
) -> list[tuple[str, ...]]:
    """MiB that each feed takes for batches, from a data set and from one of ten times its size."""
    grown: list[float] = []
    held: list[float] = []
    with ray_or_not(with_ray):
        for times in (1, 10):
            root = write_data(folder / f"times{times}", patches * times, ROWS)
            command = [sys.executable, __file__, "--memory-of", root]
            grown.append(float(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
            if with_ray:
                from pipeline.data.feed.ray_feed import RayFeed

                held.append(held_mib(RayFeed(root, 1, BATCH, CROP)))
            shutil.rmtree(root)
    rows: list[tuple[str, ...]] = []
    for name, results in (("thread feed", grown), ("ray feed's blocks in the object store", held)):
        if results:
            small, large = results
            rows += [
                (f"memory of the {name}, MiB", f"{small:.0f}", f"10x the data: {large:.0f}", ""),
                ("the same, 10x the data to 1x", f"{large / small:.2f}", "", "flat"),
            ]
    return rows


def held_mib(feed: Feed) -> float:
    """The most that Ray's object store holds while training takes a batch every 10 ms."""
    import ray

    def free() -> float:
        return float(ray.available_resources().get("object_store_memory", 0.0))

    before = least = free()
    with closing(feed.batches(0, 1000)) as batches:
        for number, _ in enumerate(batches):
            time.sleep(0.01)
            if number % 10 == 0:
                least = min(least, free())
    return (before - least) / 2**20


def grown_mib(root: str) -> float:
    """How much this process grows while it reads 300 batches."""
    torch.zeros(1)
    process = psutil.Process()
    before = peak = process.memory_info().rss
    with closing(Feed(root, seed=1, batch_size=BATCH, crop_px=CROP).batches(0, 300)) as batches:
        for _ in batches:
            peak = max(peak, process.memory_info().rss)
    return (peak - before) / 2**20


def first_batches(folder: Path, rounds: int) -> list[tuple[str, ...]]:
    """Seconds from nothing to the first batch, for manifests with as many sources as DIV2K at that size.

    All shards are links to one of 364 rows (a shard of 256 MiB) with small patches. Its patch ids are right for the
    first shard only, so a batch is timed as: manifest, order, the footers of the shards drawn, then crops of the first.
    """
    side, crop, rows = 32, 16, 364
    images = np.zeros((side, side, 3), np.uint8), np.zeros((side // SCALE, side // SCALE, 3), np.uint8)
    one = write_data(folder / "one", [images] * rows, rows)
    shard = load_manifest(one).shards[0]
    results: dict[int, list[float]] = {}
    for patches in (10_000, 1_000_000):
        many = folder / str(patches)
        many.mkdir()
        shards = [replace(shard, name=f"patches-{number:05d}.parquet") for number in range(patches // rows)]
        for link in shards:
            (many / link.name).symlink_to(Path(one) / shard.name)
        write_manifest(Storage(str(many)), shards, side, sources=patches // 23)
    for _ in range(rounds):
        for patches in (10_000, 1_000_000):
            began = time.perf_counter()
            manifest = load_manifest(str(folder / str(patches)))
            reader, samples = opened(manifest, 1, BATCH, crop)
            with closing(reader):
                for patch in samples.of_step(0).patch.tolist():
                    reader.edges(manifest.locate(patch)[0])
                for index in range(BATCH):
                    reader.crop(index, 0, 0, crop)
            results.setdefault(patches, []).append(time.perf_counter() - began)
    ratios = [large / small for small, large in zip(*results.values(), strict=True)]
    rows_of_table = [
        (f"first batch of {patches} patches, s", *spread(seconds, 3), "")
        for patches, seconds in results.items()
    ]
    return [*rows_of_table, ("first batch, the larger to the smaller", *spread(ratios), "at most 2")]


def make_patches() -> list[tuple[np.ndarray, np.ndarray]]:
    """Noise with the smoothness of photos, so that PNG compresses it as a photo."""
    draws = np.random.default_rng(0)
    results = []
    for _ in range(PATCHES):
        coarse = draws.integers(0, 256, (PATCH // 8, PATCH // 8, 3), np.uint8)
        smooth = np.asarray(
            Image.fromarray(coarse).resize((PATCH, PATCH), Image.Resampling.BICUBIC), np.int16
        )
        hr = (smooth + draws.normal(0, 4, smooth.shape)).clip(0, 255).astype(np.uint8)
        results.append((hr, np.ascontiguousarray(matlab_bicubic_downscale(hr, SCALE))))
    return results


def write_data(folder: Path, patches: list[tuple[np.ndarray, np.ndarray]], rows: int) -> str:
    """A data set of raw patches."""
    storage = Storage(str(folder))
    shards: list[Shard] = []
    for first in range(0, len(patches), rows):
        writer = ShardWriter(storage, f"patches-{len(shards):05d}.parquet", PATCH_SCHEMA)
        for number in range(first, first + rows):
            hr, lr = (image.tobytes() for image in patches[number])
            cells = {"patch_id": number, "source_id": 0, "y": 0, "x": 0, "hr": hr, "lr": lr, "detail": 1.0}
            cells["row_checksums"] = pack(number, patch_checksums(*patches[number]))
            writer.write(pa.Table.from_pylist([cells], schema=PATCH_SCHEMA))
        shards.append(writer.finish())
    write_manifest(storage, shards, len(patches[0][0]))
    return storage.uri


def write_manifest(storage: Storage, shards: list[Shard], side: int, sources: int = 0) -> None:
    """A manifest of those shards."""
    source = {
        "bytes": 4_000_000,
        "first_patch": 0,
        "height": 1404,
        "patches": 23,
        "path": "DIV2K_train_HR/0001.png",
    }
    source |= {"pixels_sha256": "0" * 64, "set": "train", "sha256": "0" * 64, "source_id": 0, "width": 2040}
    content = {
        "patches": sum(shard.rows for shard in shards),
        "settings": {"scale": SCALE, "patch_px": side, "codec": "raw"},
        "shards": [asdict(shard) for shard in shards],
        "sources": [source] * sources,
        **{"held_out": [], "rejected": [], "degradation": {}},
    }
    storage.write_bytes(manifests.NAME, manifests.encode(content))


def png(pixels: np.ndarray) -> bytes:
    """A PNG file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@contextmanager
def ray_or_not(with_ray: bool) -> Iterator[None]:
    """A private Ray cluster, if requested."""
    if not with_ray:
        yield
        return
    import ray

    os.environ["RAY_AUTH_MODE"] = "disabled"
    os.environ.pop("RAY_ADDRESS", None)
    with tempfile.TemporaryDirectory(prefix="er", dir="/tmp", ignore_cleanup_errors=True) as folder:
        ray.init(address="local", include_dashboard=False, _temp_dir=folder, log_to_driver=False)
        try:
            yield
        finally:
            ray.shutdown()


def cpu_seconds_of_all() -> float:
    """CPU time of this process and of the processes that it started, Ray's included."""
    total = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
    for child in psutil.Process().children(recursive=True):
        try:
            total += sum(child.cpu_times()[:2])
        except psutil.NoSuchProcess:
            continue
    return total


def spread(values: list[float], digits: int = 2) -> tuple[str, str]:
    """Median, and the range."""
    return f"{statistics.median(values):.{digits}f}", f"{min(values):.{digits}f} to {max(values):.{digits}f}"


if __name__ == "__main__":
    sys.exit(main())
