"""Loading the configuration: precedence, one-line errors, recipes that load."""

import contextlib
import functools
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from evaluation_helpers import exit_code
from pydantic import BaseModel

from pipeline.config import FIRST_FIELDS, Config, fields_page, load_config
from pipeline.errors import UserError
from pipeline.model import RRDBNet, UNetDiscriminator, VGGStyleDiscriminator
from pipeline.section import with_fields
from pipeline.training.config import TrainConfig
from pipeline.training.distributed import unwrap
from pipeline.training.state import new_state

ROOT = Path(__file__).parent.parent


def load(argv: list[str], environment: dict[str, str] | None = None):
    return load_config(argv, description="", environment=environment or {})[0]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text("gan: {steps: 7, pixel_weight: 0.5}\nworkers: [1, 2]\n")
    return path


def test_flag_beats_environment_beats_file_beats_default(file: Path) -> None:
    argv = ["--config", str(file)]
    environment = {"ESRGAN_GAN__STEPS": "8", "ESRGAN_PRECISION": "bf16"}
    assert load(argv).gan.steps == 7
    assert load(argv, environment).gan.steps == 8
    config = load([*argv, "--gan.steps", "9"], environment)
    assert (config.gan.steps, config.gan.pixel_weight, config.precision, config.seed) == (9, 0.5, "bf16", 0)


def test_a_mapping_from_a_flag_or_the_environment_replaces_that_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(
        "perceptual: {weights: random, layers: {conv5_4: 1.0, conv4_4: 0.5}}\n"
        "tune: {trials: 3, space: {gan.pixel_weight: {low: 0.1, high: 1.0}, model.residual_scale: {choice: [0.1]}}}\n"
    )
    argv = ["--config", str(path)]
    space = '{"gan.adversarial_weight": {"low": 0.001, "high": 0.1}}'
    config = load([*argv, "--perceptual.layers", '{"conv1_2": 2.0}'], {"ESRGAN_TUNE__SPACE": space})
    assert (config.perceptual.weights, config.perceptual.layers) == ("random", {"conv1_2": 2.0})
    assert (config.tune.trials, list(config.tune.space)) == (3, ["gan.adversarial_weight"])
    changed = with_fields(config, {"perceptual.layers": {"conv2_2": 1.0}})
    assert changed.perceptual.layers == {"conv2_2": 1.0}


def every_field(section: BaseModel, prefix: str = "") -> dict[str, Any]:
    """Dotted names of all fields that have a value, with their defaults."""
    values: dict[str, Any] = {}
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            values |= every_field(value, f"{prefix}{name}.")
        elif value is not None:
            values[prefix + name] = value
    return values


def test_every_field_can_be_set_by_flag_and_by_environment() -> None:
    config = load([])
    plain, expected = config.model_dump(mode="json"), every_field(config)
    values = {name: functools.reduce(dict.__getitem__, name.split("."), plain) for name in expected}
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in values.items()}
    assert every_field(load([f"--{name}={text}" for name, text in texts.items()])) == expected
    environment = {f"ESRGAN_{name.upper().replace('.', '__')}": text for name, text in texts.items()}
    assert every_field(load([], environment)) == expected


@pytest.mark.parametrize(
    ("text", "range_"), [("2", (2, 2)), ("[1,4]", (1, 4)), ("1,4", (1, 4)), ("0", (0, 0))]
)
def test_workers_are_a_number_or_a_range(text: str, range_: tuple[int, int]) -> None:
    assert load(["--workers", text]).worker_range == range_


@pytest.mark.parametrize(("text", "range_"), [("2", (2, 2)), ("[1,4]", (1, 4))])
def test_workers_in_the_environment_are_a_number_or_a_range(text: str, range_: tuple[int, int]) -> None:
    assert load([], {"ESRGAN_WORKERS": text}).worker_range == range_


