"""The model in models/: found by its name, small, and better than bicubic on a photo that it has not seen."""

import runpy
import shutil
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import tiny
from evaluation_helpers import ROOT, exit_code, write_image

from pipeline.config import load_config
from pipeline.evaluation.models import Model, notes, open_model
from pipeline.imaging import bicubic_upscale, matlab_bicubic_downscale, psnr
from pipeline.model import generator_sha256
from pipeline.storage import Storage
from pipeline.training.checks import with_absolute_paths
from pipeline.training.initial import resolve
from pipeline.training.model_source import shipped_model


@pytest.fixture(scope="module")
def compact() -> Model:
    return open_model("compact-x4")


def test_its_file_is_small_and_describes_itself(compact: Model) -> None:
    file = shipped_model("compact-x4")
    assert file is not None
    assert file.stat().st_size < 1_500_000
    assert compact.scale == 4
    assert [line for line in notes([compact]) if line.startswith("compact-x4: RRDBNet")]


def test_it_is_sharper_than_bicubic(compact: Model) -> None:
    hr = np.ascontiguousarray(skimage.data.astronaut()[:256, 100:356])
    lr = matlab_bicubic_downscale(hr, 4)
    assert psnr(compact.upscale(lr), hr) > psnr(bicubic_upscale(lr, 4), hr) + 1.5


@pytest.mark.parametrize("source", ["compact", "../models/compact-x4", "", "compact-x4.safetensors"])
def test_only_its_exact_name_is_one(source: str) -> None:
    assert shipped_model(source) is None


def test_training_starts_from_it_by_its_name(tmp_path: Path) -> None:
    values = tiny.fields(tmp_path, **{"init.generator": "compact-x4", "init.adopt_sizes": True})
    config, _ = load_config(tiny.flags(values), description="", environment={})
    config, initial = resolve(with_absolute_paths(config), Storage(str(tmp_path / "run")), {}, begun=False)
    assert (config.model.num_block, config.model.num_feat, config.model.num_grow_ch) == (3, 32, 16)
    assert initial["generator"].origin.source == "compact-x4"


def test_a_generator_is_packed_as_a_model_of_half_the_size(tmp_path: Path, compact: Model) -> None:
    script = shutil.copy(ROOT / "models" / "pack.py", tmp_path / "pack.py")
    main = runpy.run_path(script)["main"]
    main([str(shipped_model("compact-x4")), "copy", "the same"])
    copy = open_model(str(tmp_path / "copy.safetensors"))
    assert copy.info["description"] == "the same"
    assert (tmp_path / "copy.safetensors").stat().st_size < 1_200_000
    assert compact.generator is not None
    assert copy.generator is not None
    assert generator_sha256(copy.generator.state_dict()) == generator_sha256(compact.generator.state_dict())


def test_upscale_prints_what_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = write_image(tmp_path / "small.png", 12, 16)
    assert exit_code("upscale", "-n", "compact-x4", "-i", small, "-o", tmp_path / "large.png") == 0
    assert "compact-x4: RRDBNet" in capsys.readouterr().out
