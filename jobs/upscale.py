"""Upscales images with a trained generator: a file, a folder (with all its subfolders) or an s3:// prefix."""

import sys
from dataclasses import asdict

from pipeline import command
from pipeline.storage import Storage

EXIT_SOME_FAILED = 1


def main(argv: list[str]) -> int:
    """Loads the configuration, upscales, prints the result. Returns 1 if an image failed."""
    command.announce("upscaling images: loading libraries and the model")
    from pipeline.evaluation.config import UpscaleConfig
    from pipeline.evaluation.upscaling import upscale_images

    config = command.parse_section("upscale", UpscaleConfig, argv, __doc__ or "")
    command.require_writable_file(config.json_file, "--json")
    result = upscale_images(config)
    command.write_json(config.json_file, asdict(result))
    for entry in result.failed:
        print(f"failed: {entry['path']}: {entry['reason']}", file=sys.stderr)
    counts = f"{len(result.written)} written, {len(result.skipped)} skipped, {len(result.failed)} failed"
    print(f"{counts}: {Storage(config.output).uri}")
    return EXIT_SOME_FAILED if result.failed else 0


if __name__ == "__main__":
    command.run(main)
