"""Initial weights: checked before the start, kept in the run's folder, and nothing else than them is trained."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluation_helpers import exit_code
from s3 import s3_bucket
from test_training_checks import html, lfs_pointer
from tiny import command, fields, flags
from torch import Tensor

from pipeline.config import load_config
from pipeline.errors import UserError
from pipeline.model import RRDBNet, UNetDiscriminator, VGGStyleDiscriminator, save_generator, seeded
from pipeline.model.weights import encode_generator
from pipeline.run_folder import IDENTITY, InitialWeights
from pipeline.storage import Storage
from pipeline.training.checks import with_absolute_paths
from pipeline.training.config import TrainConfig
from pipeline.training.distributed import unwrap
from pipeline.training.identity import check_resume, identity_of
from pipeline.training.initial import Initial, load_initial, origins, resolve, resolve_for_run, save_copies
from pipeline.training.state import begin_gan, new_state

CPU = torch.device("cpu")
SIZES = {"num_feat": 8, "num_block": 1, "num_grow_ch": 4}


def config_of(folder: Path, **changes: Any) -> TrainConfig:
    return load_config(flags(fields(folder, **changes)), description="", environment={})[0].alone()


def run_of(folder: Path) -> Storage:
    return Storage(str(folder / "runs" / "tiny"))


def network(**sizes: Any) -> RRDBNet:
    return seeded(9, lambda: RRDBNet(**{**SIZES, **sizes}))


def write_weights(path: Path, **sizes: Any) -> str:
    save_generator(network(**sizes), path)
    return str(path)


def write_discriminator(path: Path, discriminator: torch.nn.Module) -> str:
    torch.save({"params": discriminator.state_dict()}, path)
    return str(path)


def resolved(folder: Path, **changes: Any) -> tuple[TrainConfig, dict[str, Initial]]:
    config = config_of(folder, **changes)
    return resolve_for_run(config, run_of(folder), IDENTITY.read(run_of(folder)))


def begun(folder: Path, **changes: Any) -> TrainConfig:
    """A run's folder after its start: identity and copies."""
    config, initial = resolved(folder, **changes)
    IDENTITY.write(run_of(folder), identity_of(config, "0" * 64, origins(initial)))
    save_copies(run_of(folder), initial)
    return config


def with_checkpoint(folder: Path, stage: str = "psnr") -> None:
    """Makes the run look as if it had a checkpoint."""
    name = {"psnr": "psnr-00000002", "gan": "gan-00000008"}[stage]
    run_of(folder).write_bytes(f"checkpoints/{name}/manifest.json", b"{}")


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_both_networks_begin_with_the_given_weights(tmp_path: Path) -> None:
    given = seeded(4, lambda: VGGStyleDiscriminator(32, 4))
    config = begun(
        tmp_path,
        **{
            "init.generator": write_weights(tmp_path / "g.safetensors"),
            "init.discriminator": write_discriminator(tmp_path / "d.pth", given),
        },
    )
    state, run = new_state(config, "psnr", CPU), run_of(tmp_path)
    text = load_initial("generator", state, config, run)
    assert "36 of 36" not in text
    assert text.endswith("21 of 21 layers taken (100.00% of the parameters)")
    assert same(state.generator.state_dict(), network().state_dict())
    assert same(state.ema.state_dict(), network().state_dict())
    begin_gan(state, config, CPU)
    load_initial("discriminator", state, config, run)
    assert state.discriminator is not None
    assert same(unwrap(state.discriminator).state_dict(), given.state_dict())
    assert state.tensors()["discriminator.bn0_1.weight"].requires_grad is False


def test_partial_keeps_the_seeds_weights_where_nothing_fits(tmp_path: Path) -> None:
    changes = {"init.generator": write_weights(tmp_path / "g.pth", scale=2), "init.partial": True}
    config = begun(tmp_path, **changes, **{"model.num_block": 2})
    state = new_state(config, "psnr", CPU)
    fresh = {name: tensor.clone() for name, tensor in state.ema.state_dict().items()}
    text = load_initial("generator", state, config, run_of(tmp_path))
    assert "20 of 36 layers taken" in text
    assert "16 randomly initialized (conv_first, body.1.rdb1.conv1, body.1.rdb1.conv2, ...)" in text
    assert "1 unused in the file (conv_first)" in text
    given = network(scale=2).state_dict()
    for name, tensor in state.ema.state_dict().items():
        taken = not name.startswith(("conv_first", "body.1."))
        assert torch.equal(tensor, given[name] if taken else fresh[name]), name


