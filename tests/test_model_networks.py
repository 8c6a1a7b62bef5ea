"""Generator and discriminators: reference values, names, sizes, memory and initial weights."""

import ast
import copy
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.model import RRDBNet, UNetDiscriminator, VGGStyleDiscriminator, rrdbnet, seeded
from pipeline.model.rrdbnet import DenseBlock

Reference = dict[str, np.ndarray]


def fill(module: nn.Module) -> None:
    """The weights of tests/golden/README.md."""
    state = module.state_dict()
    for number, name in enumerate(sorted(state)):
        tensor = state[name]
        if not tensor.is_floating_point() or "running" in name:
            continue
        v = np.sin(0.7 * np.arange(tensor.numel(), dtype=np.float64) + number)
        if tensor.ndim > 1:
            v = v * 1.5 / np.sqrt(tensor[0].numel())
        elif "bn" in name and name.endswith("weight"):
            v = 1 + 0.1 * v
        else:
            v = 0.1 * v
        tensor.copy_(torch.from_numpy(v.astype(np.float32)).view(tensor.shape))


def shapes(module: nn.Module) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in module.state_dict().items()}


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_the_generators_file_imports_only_torch_and_the_standard_library() -> None:
    """A registered model carries this file and runs where the project is not installed."""
    imports = set()
    for node in ast.walk(ast.parse(Path(rrdbnet.__file__).read_text())):
        if isinstance(node, ast.Import):
            imports |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imports.add((node.module or "").split(".")[0])
    assert "torch" in imports
    assert imports - {"torch"} <= sys.stdlib_module_names


@pytest.mark.parametrize("training", [False, True])
def test_generator_equals_the_reference(reference: Reference, training: bool) -> None:
    generator = RRDBNet(num_block=2)
    fill(generator)
    with torch.set_grad_enabled(training):
        sr = generator.train(training)(torch.from_numpy(reference["rrdbnet_in"])).detach().numpy()
    expected = reference["rrdbnet_out"]
    np.testing.assert_allclose(sr, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_names_and_shapes_are_those_of_published_weights(reference: Reference) -> None:
    assert shapes(RRDBNet(num_block=2)) == json.loads(str(reference["rrdbnet2_keys"]))
    assert shapes(VGGStyleDiscriminator()) == json.loads(str(reference["vggd_keys"]))


def test_parameter_counts_are_the_papers(reference: Reference) -> None:
    with torch.device("meta"):
        assert parameters(RRDBNet()) == reference["rrdbnet23_params"]
        assert parameters(VGGStyleDiscriminator()) == reference["vggd_params"]
        assert parameters(UNetDiscriminator()) == 4_376_897  # Real-ESRGAN's published discriminator.


def test_vgg_style_discriminator_equals_the_reference(reference: Reference) -> None:
    discriminator = VGGStyleDiscriminator()
    fill(discriminator)
    photo = torch.from_numpy(reference["photo_hr"]).permute(2, 0, 1).float() / 255
    crops = torch.stack([photo[:, :, 8 * i : 8 * i + 128] for i in range(4)])
    with torch.no_grad():
        np.testing.assert_allclose(discriminator.eval()(crops), reference["vggd_out_eval"], rtol=1e-4)
        np.testing.assert_allclose(discriminator.train()(crops), reference["vggd_out_train"], rtol=1e-4)


def test_initial_weights_have_the_reference_standard_deviation(reference: Reference) -> None:
    generator = seeded(1, RRDBNet)
    blocks = [module for module in generator.modules() if isinstance(module, DenseBlock)]
    std = np.mean([block.conv1.weight.std().item() for block in blocks])
    assert std == pytest.approx(reference["rdb_conv1_std"], rel=0.05)
    assert generator.conv_first.weight.std().item() == pytest.approx(reference["conv_first_std"], rel=0.05)
    assert not any(block.conv5.bias.any() for block in blocks)


def test_a_seed_decides_the_weights_and_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(123)
    expected = torch.rand(3)
    torch.manual_seed(123)
    a, b, c = (seeded(seed, lambda: RRDBNet(8, 1, 4)).state_dict() for seed in (5, 5, 6))
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["conv_first.weight"], c["conv_first.weight"])


@pytest.mark.parametrize("scale", [4, 2, 1])
def test_the_output_is_larger_by_the_scale(scale: int) -> None:
    assert RRDBNet(4, 1, 2, scale=scale)(torch.rand(2, 3, 8, 12)).shape == (2, 3, 8 * scale, 12 * scale)


def test_another_scale_is_rejected() -> None:
    with pytest.raises(ValueError, match="scale=3"):
        RRDBNet(4, 1, 2, scale=3)


def test_residual_scale_acts_in_the_dense_block_and_in_the_rrdb() -> None:
    x = torch.rand(1, 3, 6, 6)
    inner, outer, unchanged, expected = (seeded(0, lambda: RRDBNet(8, 1, 4)) for _ in range(4))
    for generator in (inner, expected):
        for module in generator.modules():
            if isinstance(module, DenseBlock):
                module.residual_scale = 0.5
    for generator in (outer, expected):
        generator.body[0].residual_scale = 0.5
    given = seeded(0, lambda: RRDBNet(8, 1, 4, residual_scale=0.5))
    assert torch.equal(given(x), expected(x))
    outputs = [generator(x) for generator in (inner, outer, unchanged, given)]
    assert all(not torch.equal(outputs[i], outputs[j]) for i in range(4) for j in range(i))


