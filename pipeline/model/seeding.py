"""Builds a module with initial weights that are a function of a seed."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def seeded(seed: int, build: Callable[[], ModuleT]) -> ModuleT:
    """`build()`, with its weights drawn on the CPU from `seed`; the global random state does not change."""
    # Only the CPU's generator: torch.manual_seed would also seed the GPUs' generators.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return build()
