"""Backbone weights drawn from a seed, under names with their sha256, in place of torchvision's downloads."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pipeline.metrics import weights


@contextmanager
def drawn(seed: int) -> Iterator[None]:
    """Torch's CPU generator with this seed; the global state does not change."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def random_backbone(make: type[nn.Module], seed: int = 0) -> nn.Module:
    """`features` of a torchvision network with weights that keep the activations' variance."""
    with torch.device("meta"):
        features = make().features
    features.to_empty(device="cpu")
    with drawn(seed):
        for layer in features:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.normal_(layer.bias, std=0.1)
    return features.eval()


def write_backbone(folder: Path, name: str, features: nn.Module) -> Path:
    """Writes a network's `features` as the weights file of a metric, with its sha256 in the file's name."""
    state: dict[str, Tensor] = {f"features.{key}": value for key, value in features.state_dict().items()}
    path = folder / "weights"
    torch.save(state, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return path.rename(folder / f"{name}-{digest[:8]}.pth")


def use_backbone(monkeypatch: pytest.MonkeyPatch, name: str, path: Path) -> None:
    """Makes a file the only valid weights of a metric."""
    monkeypatch.setitem(weights.BACKBONES, name, path.name)