def test_sizes_are_adopted_from_the_file(tmp_path: Path) -> None:
    sizes = {"num_feat": 12, "num_block": 3, "num_grow_ch": 6, "residual_scale": 0.4}
    config, _ = resolved(
        tmp_path,
        **{
            "init.generator": write_weights(tmp_path / "g.safetensors", **sizes),
            "init.discriminator": write_discriminator(tmp_path / "d.pth", UNetDiscriminator(6)),
            "init.adopt_sizes": True,
        },
    )
    assert config.model.model_dump() == {**sizes, "discriminator": "unet", "discriminator_num_feat": 6}


def test_a_file_without_a_residual_scale_leaves_it_to_the_configuration(tmp_path: Path) -> None:
    changes = {"init.generator": write_weights(tmp_path / "g.pth"), "model.residual_scale": 0.5}
    for adopt in (True, False):
        config, initial = resolved(tmp_path, **changes, **{"init.adopt_sizes": adopt})
        assert config.model.residual_scale == 0.5
        assert initial["generator"].origin.residual_scale is None


def test_the_digest_depends_on_the_weights_and_not_on_the_file(tmp_path: Path) -> None:
    half = {name: tensor.half() for name, tensor in network().state_dict().items()}
    exact = {name: tensor.float() for name, tensor in half.items()}
    digests = set()
    for name, state in (("half", half), ("exact", exact)):
        torch.save({"params_ema": state}, tmp_path / f"{name}.pth")
        _, initial = resolved(tmp_path, **{"init.generator": str(tmp_path / f"{name}.pth")})
        digests.add(initial["generator"].origin.sha256)
    assert len(digests) == 1


def generator_of(**sizes: Any) -> Callable[[Path], object]:
    return lambda path: save_generator(network(**sizes), path)


def other_residual_scale(path: Path) -> None:
    path.write_bytes(encode_generator(network(residual_scale=0.1)))


def another_architecture(path: Path) -> None:
    torch.save({"params": {"body.0.weight": torch.zeros(8, 3, 3, 3)}}, path)


def vgg(input_px: int, num_feat: int) -> Callable[[Path], object]:
    return lambda path: write_discriminator(path, VGGStyleDiscriminator(input_px, num_feat))


def unet(path: Path) -> None:
    write_discriminator(path, UNetDiscriminator(4))


def incomplete(path: Path) -> None:
    state = VGGStyleDiscriminator(32, 4).state_dict()
    del state["bn3_0.running_mean"]
    torch.save(state, path)


def stage_one(path: Path) -> None:
    torch.save({f"generator.{name}": tensor for name, tensor in network().state_dict().items()}, path)


def nothing(path: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("write", "changes", "message"),
    [
        (nothing, {}, "no such file"),
        (html, {}, "not readable as weights: HTML or XML text"),
        (lfs_pointer, {}, "git-LFS pointer"),
        (another_architecture, {}, "not the weights of an RRDBNet"),
        (another_architecture, {"init.partial": True}, "no layer fits the configured generator"),
        (vgg(32, 4), {}, "a VGG-style discriminator, not a generator"),
        (
            generator_of(num_block=6, num_feat=16),
            {},
            "set model.num_block=6, model.num_feat=16, or init.adopt_sizes=true (init.partial=true takes",
        ),
        (generator_of(scale=2), {}, "set data.scale=2 (init.partial"),
        (generator_of(scale=2), {"init.adopt_sizes": True}, "set data.scale=2 (init.partial"),
        (other_residual_scale, {}, "set model.residual_scale=0.1, or"),
        (generator_of(num_feat=16), {"init.partial": True}, "no layer fits the configured generator by name"),
    ],
)
def test_wrong_generators_are_one_line_and_exit_code_2(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    write: Callable[[Path], object],
    changes: dict[str, Any],
    message: str,
) -> None:
    # Ray starts later: nothing has been written, and workers=1 would need it.
    _assert_refused(tmp_path, capsys, write, {"workers": 1, **changes}, "generator", message)


