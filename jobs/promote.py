"""Makes a version of the registered model the champion, and prints the previous one."""

from pathlib import Path

from pipeline import command

DEMO = Path(__file__).resolve().parent.parent / "configs" / "demo.yaml"
FLAGS = {
    "--model-version": {
        "type": int,
        "required": True,
        "metavar": "N",
        "help": "The version of tracking.model_name that becomes the champion.",
    }
}


def main(argv: list[str]) -> None:
    """Sets the alias on the tracking server of the configuration."""
    command.announce("promoting a model: loading libraries and the configuration")
    from pipeline.config import load_config
    from pipeline.storage import absolute
    from pipeline.tracking.registry import promote
    from pipeline.tracking.uri import resolve_uri

    config, options = load_config(
        argv,
        description=__doc__ or "",
        default_file=DEMO,
        own_flags=FLAGS,
        first_fields=("storage", "tracking.uri", "tracking.model_name"),
    )
    name = config.tracking.model_name
    uri = None  # that of the last run
    if options.config or "storage" in options.given or config.tracking.uri is not None:
        uri = resolve_uri(config.tracking, absolute(config.storage))
    previous = promote(name, options.model_version, uri)
    command.write_json(options.json, {"model_name": name, "champion": options.model_version, "was": previous})
    before = "there was none" if previous is None else f"it was version {previous}"
    print(f"champion of {name}: version {options.model_version} ({before})")


if __name__ == "__main__":
    command.run(main)
