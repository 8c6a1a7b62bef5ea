"""The step: the same on any number of workers, and the same as the plain sequence of operations."""

import copy
from typing import Any

import pytest
import torch
from gloo import run_workers
from torch import Tensor, nn
from torch.nn import functional

from pipeline.model import RRDBNet, UNetDiscriminator
from pipeline.model.losses import ms_ssim_loss, relativistic_losses
from pipeline.section import with_fields
from pipeline.training.config import TrainConfig
from pipeline.training.distributed import unwrap
from pipeline.training.state import TrainState, begin_gan, new_state
from pipeline.training.step import Batch, gan_step, psnr_step

CONFIG = TrainConfig.model_validate(
    {
        "batch_size": 8,
        "crop_px": 32,
        "seed": 3,
        "model": {"num_block": 1, "num_feat": 8, "num_grow_ch": 4, "discriminator_num_feat": 4},
        "data": {"patch_px": 64},
        "channels_last": False,
        "ema_decay": 0.9,
    }
)
RATE = 1e-3
OTHER_LOSSES = with_fields(
    CONFIG,
    {"psnr.pixel_loss": "charbonnier", "psnr.ms_ssim_weight": 0.5}
    | {"gan.pixel_loss": "charbonnier", "gan.ms_ssim_weight": 0.5, "gan.loss": "vanilla"},
)


class SmallFeatures(nn.Module):
    """Replaces VGG19: two convolutions with seeded weights."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("first", torch.randn(6, 3, 3, 3, generator=generator, dtype=torch.float64))
        self.register_buffer("second", torch.randn(6, 6, 3, 3, generator=generator, dtype=torch.float64))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        x = functional.conv2d(images, self.first.to(images.dtype), padding=1)
        return {"conv5_4": functional.conv2d(functional.relu(x), self.second.to(images.dtype), padding=1)}


def images(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    lr = torch.rand(8, 3, 8, 8, generator=generator, dtype=torch.float64)
    hr = torch.rand(8, 3, 32, 32, generator=generator, dtype=torch.float64)
    return lr, hr


def share(rank: int, world_size: int, step: int) -> Batch:
    lr, hr = images(step)
    rows = slice(8 * rank // world_size, 8 * (rank + 1) // world_size)
    return Batch(lr[rows], hr[rows], global_size=8)


def double_state(discriminator: str = "vgg") -> TrainState:
    """A new state of stage 2, in float64."""
    model = CONFIG.model.model_copy(update={"discriminator": discriminator})
    config = CONFIG.model_copy(update={"model": model})
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        state = new_state(config, "psnr", torch.device("cpu"))
        begin_gan(state, config, torch.device("cpu"))
    finally:
        torch.set_default_dtype(default)
    return state


def steps_of_both_stages(
    rank: int, world_size: int, discriminator: str, config: TrainConfig
) -> dict[str, Tensor]:
    """Gradients (as Adam's first moments), buffers and losses of one step of each stage."""
    seen: dict[str, Tensor] = {}
    for stage in ("psnr", "gan"):
        state = double_state(discriminator)
        batch = share(rank, world_size, 0)
        if stage == "psnr":
            losses = psnr_step(state, batch, config, RATE)
        else:
            losses = gan_step(state, batch, SmallFeatures(), config, RATE)
        for name, value in state.tensors().items():
            if name.endswith(("exp_avg", "weight_u", "weight_v")) or "running" in name:
                seen[f"{stage}.{name}"] = value.clone()
        seen |= {f"{stage}.loss.{name}": value for name, value in losses.items()}
    return seen


def close(one: Tensor, other: Tensor, tolerance: float = 1e-12) -> bool:
    """Whether two tensors differ by at most `tolerance`, relative to the larger of their largest element and 0.001."""
    return bool((one - other).abs().max() <= tolerance * max(1e-3, float(one.abs().max())))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world_size", "discriminator", "config"),
    [
        (2, "vgg", CONFIG),
        (3, "vgg", CONFIG),
        (2, "unet", CONFIG),
        (3, "vgg", OTHER_LOSSES),
    ],
)
def test_workers_follow_the_gradients_of_one_worker(
    world_size: int, discriminator: str, config: TrainConfig
) -> None:
    alone = steps_of_both_stages(0, 1, discriminator, config)
    together = run_workers(world_size, steps_of_both_stages, discriminator, config)
    assert len(alone) > 50
    assert any("weight_u" in name for name in alone) == (discriminator == "unet")
    for name, value in alone.items():
        if ".loss." in name:
            assert close(value, torch.stack([result[name] for result in together]).mean(0)), name
        else:
            for result in together:
                assert close(value, result[name]), name