class _Plain(nn.Module):
    """A dense block as in the paper's figure 4, with the weights of `block`."""

    def __init__(self, block: DenseBlock) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        inputs = [x]
        for number in range(1, 6):
            output = self.block.get_submodule(f"conv{number}")(torch.cat(inputs, 1))
            inputs.append(functional.leaky_relu(output, 0.2) if number < 5 else output)
        return torch.add(x, inputs[-1], alpha=self.block.residual_scale)


def gradients(module: nn.Module, block: DenseBlock, x: Tensor, autocast: bool) -> list[Tensor]:
    block.zero_grad()
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = module(x)
    output.float().pow(2).sum().backward()
    return [x.grad, *(parameter.grad.clone() for parameter in block.parameters())]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_dense_block_has_the_same_gradients_as_with_kept_concatenations(
    autocast: bool, channels_last: bool
) -> None:
    block = seeded(0, lambda: DenseBlock(8, 4, 0.2))
    x = torch.randn(2, 8, 9, 7)
    if channels_last:
        block, x = (
            block.to(memory_format=torch.channels_last),
            x.contiguous(memory_format=torch.channels_last),
        )
    lean, plain = (gradients(module, block, x, autocast) for module in (block, _Plain(block)))
    assert all(torch.equal(a, b) for a, b in zip(lean, plain, strict=True))


def test_dense_block_passes_a_numerical_gradient_check() -> None:
    block = seeded(0, lambda: DenseBlock(3, 2, 0.2)).double()
    assert torch.autograd.gradcheck(
        block, (torch.randn(1, 3, 4, 3, dtype=torch.float64, requires_grad=True),)
    )


def saved_bytes(module: nn.Module, x: Tensor) -> int:
    """Bytes of activations that the forward pass keeps for the backward pass."""
    kept: dict[int, int] = {}
    alive: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        module(x)
    return sum(kept.values())


def test_a_dense_block_keeps_each_activation_once() -> None:
    block = DenseBlock(64, 32, 0.2)
    x = torch.rand(1, 64, 8, 8, requires_grad=True)
    assert saved_bytes(block, x) == (64 + 4 * 32) * 8 * 8 * 4
    assert saved_bytes(_Plain(block), x) > 2.5 * saved_bytes(block, x)


@pytest.mark.parametrize("channels_last", [False, True])
def test_the_trunk_keeps_a_quarter_of_what_concatenations_keep(channels_last: bool) -> None:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    lean = seeded(0, lambda: RRDBNet(64, 2, 32)).body.to(memory_format=layout)
    plain = copy.deepcopy(lean)
    for block in plain:
        for name in ("rdb1", "rdb2", "rdb3"):
            setattr(block, name, _Plain(block.get_submodule(name)))
    x = torch.rand(1, 64, 8, 8).contiguous(memory_format=layout).requires_grad_()
    # 64 + 4 x 32 channels per dense block, against 64, 96, 128, 160, 192 and the four outputs.
    assert saved_bytes(lean, x) <= 0.26 * saved_bytes(plain, x)


@pytest.fixture
def discriminator() -> VGGStyleDiscriminator:
    return seeded(0, lambda: VGGStyleDiscriminator(input_px=64, num_feat=4))


def test_vgg_style_discriminator_takes_multiples_of_32(discriminator: VGGStyleDiscriminator) -> None:
    assert discriminator(torch.rand(2, 3, 64, 64)).shape == (2, 1)
    assert discriminator.linear1.in_features == 8 * 4 * 2 * 2
    with pytest.raises(ValueError, match="input_px=100"):
        VGGStyleDiscriminator(input_px=100)
    with pytest.raises(ValueError, match=r"96 x 96 pixels.*input_px=64"):
        discriminator(torch.rand(2, 3, 96, 96))


def test_memory_format_does_not_change_the_discriminators_logits(
    discriminator: VGGStyleDiscriminator,
) -> None:
    x = torch.rand(2, 3, 64, 64)
    expected = discriminator.eval()(x)
    actual = discriminator.to(memory_format=torch.channels_last)(
        x.contiguous(memory_format=torch.channels_last)
    )
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_unet_discriminator_returns_a_logit_per_pixel() -> None:
    discriminator = seeded(0, lambda: UNetDiscriminator(4))
    assert discriminator(torch.rand(2, 3, 16, 24)).shape == (2, 1, 16, 24)
    assert {"conv0.weight", "conv1.weight_orig", "conv1.weight_u", "conv8.weight_v", "conv9.bias"} <= shapes(
        discriminator
    ).keys()
    with pytest.raises(ValueError, match="multiples of 8"):
        discriminator(torch.rand(1, 3, 20, 16))


def test_spectral_norm_bounds_the_unets_convolutions() -> None:
    discriminator = seeded(0, lambda: UNetDiscriminator(4))
    for _ in range(30):
        discriminator(torch.rand(1, 3, 8, 8))
    weight = discriminator.conv2.weight.detach().flatten(1)
    assert torch.linalg.matrix_norm(weight, 2).item() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("unet", [False, True])
def test_two_forward_passes_serve_one_backward_pass(unet: bool) -> None:
    """A training step computes the logits of real and generated images, then one backward pass through both."""
    discriminator = seeded(0, lambda: UNetDiscriminator(4) if unet else VGGStyleDiscriminator(32, 4))
    real, fake = torch.rand(2, 3, 32, 32), torch.rand(2, 3, 32, 32, requires_grad=True)
    (discriminator(fake).mean() - discriminator(real).mean()).backward()
    assert fake.grad is not None
    assert all(parameter.grad is not None for parameter in discriminator.parameters())
