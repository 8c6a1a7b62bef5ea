"""The training step compared with BasicSR's sequence of operations, in turns in one process.

    python benchmarks/step.py --blocks 4 23 --out step.json
    python benchmarks/step.py --device cuda --precision bf16 --batch 16 --blocks 23
    python benchmarks/step.py --blocks 4 --profile            time per operation
    python benchmarks/step.py --memory                        activations that the trunk saves for its backward pass

BasicSR's sequence (basicsr_step.py) runs in `--baseline`, default float32. On a GPU a turn is several
steps with one synchronization at its end, as in a training loop.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from basicsr_step import LAYER, BasicSR
from basicsr_step import Generator as PlainGenerator
from torch import Tensor, nn
from turns import abba, as_text, machine, ratios, summary

from pipeline.model import VGGFeatures, set_precision
from pipeline.training.config import TrainConfig
from pipeline.training.state import TrainState, begin_gan, new_state
from pipeline.training.step import Batch, gan_step, psnr_step

RATE = 1e-4
Step = Callable[[], object]


def make_config(blocks: int, batch: int, crop: int, channels_last: bool = True) -> TrainConfig:
    """The paper's widths with this many blocks."""
    return TrainConfig.model_validate(
        {
            "batch_size": batch,
            "crop_px": crop,
            "model": {"num_block": blocks, "num_feat": 64, "num_grow_ch": 32},
            "channels_last": channels_last,
        }
    )


