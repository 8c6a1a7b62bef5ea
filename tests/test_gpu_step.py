"""The step on a GPU: equal to the CPU's, without host synchronizations, within bounded memory."""

import gc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from gloo import run_workers
from gpu import (
    BATCH,
    DEVICES,
    SmallFeatures,
    batch_of,
    different,
    everything,
    first_step,
    first_step_of_worker,
    no_host_wait,
    requires_gpu,
    small_config,
    state_of,
    take_step,
)
from torch import Tensor

from pipeline.data.feed import RawBatch
from pipeline.model import VGGFeatures, set_deterministic, set_precision
from pipeline.model.losses import ms_ssim_loss
from pipeline.storage import Storage
from pipeline.training import checkpoint as checkpoints
from pipeline.training.batches import on_device
from pipeline.training.checkpointer import Checkpointer
from pipeline.training.config import TrainConfig
from pipeline.training.meter import Meter
from pipeline.training.run_log import RunLog
from pipeline.training.state import TrainState, begin_gan, new_state
from pipeline.training.worker import Worker

STAGES = [("psnr", "vgg"), ("gan", "vgg"), ("gan", "unet")]
# Of the norm of the generator's gradient. float32 rounds to 2^-24, TF32 a convolution's inputs to 2^-11, bf16 to 2^-9.
LIMITS = {"fp32": 1e-4, "tf32": 2e-2, "bf16": 1e-1}
# An untrained discriminator's logits are nearly equal for real and fake images, so its gradient is a small difference.
ILL_CONDITIONED = 20


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    yield
    set_precision("tf32")  # torch's default
    set_deterministic(False)


def distance(one: dict[str, Tensor], other: dict[str, Tensor], network: str) -> float:
    """Norm of the difference of a network's gradients, relative to the second's."""
    names = [name for name in other if name.startswith(f"{network}_optimizer.")]
    found, expected = (torch.cat([values[name].flatten() for name in names]) for values in (one, other))
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("stage", "discriminator"), STAGES)
def test_a_step_in_float64_equals_the_cpus(device: str, stage: str, discriminator: str) -> None:
    expected = first_step(stage, "cpu", torch.float64, "fp32", discriminator)
    found = first_step(stage, device, torch.float64, "fp32", discriminator)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] - value).abs().max() <= 1e-10 * max(1e-3, float(value.abs().max())), name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
@pytest.mark.parametrize(("stage", "discriminator"), STAGES)
def test_every_precision_is_near_float64(device: str, precision: str, stage: str, discriminator: str) -> None:
    exact = first_step(stage, device, torch.float64, "fp32", discriminator)
    found = first_step(stage, device, torch.float32, precision, discriminator)
    assert distance(found, exact, "generator") <= LIMITS[precision]
    if stage == "gan":
        assert distance(found, exact, "discriminator") <= ILL_CONDITIONED * LIMITS[precision]
    for name in exact:
        if name.endswith(("weight_u", "weight_v")):  # spectral norm stays outside of autocast
            torch.testing.assert_close(found[name], exact[name], rtol=0, atol=1e-5)


@pytest.mark.gpu
@requires_gpu
def test_fp32_is_not_tf32_on_a_gpu() -> None:
    exact = first_step("psnr", "cuda", torch.float64)
    rounded = {
        each: distance(first_step("psnr", "cuda", precision=each), exact, "generator") for each in LIMITS
    }
    assert rounded["fp32"] < 0.1 * rounded["tf32"] < rounded["bf16"]


@pytest.mark.parametrize("device", DEVICES)
def test_ms_ssim_is_not_computed_in_tf32(device: str) -> None:
    set_precision("tf32")
    generator = torch.Generator().manual_seed(0)
    hr = torch.rand(2, 3, 128, 128, generator=generator, dtype=torch.float64)
    sr = hr + 0.01 * torch.randn(hr.shape, generator=generator, dtype=torch.float64)
    loss = ms_ssim_loss(sr.float().to(device), hr.float().to(device))
    assert loss.item() == pytest.approx(ms_ssim_loss(sr, hr).item(), abs=1e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("stage", "discriminator"), STAGES)
def test_the_host_never_waits_for_the_device(device: str, stage: str, discriminator: str) -> None:
    config = small_config(discriminator).model_copy(update={"shuffle_channels": True})
    state, features = state_of(stage, device, discriminator=discriminator), SmallFeatures().to(device)
    worker, meter = Worker(device=torch.device(device)), Meter(BATCH, torch.device(device))
    draws = np.random.default_rng(0)
    raw = RawBatch(
        draws.integers(0, 256, (BATCH, 8, 8, 3), np.uint8),
        draws.integers(0, 256, (BATCH, 32, 32, 3), np.uint8),
        0,
    )

    def iteration(step: int) -> None:
        meter.add(take_step(state, on_device(raw, config, worker, step), features), 0.0, raw.corrupt)

    for step in range(4):  # cuDNN and Adam's state are set up, and a graph may be captured
        iteration(step)
    meter.finish()
    with no_host_wait(device):
        for step in range(4, 7):
            iteration(step)
    assert meter.finish()[0]["loss_pixel"] > 0


def test_a_wait_for_the_device_is_detected() -> None:
    with pytest.raises(AssertionError, match="waits for the device"), no_host_wait("cpu"):
        torch.ones(1).item()


