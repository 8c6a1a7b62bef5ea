"""Exports a generator: .safetensors or .pth that spandrel (chaiNNer, ComfyUI) loads, or ONNX."""

from pathlib import Path

import torch
from torch import Tensor

from pipeline.errors import UserError
from pipeline.evaluation.config import ExportConfig
from pipeline.evaluation.models import interpolated, notes, open_model, split_label
from pipeline.evaluation.openmodeldb import TO_FILL_IN, openmodeldb_entry
from pipeline.json_file import json_text
from pipeline.model import RRDBNet
from pipeline.model.weights import generator_sha256, save_generator
from pipeline.tracking.lookup import pull_card

# spandrel assumes these two for every ESRGAN file.
GROWTH_CH = 32
RESIDUAL_SCALE = 0.2


def export_model(config: ExportConfig) -> Path:
    """Opens the model, or interpolates two, and writes the file. Notes about the models are printed.

    Raises:
        UserError: `bicubic`, a model that cannot be opened, networks of different sizes, or a file that cannot be
            written.
    """
    output = _new_file("--output", config.output)
    entry = _new_file("--openmodeldb", config.openmodeldb) if config.openmodeldb else None
    generator, metadata = _opened(config)
    card = pull_card(split_label(config.model or "")[1], config.tracking_uri) if entry else None
    try:
        if output.suffix == ".onnx":
            from pipeline.model.export import export_onnx

            export_onnx(generator, output, config.onnx)
        else:
            _warn_if_incompatible(generator)
            save_generator(_with_published_growth(generator), output, metadata)
        if entry is not None and card is not None:
            entry.write_text(json_text(openmodeldb_entry(generator, output, card)), encoding="utf-8")
            print(f"note: {entry}: fill in {', '.join(TO_FILL_IN)}")
    except OSError as error:
        path, reason = error.filename or output, error.strerror
        raise UserError(f"--output {output}: {path} cannot be written ({reason})") from None
    return output


def _new_file(flag: str, path: str) -> Path:
    file = Path(path).expanduser()
    if file.is_dir() or not file.parent.is_dir():
        raise UserError(f"{flag} {file}: not a file in an existing folder")
    return file


def _opened(config: ExportConfig) -> tuple[RRDBNet, dict[str, str]]:
    """The generator to be written, and metadata on its origin."""
    sources = config.interpolate[:2] if config.interpolate else [config.model or ""]
    models = [open_model(source, config.tracking_uri) for source in sources]
    for line in notes(models):
        print(f"note: {line}")
    if config.interpolate is None:
        if models[0].generator is None:
            raise UserError("--model bicubic: has no weights to export")
        return models[0].generator, {}
    alpha = config.interpolate[2]
    mixed = interpolated(models[0], models[1], alpha)
    # Digests and not names: a name may be a path, and the file may be published.
    first, second = (generator_sha256(model.generator.state_dict()) for model in models if model.generator)
    assert mixed.generator is not None
    return mixed.generator, {"interpolation": f"{1 - alpha:.4g} * {first} + {alpha:.4g} * {second}"}


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
