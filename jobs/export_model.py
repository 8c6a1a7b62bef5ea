"""Writes a generator as a file for other programs: .safetensors or .pth (chaiNNer, ComfyUI), or ONNX."""

from pathlib import Path

from pipeline import command
from pipeline.config import make_parser
from pipeline.errors import UserError
from pipeline.evaluation.models import MODEL_HELP, notes, open_model
from pipeline.evaluation.published_form import misread, with_published_growth
from pipeline.model.weights import save_generator

SUFFIXES = (".safetensors", ".pth", ".onnx")


def main(argv: list[str]) -> None:
    """Opens the model and writes it."""
    parser = make_parser(__doc__ or "")
    parser.add_argument("--model", required=True, metavar="M", help=MODEL_HELP)
    parser.add_argument(
        "--output", required=True, metavar="FILE", help="Ends in .safetensors, .pth or .onnx."
    )
    parser.add_argument(
        "--tracking.uri",
        dest="tracking_uri",
        default=None,
        metavar="URI",
        help="The MLflow store behind models:/.",
    )
    options = parser.parse_args(argv)
    output = Path(options.output).expanduser()
    if output.suffix not in SUFFIXES:
        raise UserError(f"--output {output}: end it in {', '.join(SUFFIXES)}")
    command.require_writable_file(str(output), "--output")
    model = open_model(options.model, options.tracking_uri)
    if model.generator is None:
        raise UserError("--model bicubic: has no weights to export")
    for line in notes([model]):
        print(f"note: {line}")
    try:
        if output.suffix == ".onnx":
            from pipeline.model.export import export_onnx

            export_onnx(model.generator, output)
        else:
            warning = misread(model.generator)
            if warning:
                print(f"note: {warning}")
            save_generator(with_published_growth(model.generator), output)
    except OSError as error:
        raise UserError(f"--output {output}: cannot be written ({error.strerror})") from None
    print(f"written: {output}")


if __name__ == "__main__":
    command.run(main)
