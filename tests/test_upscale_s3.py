"""Upscaling from and to an object store."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from evaluation_helpers import job, user_error, write_generator, write_image
from PIL import Image
from s3 import s3_bucket

from pipeline.storage import Storage


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with s3_bucket(monkeypatch) as bucket:
        yield bucket


def test_a_prefix_is_upscaled_into_another_and_skipped_the_second_time(bucket: str, tmp_path: Path) -> None:
    weights = write_generator(tmp_path / "g.safetensors")
    content = write_image(tmp_path / "a.png", 20, 24).read_bytes()
    Storage(f"{bucket}/in").write_bytes("deep/a.png", content)
    Storage(f"{bucket}/models").write_bytes("g.safetensors", weights.read_bytes())
    arguments = [
        "--model",
        f"{bucket}/models/g.safetensors",
        "--input",
        f"{bucket}/in",
        "--output",
        f"{bucket}/out",
    ]
    assert job("upscale")(arguments) == 0
    output = Storage(f"{bucket}/out").read_bytes("deep/a.png")
    (tmp_path / "output.png").write_bytes(output)
    assert np.asarray(Image.open(tmp_path / "output.png")).shape == (80, 96, 3)
    assert job("upscale")(arguments) == 0
    assert Storage(f"{bucket}/out").read_bytes("deep/a.png") == output
    arguments[1] = str(write_generator(tmp_path / "other.safetensors", seed=1))
    assert "made by s3://" in user_error("upscale", *arguments)
    assert Storage(f"{bucket}/out").read_bytes("deep/a.png") == output
    assert job("upscale")([*arguments, "--overwrite"]) == 0
    assert Storage(f"{bucket}/out").read_bytes("deep/a.png") != output
    assert job("upscale")(arguments) == 0


def test_hr_images_on_s3_are_evaluated_into_s3(bucket: str, tmp_path: Path) -> None:
    content = write_image(tmp_path / "a.png").read_bytes()
    Storage(f"{bucket}/hr").write_bytes("a.png", content)
    assert not job("evaluate")(
        ["--model", "bicubic", "--hr", f"{bucket}/hr", "--out", f"{bucket}/evaluation"]
    )
    out = Storage(f"{bucket}/evaluation")
    assert sorted(out.files()) == ["comparison.png", "metrics.json", "report.html"]
    assert json.loads(out.read_bytes("metrics.json"))["images"][0]["name"] == "a.png"
