"""Exports a generator for other programs: .safetensors or .pth (chaiNNer, ComfyUI), or ONNX."""

from pipeline import command


def main(argv: list[str]) -> None:
    """Loads the configuration, exports, prints the file."""
    command.announce("exporting a model: loading libraries and the model")
    from pipeline.evaluation.config import ExportConfig
    from pipeline.evaluation.export import export_model

    config = command.parse_section("export", ExportConfig, argv, __doc__ or "")
    print(f"written: {export_model(config)}")


if __name__ == "__main__":
    command.run(main)