@pytest.mark.parametrize(
    ("write", "changes", "message"),
    [
        (nothing, {}, "no such file"),
        (html, {}, "not readable as weights"),
        (lfs_pointer, {}, "git-LFS pointer"),
        (generator_of(), {}, "not the weights of a discriminator"),
        (stage_one, {}, "a checkpoint of stage 1, which has no discriminator"),
        (vgg(64, 4), {}, "set crop_px=64 (init.partial=true"),
        (vgg(32, 8), {}, "set model.discriminator_num_feat=8, or init.adopt_sizes=true"),
        (unet, {}, "set model.discriminator=unet, or init.adopt_sizes=true"),
        (unet, {"init.partial": True}, "no layer fits the configured discriminator"),
        (incomplete, {}, "1 randomly initialized (bn3_0)"),
        (vgg(32, 4), {"gan.steps": 0}, "gan.steps=0 trains no discriminator"),
    ],
)
def test_wrong_discriminators_are_one_line_and_exit_code_2(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    write: Callable[[Path], object],
    changes: dict[str, Any],
    message: str,
) -> None:
    _assert_refused(tmp_path, capsys, write, {"workers": 1, **changes}, "discriminator", message)


def _assert_refused(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    write: Callable[[Path], object],
    changes: dict[str, Any],
    network: str,
    message: str,
) -> None:
    path = folder / "given.pth"
    write(path)
    values = fields(folder, **{f"init.{network}": str(path), **changes})
    _, program, *arguments = command("train_gan", folder, values)
    assert exit_code(Path(program).stem, *arguments) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert f"init.{network}={path}: " in lines[0]
    assert message in lines[0]
    assert not (folder / "runs").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init.partial": True}, "init.partial=true: no weights are given"),
        ({"init.adopt_sizes": True}, "init.adopt_sizes=true: no weights are given"),
        ({"psnr.steps": 0}, "psnr.steps=0: stage 2 would start from a random generator; set init.generator"),
        ({"init.generator": "hf://model"}, "init.generator=hf://model: use a folder"),
        ({"init.generator": "models:/esrgan"}, "init.generator: models:/esrgan: not a registered model"),
        ({"init.discriminator": "models:/esrgan@champion"}, "registered models have no discriminator"),
    ],
)
def test_fields_that_contradict_each_other_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], message: str
) -> None:
    _, program, *arguments = command("train_gan", tmp_path, fields(tmp_path, **changes))
    assert exit_code(Path(program).stem, *arguments) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line


def test_a_run_that_has_begun_needs_neither_its_source_nor_its_copy(tmp_path: Path) -> None:
    changes = {"init.generator": write_weights(tmp_path / "g.pth")}
    first = begun(tmp_path, **changes)
    with_checkpoint(tmp_path)
    (tmp_path / "g.pth").unlink()
    shutil.rmtree(run_of(tmp_path).path("initial"))
    config, initial = resolved(tmp_path, **changes)
    assert config == first
    assert initial["generator"].tensors is None
    assert identity_of(config, "", origins(initial)).initial == IDENTITY.read(run_of(tmp_path)).initial  # type: ignore[union-attr]


@pytest.mark.parametrize("changed", ["missing", "other"])
def test_a_run_before_its_first_checkpoint_uses_its_copy_only_without_the_source(
    tmp_path: Path, changed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"init.generator": write_weights(tmp_path / "g.pth"), "init.adopt_sizes": True}
    begun(tmp_path, **changes)
    (tmp_path / "g.pth").unlink()
    if changed == "other":
        write_weights(tmp_path / "g.pth", num_block=2)
    config, _ = resolved(tmp_path, **changes)
    assert config.model.num_block == (2 if changed == "other" else 1)
    assert ("using the copy in" in capsys.readouterr().out) == (changed == "missing")


