"""Reads and writes generator weights: this project's files, and those of other ESRGAN repositories."""

import hashlib
import io
import json
import math
import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch
from torch import Tensor

from pipeline.errors import UserError
from pipeline.model.encoding import encode_tensors
from pipeline.model.rrdbnet import UNSHUFFLE, RRDBNet
from pipeline.model.weight_forms import (
    archive_fault,
    content_fault,
    generator_names,
    no_state_dict,
    numpy_globals,
    other_network,
    unwrapped,
)

SIZES = ("num_feat", "num_block", "num_grow_ch", "residual_scale", "scale")
DEFAULT_RESIDUAL_SCALE = 0.2
_ZIP_START, _PICKLE_START = b"PK\x03\x04", b"\x80"


def save_generator(
    generator: RRDBNet, path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes the generator's weights, in float32.

    Args:
        generator: the network.
        path: .safetensors stores the sizes and `metadata` in the file's header; .pth is a plain
            {"params_ema": state dict} as BasicSR and spandrel read it, without metadata. Both assume a residual scale
            of 0.2, and spandrel assumes `num_grow_ch` 32.
        metadata: additional header entries.

    Raises:
        UserError: another suffix, or the file cannot be written.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        content = encode_generator(generator, metadata)
    elif path.suffix == ".pth":
        buffer = io.BytesIO()
        torch.save({"params_ema": _plain_state(generator)}, buffer)
        content = buffer.getvalue()
    else:
        raise UserError(f"{path}: weights are written as .safetensors or .pth")
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from None


def encode_generator(
    generator: RRDBNet, metadata: Mapping[str, str] | None = None, dtype: torch.dtype = torch.float32
) -> bytes:
    """The content of a .safetensors file of the generator, for `decode_generator`; its weights are rounded to `dtype`.

    Equal networks and metadata give equal bytes.
    """
    return bytes(
        encode_tensors(_plain_state(generator, dtype), {**(metadata or {}), **sizes_as_text(generator)})
    )


def architecture(generator: RRDBNet) -> dict[str, Any]:
    """RRDBNet's arguments."""
    return {name: getattr(generator, name) for name in SIZES}


def sizes_as_text(generator: RRDBNet) -> dict[str, str]:
    """The header entries from which `decode_generator` reads the architecture."""
    return {
        "architecture": "RRDBNet",
        **{name: repr(value) for name, value in architecture(generator).items()},
    }


def decode_generator(source: bytes | Path, name: str) -> tuple[RRDBNet, dict[str, str]]:
    """A generator in float32 on the CPU, from a file's content or path; the sizes are read from the file.

    Reads .safetensors and .pth (unpickling tensors and numpy numbers only). The state dict may be the file itself or
    one of the entries in `weight_forms.WRAPPERS`, with BasicSR's names or those of the two older ESRGAN repositories.
    `name` is its name in error messages.

    Returns:
        The network, and information on it: the header's entries, the sizes, and `residual_scale_source`, which is
        "metadata" or "default" (the residual scale cannot be read from the weights).

    Raises:
        UserError: no such file, not readable as weights, not finite, or not an RRDBNet.
    """
    state, metadata = read_generator_tensors(source, name)
    if other := other_network(state):
        raise UserError(f"{name}: {other}")
    sizes = generator_sizes(state, metadata, name)
    # On the meta device no weights are allocated or initialized, and no random number is drawn.
    with torch.device("meta"):
        generator = RRDBNet(**sizes)
    expected = generator.state_dict()
    generator.load_state_dict(matching(state, expected, name, "an RRDBNet at this scale"), assign=True)
    if extra := sorted(state.keys() - expected.keys()):
        raise UserError(
            f"{name}: not the weights of an RRDBNet ({len(extra)} unknown parameters, the first is {extra[0]})"
        )
    origin = "metadata" if "residual_scale" in metadata else "default"
    info = {**metadata, **sizes_as_text(generator), "residual_scale_source": origin}
    return generator, info


def read_generator_tensors(source: bytes | Path, name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """`read_tensors` with RRDBNet's names; neither complete nor of known sizes."""
    tensors, metadata = read_tensors(source, name)
    return generator_names(tensors), metadata


def generator_sha256(state_dict: Mapping[str, Tensor]) -> str:
    """sha256 over the tensors' bytes, names sorted, in hexadecimal."""
    digest = hashlib.sha256()
    for name in sorted(state_dict):
        tensor = state_dict[name].detach().cpu().contiguous()
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_tensors(source: bytes | Path, name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a .safetensors or .pth file; the format is detected from the content.

    Args:
        source: the file's content or path.
        name: its name in error messages.

    Raises:
        UserError: no such file, neither of the two formats, corrupt, or with other objects than tensors; values that
            are not finite in float32.
    """
    try:
        file: BinaryIO = io.BytesIO(source) if isinstance(source, bytes) else source.open("rb")
    except OSError as error:
        raise UserError(f"{name}: cannot be read ({error.strerror or error})") from None
    with file:
        try:
            loaded, metadata = _parsed(file)
        except MemoryError:
            raise
        except Exception as error:  # noqa: BLE001 - a corrupt file can make torch's reader raise anything
            raise UserError(f"{name}: not readable as weights: {_reading_fault(file, error)}") from None
    tensors = unwrapped(loaded)
    if not tensors:
        raise UserError(f"{name}: {no_state_dict(loaded)}")
    _require_finite(tensors, name)
    return tensors, metadata


def _parsed(file: BinaryIO) -> tuple[object, dict[str, str]]:
    start = file.read(9)
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    # A .safetensors file is 8 bytes of header length, then a JSON object. Its first byte can be any, so this test comes
    # first: taken as a length, the start of a zip archive or of a pickle is larger than any file.
    header_length = int.from_bytes(start[:8], "little")
    if start[8:] == b"{" and 8 + header_length <= size:
        content = file.read()
        header = json.loads(content[8 : 8 + header_length])
        return safetensors.torch.load(content), header.get("__metadata__", {})
    if start.startswith((_ZIP_START, _PICKLE_START)):
        with torch.serialization.safe_globals(numpy_globals()):
            return torch.load(file, map_location="cpu", weights_only=True), {}
    raise ValueError("neither a safetensors header nor PyTorch's zip archive or pickle")


def _reading_fault(file: BinaryIO, error: Exception) -> str:
    """Why a file cannot be read, and what to do."""
    file.seek(0)
    fault = content_fault(file)
    is_zip = not fault and file.read(4) == _ZIP_START
    if isinstance(error, pickle.UnpicklingError):
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        held = (
            f"it holds objects other than tensors ({found[1]})"
            if found
            else "it is corrupt, or holds other objects"
        )
        return f"{held}, which are never unpickled; save the state dict alone: torch.save(model.state_dict(), FILE)"
    reason = fault or (archive_fault(file) if is_zip else "")
    if reason:
        return reason
    first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return f"{first_line[:120]}; give a .safetensors or .pth file"


def _plain_state(generator: RRDBNet, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {
        name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in generator.state_dict().items()
    }


def _require_finite(tensors: Mapping[str, Tensor], name: str) -> None:
    for key, tensor in tensors.items():
        # In float32, as networks compute: a larger float64 becomes infinite there.
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor.float()).all()):
            raise UserError(f"{name}: {key} holds non-finite values (NaN or infinity); use other weights")


def generator_sizes(state: Mapping[str, Tensor], metadata: Mapping[str, str], name: str) -> dict[str, Any]:
    """RRDBNet's arguments, from names and shapes; the residual scale from the metadata, default 0.2 (the paper's).

    Raises:
        UserError: not the weights of an RRDBNet.
    """
    first, dense = state.get("conv_first.weight"), state.get("body.0.rdb1.conv1.weight")
    if first is None or dense is None or first.ndim != 4 or dense.ndim != 4:
        missing = "conv_first.weight" if first is None or first.ndim != 4 else "body.0.rdb1.conv1.weight"
        raise UserError(f"{name}: not the weights of an RRDBNet ({missing} is missing or has another shape)")
    scales = {3 * factor**2: scale for scale, factor in UNSHUFFLE.items()}
    if first.shape[1] not in scales:
        raise UserError(
            f"{name}: conv_first takes {first.shape[1]} channels; RGB generators take 3, 12 or 48"
        )
    blocks = [int(key.split(".")[1]) for key in state if re.match(r"body\.\d+\.", key)]
    try:
        residual_scale = float(metadata.get("residual_scale", DEFAULT_RESIDUAL_SCALE))
    except ValueError:
        residual_scale = math.nan
    if not math.isfinite(residual_scale):
        raise UserError(
            f"{name}: residual_scale={metadata['residual_scale']!r} in its header is not a finite number"
        )
    return {
        "num_feat": first.shape[0],
        "num_block": max(blocks) + 1,
        "num_grow_ch": dense.shape[0],
        "residual_scale": residual_scale,
        "scale": scales[first.shape[1]],
    }


def matching(
    state: Mapping[str, Tensor], expected: Mapping[str, Tensor], name: str, network: str
) -> dict[str, Tensor]:
    """The tensors of a file that a network expects, as copies in float32: the rest of the file can be freed.

    Args:
        state: the file's tensors.
        expected: the network's state dict, which may be on the meta device, with the names in the file.
        name: the file's name in error messages.
        network: the network's.

    Raises:
        UserError: a tensor is missing, or has another shape.
    """
    for key, tensor in expected.items():
        found = None if key not in state else tuple(state[key].shape)
        if found != tuple(tensor.shape):
            fault = "is missing" if found is None else f"has shape {found}"
            raise UserError(
                f"{name}: not the weights of {network} ({key} {fault}, expected {tuple(tensor.shape)})"
            )
    return {key: state[key].float().clone(memory_format=torch.contiguous_format) for key in expected}
