"""BasicSR's sequence of operations in a training step, reimplemented as the baseline of benchmarks/step.py.

It differs from this project's step in:

* Dense blocks concatenate, and autograd keeps every concatenation; `x5 * 0.2 + x` allocates another tensor.
* Stage 2 calls the discriminator five times: on real (result detached) and fake for the generator's loss, with its
  parameters frozen; then, after the generator's update, on fake (result detached, its graph thrown away), on real, and
  on fake again, with separate backward passes for real and for fake.
* Every loss is copied to the host in every step, the EMA update is a loop over names, Adam is not fused, and memory has
  the default format. It computes no gradient norm and skips no step with non-finite gradients.

The discriminator is updated after the generator, but on the output computed before, so both use the weights before the
step, as in this project. Two differences are mathematical:

* In the discriminator's loss, the mean over the other kind of images is a constant; in the paper (eq. 1) and in this
  project the gradient flows through it, as it does here with `constant_means=False`.
* Batch norm's running statistics, which training does not use, are updated by fake images three times and by real ones
  twice.

    python benchmarks/basicsr_step.py     compares the gradients of both in float64
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.model import VGGFeatures
from pipeline.model.config import ModelConfig
from pipeline.training.config import GanStage, TrainConfig
from pipeline.training.distributed import unwrap
from pipeline.training.state import TrainState, begin_gan, new_state
from pipeline.training.step import Batch, gan_step, psnr_step

LAYER = "conv5_4"


class DenseBlock(nn.Module):
    """Five convolutions of concatenations, which autograd saves."""

    def __init__(self, num_feat: int, num_grow_ch: int, residual_scale: float) -> None:
        super().__init__()
        self.residual_scale = residual_scale
        for number in range(1, 6):
            width = num_grow_ch if number < 5 else num_feat
            conv = nn.Conv2d(num_feat + (number - 1) * num_grow_ch, width, 3, 1, 1)
            self.add_module(f"conv{number}", conv)
        self.lrelu = nn.LeakyReLU(0.2, inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """(N, num_feat, H, W) to the same shape."""
        x1 = self.lrelu(self.conv1(x))
        x2 = self.lrelu(self.conv2(torch.cat((x, x1), 1)))
        x3 = self.lrelu(self.conv3(torch.cat((x, x1, x2), 1)))
        x4 = self.lrelu(self.conv4(torch.cat((x, x1, x2, x3), 1)))
        x5 = self.conv5(torch.cat((x, x1, x2, x3, x4), 1))
        return x5 * self.residual_scale + x


class RRDB(nn.Module):
    """Three dense blocks and a scaled residual."""

    def __init__(self, num_feat: int, num_grow_ch: int, residual_scale: float) -> None:
        super().__init__()
        self.residual_scale = residual_scale
        self.rdb1 = DenseBlock(num_feat, num_grow_ch, residual_scale)
        self.rdb2 = DenseBlock(num_feat, num_grow_ch, residual_scale)
        self.rdb3 = DenseBlock(num_feat, num_grow_ch, residual_scale)

    def forward(self, x: Tensor) -> Tensor:
        """(N, num_feat, H, W) to the same shape."""
        return self.rdb3(self.rdb2(self.rdb1(x))) * self.residual_scale + x


class Generator(nn.Module):
    """RRDBNet x4 with these blocks; state-dict names as in `pipeline.model.RRDBNet`."""

    def __init__(self, size: ModelConfig) -> None:
        super().__init__()
        feat = size.num_feat
        self.conv_first = nn.Conv2d(3, feat, 3, 1, 1)
        self.body = nn.Sequential(
            *(RRDB(feat, size.num_grow_ch, size.residual_scale) for _ in range(size.num_block))
        )
        self.conv_body = nn.Conv2d(feat, feat, 3, 1, 1)
        self.conv_up1 = nn.Conv2d(feat, feat, 3, 1, 1)
        self.conv_up2 = nn.Conv2d(feat, feat, 3, 1, 1)
        self.conv_hr = nn.Conv2d(feat, feat, 3, 1, 1)
        self.conv_last = nn.Conv2d(feat, 3, 3, 1, 1)
        self.lrelu = nn.LeakyReLU(0.2, inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) in [0, 1] to (N, 3, 4H, 4W)."""
        features = self.conv_first(x)
        features = features + self.conv_body(self.body(features))
        for conv in (self.conv_up1, self.conv_up2):
            features = self.lrelu(conv(functional.interpolate(features, scale_factor=2, mode="nearest")))
        return self.conv_last(self.lrelu(self.conv_hr(features)))