def test_the_discriminator_of_a_run_in_stage_one_comes_from_its_copy(tmp_path: Path) -> None:
    given = seeded(4, lambda: VGGStyleDiscriminator(32, 4))
    changes = {"init.discriminator": write_discriminator(tmp_path / "d.pth", given)}
    begun(tmp_path, **changes)
    with_checkpoint(tmp_path)
    write_discriminator(tmp_path / "d.pth", seeded(5, lambda: VGGStyleDiscriminator(32, 4)))
    _, initial = resolved(tmp_path, **changes)
    assert initial["discriminator"].stored
    assert same(initial["discriminator"].tensors or {}, dict(given.state_dict()))
    with_checkpoint(tmp_path, "gan")
    _, initial = resolved(tmp_path, **changes)
    assert initial["discriminator"].tensors is None


def test_a_corrupt_copy_is_refused_by_the_worker(tmp_path: Path) -> None:
    config = begun(tmp_path, **{"init.generator": write_weights(tmp_path / "g.pth")})
    run = run_of(tmp_path)
    content = bytearray(run.read_bytes("initial/generator.safetensors"))
    content[-1] ^= 1
    run.write_bytes("initial/generator.safetensors", bytes(content))
    with pytest.raises(UserError, match=r"initial/generator\.safetensors: corrupt"):
        load_initial("generator", new_state(config, "psnr", CPU), config, run)
    run.remove("initial/generator.safetensors")
    with pytest.raises(UserError, match=r"initial/generator\.safetensors: missing"):
        load_initial("generator", new_state(config, "psnr", CPU), config, run)


def test_other_initial_weights_of_a_network_that_has_begun_are_refused(tmp_path: Path) -> None:
    config, run = config_of(tmp_path), run_of(tmp_path)
    weights = {name: InitialWeights(f"{name}.pth", name[0] * 64) for name in ("generator", "discriminator")}
    plain, given = identity_of(config, "", {}), identity_of(config, "", weights)
    with_checkpoint(tmp_path)
    with pytest.raises(
        UserError, match=r"init.generator: the generator of run_name=tiny began with random weights"
    ):
        check_resume(config, run, plain, given, ["x"], accept=True)
    with pytest.raises(UserError, match=r"init.generator: .* began from generator.pth"):
        check_resume(config, run, given, plain, ["x"], accept=True)
    only = identity_of(config, "", {"discriminator": weights["discriminator"]})
    check_resume(config, run, plain, only, ["x"], accept=True)
    with_checkpoint(tmp_path, "gan")
    with pytest.raises(
        UserError, match=r"init.discriminator: the discriminator of run_name=tiny began with random"
    ):
        check_resume(config, run, plain, only, ["x"], accept=True)


def test_a_sweep_reads_the_weights_once(tmp_path: Path) -> None:
    from pipeline.run_folder import SWEEP, SweepIdentity

    source = write_weights(tmp_path / "g.pth", num_block=2)
    config = config_of(tmp_path, **{"init.generator": source, "init.adopt_sizes": True})
    sweep = Storage(str(tmp_path / "runs" / "sweep"))
    base, initial = resolve(config, sweep, {}, begun=False)
    SWEEP.write(sweep, SweepIdentity({}, initial=origins(initial)))
    save_copies(sweep, initial)
    Path(source).unlink()
    trial, given = resolve_for_run(base, sweep / "trials" / "one", None, sweep)
    assert trial.model.num_block == 2
    assert given["generator"].origin == initial["generator"].origin
    assert not given["generator"].stored
    again, _ = resolve(config, sweep, SWEEP.read(sweep).initial, begun=True)  # type: ignore[union-attr]
    assert again == base


def test_sources_in_an_object_store_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = write_weights(tmp_path / "g.safetensors")
    _, local = resolved(tmp_path, **{"init.generator": given})
    with s3_bucket(monkeypatch) as bucket:
        Storage(bucket).write_bytes("weights/g.safetensors", Path(given).read_bytes())
        config = config_of(tmp_path, **{"init.generator": f"{bucket}/weights/g.safetensors"})
        _, remote = resolve_for_run(with_absolute_paths(config), run_of(tmp_path), None)
    assert remote["generator"].origin.sha256 == local["generator"].origin.sha256


def test_a_relative_path_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = with_absolute_paths(config_of(tmp_path, **{"init.generator": "g.pth"}))
    assert config.init.generator == str(tmp_path / "g.pth")
