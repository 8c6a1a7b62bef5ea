"""fp32, tf32 and bf16: torch's switches, and what stays in float32 under autocast."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import fields, flags
from torch import Tensor

from pipeline.config import load_config
from pipeline.errors import UserError
from pipeline.evaluation.models import choose_device, open_model
from pipeline.model import (
    RRDBNet,
    UNetDiscriminator,
    VGGStyleDiscriminator,
    save_generator,
    set_deterministic,
    set_precision,
)
from pipeline.model.device import require_gpu
from pipeline.storage import Storage
from pipeline.training.loop import train
from pipeline.training.worker import Worker

CUDNN: Any = torch.backends.cudnn
SWITCHES = (CUDNN.conv, torch.backends.cuda.matmul)


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    before = [switch.fp32_precision for switch in SWITCHES]
    yield
    for switch, value in zip(SWITCHES, before, strict=True):
        switch.fp32_precision = value


@pytest.mark.parametrize(("precision", "mode"), [("fp32", "ieee"), ("tf32", "tf32"), ("bf16", "tf32")])
def test_a_precision_sets_torchs_switches(precision: str, mode: str) -> None:
    set_precision(precision)
    assert CUDNN.conv.fp32_precision == mode
    assert torch.backends.cuda.matmul.fp32_precision == "ieee"
    # These raise where torch's newer and older switches contradict each other; torch.compile asks them.
    assert not torch.backends.cuda.matmul.allow_tf32
    assert torch.get_float32_matmul_precision() == "highest"


def test_deterministic_algorithms_are_set_before_cublas_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    try:
        set_deterministic(True)
        assert torch.are_deterministic_algorithms_enabled()
        assert CUDNN.deterministic
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        set_deterministic(False)
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RuntimeError("The NVIDIA driver on your system is too old (found version 12040). Please"), "12040"),
        (AssertionError("Torch not compiled with CUDA enabled"), "not compiled with CUDA"),
    ],
)
def test_a_gpu_that_torch_cannot_use_is_explained(
    monkeypatch: pytest.MonkeyPatch, error: Exception, words: str
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr(torch.cuda, "init", fail)
    with pytest.raises(UserError, match=words) as raised:
        require_gpu("use_gpu=true", "set use_gpu=false")
    line = str(raised.value)
    assert line.startswith("use_gpu=true: torch cannot use a GPU here (")
    assert line.endswith("or set use_gpu=false")
    assert torch.version.cuda is None or "driver 580 or newer" in line


@pytest.mark.parametrize(("precision", "mode"), [("fp32", "ieee"), ("tf32", "tf32")])
def test_training_computes_in_the_precision_of_the_configuration(
    tmp_path: Path, precision: str, mode: str
) -> None:
    config = load_config(flags(fields(tmp_path, precision=precision)), description="", environment={})[0]
    set_precision("fp32" if precision == "tf32" else "tf32")

    class Feed:
        def batches(self, *_: Any) -> Iterator[None]:
            found.append(CUDNN.conv.fp32_precision)
            raise UserError("enough")

    found: list[str] = []
    worker = Worker(device=torch.device("cpu"))
    with pytest.raises(UserError, match="enough"):
        train(config.alone(), worker, Storage(str(tmp_path / "run")), Feed(), [])  # type: ignore[arg-type]
    assert found == [mode]


@pytest.mark.parametrize(("precision", "mode"), [("fp32", "ieee"), ("tf32", "tf32")])
def test_upscaling_computes_in_its_own_precision(tmp_path: Path, precision: str, mode: str) -> None:
    save_generator(RRDBNet(num_feat=4, num_block=1, num_grow_ch=2), tmp_path / "g.safetensors")
    model = open_model(str(tmp_path / "g.safetensors"), precision=precision)
    set_precision("fp32" if precision == "tf32" else "tf32")
    model.upscale(np.zeros((8, 8, 3), np.uint8))
    assert CUDNN.conv.fp32_precision == mode


@pytest.mark.parametrize("training", [True, False])
def test_the_generators_output_is_float32_under_autocast(training: bool) -> None:
    generator = RRDBNet(num_feat=4, num_block=1, num_grow_ch=2)
    inner: list[torch.dtype] = []
    generator.conv_hr.register_forward_hook(lambda _, __, output: inner.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(training):
        sr = generator(torch.rand(1, 3, 8, 8))
    assert (inner, sr.dtype) == ([torch.bfloat16], torch.float32)
    # bfloat16 has 8 bits: values of it would not change when they are rounded to it.
    assert not torch.equal(sr, sr.bfloat16().float())


@pytest.mark.parametrize("discriminator", [VGGStyleDiscriminator(32, 4), UNetDiscriminator(4)])
def test_logits_are_float32_under_autocast(discriminator: torch.nn.Module) -> None:
    inner: list[torch.dtype] = []
    middle = "conv1_0" if isinstance(discriminator, VGGStyleDiscriminator) else "conv1"
    discriminator.get_submodule(middle).register_forward_hook(
        lambda _, __, output: inner.append(output.dtype)
    )
    with torch.autocast("cpu", torch.bfloat16):
        logits = discriminator(torch.rand(2, 3, 32, 32))
    assert (inner, logits.dtype) == ([torch.bfloat16], torch.float32)
    assert not torch.equal(logits, logits.bfloat16().float())


def test_spectral_norm_runs_outside_of_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    # On CUDA, and not on the CPU, autocast would make these products bfloat16.
    under_autocast: list[bool] = []
    mv = torch.mv

    def noting(matrix: Tensor, vector: Tensor) -> Tensor:
        under_autocast.append(torch.is_autocast_enabled("cpu"))
        return mv(matrix, vector)

    monkeypatch.setattr(torch, "mv", noting)
    network = UNetDiscriminator(4)
    exact = network.state_dict()["conv1.weight_u"].clone()
    with torch.autocast("cpu", torch.bfloat16):
        network(torch.rand(1, 3, 16, 16))
    assert under_autocast
    assert not any(under_autocast)
    assert not torch.equal(network.state_dict()["conv1.weight_u"], exact)


@pytest.mark.parametrize("double", [RRDBNet(4, 1, 2), VGGStyleDiscriminator(32, 4), UNetDiscriminator(4)])
def test_networks_in_double_precision_stay_so(double: torch.nn.Module) -> None:
    assert double.double()(torch.rand(2, 3, 32, 32, dtype=torch.float64)).dtype == torch.float64


@pytest.mark.ray
def test_the_device_of_ray_workers_is_compared_with_the_cluster(ray_cluster: str) -> None:
    from pipeline.evaluation.ray_workers import map_on_ray

    # A local function is pickled by value: Ray's workers cannot import this module.
    def visible_gpus(item: str) -> dict[str, str | None]:
        return {item: os.environ.get("CUDA_VISIBLE_DEVICES")}

    with pytest.raises(UserError, match="--workers 1: needs 1 GPUs, and Ray has 0"):
        list(map_on_ray(visible_gpus, ["a"], 1, "cuda"))
    assert list(map_on_ray(visible_gpus, ["a"], 1, "auto")) == [{"a": ""}]


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_the_device_of_ray_workers_is_not_looked_for_in_the_driver() -> None:
    assert [choose_device(name, workers=2) for name in ("auto", "cuda", "cpu")] == ["auto", "cuda", "cpu"]
    with pytest.raises(
        UserError, match=r"--device cuda: torch cannot use a GPU here .*, or use --device cpu"
    ):
        choose_device("cuda")
    with pytest.raises(UserError, match="--device cuda:1: with --workers Ray assigns the GPUs"):
        choose_device("cuda:1", workers=2)
