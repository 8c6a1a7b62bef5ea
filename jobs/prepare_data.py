"""Turns photographs into verified patches: Parquet shards and a manifest. Run again, it goes on or says it is done."""

import argparse
from dataclasses import asdict

from pipeline import command
from pipeline.config import load_config
from pipeline.data import check_source, has_manifest, load_manifest, prepare
from pipeline.data.config import DataConfig
from pipeline.data.format.contact_sheet import contact_sheet
from pipeline.data.format.manifest import NAME
from pipeline.data.format.verify import verify
from pipeline.data.ingest.prepare import describe
from pipeline.errors import UserError
from pipeline.storage import absolute


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own flags."""
    parser.add_argument(
        "--strict", action="store_true", help="The first photograph that is refused is an error."
    )
    parser.add_argument(
        "--verify", action="store_true", help="Read the finished data set again and name what is damaged."
    )
    parser.add_argument(
        "--show", metavar="OUT.png", help="Draw patches with their low resolution, source and detail score."
    )
    parser.add_argument("--json", metavar="FILE", help="Also write the result there.")


def main(argv: list[str]) -> None:
    """Prepares the data set of the configuration, or looks at the one that is there."""
    config, options = load_config(argv, description=__doc__ or "", add_arguments=add_arguments)
    command.require_writable_file(options.json, "--json")
    command.require_writable_file(options.show, "--show")
    data = config.data.model_copy(update={"root": absolute(config.data.root)})
    if options.verify:
        _verify(data, options.json)
    elif not (options.show and has_manifest(data.root)):
        _prepare(data, options)
    else:
        command.write_json(options.json, asdict(describe(load_manifest(data.root))))
    if options.show:
        contact_sheet(load_manifest(data.root)).save(options.show, "PNG")
        print(f"picture: {options.show}")


def _prepare(data: DataConfig, options: argparse.Namespace) -> None:
    check_source(data)
    # Ray takes seconds to import; mistakes, --verify and --show do without it.
    from pipeline.data.ingest.ray_ingest import join_ray

    join_ray()
    result = prepare(data, strict=options.strict)
    command.write_json(options.json, asdict(result))
    manifest = load_manifest(data.root)
    for entry in manifest.rejected:
        print(f"refused: {entry['path']!r}: {entry['reason']}")
    print(
        f"{result.patches} patches from {result.sources} photographs, {result.rejected} refused, in {data.root}"
    )


def _verify(data: DataConfig, json_file: str | None) -> None:
    manifest = load_manifest(data.root)
    damaged = verify(manifest)
    command.write_json(json_file, {**asdict(describe(manifest)), "damaged": damaged})
    for line in damaged:
        print(f"damaged: {line}")
    if damaged:
        raise UserError(
            f"data.root={data.root}: damaged in {len(damaged)} place(s), named above; remove it and prepare it again"
        )
    print(
        f"every patch is as it was written: {manifest.patches} in {data.root} (sha256 of {NAME}: {manifest.sha256})"
    )


if __name__ == "__main__":
    command.run(main)