def plain_image_loss(sr: Tensor, hr: Tensor, config: TrainConfig, weight: float) -> Tensor:
    if config == CONFIG:
        return weight * functional.l1_loss(sr, hr)
    charbonnier = ((sr - hr) ** 2 + 1e-6).sqrt().mean()
    return weight * charbonnier + config.gan.ms_ssim_weight * ms_ssim_loss(sr, hr)


def plain_losses(real: Tensor, fake: Tensor, config: TrainConfig) -> tuple[Tensor, Tensor]:
    if config.gan.loss == "relativistic":
        return relativistic_losses(real, fake)
    entropy, ones = functional.binary_cross_entropy_with_logits, torch.ones_like(real)
    return entropy(fake, ones), entropy(real, ones) + entropy(fake, torch.zeros_like(fake))


def plain_sequence(state: TrainState, config: TrainConfig) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Both networks' gradients from four separate forward passes of the discriminator, without a cut of the graph."""
    generator, discriminator = (
        copy.deepcopy(unwrap(state.generator)),
        copy.deepcopy(unwrap(state.discriminator)),
    )
    features = SmallFeatures()
    lr, hr = images(0)
    sr = generator(lr)
    for parameter in discriminator.parameters():
        parameter.requires_grad_(False)
    content = functional.l1_loss(features(sr)["conv5_4"], features(hr)["conv5_4"].detach())
    generator_loss, _ = plain_losses(discriminator(hr).detach(), discriminator(sr), config)
    (plain_image_loss(sr, hr, config, 1e-2) + content + 5e-3 * generator_loss).backward()
    for parameter in discriminator.parameters():
        parameter.requires_grad_(True)
    _, discriminator_loss = plain_losses(discriminator(hr), discriminator(sr.detach()), config)
    discriminator_loss.backward()
    return (
        {name: parameter.grad for name, parameter in generator.named_parameters()},
        {name: parameter.grad for name, parameter in discriminator.named_parameters()},
    )


@torch.no_grad()
def converge_spectral_norm(network: nn.Module) -> None:
    """Sets each layer's vectors to the first singular ones, so that more forward passes leave them where they are."""
    for module in network.modules():
        if hasattr(module, "weight_orig"):
            left, _, right = torch.linalg.svd(module.weight_orig.flatten(1), full_matrices=False)
            module.weight_u.copy_(left[:, 0])
            module.weight_v.copy_(right[0])


@pytest.mark.parametrize(
    ("discriminator", "config"),
    [("vgg", CONFIG), ("unet", CONFIG), ("vgg", OTHER_LOSSES), ("unet", OTHER_LOSSES)],
)
def test_a_step_gives_the_gradients_of_the_plain_sequence(discriminator: str, config: TrainConfig) -> None:
    state = double_state(discriminator)
    assert state.discriminator is not None
    assert isinstance(unwrap(state.discriminator), UNetDiscriminator) == (discriminator == "unet")
    converge_spectral_norm(state.discriminator)
    expected_generator, expected_discriminator = plain_sequence(state, config)
    gan_step(state, share(0, 1, 0), SmallFeatures(), config, RATE)
    beta1 = CONFIG.adam.beta1
    tensors = state.tensors()
    for kind, expected in (("generator", expected_generator), ("discriminator", expected_discriminator)):
        for name, gradient in expected.items():
            # After one step Adam's first moment is (1 - beta1) times the gradient.
            moment = tensors[f"{kind}_optimizer.{name}.exp_avg"] / (1 - beta1)
            assert close(gradient, moment), f"{kind} {name}"


