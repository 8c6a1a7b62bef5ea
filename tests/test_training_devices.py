"""The step on the meta device: no operation has a CPU tensor, and none needs a value.

On a GPU a CPU tensor fails or, if it is a scalar, makes a CUDA graph keep its value. Tests on the CPU cannot see it.
"""

import sys
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from gpu import BATCH, SmallFeatures, small_config
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline.section import with_fields
from pipeline.training import discriminate, distributed
from pipeline.training import state as states
from pipeline.training.meter import Meter
from pipeline.training.state import begin_gan, new_state
from pipeline.training.step import Batch, gan_step, psnr_step

META = torch.device("meta")


class _OnlyOnMeta(TorchDispatchMode):
    """Fails for an operation that reads or returns a tensor of another device."""

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        if function is torch.ops.aten.batch_norm_update_stats.default:  # not implemented on meta
            result = tuple(arguments[0].new_empty(arguments[0].shape[1]) for _ in range(2))
        else:
            result = function(*arguments, **(options or {}))
        tensors = [each for each in tree_leaves((arguments, options, result)) if isinstance(each, Tensor)]
        assert {each.device for each in tensors} <= {META}, f"{function}: {[each.device for each in tensors]}"
        return result


@pytest.fixture(autouse=True)
def meta_can_train(monkeypatch: pytest.MonkeyPatch) -> None:
    """Autocast and the fused Adam check the device's name."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda _: False)
    adam = sys.modules[torch.optim.Adam.__module__]
    monkeypatch.setattr(adam, "_device_dtype_check_for_fused", lambda *_, **__: None)


@pytest.mark.parametrize("workers", [1, 8])
@pytest.mark.parametrize(("stage", "discriminator"), [("psnr", "vgg"), ("gan", "vgg"), ("gan", "unet")])
def test_a_step_has_no_tensor_on_the_cpu(
    monkeypatch: pytest.MonkeyPatch, stage: str, discriminator: str, workers: int
) -> None:
    monkeypatch.setattr(dist, "all_reduce", lambda _: None)
    for module in (distributed, discriminate):
        monkeypatch.setattr(module, "world_size", lambda: workers)
        monkeypatch.setattr(module, "rank", lambda: 0)
    monkeypatch.setattr(states, "distribute", lambda module, *_: module)
    config = small_config(discriminator)
    state = new_state(config, "psnr", META)
    if stage == "gan":
        begin_gan(state, config, META)
    features, meter = SmallFeatures().to(META), Meter(BATCH, META)
    batch = Batch(torch.rand(BATCH, 3, 8, 8, device=META), torch.rand(BATCH, 3, 32, 32, device=META), BATCH)
    fields = {"pixel_loss": "charbonnier", "ms_ssim_weight": 0.5}
    config = with_fields(config, {"adam.clip_norm": 1.0, "psnr": fields, "gan": fields})
    with _OnlyOnMeta():
        for _ in range(2):
            if stage == "psnr":
                losses = psnr_step(state, batch, config, 1e-4)
            else:
                losses = gan_step(state, batch, features, config, 1e-4)
            meter.add(losses, 0.0, 0)
