"""Forms of weight files: wrappers, prefixes and older names that are understood, and what any other file is."""

import re
import zipfile
from collections.abc import Mapping
from typing import Any, BinaryIO

import numpy as np
from numpy._core.multiarray import _reconstruct, scalar
from torch import Tensor

# Entries that hold a state dict; EMA weights before others.
WRAPPERS = (
    *("params_ema", "params-ema", "model_ema", "ema", "params", "state_dict", "model_state_dict"),
    *("generator", "net_g", "netG", "model", "net"),
)
# Prefixes of parameters. Of a file with several networks, those with a generator's prefix are used.
_GENERATOR_PREFIXES = ("generator_ema.", "generator.", "netG_ema.", "netG.", "net_g.")
_WRAPPER_PREFIXES = ("module.", "_orig_mod.")
# Entries of torch.optim.swa_utils.AveragedModel that are not parameters.
_COUNTERS = ("n_averaged",)
_OLDER_NAMES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        # The first repository: numbered layers of a Sequential.
        (r"^model\.0\.(\w+)$", r"conv_first.\1"),
        (r"^model\.1\.sub\.(\d+)\.RDB(\d)\.conv(\d)\.0\.(\w+)$", r"body.\1.rdb\2.conv\3.\4"),
        (r"^model\.1\.sub\.\d+\.(weight|bias)$", r"conv_body.\1"),
        (r"^model\.3\.(\w+)$", r"conv_up1.\1"),
        (r"^model\.6\.(\w+)$", r"conv_up2.\1"),
        (r"^model\.8\.(\w+)$", r"conv_hr.\1"),
        (r"^model\.10\.(\w+)$", r"conv_last.\1"),
        # The same repository, later.
        (r"^RRDB_trunk\.(\d+)\.RDB(\d)\.(conv\d\.\w+)$", r"body.\1.rdb\2.\3"),
        (r"^trunk_conv\.", "conv_body."),
        (r"^upconv(\d)\.", r"conv_up\1."),
        (r"^HRconv\.", "conv_hr."),
    ]
]
# The last layer of the first repository's other scales.
_SCALE_OF_LAST_LAYER = {4: 1, 7: 2, 13: 8}
_SIGNATURES = (
    (b"version https://git-lfs", "a git-LFS pointer instead of the file; run: git lfs pull"),
    (b"<", "HTML or XML text, perhaps a download page; download the file itself"),
    (b"\x08", "perhaps an ONNX file; give the .safetensors or .pth file that it was exported from"),
    (b"\x1f\x8b", "a .gz archive; unpack it"),
    (b"7z\xbc\xaf", "a .7z archive; unpack it"),
    (b"Rar!", "a .rar archive; unpack it"),
)


def numpy_globals() -> list[Any]:
    """What torch may build from a file in addition to tensors: numpy numbers and arrays, such as a saved PSNR."""
    kinds = [
        type(np.dtype(kind))
        for kind in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "?")
    ]
    functions = [
        (function, f"numpy.{core}.multiarray.{function.__name__}")
        for function in (scalar, _reconstruct)
        for core in ("core", "_core")
    ]
    return [np.dtype, np.ndarray, *kinds, *functions]


def content_fault(file: BinaryIO) -> str:
    """What other file this is, by its first bytes, and what to do; empty if unknown. Reads from the start."""
    start = file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n")
    file.seek(0)
    if not start:
        return "an empty file; download it again"
    return next((text for magic, text in _SIGNATURES if start.startswith(magic)), "")


def archive_fault(file: BinaryIO) -> str:
    """Why a zip archive is not one of PyTorch's; empty if unknown."""
    try:
        names = zipfile.ZipFile(file).namelist()
    except (zipfile.BadZipFile, OSError):
        return "truncated or corrupt; download it again"
    inside = [name for name in names if name.endswith((".pth", ".pt", ".ckpt", ".safetensors"))]
    return f"an archive that contains {inside[0]}; unpack it" if inside else ""


