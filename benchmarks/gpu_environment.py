"""What this machine and its torch offer: versions, driver, torch's defaults, rates of copies and matrix products."""

import argparse
import platform
import shutil
import subprocess
import time

import torch

from pipeline.errors import UserError, is_installed
from pipeline.model.device import require_gpu

PACKAGES = (
    "ray", "mlflow", "torchvision", "pydantic_settings", "safetensors", "pyarrow", "skimage", "psutil", "pytest",
    "triton",
)  # fmt: skip


def main() -> None:
    """Prints one fact per line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    device = torch.device(parser.parse_args().device)
    print(f"python {platform.python_version()}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    print("installed:", ", ".join(f"{name} {'yes' if is_installed(name) else 'no'}" for name in PACKAGES))
    if shutil.which("nvidia-smi"):
        query = [
            "nvidia-smi",
            "--query-gpu=name,driver_version,memory.total,clocks.max.sm,power.limit",
            "--format=csv",
        ]
        print(subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip())
    if device.type == "cuda":
        try:
            require_gpu("--device cuda", "use --device cpu")
        except UserError as error:
            raise SystemExit(str(error)) from None
        print(f"cuDNN {torch.backends.cudnn.version()}, NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}")
        print(f"compute capability {torch.cuda.get_device_capability()}, bf16 without emulation:",
              torch.cuda.is_bf16_supported(including_emulation=False))  # fmt: skip
    print("convolutions' precision by default:", torch.backends.cudnn.conv.fp32_precision)
    side = 8192 if device.type == "cuda" else 512
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.randn(side, side, device=device, dtype=dtype)
        seconds = _time(lambda a=a: a @ a, device)
        print(f"matrix product of {side}, {dtype}: {2 * side**3 / seconds / 1e12:.1f} TFLOP/s")
    a = torch.empty(2**28 if device.type == "cuda" else 2**22, device=device)
    b = torch.empty_like(a)
    print(f"copy on the device: {2 * a.nbytes / _time(lambda: b.copy_(a), device) / 1e9:.0f} GB/s")
    if device.type == "cuda":
        for pinned in (False, True):
            host = torch.empty(2**26, dtype=torch.uint8, pin_memory=pinned)
            seconds = _time(lambda host=host: host.to(device, non_blocking=True), device)
            print(
                f"copy from {'pinned' if pinned else 'pageable'} memory: {host.nbytes / seconds / 1e9:.1f} GB/s"
            )


def _time(work: object, device: torch.device, rounds: int = 10) -> float:
    """Seconds of one call."""
    for _ in range(2):
        work()  # type: ignore[operator]
    _finish(device)
    began = time.perf_counter()
    for _ in range(rounds):
        work()  # type: ignore[operator]
    _finish(device)
    return (time.perf_counter() - began) / rounds


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
