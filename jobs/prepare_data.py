"""Prepares a data set from images: Parquet shards and a manifest. Resumes an interrupted attempt."""

from argparse import Namespace
from dataclasses import asdict
from typing import TYPE_CHECKING

from pipeline import command

if TYPE_CHECKING:
    from pipeline.data.config import DataConfig

FIRST = (
    "data.source",
    "data.held_out",
    "data.root",
    "data.lr_dir",
    "data.scale",
    "data.patch_px",
    "data.patch_stride_px",
)
FLAGS = {
    "--strict": {"action": "store_true", "help": "Fail at the first rejected image."},
    "--verify": {
        "action": "store_true",
        "help": "Verify the data set: read it again and list what is corrupt.",
    },
    "--show": {
        "metavar": "OUT.png",
        "help": "Draw patches with their low resolution, source and detail score.",
    },
}


def main(argv: list[str]) -> None:
    """Prepares the configured data set, or verifies or draws an existing one."""
    command.announce("preparing data: loading libraries and the configuration")
    from pipeline.config import load_config
    from pipeline.data import has_manifest, load_manifest
    from pipeline.data.format.contact_sheet import contact_sheet
    from pipeline.data.ingest.prepare import describe
    from pipeline.storage import absolute

    config, options = load_config(argv, description=__doc__ or "", own_flags=FLAGS, first_fields=FIRST)
    command.require_writable_file(options.show, "--show")
    data = config.data.model_copy(update={"root": absolute(config.data.root)})
    if options.verify:
        _verify(data, options.json)
    elif not (options.show and has_manifest(data.root)):
        _prepare(data, options, config.worker_range[1] > 0)
    else:
        command.write_json(options.json, asdict(describe(load_manifest(data.root))))
    if options.show:
        contact_sheet(load_manifest(data.root)).save(options.show, "PNG")
        print(f"contact sheet: {options.show}")


def _prepare(data: "DataConfig", options: Namespace, on_ray: bool) -> None:
    from pipeline.data import check_source, load_manifest, prepare
    from pipeline.errors import require_package

    check_source(data)
    if on_ray:
        # Importing Ray takes seconds; invalid input, --verify and --show do not need it.
        require_package("ray", "workers > 0", "set workers=0")
        from pipeline.data.ingest.ray_ingest import join_ray

        join_ray()
    result = prepare(data, strict=options.strict, on_ray=on_ray)
    command.write_json(options.json, asdict(result))
    manifest = load_manifest(data.root)
    for entry in manifest.rejected:
        print(f"rejected: {entry['path']!r}: {entry['reason']}")
    print(
        f"{result.patches} patches from {result.sources} images, {result.rejected} rejected, in {data.root}"
    )


def _verify(data: "DataConfig", json_file: str | None) -> None:
    from pipeline.data import load_manifest
    from pipeline.data.format.manifest import NAME
    from pipeline.data.format.verify import verify
    from pipeline.data.ingest.prepare import describe
    from pipeline.errors import UserError

    manifest = load_manifest(data.root)
    corrupt = verify(manifest)
    command.write_json(json_file, {**asdict(describe(manifest)), "corrupt": corrupt})
    for line in corrupt:
        print(f"corrupt: {line}")
    if corrupt:
        raise UserError(
            f"data.root={data.root}: {len(corrupt)} corrupt part(s), listed above; remove it and prepare it again"
        )
    print(f"verified: {manifest.patches} patches in {data.root} (sha256 of {NAME}: {manifest.sha256})")


if __name__ == "__main__":
    command.run(main)