@pytest.mark.parametrize(
    ("argv", "environment", "message"),
    [
        (["--gan.steps", "-1"], {}, "gan.steps='-1'"),
        (["--gan.stepz", "1"], {}, "did you mean --gan.steps?"),
        (["--crop_px", "30"], {}, "crop_px=30 is not a multiple of 4, which data.scale=4 needs; use 28"),
        (
            ["--data.scale", "2", "--crop_px", "18", "--gan.steps", "0"],
            {},
            "crop_px=18 is not a multiple of 4, which data.scale=2 needs; use 16",
        ),
        (["--crop_px", "72"], {}, "crop_px=72 is not a multiple of 32"),
        (
            ["--crop_px", "20", "--model.discriminator", "unet"],
            {},
            "crop_px=20 is not a multiple of 8, which",
        ),
        (["--crop_px", "100", "--model.discriminator", "unet"], {}, "model.discriminator=unet needs; use 96"),
        (["--crop_px", "32", "--batch_size", "1"], {}, "batch_size=1: batch norm in model.discriminator=vgg"),
        (
            ["--psnr.steps", "0"],
            {},
            "psnr.steps=0: stage 2 would start from a random generator; set init.generator or psnr.steps",
        ),
        (
            ["--tracking.model_name", "team/esrgan"],
            {},
            "tracking.model_name: 'team/esrgan' cannot be registered",
        ),
        (["--tracking.model_name", "esrgan:x4"], {}, "without / : @ '"),
        (["--tracking.model_name", "esrgan@x4"], {}, "tracking.model_name: 'esrgan@x4'"),
        (["--tracking.model_name", ""], {}, "tracking.model_name: ''"),
        (["--tracking.model_name", " x4"], {}, "tracking.model_name: ' x4'"),
        (["--tracking.model_name", "x" * 257], {}, "use 1 to 256 characters"),
        (["--tracking.experiment", "x" * 501], {}, "tracking.experiment="),
        (["--crop_px", "1024"], {}, "crop_px=1024 is larger than data.patch_px=480"),
        (["--workers", "3,2"], {}, "workers=(3, 2)"),
        (["--workers", "many"], {}, "workers='many'"),
        (["--workers", "4", "--batch_size", "3"], {}, "batch_size=3 is smaller than workers=4"),
        (["--psnr.steps", "0", "--gan.steps", "0"], {}, "nothing to train"),
        (["--run_name", "a/b"], {}, "run_name='a/b'"),
        (["--data.scale", "5"], {}, "should be less than or equal to 4"),
        (["--psnr.learning_rate", "inf"], {}, "psnr.learning_rate='inf': should be a finite number"),
        (["--perceptual.layers", '{"conv1_2": NaN}'], {}, "perceptual.layers=nan: should be a finite number"),
        (["--perceptual.layers", '{"conv1_2": -1}'], {}, "perceptual.layers=-1"),
        (
            ["--perceptual.layers", "conv1_2"],
            {},
            "--perceptual.layers: not JSON; write a list as [1, 2] and a ",
        ),
        (["--gan.schedule.milestones", "[5,"], {}, "--gan.schedule.milestones: not JSON"),
        (["--gan.schedule.milestones", "[-5]"], {}, "gan.schedule.milestones=-5"),
        (["--config", "/no/such/file.yaml"], {}, "--config /no/such/file.yaml: no such file"),
        (["--gan.steps"], {}, "expected one argument"),
        (
            [],
            {"ESRGAN_GAN__STEPZ": "5"},
            "environment: gan.stepz: no such field; did you mean steps?",
        ),
        (["--tracking.if_away", "spool"], {}, "renamed to --tracking.if_unreachable"),
        (
            [],
            {"ESRGAN_TRACKING__IF_AWAY": "spool"},
            "tracking.if_away: no such field; renamed to tracking.if_unreachable",
        ),
        (["--tracking.metric", "lpips"], {}, "renamed to --gan.select_by (psnr.select_by for stage 1)"),
        (["--data.patch_step_px", "96"], {}, "renamed to --data.patch_stride_px"),
        (
            [],
            {"ESRGAN_DATA__MAX_DAMAGED_SHARE": "0"},  # codespell:ignore
            "data.max_damaged_share: no such field; renamed to data.max_corrupt_share",  # codespell:ignore
        ),
        ([], {"ESRGAN_GEN": "5"}, "environment ESRGAN_GEN: no field gen"),
        ([], {"ESRGAN_WORKERS": "x"}, "environment: workers='x'"),
    ],
)
def test_an_invalid_value_is_one_line_with_field_and_value(
    argv: list[str], environment: dict[str, str], message: str
) -> None:
    with pytest.raises(UserError) as caught:
        load(argv, environment)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "tracking: {if_away: spool}",
            "tracking.if_away: no such field; renamed to tracking.if_unreachable",
        ),
        ("data: {licence: CC0}", "data.licence: no such field; renamed to data.license"),  # codespell:ignore
        ("data: {codec: lz4}", "data.codec='lz4': should be 'raw' or 'webp'"),
        ("gan: {stepz: 7}", "gan.stepz: no such field; did you mean steps?"),
        ("gan: [1]", "gan"),
        ("a: b: c", "line 1: not valid YAML"),
        ("- 1", "contains a list"),
        ("precision: fp8", "precision='fp8'"),
    ],
)
def test_an_invalid_file_is_refused_with_its_path(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load(["--config", str(path)])
    assert str(path) in str(caught.value)
    assert message in str(caught.value)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_recipe_loads_and_has_its_description(path: Path) -> None:
    load(["--config", str(path)])
    comment = path.read_text().split("\n\n")[0]
    for word in ("Source:", "Data:", "Expected", "Time:", "Command:"):
        assert word in comment, word


DEMO = str(ROOT / "configs/demo.yaml")


@pytest.mark.parametrize(
    ("argv", "environment"),
    [
        ([], {}),
        (["--config", DEMO], {}),
        (["--config", DEMO, "--storage", "/runs"], {}),
        (["--config", DEMO, "--data.source", "photos"], {}),
        (["--config", DEMO, "--data.source", "photos", "--data.root", "out"], {}),
        (["--config", DEMO, "--data.root", "out"], {"ESRGAN_DATA__SOURCE": "photos"}),
        (["--config", DEMO, "--data.source", "photos"], {"ESRGAN_DATA__ROOT": "out"}),
        (["--data.root", "out"], {}),  # refused because data.source is missing
    ],
)
def test_a_missing_data_set_may_be_prepared_if_root_and_source_come_together(
    argv: list[str], environment: dict[str, str]
) -> None:
    _, options = load_config(argv, description="", environment=environment)
    assert options.prepare_command is None


@pytest.mark.parametrize(
    ("argv", "environment", "command"),
    [
        (["--data.root", "/typo"], {}, "--data.root /typo"),
        ([], {"ESRGAN_DATA__ROOT": "/a b"}, "--data.root '/a b'"),
        (
            ["--data.root", "/typo"],
            {"ESRGAN_DATA__SCALE": "2", "ESRGAN_SEED": "1"},
            "--data.scale 2 --data.root /typo",
        ),
    ],
)
def test_a_root_alone_gives_the_command_that_prepares_it(
    argv: list[str], environment: dict[str, str], command: str
) -> None:
    _, options = load_config(["--config", DEMO, *argv], description="", environment=environment)
    assert options.prepare_command == f"python jobs/prepare_data.py --config {DEMO} {command}"


@pytest.mark.parametrize("job", ["train_gan", "tune_gan"])
def test_a_mistyped_root_is_refused_and_nothing_is_prepared_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], job: str
) -> None:
    typo = tmp_path / "typo"
    assert exit_code(job, "--data.root", typo, "--storage", tmp_path / "runs") == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert f"data.root={typo}: no data set" in line
    assert "python jobs/prepare_data.py --config" in line
    assert line.endswith(f"--data.root {typo}")
    assert not typo.exists()