@dataclass
class BasicSR:
    """Networks and optimizers of one run, in the default memory format."""

    generator: nn.Module
    ema: nn.Module
    discriminator: nn.Module | None
    features: nn.Module | None
    generator_optimizer: torch.optim.Adam
    discriminator_optimizer: torch.optim.Adam | None
    ema_decay: float
    weights: GanStage
    layers: dict[str, float]
    constant_means: bool = True
    """As in BasicSR; see the module's docstring."""

    @classmethod
    def like(cls, state: TrainState, config: TrainConfig, features: nn.Module | None) -> "BasicSR":
        """The weights of `state`, with new optimizers."""
        dtype = next(state.generator.parameters()).dtype
        device = next(state.generator.parameters()).device

        def build(weights: dict[str, Tensor]) -> Generator:
            network = Generator(config.model).to(device, dtype)
            network.load_state_dict({name: value.contiguous() for name, value in weights.items()})
            return network

        def adam(network: nn.Module) -> torch.optim.Adam:
            betas = (config.adam.beta1, config.adam.beta2)
            return torch.optim.Adam(network.parameters(), lr=1e-4, betas=betas)

        generator, ema = build(state.generator.state_dict()), build(state.ema.state_dict())
        ema.requires_grad_(False)
        discriminator = None
        if state.discriminator is not None:
            fresh = new_state(config, "gan", device).discriminator
            assert fresh is not None
            discriminator = unwrap(fresh).to(dtype=dtype, memory_format=torch.contiguous_format)
            discriminator.load_state_dict(unwrap(state.discriminator).state_dict())
        return cls(
            generator,
            ema,
            discriminator,
            features,
            adam(generator),
            adam(discriminator) if discriminator is not None else None,
            config.ema_decay,
            config.gan,
            dict(config.perceptual.layers),
        )

    def psnr_step(self, lr: Tensor, hr: Tensor, learning_rate: float) -> dict[str, float]:
        """One update of stage 1; images in [0, 1]."""
        _set_rate(self.generator_optimizer, learning_rate)
        self.generator_optimizer.zero_grad()
        pixel = functional.l1_loss(self.generator(lr), hr)
        pixel.backward()
        self.generator_optimizer.step()
        logged = _to_host({"pixel": pixel})
        self._update_ema()
        return logged

    def gan_step(self, lr: Tensor, hr: Tensor, learning_rate: float) -> dict[str, float]:
        """One update of both networks; images in [0, 1]."""
        assert self.discriminator is not None
        assert self.discriminator_optimizer is not None
        assert self.features is not None
        discriminator, weights = self.discriminator, self.weights
        share = (weights.discriminator_learning_rate or weights.learning_rate) / weights.learning_rate
        _set_rate(self.generator_optimizer, learning_rate)
        _set_rate(self.discriminator_optimizer, learning_rate * share)

        for parameter in discriminator.parameters():
            parameter.requires_grad = False
        self.generator_optimizer.zero_grad()
        sr = self.generator(lr)
        pixel = weights.pixel_weight * functional.l1_loss(sr, hr)
        output, target = self.features(sr), self.features(hr.detach())
        perceptual = weights.perceptual_weight * sum(
            weight * functional.l1_loss(output[layer], target[layer]) for layer, weight in self.layers.items()
        )
        real, fake = discriminator(hr).detach(), discriminator(sr)
        adversarial = (
            weights.adversarial_weight * (_bce(real - fake.mean(), 0) + _bce(fake - real.mean(), 1)) / 2
        )
        (pixel + perceptual + adversarial).backward()
        self.generator_optimizer.step()

        for parameter in discriminator.parameters():
            parameter.requires_grad = True
        self.discriminator_optimizer.zero_grad()
        constant = self.constant_means
        fake = discriminator(sr).detach() if constant else discriminator(sr.detach())
        real = discriminator(hr)
        real_loss = 0.5 * _bce(real - fake.mean(), 1)
        real_loss.backward(retain_graph=not constant)
        fake = discriminator(sr.detach())
        fake_loss = 0.5 * _bce(fake - (real.detach() if constant else real).mean(), 0)
        fake_loss.backward()
        self.discriminator_optimizer.step()

        logged = _to_host(
            {
                "pixel": pixel,
                "perceptual": perceptual,
                "adversarial": adversarial,
                "discriminator_on_real": real_loss,
                "discriminator_on_fake": fake_loss,
                "real": real.detach().mean(),
                "fake": fake.detach().mean(),
            }
        )
        self._update_ema()
        return logged

    def _update_ema(self) -> None:
        network = dict(self.generator.named_parameters())
        for name, ema in self.ema.named_parameters():
            ema.data.mul_(self.ema_decay).add_(network[name].data, alpha=1 - self.ema_decay)