def everything(state: TrainState) -> dict[str, Tensor]:
    """All tensors of a state but the count of skipped steps, with the EMA weights."""
    ema = {f"ema.{name}": value for name, value in state.ema.state_dict().items()}
    return {name: value for name, value in (state.tensors() | ema).items() if name != "skipped"}


@pytest.mark.parametrize(("stage", "discriminator"), [("psnr", "vgg"), ("gan", "vgg"), ("gan", "unet")])
def test_a_step_with_non_finite_gradients_changes_nothing(stage: str, discriminator: str) -> None:
    state = double_state(discriminator)

    def step(batch: Batch) -> None:
        if stage == "psnr":
            psnr_step(state, batch, CONFIG, RATE)
        else:
            gan_step(state, batch, SmallFeatures(), CONFIG, RATE)

    step(share(0, 1, 0))
    before = {name: value.clone() for name, value in everything(state).items()}
    # The EMA weights lag behind the generator, so an update would move them.
    assert not torch.equal(before["ema.conv_last.weight"], before["generator.conv_last.weight"])
    lr, hr = images(1)
    lr[0, 0, 0, 0] = float("nan")
    step(Batch(lr, hr, 8))
    after = everything(state)
    assert state.skipped.tolist() == [1, 1]
    for name, value in before.items():
        assert torch.equal(value, after[name]), name
    step(share(0, 1, 2))
    assert state.skipped.tolist() == [0, 1]
    assert not torch.equal(before["ema.conv_last.weight"], state.ema.conv_last.weight)


def test_stage_two_starts_from_the_ema_weights() -> None:
    state = new_state(CONFIG, "psnr", torch.device("cpu"))
    for step in range(3):
        lr, hr = images(step)
        psnr_step(state, Batch(lr.float(), hr.float(), 8), CONFIG, RATE)
    ema = {name: value.clone() for name, value in state.ema.state_dict().items()}
    assert any(not torch.equal(value, ema[name]) for name, value in state.generator.state_dict().items())
    begin_gan(state, CONFIG, torch.device("cpu"))
    assert state.stage == "gan"
    for name, value in state.generator.state_dict().items():
        assert torch.equal(value, ema[name])
    assert not state.generator_optimizer.state


@pytest.mark.parametrize("as_tensor", [False, True])
def test_the_discriminator_has_its_own_learning_rate(as_tensor: bool) -> None:
    def change(config: TrainConfig, rate: float | Tensor, kind: str) -> float:
        state = double_state()
        network = unwrap(getattr(state, kind))
        before = copy.deepcopy(network.state_dict())
        gan_step(state, share(0, 1, 0), SmallFeatures(), config, rate)
        # Adam's first update of a weight is the learning rate, in the direction of the gradient.
        return max(float((value - before[name]).abs().max()) for name, value in network.named_parameters())

    rate = torch.tensor(1e-3, dtype=torch.float64) if as_tensor else 1e-3
    own = with_fields(CONFIG, {"gan.learning_rate": 1e-3, "gan.discriminator_learning_rate": 1e-4})
    assert change(own, rate, "discriminator") == pytest.approx(1e-4, rel=1e-4)
    assert change(own, rate, "generator") == pytest.approx(1e-3, rel=1e-4)
    assert change(CONFIG, RATE, "discriminator") == pytest.approx(1e-3, rel=1e-4)


