"""Enlarges photographs with a trained generator: a file, a folder (with all below it) or an s3:// prefix."""

import argparse
import sys
from dataclasses import asdict

from pipeline import command
from pipeline.config import make_parser
from pipeline.errors import UserError
from pipeline.evaluation.models import MODEL_HELP, choose_device, notes, open_model
from pipeline.evaluation.upscaling import Upscaler, plan, upscale_all
from pipeline.model import PRECISIONS

EXIT_SOME_FAILED = 1


def parser() -> argparse.ArgumentParser:
    """The command's flags."""
    flags = make_parser(__doc__ or "")
    add = flags.add_argument
    add("--model", required=True, metavar="M", help=MODEL_HELP)
    add("--input", required=True, metavar="PATH", help="A photograph, a folder or an s3:// prefix.")
    add(
        "--output",
        required=True,
        metavar="DIR",
        help="Output folder. Relative paths are kept; existing outputs of the same model and settings are skipped.",
    )
    add(
        "--format",
        choices=("png", "jpg", "webp"),
        default="png",
        help="File format of the copies (default: png).",
    )
    add(
        "--tile",
        type=int,
        default=None,
        metavar="PX",
        help="Side of a tile in the photograph's pixels: lower means less memory; 0: never tiles "
        "(default: 256 for photographs of more than 512 x 512).",
    )
    add(
        "--overwrite",
        action="store_true",
        help="Overwrite existing outputs, also those of another model or other settings.",
    )
    add("--max-megapixels", type=float, default=200.0, metavar="N", help="Larger photographs are refused.")
    add("--device", default="auto", help="auto, cpu or cuda (default: auto).")
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
        help="Ray workers to spread the photographs over; 0: this process.",
    )
    add(
        "--tracking.uri",
        dest="tracking_uri",
        default=None,
        metavar="URI",
        help="The MLflow store behind models:/.",
    )
    add("--json", metavar="FILE", help="Also write {written, skipped, failed} there.")
    return flags


def main(argv: list[str]) -> int:
    """Plans, opens the model, enlarges, reports. Exits 1 when a photograph failed."""
    options = parser().parse_args(argv)
    command.require_writable_file(options.json, "--json")
    for flag in ("tile", "workers"):
        value = getattr(options, flag)
        if value is not None and value < 0:
            raise UserError(f"--{flag} {value}: use at least 0")
    source, output, tasks = plan(options.input, options.output, options.format)
    output.require_writable("--output")
    model = open_model(
        options.model,
        options.tracking_uri,
        device=choose_device(options.device, options.workers),
        precision=options.precision,
    )
    for line in notes([model]):
        print(f"note: {line}")
    upscaler = Upscaler(model, source, output, options.format, options.tile, options.max_megapixels)
    result = upscale_all(upscaler, tasks, options.workers, options.overwrite)
    command.write_json(options.json, asdict(result))
    for entry in result.failed:
        print(f"failed: {entry['path']}: {entry['reason']}", file=sys.stderr)
    print(
        f"{len(result.written)} written, {len(result.skipped)} skipped, {len(result.failed)} failed: {output.uri}"
    )
    return EXIT_SOME_FAILED if result.failed else 0


if __name__ == "__main__":
    command.run(main)