def unwrapped(loaded: object) -> dict[str, Tensor]:
    """The state dict in the content of a file: one of WRAPPERS, or the content itself; entries other than tensors are
    dropped, and without any the result is empty.
    """
    for _ in range(2):
        if isinstance(loaded, dict):
            loaded = next((loaded[key] for key in WRAPPERS if isinstance(loaded.get(key), dict)), loaded)
    if not isinstance(loaded, dict):
        return {}
    return {
        str(key): value
        for key, value in loaded.items()
        if isinstance(value, Tensor) and str(key) not in _COUNTERS
    }


def no_state_dict(loaded: object) -> str:
    """What the content of a file without a state dict is, and what to do."""
    if isinstance(loaded, dict) and loaded.keys() & {
        "optimizers",
        "optimizer",
        "schedulers",
        "optimizer_states",
    }:
        return (
            "a training state (optimizers) without weights; give the network's file, such as net_g_latest.pth"
        )
    return "contains no state dict (a mapping from names to tensors)"


def generator_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The generator's parameters by RRDBNet's names; names that are not known are returned unchanged."""
    plain = {_without_wrappers(key): tensor for key, tensor in tensors.items()}
    for prefix in _GENERATOR_PREFIXES:
        part = {key.removeprefix(prefix): tensor for key, tensor in plain.items() if key.startswith(prefix)}
        if part:
            plain = {_without_wrappers(key): tensor for key, tensor in part.items()}
            break
    return {_modern_name(key): tensor for key, tensor in plain.items()}


def other_network(state: Mapping[str, Tensor]) -> str:
    """What a state dict is that RRDBNet cannot hold, and what to do; empty if unknown.

    Args:
        state: as `generator_names` returns it.
    """
    layers = [int(found[1]) for key in state if (found := re.fullmatch(r"model\.(\d+)\.weight", key))]
    scale = _SCALE_OF_LAST_LAYER.get(max(layers, default=0)) if "conv_first.weight" in state else None
    if scale is None and "conv_first.weight" in state and "conv_last.weight" in state:
        upsampling = len({key for key in state if re.fullmatch(r"conv_up\d\.weight", key)})
        scale = {0: 1, 1: 2, 3: 8}.get(upsampling)
    if scale is not None:
        return (
            f"an x{scale} generator with its own number of upsampling layers; x4 is read, and x2 and x1 in "
            "Real-ESRGAN's form (12 or 48 input channels): use another file"
        )
    if any(".conv1x1." in key for key in state):
        return "a generator of ESRGAN+ (with conv1x1 layers), which is not supported; use an ESRGAN file"
    return _other_kind(state)


def _other_kind(state: Mapping[str, Tensor]) -> str:
    kinds = {
        "a U-Net discriminator": ("conv0.weight", "conv9.weight"),
        "a VGG-style discriminator": ("conv0_0.weight", "linear1.weight"),
        "a discriminator": ("classifier.0.weight", "features.0.weight"),
        "a SwinIR or HAT network": ("layers.0.residual_group.blocks.0.norm1.weight",),
        "an EDSR network": ("head.0.weight", "tail.0.0.weight"),
    }
    names = {key.replace(".weight_orig", ".weight") for key in state}
    for kind, needed in kinds.items():
        if names.issuperset(needed):
            give = "give the generator's file" if "discriminator" in kind else "give an RRDBNet (ESRGAN)"
            return f"{kind}, not a generator of this kind; {give}"
    return ""


def _without_wrappers(name: str) -> str:
    """A name without the prefixes of DataParallel, torch.compile and AveragedModel, in any order."""
    while name.startswith(_WRAPPER_PREFIXES):
        name = name.partition(".")[2]
    return name


def _modern_name(name: str) -> str:
    for pattern, replacement in _OLDER_NAMES:
        name, replaced = pattern.subn(replacement, name)
        if replaced:
            break
    return name
