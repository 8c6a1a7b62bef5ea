"""The discriminator on real and fake images together: the logits, gradients and statistics of separate passes."""

import collections
import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from gloo import run_workers
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.model import UNetDiscriminator, VGGFeatures, VGGStyleDiscriminator, seeded
from pipeline.model.discriminators import Discriminator
from pipeline.training import discriminate, distributed
from pipeline.training import state as states
from pipeline.training.config import TrainConfig
from pipeline.training.discriminate import PairedDiscriminator
from pipeline.training.state import begin_gan, new_state
from pipeline.training.step import Batch, gan_step, psnr_step

GPU = pytest.param(
    "cuda",
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
)
Results = dict[str, Tensor]


def network_of(kind: str, dtype: torch.dtype = torch.float64) -> Discriminator:
    """A discriminator whose batch norm has other weights than 1 and 0."""

    def build() -> Discriminator:
        return UNetDiscriminator(4) if kind == "unet" else VGGStyleDiscriminator(32, 4)

    network = seeded(5, build)
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "bn" in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return network.to(dtype)


def inputs(kind: str, count: int = 5, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """Real and fake images, and three gradients of logits that have nothing to do with each other."""
    generator = torch.Generator().manual_seed(7)
    shape = (count, 1, 32, 32) if kind == "unet" else (count, 1)
    real, fake = (torch.rand(count, 3, 32, 32, generator=generator, dtype=dtype) for _ in range(2))
    return real, 1.5 * fake, *(torch.randn(shape, generator=generator, dtype=dtype) for _ in range(3))


def separately(network: nn.Module, real: Tensor, fake: Tensor, *gradients: Tensor) -> Results:
    """Two passes and two backward passes of autograd."""
    fake = fake.clone().requires_grad_()
    real_logits, fake_logits = network(real), network(fake)
    (of_fake,) = torch.autograd.grad(fake_logits, fake, gradients[2], retain_graph=True)
    torch.autograd.backward(
        [real_logits, fake_logits], list(gradients[:2]), inputs=list(network.parameters())
    )
    return results(network, real_logits, fake_logits, of_fake)


def together(network: nn.Module, real: Tensor, fake: Tensor, *gradients: Tensor) -> Results:
    fake = fake.clone().requires_grad_()
    logits = PairedDiscriminator(network)(real, fake)
    assert torch.equal(logits[1], logits[2])
    torch.autograd.backward(logits, gradients)
    assert fake.grad is not None
    return results(network, *logits[:2], fake.grad)


def results(network: nn.Module, real_logits: Tensor, fake_logits: Tensor, of_fake: Tensor) -> Results:
    of_parameters = {
        f"gradient.{name}": parameter.grad
        for name, parameter in network.named_parameters()
        if parameter.grad is not None
    }
    buffers = {f"buffer.{name}": value for name, value in network.named_buffers()}
    logits = {"real": real_logits.detach(), "fake": fake_logits.detach(), "of_fake": of_fake}
    return {name: value.cpu() for name, value in (logits | of_parameters | buffers).items()}


def largest_difference(found: Results, expected: Results) -> float:
    """Of all tensors, relative to the norm of each."""
    assert found.keys() == expected.keys()
    return max(
        float((found[name].double() - value.double()).norm() / value.double().norm())
        for name, value in expected.items()
    )


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("kind", ["vgg", "unet"])
def test_one_pass_gives_what_autograd_gives_for_two(
    kind: str, layout: torch.memory_format, device: str
) -> None:
    network = network_of(kind).to(device).to(memory_format=layout)
    images = [image.to(device, memory_format=layout) for image in inputs(kind)[:2]]
    gradients = [gradient.to(device) for gradient in inputs(kind)[2:]]
    expected = separately(copy.deepcopy(network), *images, *gradients)
    found = together(network, *images, *gradients)
    assert sum(name.startswith("gradient") for name in expected) == (33 if kind == "vgg" else 12)
    assert largest_difference(found, expected) < 1e-12


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_bf16_rounds_as_separate_passes_do(device: str) -> None:
    given = [tensor.to(device) for tensor in inputs("vgg", 64, torch.float32)]
    network = network_of("vgg", torch.float32).to(device)
    exact = separately(copy.deepcopy(network), *given)
    with torch.autocast(device, torch.bfloat16):
        expected = separately(copy.deepcopy(network), *given)
        found = together(network, *given)
    assert {value.dtype for value in found.values()} == {torch.float32, torch.int64}
    rounding = largest_difference(expected, exact)
    # 8 significant bits: a smaller difference would mean that nothing was computed in bfloat16.
    assert 1e-3 < largest_difference(found, exact) < 1.5 * rounding


def test_without_a_gradient_for_the_fake_images_there_is_none() -> None:
    real, fake, *gradients = inputs("vgg")
    network = network_of("vgg")
    logits = PairedDiscriminator(network)(real, fake)
    torch.autograd.backward(logits, gradients)
    assert fake.grad is None
    assert all(parameter.grad is not None for parameter in network.parameters())


SHARES = {2: (2, 3), 3: (1, 1, 3)}


def share_of_a_pass(rank: int, world_size: int, dtype: torch.dtype) -> Results:
    """Gradients and buffers on one worker of several with different numbers of samples; "reduces": all-reduces."""
    start = sum(SHARES[world_size][:rank])
    network = network_of("vgg", torch.float64 if dtype == torch.float64 else torch.float32)
    given = [
        each[start : start + SHARES[world_size][rank]].to(next(network.parameters()).dtype)
        for each in inputs("vgg")
    ]
    calls: list[torch.Size] = []
    all_reduce = dist.all_reduce

    def counting(tensor: Tensor) -> None:
        calls.append(tensor.shape)
        all_reduce(tensor)

    dist.all_reduce = counting  # type: ignore[assignment]
    try:
        with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
            found = together(network, *given)
    finally:
        dist.all_reduce = all_reduce
    return found | {"reduces": torch.tensor(len(calls))}


def joined(shares: list[Results]) -> Results:
    """What one worker would have with all shares."""
    whole: Results = {}
    for name, value in shares[0].items():
        if name.startswith("gradient"):
            whole[name] = torch.stack([share[name] for share in shares]).sum(0)
        elif name.startswith("buffer"):
            assert all(torch.equal(value, share[name]) for share in shares)
            whole[name] = value
        elif name != "reduces":
            whole[name] = torch.cat([share[name] for share in shares])
    return whole


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world_size", "dtype"), [(2, torch.float64), (3, torch.float64), (2, torch.bfloat16)]
)
def test_workers_with_unequal_shares_have_the_statistics_of_the_global_batch(
    world_size: int, dtype: torch.dtype
) -> None:
    shares = run_workers(world_size, share_of_a_pass, dtype)
    expected = separately(network_of("vgg"), *inputs("vgg"))
    assert [int(share["reduces"]) for share in shares] == [18] * world_size
    limit = 1e-12
    if dtype == torch.bfloat16:
        # Half as much again as the rounding of one worker's separate passes.
        single = [tensor.float() for tensor in inputs("vgg")]
        with torch.autocast("cpu", dtype):
            rounded = separately(network_of("vgg", torch.float32), *single)
        limit = 1.5 * largest_difference(rounded, expected)
    assert largest_difference(joined(shares), expected) < limit


