"""Shared by the GPU tests: a small step on any device. The same tests run on the CPU, which checks their logic."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.model import set_precision
from pipeline.training.config import TrainConfig
from pipeline.training.distributed import unwrap
from pipeline.training.state import TrainState, begin_gan, new_state
from pipeline.training.step import Batch, gan_step, psnr_step

# Read when cuBLAS starts, which is before the first deterministic test.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

requires_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
GPU = pytest.param("cuda", marks=[pytest.mark.gpu, requires_gpu])
DEVICES = ["cpu", GPU]

BATCH = 8
LEARNING_RATE = 1e-3


def small_config(discriminator: str = "vgg") -> TrainConfig:
    """A step of 8 crops of 32 px, with networks of some thousand weights."""
    return TrainConfig.model_validate(
        {
            "batch_size": BATCH,
            "crop_px": 32,
            "seed": 3,
            "model": {
                "num_block": 1,
                "num_feat": 8,
                "num_grow_ch": 4,
                "discriminator": discriminator,
                "discriminator_num_feat": 4,
            },
            "data": {"patch_px": 64},
        }
    )


class SmallFeatures(nn.Module):
    """Replaces VGG19: two convolutions with seeded weights."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("first", 0.1 * torch.randn(6, 3, 3, 3, generator=generator, dtype=torch.float64))
        self.register_buffer(
            "second", 0.1 * torch.randn(6, 6, 3, 3, generator=generator, dtype=torch.float64)
        )

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        x = functional.conv2d(images, self.first.to(images.dtype), padding=1)
        return {"conv5_4": functional.conv2d(functional.relu(x), self.second.to(images.dtype), padding=1)}


def batch_of(step: int, device: str, dtype: torch.dtype, rank: int = 0, world_size: int = 1) -> Batch:
    """This rank's samples of a step of random images."""
    generator = torch.Generator().manual_seed(100 + step)
    lr = torch.rand(BATCH, 3, 8, 8, generator=generator, dtype=torch.float64)
    hr = torch.rand(BATCH, 3, 32, 32, generator=generator, dtype=torch.float64)
    rows = slice(BATCH * rank // world_size, BATCH * (rank + 1) // world_size)
    return Batch(lr[rows].to(device, dtype), hr[rows].to(device, dtype), global_size=BATCH)


def state_of(
    stage: str, device: str, dtype: torch.dtype = torch.float32, discriminator: str = "vgg"
) -> TrainState:
    """A new state of a stage, with the same weights in every dtype."""
    config, default = small_config(discriminator), torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        state = new_state(config, "psnr", torch.device(device))
        if stage == "gan":
            begin_gan(state, config, torch.device(device))
    finally:
        torch.set_default_dtype(default)
    if dtype != torch.float32:  # torch draws other numbers in float64
        drawn = state_of(stage, device, discriminator=discriminator)
        for network, source in [
            (state.generator, drawn.generator), (state.ema, drawn.ema), (state.discriminator, drawn.discriminator)
        ]:  # fmt: skip
            if network is not None and source is not None:
                unwrap(network).load_state_dict(unwrap(source).state_dict())
    return state


def take_step(
    state: TrainState, batch: Batch, features: nn.Module, precision: str = "fp32"
) -> dict[str, Tensor]:
    """One step of the state's stage; returns its scalars."""
    config = small_config().model_copy(update={"ema_decay": 0.9, "precision": precision})
    if state.stage == "psnr":
        return psnr_step(state, batch, config, LEARNING_RATE)
    return gan_step(state, batch, features, config, LEARNING_RATE)


def first_step(
    stage: str,
    device: str,
    dtype: torch.dtype = torch.float32,
    precision: str = "fp32",
    discriminator: str = "vgg",
    rank: int = 0,
    world_size: int = 1,
) -> dict[str, Tensor]:
    """Gradients (as Adam's first moments), buffers and scalars of a stage's first step, in float64 on the CPU."""
    set_precision(precision)
    state = state_of(stage, device, dtype, discriminator)
    scalars = take_step(
        state, batch_of(0, device, dtype, rank, world_size), SmallFeatures().to(device), precision
    )
    seen = {f"scalar.{name}": value for name, value in scalars.items()}
    seen |= {
        name: value
        for name, value in state.tensors().items()
        if name.endswith(("exp_avg", "weight_u", "weight_v")) or "running" in name
    }
    return {name: value.detach().double().cpu() for name, value in seen.items()}


def first_step_of_worker(rank: int, world_size: int, *arguments: Any) -> dict[str, Tensor]:
    """The same for `gloo.run_workers`."""
    stage, device, dtype, discriminator = arguments
    return first_step(stage, device, dtype, "fp32", discriminator, rank, world_size)


def everything(state: TrainState) -> dict[str, Tensor]:
    """Copies of all tensors of the state, on the CPU."""
    named = state.tensors() | {f"ema.{name}": value for name, value in state.ema.state_dict().items()}
    return {name: value.detach().cpu().clone() for name, value in named.items()}


def different(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    """Names of the tensors whose bits differ, or that only one has."""
    names = one.keys() | other.keys()
    return sorted(
        name
        for name in names
        if name not in one or name not in other or not torch.equal(one[name], other[name])
    )


class _NoFetch(TorchDispatchMode):
    """Raises for operations that fetch a value of a tensor: on a GPU the host would wait for them."""

    _FETCHES = ("_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal", "allclose")

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        if function.overloadpacket.__name__ in self._FETCHES:
            raise AssertionError(f"{function} waits for the device")
        return function(*arguments, **(options or {}))


@contextmanager
def no_host_wait(device: str) -> Iterator[None]:
    """Fails if the host waits for the device."""
    if device == "cpu":
        with _NoFetch():
            yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