def test_paper_recipe_has_the_published_numbers() -> None:
    config = load(["--config", str(ROOT / "configs/esrgan_x4.yaml")])
    assert (config.model.num_block, config.model.num_feat, config.model.num_grow_ch) == (23, 64, 32)
    assert (config.psnr.steps, config.psnr.learning_rate) == (1_000_000, 2e-4)
    assert (config.gan.pixel_weight, config.gan.perceptual_weight, config.gan.adversarial_weight) == (
        1e-2,
        1.0,
        5e-3,
    )
    assert config.gan.schedule.milestones == (50_000, 100_000, 200_000, 300_000)


def test_the_gan_may_start_from_random_weights_if_allowed() -> None:
    config = load(["--psnr.steps", "0", "--gan.allow_random_start", "true"])
    assert (config.psnr.steps, config.gan.steps) == (0, 400_000)
    assert load(["--psnr.steps", "0", "--gan.steps", "5", "--gan.allow_random_start", "true"]).gan.steps == 5


@pytest.mark.parametrize("discriminator", ["vgg", "unet"])
@pytest.mark.parametrize("crop_px", [16, 20, 24, 32, 36, 64, 100])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_stage_2_accepts_the_sizes_that_the_configuration_accepts(
    discriminator: str, crop_px: int, batch_size: int
) -> None:
    fields = {
        "crop_px": crop_px,
        "batch_size": batch_size,
        "model": {
            "discriminator": discriminator, "discriminator_num_feat": 4, "num_feat": 4, "num_grow_ch": 2,
            "num_block": 1,
        },
    }  # fmt: skip
    images = torch.zeros(batch_size, 3, crop_px, crop_px)
    try:
        config = TrainConfig.model_validate(fields)
    except ValueError:
        with pytest.raises(ValueError, match=r"multiples? of|more than 1 value per channel"):
            (UNetDiscriminator(4) if discriminator == "unet" else VGGStyleDiscriminator(crop_px, 4))(images)
    else:
        network = new_state(config, "gan", torch.device("cpu")).discriminator
        assert network is not None
        assert unwrap(network)(images).isfinite().all()


