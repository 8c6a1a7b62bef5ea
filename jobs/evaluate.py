"""Measures models on photographs: PSNR and SSIM as the papers compute them, and a report to look at."""

import argparse
from pathlib import Path

from pipeline import command
from pipeline.config import make_parser
from pipeline.errors import UserError
from pipeline.evaluation.crops import Box
from pipeline.evaluation.evaluate import evaluate, table, write_results
from pipeline.evaluation.layout import find_pairs
from pipeline.evaluation.lpips import Lpips, load_lpips
from pipeline.evaluation.models import (
    BICUBIC,
    MODEL_HELP,
    choose_device,
    interpolated,
    notes,
    open_model,
    split_label,
)
from pipeline.evaluation.scoring import Scorer, Settings
from pipeline.model import PRECISIONS
from pipeline.storage import Storage


def parser() -> argparse.ArgumentParser:
    """The command's flags."""
    flags = make_parser(__doc__ or "")
    add = flags.add_argument
    add("--model", nargs="+", default=[], metavar="M", help=MODEL_HELP)
    add("--interpolate", nargs=3, action="append", default=[], metavar=("A", "B", "ALPHA"),
        help="Also the network (1 - ALPHA) * A + ALPHA * B, such as PSNR GAN 0.8 (ESRGAN, sec. 3.4).")  # fmt: skip
    add("--hr", required=True, metavar="DIR", help="Originals: a folder, a file or an s3:// prefix; HR and LR "
        "folders in it (HR/ LR/, GT/ LQ/, *_HR/ *_LR_*/X4/), or name_HR.png next to name_LR.png, are "
        "recognized.")  # fmt: skip
    add("--lr", metavar="DIR", help="Low-resolution files of the same names (an ending such as x4 or _LR is ignored). "
        "Without them the originals are reduced as MATLAB's bicubic does it.")  # fmt: skip
    add("--out", required=True, metavar="DIR", help="Gets metrics.json, report.html and comparison.png.")
    add(
        "--scale",
        type=int,
        choices=(2, 3, 4),
        default=None,
        help="Factor of bicubic (default: the models', or 4).",
    )
    add(
        "--border",
        type=int,
        default=None,
        metavar="PX",
        help="Pixels left out at each edge (default: the scale).",
    )
    add("--tile", type=int, default=None, metavar="PX", help="Side of a tile in low-resolution pixels; 0: never tiles "
        "(default: 256 for pictures of more than 512 x 512).")  # fmt: skip
    add("--limit", type=int, default=None, metavar="N", help="Only the first N pictures.")
    add("--crop", action="append", default=[], metavar="NAME:X,Y,W,H", help="The part of a picture that the report "
        "shows, in the original's pixels (default: where the models differ most).")  # fmt: skip
    add("--lpips", nargs="?", const="", default=None, metavar="DIR", help="Also LPIPS (AlexNet); DIR contains "
        "alexnet-owt-7be5be79.pth. Without DIR: torch hub's cache; if the file is not there, LPIPS is skipped with "
        "a note.")  # fmt: skip
    add("--device", default="auto", help="auto, cpu, cuda (default: auto).")
    add(
        "--precision",
        choices=PRECISIONS,
        default="fp32",
        help="fp32: IEEE float32. tf32 (GPUs) and bf16 (GPUs and CPUs that have it) are faster; some pixels differ by "
        "a level.",
    )
    add(
        "--workers",
        type=int,
        default=0,
        metavar="N",
        help="Ray workers to spread the pictures over; 0: this process.",
    )
    add(
        "--tracking.uri",
        dest="tracking_uri",
        default=None,
        metavar="URI",
        help="The MLflow store behind models:/.",
    )
    add("--json", metavar="FILE", help="Also write the means there.")
    return flags


def main(argv: list[str]) -> None:
    """Opens the models, finds the pictures, scores them, writes and prints the results."""
    options = parser().parse_args(argv)
    command.require_writable_file(options.json, "--json")
    if not options.model and not options.interpolate:
        raise UserError("--model: name at least one model, or bicubic")
    for flag, least in (("border", 0), ("tile", 0), ("limit", 1), ("workers", 0)):
        value = getattr(options, flag)
        if value is not None and value < least:
            raise UserError(f"--{flag} {value}: use at least {least}")
    boxes = dict(_box(text) for text in options.crop)
    Storage(options.out).require_writable("--out")
    device = choose_device(options.device, options.workers)

    def opened(source: str, bicubic_scale: int = 4):  # type: ignore[no-untyped-def]
        return open_model(source, options.tracking_uri, device=device, precision=options.precision,
                          bicubic_scale=bicubic_scale)  # fmt: skip

    networks = {source: opened(source) for source in options.model if split_label(source)[1] != BICUBIC}
    mixed = [interpolated(opened(a), opened(b), _alpha(alpha)) for a, b, alpha in options.interpolate]
    scale = options.scale or next((model.scale for model in [*networks.values(), *mixed]), 4)
    models = [networks[source] if source in networks else opened(source, scale) for source in options.model]
    models += mixed
    pairs, refused = find_pairs(options.hr, options.lr, scale)
    settings = Settings(scale, scale if options.border is None else options.border, options.tile, boxes=boxes)
    unknown = boxes.keys() - {pair.name for pair in pairs}
    if unknown:
        raise UserError(f"--crop {min(unknown)}: no picture of this name in {options.hr}")
    lpips, missing = _lpips(options.lpips)
    for line in [*notes(models), *missing]:
        print(f"note: {line}")
    result = evaluate(Scorer(models, settings, lpips), pairs[: options.limit], refused, options.workers)
    write_results(result, Path(Storage(options.out).uri))
    for each in result.refused:
        print(f"refused: {each.path}: {each.reason}")
    print(f"{len(result.images)} pictures, x{scale}, border {settings.border}; PSNR in dB; y: BT.601 luma")
    print(command.table(*table(result)))
    print(f"report: {Storage(options.out).path('report.html')}")
    command.write_json(options.json, result.means_as_json())


def _box(text: str) -> tuple[str, Box]:
    name, colon, numbers = text.rpartition(":")
    try:
        x, y, width, height = (int(number) for number in numbers.split(","))
    except ValueError:
        colon = ""
    if not colon or min(x, y) < 0 or min(width, height) < 4:
        raise UserError(f"--crop {text}: write NAME:X,Y,W,H, such as baby.png:120,80,128,128")
    return name, Box(x, y, width, height)


def _lpips(folder: str | None) -> tuple[Lpips | None, list[str]]:
    """The distance, if requested and its file exists; a note if the file is missing from torch hub's cache."""
    if folder is None:
        return None, []
    if folder:
        return load_lpips(folder), []
    try:
        return load_lpips(), []
    except UserError as error:
        return None, [f"LPIPS is skipped; {str(error).removeprefix('LPIPS: ')}"]


def _alpha(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UserError(f"--interpolate: ALPHA={text} is no number") from None


if __name__ == "__main__":
    command.run(main)
