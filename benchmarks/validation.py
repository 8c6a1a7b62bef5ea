"""Validation: seconds for 100 images of DIV2K's size, of the network and of each metric.

A few noise images are validated by `pipeline.training.validation.validate`, and the time is scaled to 100; each metric
is also measured alone. LPIPS and DISTS run on random backbones, which take the same time. A metric without its package
is skipped. On a GPU the network is the paper's, and times are wall-clock. On a CPU the network is a tiny one, because
the paper's takes minutes, and times are CPU time of all threads.

    python benchmarks/validation.py --device cuda
    python benchmarks/validation.py --device cpu --images 2 --threads 1
"""

import argparse
import hashlib
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torchvision
from turns import cpu_name

from pipeline.data import HeldOutPhoto
from pipeline.errors import UserError, is_installed
from pipeline.imaging import bicubic_upscale, luma, matlab_bicubic_downscale
from pipeline.metrics import FIDELITY, METRICS, MetricSet, weights
from pipeline.model import RRDBNet
from pipeline.model.trunk import use_kernels
from pipeline.training.validation import validate
from pipeline.training.validation_sets import ValidationSet

BACKBONES = {"lpips": torchvision.models.alexnet, "dists": torchvision.models.vgg16}
SCALED_TO = 100


def write_random_backbones(folder: Path) -> None:
    """Replaces the weights files that LPIPS and DISTS expect."""
    for name, make in BACKBONES.items():
        state = {f"features.{key}": value for key, value in make().features.state_dict().items()}
        torch.save(state, folder / name)
        digest = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        weights.BACKBONES[name] = (folder / name).rename(folder / f"{name}-{digest[:8]}.pth").name


def with_scikit_image(sr: np.ndarray, hr: np.ndarray) -> None:
    """PSNR and SSIM of one image, of luma and of RGB."""
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity

    inside = [image[4:-4, 4:-4] for image in (sr, hr)]
    for pair in ([luma(image)[..., None] for image in inside], [image.astype(float) for image in inside]):
        peak_signal_noise_ratio(*pair, data_range=255)
        structural_similarity(
            *pair,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            data_range=255,
            channel_axis=2,
        )


def photos(count: int, height: int, width: int) -> list[HeldOutPhoto]:
    draws = np.random.default_rng(0)
    images = [draws.integers(0, 256, (height, width, 3), dtype=np.uint8) for _ in range(count)]
    return [HeldOutPhoto(f"{index}.png", hr, matlab_bicubic_downscale(hr)) for index, hr in enumerate(images)]


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Time of a call's second run: wall-clock on a GPU, else CPU time of all threads."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = clock()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument("--size", type=int, nargs=2, default=(1404, 2040), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else cpu_name()
    height, width = options.size
    print(f"{name}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"{options.images} images of {width} x {height}, in seconds for {SCALED_TO}:")
    images = photos(options.images, height, width)
    scale = SCALED_TO / options.images
    sr, hr, lr = (
        np.stack(arrays)
        for arrays in zip(*((bicubic_upscale(photo.lr), photo.hr, photo.lr) for photo in images), strict=True)
    )
    with tempfile.TemporaryDirectory() as folder:
        write_random_backbones(Path(folder))
        usable = []
        for metric in METRICS:
            try:
                alone = MetricSet([metric], device, folder=folder)
            except UserError as error:
                print(f"{metric}: skipped, {error}")
                continue
            usable.append(metric)

            def measure(metrics: MetricSet = alone) -> None:
                for index in range(len(sr)):
                    metrics.measure(*(each[index : index + 1] for each in (sr, hr, lr)))

            print(f"{metric}: {seconds(measure, device) * scale:.1f}", flush=True)
        if is_installed("skimage"):
            reference = seconds(
                lambda: [with_scikit_image(*pair) for pair in zip(sr, hr, strict=True)], device
            )
            print(f"PSNR and SSIM with scikit-image, one thread: {reference * scale:.1f}", flush=True)
        sizes = () if device.type == "cuda" else (4, 1, 2)
        network = RRDBNet(*sizes).to(device, memory_format=torch.channels_last).eval()
        use_kernels(network)
        network_name = "the paper's network" if device.type == "cuda" else "a tiny network"
        sets = [ValidationSet("held_out", images)]
        for chosen, metrics in (("PSNR and SSIM", FIDELITY), ("all of these", usable)):
            together = MetricSet(metrics, device, folder=folder)
            ways = [("in TF32", False), ("as with precision=bf16", True)]
            for how, half in ways if device.type == "cuda" else [("in float32", False)]:
                whole = seconds(partial(validate, network, sets, together, half), device)
                print(f"validation with {network_name} {how} and {chosen}: {whole * scale:.1f}", flush=True)


if __name__ == "__main__":
    main()
