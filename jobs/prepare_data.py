"""Turns photographs into verified patches: Parquet shards and a manifest. Run again, it goes on or says it is done."""

import argparse
from dataclasses import asdict

from pipeline import command
from pipeline.config import load_config
from pipeline.data import check_source, load_manifest, prepare
from pipeline.data.ingest import join_ray
from pipeline.storage import absolute


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own flags."""
    parser.add_argument(
        "--strict", action="store_true", help="The first photograph that is refused is an error."
    )
    parser.add_argument("--json", metavar="FILE", help="Also write the result there.")


def main(argv: list[str]) -> None:
    """Loads the configuration, prepares the data set, prints what is in it."""
    config, options = load_config(argv, description=__doc__ or "", add_arguments=add_arguments)
    command.require_writable_file(options.json, "--json")
    data = config.data.model_copy(update={"root": absolute(config.data.root)})
    check_source(data)
    join_ray()
    result = prepare(data, strict=options.strict)
    command.write_json(options.json, asdict(result))
    for entry in load_manifest(data.root).rejected:
        print(f"refused: {entry['path']!r}: {entry['reason']}")
    print(
        f"{result.patches} patches from {result.sources} photographs, {result.rejected} refused, in {data.root}"
    )


if __name__ == "__main__":
    command.run(main)