def images(config: TrainConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """(low resolution, high resolution) of one batch, noise in [0, 1]."""
    generator = torch.Generator().manual_seed(0)
    lr_px = config.crop_px // config.data.scale
    lr = torch.rand(config.batch_size, 3, lr_px, lr_px, generator=generator)
    hr = torch.rand(config.batch_size, 3, config.crop_px, config.crop_px, generator=generator)
    return lr.to(device), hr.to(device)


def our_step(
    config: TrainConfig, stage: str, device: torch.device, precision: str
) -> tuple[Step, TrainState, VGGFeatures | None]:
    """This project's step, its state and its perceptual features."""
    state = new_state(config, "psnr", device)
    features = None
    if stage == "gan":
        begin_gan(state, config, device)
        features = VGGFeatures([LAYER], "random").to(device)
    lr, hr = images(config, device)
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    batch = Batch(lr.to(memory_format=layout), hr.to(memory_format=layout), config.batch_size)
    config = config.model_copy(update={"precision": precision})

    def step() -> object:
        with _tf32(precision == "tf32"):
            if features is None:
                return psnr_step(state, batch, config, RATE)
            return gan_step(state, batch, features, config, RATE)

    return step, state, features


def basicsr_step(
    config: TrainConfig, state: TrainState, features: VGGFeatures | None, device: torch.device, precision: str
) -> Step:
    """A step of BasicSR's sequence, from the weights of `state`."""
    # Separate features, in the default memory format.
    basicsr_features = None if features is None else VGGFeatures([LAYER], "random").to(device)
    basicsr = BasicSR.like(state, config, basicsr_features)
    lr, hr = images(config, device)

    def step() -> object:
        with (
            _tf32(precision == "tf32"),
            torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"),
        ):
            return (basicsr.psnr_step if features is None else basicsr.gan_step)(lr, hr, RATE)

    return step


@contextmanager
def _tf32(on: bool) -> Iterator[None]:
    set_precision("tf32" if on else "fp32")
    yield


def several(step: Step, count: int, device: torch.device) -> Step:
    """`count` steps, until the device has finished them."""

    def turn() -> None:
        for _ in range(count):
            step()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return turn


def measure(stage: str, blocks: int, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds per step and speed ratio of one stage at one size."""
    device = torch.device(options.device)
    config = make_config(blocks, options.batch, options.crop, not options.no_channels_last)
    ours, state, features = our_step(config, stage, device, options.precision)
    theirs = basicsr_step(config, state, features, device, options.baseline)
    count = options.steps_per_turn or (10 if device.type == "cuda" else 1)
    turns = [several(step, count, device) for step in (theirs, ours)]
    for turn in turns:
        turn()
        turn()
    slow, fast = abba(*turns, options.rounds)
    result: dict[str, Any] = {
        "stage": stage,
        "blocks": blocks,
        "batch": options.batch,
        "crop_px": options.crop,
        "speed": ratios(slow, fast),
        "basicsr_s": summary([value / count for value in slow]),
        "ours_s": summary([value / count for value in fast]),
    }
    if device.type == "cuda":
        for name, turn in zip(("basicsr", "ours"), turns, strict=True):
            torch.cuda.reset_peak_memory_stats()
            turn()
            result[f"{name}_peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    if options.profile:
        for name, turn in zip(("BasicSR's sequence", "ours"), turns, strict=True):
            print(f"\n{name}, {stage}, {blocks} blocks\n{profiled(turn, device)}")
    return result


def profiled(turn: Step, device: torch.device) -> str:
    """The operations that take the most time in a turn."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        turn()
    key = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    return str(profile.key_averages().table(sort_by=key, row_limit=25, max_name_column_width=60))


def saved_bytes(network: nn.Module, x: Tensor) -> int:
    """Bytes of activations that the forward pass keeps for the backward pass, every storage once."""
    kept: dict[int, int] = {}
    alive: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        network(x)
    return sum(kept.values())


def measure_memory(options: argparse.Namespace) -> dict[str, Any]:
    """Saved bytes and forward and backward time of the trunk, compared with plain blocks."""
    device = torch.device(options.device)
    blocks = max(options.blocks)
    config = make_config(blocks, options.batch, options.crop)
    state = new_state(config, "psnr", device)
    lean = state.generator.body
    size = config.model
    plain = PlainGenerator(size).body.to(device)
    plain.load_state_dict(state.generator.body.state_dict())
    lr_px = config.crop_px // config.data.scale
    x = torch.rand(config.batch_size, size.num_feat, lr_px, lr_px, device=device)
    results: dict[str, Any] = {"blocks": blocks, "batch": options.batch, "lr_px": lr_px}
    for layout, name in ((torch.contiguous_format, "default format"), (torch.channels_last, "channels_last")):
        lean.to(memory_format=layout)
        plain.to(memory_format=layout)
        given = x.contiguous(memory_format=layout).requires_grad_()
        lean_bytes, plain_bytes = saved_bytes(lean, given), saved_bytes(plain, given)

        def pass_of(network: nn.Module, given: Tensor = given) -> Step:
            return several(lambda: network(given).sum().backward(), 1, device)

        turns = pass_of(plain), pass_of(lean)
        for turn in turns:
            turn()
        slow, fast = abba(*turns, options.rounds)
        results[name] = {
            "plain_mib": plain_bytes / 2**20,
            "ours_mib": lean_bytes / 2**20,
            "bytes": lean_bytes / plain_bytes,
            "time": ratios(fast, slow),
        }
    return results


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--precision", choices=["fp32", "bf16", "tf32"], default="fp32", help="of our step")
    parser.add_argument("--baseline", choices=["fp32", "bf16", "tf32"], default="fp32", help="of BasicSR's")
    parser.add_argument("--blocks", type=int, nargs="+", default=[4, 23])
    parser.add_argument("--stages", nargs="+", choices=["psnr", "gan"], default=["psnr", "gan"])
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--crop", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps-per-turn", type=int)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-channels-last", action="store_true")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--memory", action="store_true", help="only the trunk's saved activations")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.backends.cudnn.benchmark = True
    facts = machine(options.device)
    results = []
    if options.memory:
        results.append(measure_memory(options))
    else:
        for blocks in options.blocks:
            for stage in options.stages:
                result = measure(stage, blocks, options)
                results.append(result)
                print(
                    f"{stage}, {blocks} blocks, batch {options.batch}: {as_text(result['speed'])} times as fast; "
                    f"s/step {as_text(result['ours_s'])}, BasicSR's {as_text(result['basicsr_s'])}",
                    flush=True,
                )
    text = json.dumps({"machine": facts, "arguments": sys.argv[1:], "results": results}, indent=2)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
