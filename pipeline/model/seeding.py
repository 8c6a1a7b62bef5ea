"""Building a module with weights that depend on a seed alone."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def seeded(seed: int, build: Callable[[], ModuleT]) -> ModuleT:
    """What `build` makes on the CPU, its weights drawn from `seed`; the global generators stay as they were."""
    # Only the CPU's generator: torch.manual_seed would also reset those of the GPUs.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return build()
