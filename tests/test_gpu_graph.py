"""The step as a CUDA graph computes what the step computes operation by operation."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from gpu import BATCH, SmallFeatures, different, everything, requires_gpu, small_config
from torch import Tensor

from pipeline.data.feed import RawBatch
from pipeline.model import set_deterministic, set_precision
from pipeline.training.config import TrainConfig
from pipeline.training.state import TrainState, begin_gan, new_state
from pipeline.training.stepper import WARMUP_STEPS, Stepper
from pipeline.training.worker import Worker

pytestmark = [pytest.mark.gpu, requires_gpu]
STEPS = 20
CASES = [("psnr", "vgg", "fp32"), ("gan", "vgg", "fp32"), ("gan", "unet", "fp32"), ("gan", "vgg", "bf16")]


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    set_deterministic(True)
    yield
    set_precision("tf32")  # torch's default
    set_deterministic(False)


def config_of(discriminator: str, precision: str, graph: str) -> TrainConfig:
    """Sizes for which the trunk's kernels apply in bf16; a rate that changes in every step.

    With the U-Net discriminator, the losses and rates are not the default ones.
    """
    fields = small_config(discriminator).model_dump()
    fields["model"] |= {"num_feat": 32, "num_grow_ch": 16}
    losses: dict[str, object] = {}
    if discriminator == "unet":
        losses = {"pixel_loss": "charbonnier", "ms_ssim_weight": 0.5, "loss": "vanilla"}
        losses["discriminator_learning_rate"] = 1e-4
    return TrainConfig.model_validate(
        fields
        | {
            "precision": precision,
            "cuda_graph": graph,
            "deterministic": True,
            "perceptual": {"layers": {"conv1_1": 1.0}},
            "psnr": {"steps": 100, "learning_rate": 1e-3, "schedule": {"shape": "cosine"}},
            "gan": {"steps": 100, "learning_rate": 1e-3, "schedule": {"shape": "cosine"}, **losses},
        }
    )


class Features(SmallFeatures):
    """Under the name of a layer that the configuration accepts."""

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"conv1_1": super().forward(images)["conv5_4"]}


def raw_batch(step: int) -> RawBatch:
    draws = np.random.default_rng(step)
    return RawBatch(
        draws.integers(0, 256, (BATCH, 8, 8, 3), np.uint8),
        draws.integers(0, 256, (BATCH, 32, 32, 3), np.uint8),
        0,
    )


class Run:
    """A new run whose steps go through a Stepper."""

    def __init__(self, stage: str, discriminator: str, precision: str, graph: str) -> None:
        config = config_of(discriminator, precision, graph)
        set_precision(precision)
        device = torch.device("cuda")
        self.state: TrainState = new_state(config, "psnr", device)
        if stage == "gan":
            self.state.step = config.psnr.steps
            begin_gan(self.state, config, device)
        self.features = Features().to(device)
        self.stepper = Stepper(config, Worker(device=device), self.features)

    def take(self, steps: int) -> list[dict[str, float]]:
        """The scalars of the next steps."""
        seen = []
        for _ in range(steps):
            losses, rate = self.stepper(self.state, raw_batch(self.state.step))
            self.state.step += 1
            seen.append({name: float(value) for name, value in losses.items()} | {"rate": rate})
        return seen


@pytest.mark.parametrize(("stage", "discriminator", "precision"), CASES)
def test_graph_and_eager_steps_agree(stage: str, discriminator: str, precision: str) -> None:
    """Every step has its own batch and learning rate, so a graph that kept one of them would differ."""
    eager = Run(stage, discriminator, precision, "off")
    graph = Run(stage, discriminator, precision, "auto")
    one, other = eager.take(STEPS), graph.take(STEPS)
    assert len({each["loss_pixel"] for each in other}) == STEPS
    for expected, found in zip(one, other, strict=True):
        assert found == pytest.approx(expected, rel=1e-4 if precision == "fp32" else 5e-3, abs=1e-6)
    exact = everything(eager.state)
    for name, value in everything(graph.state).items():
        if value.is_floating_point() and value.numel() > 1:
            assert float((value - exact[name]).abs().max()) < 2e-2 * float(exact[name].abs().max() + 1e-6), (
                name
            )


@pytest.mark.parametrize(("stage", "discriminator", "precision"), CASES[1:])
def test_a_nan_inside_a_graph_changes_nothing(stage: str, discriminator: str, precision: str) -> None:
    run = Run(stage, discriminator, precision, "auto")
    run.take(WARMUP_STEPS + 2)
    before = everything(run.state)
    weight = run.features.get_buffer("first")
    kept = weight.clone()
    weight[0] = float("nan")
    run.take(1)
    assert different(before, everything(run.state)) == ["skipped"]
    weight.copy_(kept)
    run.take(1)
    assert run.state.skipped.tolist() == [0, 1]


def test_deterministic_graphs_repeat_every_bit_and_continue_after_a_new_capture() -> None:
    """A resumed run captures again, after warm-up steps that are not part of a graph."""
    one, other = Run("gan", "vgg", "bf16", "auto"), Run("gan", "vgg", "bf16", "auto")
    one.take(12)
    other.take(7)
    other.stepper = Stepper(
        config_of("vgg", "bf16", "auto"), Worker(device=torch.device("cuda")), Features().to("cuda")
    )
    other.take(5)
    assert different(everything(one.state), everything(other.state)) == []
