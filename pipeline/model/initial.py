"""Initial weights from a file: what fits a network by name and shape."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from pipeline.errors import UserError
from pipeline.model.discriminators import VGGStyleDiscriminator
from pipeline.model.weights import read_tensors

# Prefix of the discriminator's tensors in a checkpoint's training.safetensors.
CHECKPOINT_PREFIX = "discriminator."


@dataclass(frozen=True)
class Fit:
    """The part of a file that fits a network, in whole layers: a weight is not taken without its bias."""

    tensors: dict[str, Tensor]
    """Those that are taken."""
    layers: int
    """Layers of the network."""
    fresh: tuple[str, ...]
    """Layers of the network that keep their random initialization."""
    unused: tuple[str, ...]
    """Layers of the file that are not taken."""
    share: float
    """Share of the network's elements that are taken, 0 ... 1."""

    @property
    def complete(self) -> bool:
        """Whether every layer of the network and of the file is taken."""
        return not self.fresh and not self.unused

    def summary(self) -> str:
        """The counts, in one line."""
        text = f"{self.layers - len(self.fresh)} of {self.layers} layers taken ({self.share:.2%} of the parameters)"
        for layers, what in ((self.fresh, "randomly initialized"), (self.unused, "unused in the file")):
            if layers:
                shown = ", ".join(layers[:3]) + (", ..." if len(layers) > 3 else "")
                text += f"; {len(layers)} {what} ({shown})"
        return text


def fit(weights: Mapping[str, Tensor], network: Mapping[str, Tensor]) -> Fit:
    """Compares a file's tensors with a network's state dict, which may be on the meta device."""
    wanted = _layers(network)
    fresh = tuple(
        layer
        for layer, names in wanted.items()
        if any(name not in weights or weights[name].shape != network[name].shape for name in names)
    )
    tensors = {name: weights[name] for layer, names in wanted.items() if layer not in fresh for name in names}
    share = sum(tensor.numel() for tensor in tensors.values()) / sum(
        tensor.numel() for tensor in network.values()
    )
    unused = tuple(
        layer for layer, names in _layers(weights).items() if any(name not in tensors for name in names)
    )
    return Fit(tensors, len(wanted), fresh, unused, share)


def read_discriminator_tensors(source: bytes | Path, name: str) -> dict[str, Tensor]:
    """A discriminator's state dict, from BasicSR's and Real-ESRGAN's files, or a checkpoint's training.safetensors.

    Raises:
        UserError: not readable as weights, not finite, or a checkpoint of stage 1.
    """
    tensors, _ = read_tensors(source, name)
    if any(key.startswith("generator.") for key in tensors):
        tensors = {
            key.removeprefix(CHECKPOINT_PREFIX): tensor
            for key, tensor in tensors.items()
            if key.startswith(CHECKPOINT_PREFIX)
        }
        if not tensors:
            raise UserError(f"{name}: a checkpoint of stage 1, which has no discriminator")
    return {_discriminator_name(key): tensor for key, tensor in tensors.items()}


def discriminator_sizes(state: Mapping[str, Tensor], name: str) -> dict[str, Any]:
    """Kind ("vgg" or "unet"), `num_feat`, and for "vgg" `input_px`, from names and shapes.

    Raises:
        UserError: neither of the two discriminators.
    """
    unet, vgg, linear = (state.get(f"{layer}.weight") for layer in ("conv0", "conv0_0", "linear1"))
    if unet is not None and "conv9.weight" in state:
        return {"kind": "unet", "num_feat": unet.shape[0]}
    if vgg is not None and linear is not None and linear.ndim == 2:
        num_feat = vgg.shape[0]
        side = math.isqrt(linear.shape[1] // (8 * num_feat))
        return {"kind": "vgg", "num_feat": num_feat, "input_px": side * VGGStyleDiscriminator.multiple_of}
    raise UserError(
        f"{name}: not the weights of a discriminator (neither of the VGG-style one nor of the U-Net)"
    )


def _layers(state: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Names of the tensors of each layer (the part before the last dot)."""
    layers: dict[str, list[str]] = {}
    for name in state:
        layers.setdefault(name.rpartition(".")[0], []).append(name)
    return layers


def _discriminator_name(name: str) -> str:
    name = re.sub(r"^(module\.|netD\.)+", "", name)
    # torch's newer form of spectral norm.
    name = re.sub(r"\.parametrizations\.weight\.original$", ".weight_orig", name)
    return re.sub(r"\.parametrizations\.weight\.0\._([uv])$", r".weight_\1", name)