def test_ema_weights_decay_towards_the_generator() -> None:
    state = new_state(CONFIG, "psnr", torch.device("cpu"))
    before = state.ema.conv_last.weight.clone()
    lr, hr = images(0)
    psnr_step(state, Batch(lr.float(), hr.float(), 8), CONFIG, RATE)
    generator = state.generator
    assert isinstance(generator, RRDBNet)
    expected = 0.9 * before + 0.1 * generator.conv_last.weight
    assert torch.allclose(state.ema.conv_last.weight, expected, rtol=0, atol=1e-7)


def test_clipping_bounds_the_step_but_not_the_reported_norm() -> None:
    lr, hr = images(0)
    batch = Batch(lr.float(), hr.float(), 8)
    free, clipped = (new_state(CONFIG, "psnr", torch.device("cpu")) for _ in range(2))
    norm = psnr_step(free, batch, CONFIG, RATE)["gradient_norm_generator"]
    limit = float(norm) / 10
    clipping = with_fields(CONFIG, {"adam.clip_norm": limit})
    reported = psnr_step(clipped, batch, clipping, RATE)["gradient_norm_generator"]
    assert torch.equal(norm, reported)
    key = "generator_optimizer.conv_last.weight.exp_avg"
    assert torch.allclose(clipped.tensors()[key] * 10, free.tensors()[key], rtol=1e-4)


def test_bf16_keeps_weights_losses_and_logits_in_float32() -> None:
    state = new_state(CONFIG, "psnr", torch.device("cpu"))
    begin_gan(state, CONFIG, torch.device("cpu"))
    lr, hr = images(0)
    config = CONFIG.model_copy(update={"precision": "bf16"})
    losses = gan_step(state, Batch(lr.float(), hr.float(), 8), SmallFeatures(), config, RATE)
    assert {value.dtype for value in losses.values()} == {torch.float32}
    assert {value.dtype for value in state.generator.parameters()} == {torch.float32}
    assert all(torch.isfinite(value) for value in losses.values())


def test_bf16_gradients_differ_from_float32_by_rounding_only(monkeypatch: pytest.MonkeyPatch) -> None:
    dtypes: list[torch.dtype] = []

    def recording(real: Tensor, fake: Tensor, *more: Any) -> tuple[Tensor, Tensor]:
        dtypes.extend([real.dtype, fake.dtype])
        return relativistic_losses(real, fake, *more)

    monkeypatch.setattr("pipeline.training.step.relativistic_losses", recording)
    lr, hr = (each.float() for each in images(0))

    def gradients(kind: str, precision: str, lr: Tensor, hr: Tensor) -> Tensor:
        state = new_state(CONFIG, "psnr", torch.device("cpu"))
        begin_gan(state, CONFIG, torch.device("cpu"))
        config = CONFIG.model_copy(update={"precision": precision})
        gan_step(state, Batch(lr, hr, 8), SmallFeatures(), config, RATE)
        moments = [
            value
            for name, value in state.tensors().items()
            if name.startswith(kind) and name.endswith("exp_avg")
        ]
        assert {value.dtype for value in moments} == {torch.float32}
        return torch.cat([value.flatten() for value in moments])

    def difference(one: Tensor, other: Tensor) -> float:
        assert one.isfinite().all()
        return float((one - other).norm() / other.norm())

    rounded = lr.bfloat16().float(), hr.bfloat16().float()
    for kind, limit in (("generator", 0.02), ("discriminator", None)):
        exact = gradients(kind, "fp32", lr, hr)
        bf16 = difference(gradients(kind, "bf16", lr, hr), exact)
        if limit is None:
            # The logits of an untrained discriminator are nearly equal for real and fake images, so its gradient is
            # small: rounding only the images changes it by 0.14. Rounding in each of ten layers can change it several
            # times as much.
            limit = 10 * difference(gradients(kind, "fp32", *rounded), exact)
        # bfloat16 has 8 significant bits: a smaller difference would mean that nothing was computed in it.
        assert 1e-4 < bf16 < limit, kind
    assert set(dtypes) == {torch.float32}
