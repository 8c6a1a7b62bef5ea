"""What several workers do (DistributedDataParallel, sums over workers), on one: NCCL refuses two processes on a GPU."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from gpu import first_step, requires_gpu

from pipeline.training import discriminate, distributed


class _Several(int):
    """1 in arithmetic, and more than 1 in comparisons."""

    def __eq__(self, other: object) -> bool:
        return False

    def __gt__(self, other: int) -> bool:
        return True

    __hash__ = int.__hash__


@pytest.fixture(params=["gloo", pytest.param("nccl", marks=[pytest.mark.gpu, requires_gpu])])
def device(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The device of a process group of one process."""
    dist.init_process_group(request.param, init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    for module in (distributed, discriminate):
        monkeypatch.setattr(module, "world_size", lambda: _Several(1))
    yield "cuda" if request.param == "nccl" else "cpu"
    dist.destroy_process_group()


@pytest.mark.filterwarnings("error::FutureWarning")
@pytest.mark.parametrize(("stage", "discriminator"), [("psnr", "vgg"), ("gan", "vgg"), ("gan", "unet")])
def test_the_step_of_several_workers_is_that_of_one(device: str, stage: str, discriminator: str) -> None:
    found = first_step(stage, device, torch.float64, "fp32", discriminator)
    with pytest.MonkeyPatch.context() as alone:
        for module in (distributed, discriminate):
            alone.setattr(module, "world_size", lambda: 1)
        expected = first_step(stage, device, torch.float64, "fp32", discriminator)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] - value).abs().max() <= 1e-10 * max(1e-3, float(value.abs().max())), name


def test_texts_are_gathered(device: str) -> None:
    assert distributed.gathered("node") == ["node"]
