"""Learning rates as functions of the step."""

import pytest
import torch

from pipeline.training.config import Schedule
from pipeline.training.schedule import learning_rate


def test_halving_halves_at_each_milestone() -> None:
    schedule = Schedule(shape="halving", milestones=(50, 100))
    rates = [learning_rate(schedule, 1.0, step, 200) for step in (0, 49, 50, 99, 100, 199)]
    assert rates == [1, 1, 0.5, 0.5, 0.25, 0.25]


def test_warmup_rises_to_the_peak_and_then_the_shape_begins() -> None:
    schedule = Schedule(shape="cosine", warmup_steps=4)
    rates = [learning_rate(schedule, 2.0, step, 24) for step in range(5)]
    assert rates == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0])


def test_cosine_agrees_with_torch_and_restarts() -> None:
    schedule = Schedule(shape="cosine", period_steps=10, final_share=0.1)
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.5)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=10, eta_min=0.05)
    for step in range(35):
        assert learning_rate(schedule, 0.5, step, 100) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()


def test_cosine_ends_at_its_final_share() -> None:
    schedule = Schedule(shape="cosine", warmup_steps=100, final_share=0.01)
    assert learning_rate(schedule, 1.0, 9_999, 10_000) == pytest.approx(0.01, abs=1e-4)
