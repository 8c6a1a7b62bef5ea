"""The GPU kernels for the generator's trunk compute what the plain trunk computes."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipeline.model import RRDBNet
from pipeline.model.seeding import seeded
from pipeline.model.trunk import use_kernels

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)


def _network() -> RRDBNet:
    """Small, with weights large enough that every convolution matters, and biases of both signs."""
    network = seeded(0, lambda: RRDBNet(32, 2, 16))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim > 1:
                parameter.mul_(10)
            else:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return network


def _error(value: Tensor, expected: Tensor) -> float:
    value, expected = value.detach().double(), expected.detach().double()
    return float((value - expected).norm() / expected.norm())


def _errors(
    device: torch.device, dtype: torch.dtype, images: int, height: int, width: int
) -> dict[str, float]:
    """Relative errors of the kernels against float64: the output, the input's gradient, the worst parameter's."""
    from pipeline.model.trunk_kernels import trunk

    network = _network().to(device)
    generator = torch.Generator().manual_seed(2)
    shape = (images, 32, height, width)
    x = torch.randn(shape, generator=generator).to(device, dtype, memory_format=torch.channels_last)
    gradient = torch.randn(shape, generator=generator).to(device, dtype)
    given = x.clone().requires_grad_()
    output = trunk(given, network.body, 0.2)
    output.backward(gradient.to(memory_format=torch.channels_last))
    with torch.no_grad():
        inferred = trunk(x, network.body, 0.2)
    exact = _network().to(device).double()
    exact_given = x.double().requires_grad_()
    expected = exact.body(exact_given)
    expected.backward(gradient.double())
    assert given.grad is not None
    assert exact_given.grad is not None
    worst = 0.0
    for (name, parameter), other in zip(
        network.body.named_parameters(), exact.body.parameters(), strict=True
    ):
        assert parameter.grad is not None, name
        assert other.grad is not None
        worst = max(worst, _error(parameter.grad, other.grad))
    return {
        "output": _error(output, expected),
        "inference": _error(inferred, expected),
        "input": _error(given.grad, exact_given.grad),
        "parameters": worst,
    }


@needs_triton
@pytest.mark.slow
def test_kernels_equal_the_plain_trunk_in_the_interpreter() -> None:
    """Whole rows in a tile, and rows across tiles; float32, so that only the order of summation differs."""
    root = Path(__file__).parent.parent
    result = subprocess.run(
        [sys.executable, __file__],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=True,
    )
    errors = [float(value) for value in result.stdout.split()]
    assert len(errors) == 2 * 4
    assert max(errors) < 2e-5, result.stdout


@pytest.mark.gpu
@needs_triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.bfloat16, 1.6e-2), (torch.float16, 2e-3)], ids=["bf16", "fp16"]
)
@pytest.mark.parametrize(("images", "height", "width"), [(2, 32, 32), (1, 20, 37)])
def test_kernels_agree_with_float64_on_a_gpu(
    dtype: torch.dtype, limit: float, images: int, height: int, width: int
) -> None:
    errors = _errors(torch.device("cuda"), dtype, images, height, width)
    assert errors["output"] < limit
    assert errors["inference"] < limit
    assert errors["input"] < limit
    # Where an output is rounded across zero, its leaky ReLU has the other slope.
    assert errors["parameters"] < 20 * limit


def test_cpu_and_float32_use_the_plain_trunk() -> None:
    plain, network = _network(), _network()
    use_kernels(network)
    x = torch.rand(1, 3, 8, 8)
    assert torch.equal(network(x), plain(x))


if __name__ == "__main__":
    for size in (4, 32), (5, 7):
        print(*_errors(torch.device("cpu"), torch.float32, 2, *size).values())