@pytest.mark.parametrize("scale", [2, 4])
@pytest.mark.parametrize("crop_px", [16, 18, 20, 22])
def test_stage_1_accepts_the_crops_that_the_configuration_accepts(scale: int, crop_px: int) -> None:
    sizes = {"num_feat": 4, "num_grow_ch": 2, "num_block": 1}
    generator = RRDBNet(**sizes, scale=scale)
    try:
        TrainConfig.model_validate(
            {"data": {"scale": scale}, "crop_px": crop_px, "gan": {"steps": 0}, "model": sizes}
        )
    except ValueError:
        assert crop_px % 4
    else:
        images = torch.zeros(1, 3, crop_px // scale, crop_px // scale)
        assert generator(images).shape == (1, 3, crop_px, crop_px)


def test_changed_fields_are_validated_again() -> None:
    config = load([])
    assert with_fields(config, {"gan.pixel_weight": 0.25}).gan.pixel_weight == 0.25
    with pytest.raises(UserError, match=r"model\.residual_scale=7"):
        with_fields(config, {"model.residual_scale": 7})
    with pytest.raises(UserError, match="no such field"):
        with_fields(config, {"gan.pixel_wait": 1})


def test_schema_for_editors_is_up_to_date() -> None:
    stored = json.loads((ROOT / "configs/schema.json").read_text())
    assert stored == Config.model_json_schema(), "run: python -m pipeline.config > configs/schema.json"


def test_page_of_fields_is_up_to_date() -> None:
    assert (ROOT / "docs/fields.md").read_text() == fields_page(), (
        "run: python -m pipeline.config --page > docs/fields.md"
    )


def test_yaml_dump_of_a_configuration_loads_to_the_same(tmp_path: Path) -> None:
    config = load(["--config", str(ROOT / "configs/demo.yaml")])
    path = tmp_path / "dump.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    assert load(["--config", str(path)]) == config


def printed_help(*arguments: str, environment: dict[str, str] | None = None) -> str:
    with pytest.raises(SystemExit) as ended, contextlib.redirect_stdout(io.StringIO()) as stdout:
        load_config(
            list(arguments),
            description="Trains.",
            default_file=ROOT / "configs/demo.yaml",
            environment=environment or {},
        )
    assert ended.value.code == 0
    return stdout.getvalue()


def test_help_lists_what_most_runs_set_with_the_values_that_apply(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = printed_help("--help", environment={"ESRGAN_GAN__STEPS": "77"})
    assert len(text.splitlines()) < 60
    assert re.findall(r"^  --([a-z_.]+) X", text, re.M) == list(FIRST_FIELDS)
    flat = " ".join(text.split())
    assert "--batch_size X Patches in a step, over all workers (now: 8)." in flat
    assert "0 skips it (now: 77)." in flat
    assert "validation.* (" in flat
    assert "--help-all lists them" in flat
    assert "(now: 16)" in " ".join(
        printed_help("-h", "--config", str(ROOT / "configs/esrgan_x4.yaml")).split()
    )


@pytest.mark.parametrize("argv", [["--config", "-h"], ["-h", "--config"], ["--config", "--help"]])
def test_help_with_an_incomplete_flag_is_one_error_line(argv: list[str]) -> None:
    with pytest.raises(UserError, match=r"^[^\n]*--config: expected one argument[^\n]*$"):
        load(argv)


def test_help_shows_no_password() -> None:
    text = printed_help("--help", environment={"ESRGAN_TRACKING__URI": "postgresql://user:geheim@host/db"})
    assert "geheim" not in text


def test_help_all_has_a_group_per_section() -> None:
    text = printed_help("--help-all")
    assert "[--FIELD VALUE ...]" in text.split("\n\n")[0]
    groups = [line.removesuffix(" options:") for line in text.splitlines() if line.endswith(" options:")]
    sections = [name for name in Config.model_fields if isinstance(getattr(Config(), name), BaseModel)]
    assert [name for name in groups if "." not in name] == sections
