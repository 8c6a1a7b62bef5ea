"""A training through the command on a GPU: both stages on the sample images, killed in stage 2 and resumed to its end.

    python benchmarks/gpu_train.py --out OUT
    python benchmarks/gpu_train.py --device cpu --tiny --out OUT      tries the script

The paper's networks in bf16. Prints what the run prints (steps/s, share of the time that it waits for data, memory),
then PSNR (Y) of the first and of the last validation of stage 1, and bicubic's. Writes OUT/train.json.
"""

import argparse
import json
import re
import subprocess
import tempfile
import time
from pathlib import Path

from tiny_run import command

PAPER = {
    "model__num_block": 23, "model__num_feat": 64, "model__num_grow_ch": 32, "model__discriminator_num_feat": 64,
    "batch_size": 16, "crop_px": 128, "data__patch_px": 192, "data__patch_stride_px": 96, "precision": "bf16",
    "perceptual__layers": '{"conv5_4": 1.0}', "psnr__steps": 1500, "gan__steps": 600, "log_every_steps": 100,
    "validate_every_steps": 500, "checkpoint_every_steps": 200, "ema_decay": 0.99,
}  # fmt: skip
TINY = {
    "psnr__steps": 4, "gan__steps": 4, "log_every_steps": 1, "validate_every_steps": 2, "checkpoint_every_steps": 2
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    sizes = TINY if options.tiny else PAPER
    steps = int(sizes["psnr__steps"]), int(sizes["gan__steps"])
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        run = command(
            Path(folder), run_name="gpu", workers=0, use_gpu=options.device == "cuda", tracking__uri="none",
            gan__select_by="psnr_y", **sizes,
        )  # fmt: skip
        lines = run_until(run, f"[gan] step {steps[0] + steps[1] // 2}/")
        killed_s = time.monotonic() - began
        resumed = run_until(run)
    scores = [
        float(each)
        for each in re.findall(r"\[psnr\] step \d+ validation .*?psnr_y ([\d.]+)", "\n".join(lines))
    ]
    bicubic = re.search(r"bicubic .*?psnr_y ([\d.]+)", "\n".join(lines))
    result = {
        "resumed": [line for line in resumed if line.startswith("resuming")],
        "psnr_y_of_stage_1": [scores[0], scores[-1]],
        "psnr_y_of_bicubic": float(bicubic[1]) if bicubic else None,
        "seconds": round(time.monotonic() - began),
        "seconds_until_killed": round(killed_s),
    }
    print(json.dumps(result))
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "train.json").write_text(json.dumps(result, indent=2) + "\n")
    assert result["resumed"], "it did not resume"


def run_until(arguments: list[str], text: str | None = None) -> list[str]:
    """Runs a command, shows its lines and returns them; kills it (SIGKILL) at the first one with `text`."""
    lines = []
    with subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line.rstrip())
            if text is not None and text in line:
                process.kill()
                return lines
    if text is not None or process.returncode:
        raise SystemExit(f"ended with exit code {process.returncode}")
    return lines


if __name__ == "__main__":
    main()