class Count(TorchDispatchMode):
    """Counts dispatched operations but views and allocations, which start no kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and "empty" not in str(func):
            self.operations[str(func)] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("workers", "precision", "stage", "limit"),
    [
        (1, "fp32", "psnr", 2850),
        (1, "fp32", "gan", 3215),
        (1, "bf16", "gan", 4675),
        (8, "fp32", "gan", 3655),
        (8, "bf16", "gan", 5120),
    ],
)
def test_a_step_dispatches_a_limited_number_of_operations(
    monkeypatch: pytest.MonkeyPatch, workers: int, precision: str, stage: str, limit: int
) -> None:
    """Each operation costs the host several microseconds, and a small all-reduce between GPUs 20 to 120.

    The limits, for 23 blocks, are 1 % above the counts when they were set.
    """
    reductions: list[torch.Size] = []
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, **_: reductions.append(tensor.shape))
    for module in (distributed, discriminate):
        monkeypatch.setattr(module, "world_size", lambda: workers)
        monkeypatch.setattr(module, "rank", lambda: 0)
    monkeypatch.setattr(states, "distribute", lambda module, *_: module)
    model = {"num_block": 23, "num_feat": 4, "num_grow_ch": 2, "discriminator_num_feat": 4}
    fields = {"batch_size": 2 * workers, "crop_px": 32, "model": model, "precision": precision}
    config = TrainConfig.model_validate(fields | {"perceptual": {"layers": {"conv1_2": 1.0}}})
    device, features = torch.device("cpu"), VGGFeatures(["conv1_2"], "random")
    state = new_state(config, "psnr", device)
    batch = Batch(torch.rand(2, 3, 8, 8), torch.rand(2, 3, 32, 32), config.batch_size)
    if stage == "gan":
        begin_gan(state, config, device)

    def step() -> None:
        if stage == "gan":
            gan_step(state, batch, features, config, 1e-4)
        else:
            psnr_step(state, batch, config, 1e-4)

    step()
    reductions.clear()
    with Count() as count:
        step()
    assert len(reductions) == (20 if workers > 1 else 0)
    assert count.operations.total() <= limit, count.operations.most_common(30)