def _bce(logits: Tensor, label: int) -> Tensor:
    return functional.binary_cross_entropy_with_logits(logits, torch.full_like(logits, float(label)))


def _to_host(losses: dict[str, Tensor]) -> dict[str, float]:
    with torch.no_grad():
        return {name: value.mean().item() for name, value in losses.items()}


def _set_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def compare_gradients() -> dict[str, float]:
    """Largest relative difference between the gradients of both sequences, in float64, per network.

    Differences are relative to the largest element of each parameter's gradient, or to a millionth of the network's
    largest element if that is larger: gradients that are mathematically zero consist of rounding errors.
    """
    torch.manual_seed(0)
    config = TrainConfig.model_validate(
        {
            "batch_size": 3,
            "crop_px": 64,
            "model": {"num_block": 2, "num_feat": 16, "num_grow_ch": 8, "discriminator_num_feat": 8},
            "data": {"patch_px": 64},
        }
    )
    torch.set_default_dtype(torch.float64)
    features = VGGFeatures([LAYER], "random").double()
    lr, hr = torch.rand(3, 3, 16, 16), torch.rand(3, 3, 64, 64)
    batch = Batch(lr, hr, 3)

    def fresh() -> TrainState:
        state = new_state(config, "psnr", torch.device("cpu"))
        begin_gan(state, config, torch.device("cpu"))
        return state

    def ours(step: Callable[[TrainState], object]) -> dict[str, Tensor]:
        state = fresh()
        step(state)
        return {name: value for name, value in state.tensors().items() if name.endswith(".exp_avg")}

    def theirs(basicsr: BasicSR, step: Callable[[Tensor, Tensor, float], object]) -> dict[str, Tensor]:
        step(lr, hr, 1e-4)
        kinds = [("generator", basicsr.generator, basicsr.generator_optimizer)]
        if basicsr.discriminator is not None and basicsr.discriminator_optimizer is not None:
            kinds.append(("discriminator", basicsr.discriminator, basicsr.discriminator_optimizer))
        return {
            f"{kind}_optimizer.{name}.exp_avg": optimizer.state[parameter]["exp_avg"]
            for kind, network, optimizer in kinds
            for name, parameter in network.named_parameters()
            if parameter in optimizer.state
        }

    def difference(one: dict[str, Tensor], other: dict[str, Tensor], kind: str) -> float:
        names = [name for name in one if name.startswith(kind)]
        assert names
        assert names == [name for name in other if name.startswith(kind)]
        # Adam's first moment after one step is the gradient times a constant.
        largest = {name: float(one[name].abs().max()) for name in names}
        least = 1e-6 * max(largest.values())
        return max(float((one[name] - other[name]).abs().max()) / max(largest[name], least) for name in names)

    def whole_difference(one: dict[str, Tensor], other: dict[str, Tensor], kind: str) -> float:
        """Norm of the difference of whole gradients, relative to the first's norm."""
        names = [name for name in one if name.startswith(kind)]
        flat, other_flat = (torch.cat([values[name].flatten() for name in names]) for values in (one, other))
        return float((flat - other_flat).norm() / flat.norm())

    stage_1 = ours(lambda state: psnr_step(state, batch, config, 1e-4))
    stage_2 = ours(lambda state: gan_step(state, batch, features, config, 1e-4))
    basicsr = BasicSR.like(fresh(), config, features)
    results = {"stage 1, generator": difference(stage_1, theirs(basicsr, basicsr.psnr_step), "generator")}
    basicsr = BasicSR.like(fresh(), config, features)
    as_published = theirs(basicsr, basicsr.gan_step)
    results["stage 2, generator"] = difference(stage_2, as_published, "generator")
    basicsr = BasicSR.like(fresh(), config, features)
    basicsr.constant_means = False
    results["stage 2, discriminator, gradient through both means"] = difference(
        stage_2, theirs(basicsr, basicsr.gan_step), "discriminator"
    )
    results["stage 2, discriminator, as in BasicSR (other means), by norm"] = whole_difference(
        stage_2, as_published, "discriminator"
    )
    return results


def main() -> None:
    for name, value in compare_gradients().items():
        print(f"{name}: largest relative difference {value:.1e}")
        if "other means" not in name and value > 1e-10:
            raise SystemExit("above 1e-10")


if __name__ == "__main__":
    main()
