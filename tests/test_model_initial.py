"""What fits a network: whole layers, by name and shape; the sizes of discriminators."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.model import RRDBNet, UNetDiscriminator, VGGStyleDiscriminator
from pipeline.model.initial import discriminator_sizes, fit, read_discriminator_tensors


def generator(**sizes: int) -> dict[str, Tensor]:
    return RRDBNet(**{"num_feat": 8, "num_block": 2, "num_grow_ch": 4, **sizes}).state_dict()


def test_an_equal_network_is_taken_completely() -> None:
    found = fit(generator(), generator())
    assert found.complete
    assert found.tensors.keys() == generator().keys()
    assert found.summary() == "36 of 36 layers taken (100.00% of the parameters)"


@pytest.mark.parametrize(
    ("file", "network", "fresh", "unused"),
    [
        ({}, {"num_block": 3}, 15, 0),
        ({"num_block": 3}, {}, 0, 15),
        ({}, {"scale": 2}, 1, 1),
        ({"num_grow_ch": 6}, {}, 30, 30),
        ({"num_feat": 12}, {}, 36, 36),
    ],
)
def test_layers_that_do_not_fit_are_counted(
    file: dict[str, int], network: dict[str, int], fresh: int, unused: int
) -> None:
    found = fit(generator(**file), generator(**network))
    assert (len(found.fresh), len(found.unused)) == (fresh, unused)
    assert not found.complete
    assert f"{found.layers - fresh} of {found.layers} layers taken" in found.summary()


def test_a_bias_is_not_taken_without_its_weight() -> None:
    found = fit(generator(), generator(scale=2))
    assert found.fresh == ("conv_first",)
    assert "conv_first.bias" not in found.tensors


@pytest.mark.parametrize(
    ("network", "sizes"),
    [
        (VGGStyleDiscriminator(32, 4), {"kind": "vgg", "num_feat": 4, "input_px": 32}),
        (VGGStyleDiscriminator(96, 6), {"kind": "vgg", "num_feat": 6, "input_px": 96}),
        (UNetDiscriminator(5), {"kind": "unet", "num_feat": 5}),
    ],
)
@pytest.mark.parametrize("key", ["params", "params_ema", None])
def test_a_discriminator_is_read_from_basicsrs_file(
    tmp_path: Path, network: nn.Module, sizes: dict[str, object], key: str | None
) -> None:
    state = {f"module.{name}": tensor for name, tensor in network.state_dict().items()}
    torch.save({key: state} if key else state, tmp_path / "d.pth")
    tensors = read_discriminator_tensors(tmp_path / "d.pth", "d.pth")
    assert discriminator_sizes(tensors, "d.pth") == sizes
    assert fit(tensors, network.state_dict()).complete


def test_spectral_norm_as_a_parametrization_is_read(tmp_path: Path) -> None:
    network = UNetDiscriminator(4)
    state = {}
    for name, tensor in network.state_dict().items():
        for old, new in (("orig", "original"), ("u", "0._u"), ("v", "0._v")):
            if name.endswith(f".weight_{old}"):
                name = name.removesuffix(f"weight_{old}") + f"parametrizations.weight.{new}"
        state[name] = tensor
    torch.save(state, tmp_path / "d.pth")
    assert fit(read_discriminator_tensors(tmp_path / "d.pth", ""), network.state_dict()).complete


def test_a_generator_is_not_a_discriminator() -> None:
    with pytest.raises(UserError, match=r"x.pth: not the weights of a discriminator"):
        discriminator_sizes(generator(), "x.pth")