@pytest.mark.gpu
@requires_gpu
def test_a_wait_for_the_gpu_is_detected() -> None:
    value = torch.ones(1, device="cuda")
    with pytest.raises(RuntimeError, match="synchronizing"), no_host_wait("cuda"):
        value.item()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("stage", "discriminator"), STAGES)
def test_a_step_with_nan_changes_nothing(device: str, stage: str, discriminator: str) -> None:
    state, features = state_of(stage, device, discriminator=discriminator), SmallFeatures().to(device)
    for step in range(3):
        take_step(state, batch_of(step, device, torch.float32), features)
    before = everything(state)
    bad = batch_of(3, device, torch.float32)
    bad.lr[0, 0, 0, 0] = float("nan")
    take_step(state, bad, features)
    after = everything(state)
    assert different(before, after) == ["skipped"]
    assert after["skipped"].tolist() == [1, 1]
    take_step(state, batch_of(4, device, torch.float32), features)
    assert everything(state)["skipped"].tolist() == [0, 1]


def saved(state: TrainState, folder: Path) -> checkpoints.Checkpoint:
    """The state's checkpoint, written and read again."""
    config, run = TrainConfig(), Storage(str(folder))
    with Checkpointer(config, run, state, RunLog(config, Worker(), run)) as checkpointer:
        checkpointer.save()
    return checkpoints.read(run, checkpoints.CheckpointName(state.step, state.stage))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("stage", "discriminator"), STAGES)
def test_a_checkpoint_keeps_every_bit_on_any_device(
    tmp_path: Path, device: str, stage: str, discriminator: str
) -> None:
    state, features = state_of(stage, device, discriminator=discriminator), SmallFeatures()
    for step in range(2):
        take_step(state, batch_of(step, device, torch.float32), features.to(device))
    expected = everything(state)
    for index, target in enumerate(["cpu", device, device]):
        checkpoint = saved(state, tmp_path / str(index))
        state = state_of(stage, target, discriminator=discriminator)
        state.load(checkpoint.ema, checkpoint.tensors, checkpoint.scalars)
        assert different(expected, everything(state)) == []
        assert {value.device.type for value in state.tensors().values()} == {target}
    take_step(state, batch_of(2, device, torch.float32), features.to(device))


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("stage", "discriminator"), STAGES)
def test_two_processes_on_one_device_equal_one(device: str, stage: str, discriminator: str) -> None:
    alone = first_step(stage, device, torch.float64, "fp32", discriminator)
    together = run_workers(2, first_step_of_worker, stage, device, torch.float64, discriminator)
    for name, value in alone.items():
        tolerance = 1e-10 * max(1e-3, float(value.abs().max()))
        if name.startswith("scalar."):
            mean = (together[0][name] + together[1][name]) / 2
            assert (mean - value).abs() <= tolerance, name
        else:
            assert max(float((each[name] - value).abs().max()) for each in together) <= tolerance, name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("stage", "discriminator"), STAGES)
def test_deterministic_steps_repeat_every_bit(device: str, stage: str, discriminator: str) -> None:
    set_deterministic(True)
    set_precision("tf32")

    def after_steps() -> dict[str, Tensor]:
        state, features = state_of(stage, device, discriminator=discriminator), SmallFeatures().to(device)
        for step in range(6):
            take_step(state, batch_of(step, device, torch.float32), features, "bf16")
        return everything(state)

    assert different(after_steps(), after_steps()) == []


def live_bytes(device: str) -> int:
    """Memory of all tensors on the device."""
    if device == "cuda":
        return torch.cuda.memory_allocated()
    gc.collect()
    tensors = [each for each in gc.get_objects() if type(each) in (Tensor, torch.nn.Parameter)]
    return sum({each.data_ptr(): each.nbytes for each in tensors}.values())


@pytest.fixture
def few_objects() -> Iterator[None]:
    """Objects that exist already are not searched for tensors: imports leave a million of them."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("stage", "discriminator"), STAGES)
def test_steps_do_not_add_memory(few_objects: None, device: str, stage: str, discriminator: str) -> None:
    state, features = state_of(stage, device, discriminator=discriminator), SmallFeatures().to(device)
    batches = [batch_of(step, device, torch.float32) for step in range(2)]
    used = []
    for step in range(10):
        take_step(state, batches[step % 2], features)
        if step >= 5:
            used.append(live_bytes(device))
    assert len(set(used)) == 1, used


@pytest.mark.gpu
@requires_gpu
@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_the_papers_step_fits_into_8_gib(precision: str) -> None:
    config, device = TrainConfig(precision=precision), torch.device("cuda")
    set_precision(precision)
    state = new_state(config, "psnr", device)
    begin_gan(state, config, device)
    features = VGGFeatures(config.perceptual.layers, "random", seed=0).to(device)
    torch.cuda.reset_peak_memory_stats()
    generator = torch.Generator(device).manual_seed(0)
    for _ in range(3):
        hr = torch.rand(16, 3, 128, 128, device=device, generator=generator)
        lr = hr[:, :, ::4, ::4].contiguous()
        batch = type(batch_of(0, "cpu", torch.float32))(lr, hr, 16)
        scalars = take_step(state, batch, features, precision)
    assert all(bool(value.isfinite()) for value in scalars.values())
    assert torch.cuda.max_memory_allocated() < 8 * 2**30
