"""Exports a generator: .safetensors or .pth that spandrel (chaiNNer, ComfyUI) loads, or ONNX."""

from pathlib import Path

import torch
from torch import Tensor

from pipeline.errors import UserError
from pipeline.evaluation.config import ExportConfig
from pipeline.evaluation.models import notes, open_model
from pipeline.model import RRDBNet
from pipeline.model.weights import save_generator

# spandrel assumes these two for every ESRGAN file.
GROWTH_CH = 32
RESIDUAL_SCALE = 0.2


def export_model(config: ExportConfig) -> Path:
    """Opens the model and writes the file. Notes about the model are printed.

    Raises:
        UserError: `bicubic`, a model that cannot be opened, or a file that cannot be written.
    """
    output = Path(config.output).expanduser()
    if output.is_dir() or not output.parent.is_dir():
        raise UserError(f"--output {output}: not a file in an existing folder")
    model = open_model(config.model, config.tracking_uri)
    if model.generator is None:
        raise UserError("--model bicubic: has no weights to export")
    for line in notes([model]):
        print(f"note: {line}")
    try:
        if output.suffix == ".onnx":
            from pipeline.model.export import export_onnx

            export_onnx(model.generator, output)
        else:
            _warn_if_incompatible(model.generator)
            save_generator(_with_published_growth(model.generator), output)
    except OSError as error:
        raise UserError(f"--output {output}: cannot be written ({error.strerror})") from None
    return output


def _warn_if_incompatible(generator: RRDBNet) -> None:
    """Prints why spandrel cannot load the file, or would compute different images."""
    if generator.residual_scale != RESIDUAL_SCALE:
        print(
            f"note: other programs assume residual_scale={RESIDUAL_SCALE}, but this network has "
            f"{generator.residual_scale}: their images will be wrong; an .onnx file includes the value"
        )
    elif generator.num_grow_ch > GROWTH_CH:
        print(
            f"note: other programs assume {GROWTH_CH} growth channels, but this network has {generator.num_grow_ch}"
        )


def _with_published_growth(generator: RRDBNet) -> RRDBNet:
    """The same function as a network with 32 growth channels: the additional channels are zero everywhere.

    Generators with 32 or more are returned unchanged.
    """
    growth, features = generator.num_grow_ch, generator.num_feat
    if growth >= GROWTH_CH:
        return generator
    with torch.device("meta"):
        wide = RRDBNet(features, generator.num_block, GROWTH_CH, generator.residual_scale, generator.scale)
    state = {
        name: _widened(tensor, wide.state_dict()[name], features, growth)
        for name, tensor in generator.state_dict().items()
    }
    wide.load_state_dict(state, assign=True)
    return wide.eval()


def _widened(tensor: Tensor, like: Tensor, features: int, growth: int) -> Tensor:
    if tensor.shape == like.shape:
        return tensor
    wide = torch.zeros(like.shape, dtype=tensor.dtype)
    if tensor.ndim == 1:
        wide[: tensor.shape[0]] = tensor
        return wide
    outputs = tensor.shape[0]
    wide[:outputs, :features] = tensor[:, :features]
    # A dense convolution reads the block's input, then each earlier convolution's channels.
    for number in range((tensor.shape[1] - features) // growth):
        start, target = features + number * growth, features + number * GROWTH_CH
        wide[:outputs, target : target + growth] = tensor[:, start : start + growth]
    return wide
