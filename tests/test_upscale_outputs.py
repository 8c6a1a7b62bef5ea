"""Outputs of upscale.py: one for each input, and never those of another model, other settings or another input."""

import json
from pathlib import Path

import numpy as np
import pytest
from evaluation_helpers import job, synthetic_image, user_error, write_generator, write_image
from PIL import Image

from pipeline.evaluation.models import Model, open_model
from pipeline.evaluation.output_plan import plan


@pytest.fixture
def first(tmp_path: Path) -> Path:
    return write_generator(tmp_path / "first.safetensors", seed=1)


@pytest.fixture
def second(tmp_path: Path) -> Path:
    return write_generator(tmp_path / "second.safetensors", seed=2)


def arguments(folder: Path, model: str | Path, *more: str) -> list[str]:
    return ["--model", str(model), "--input", str(folder / "in"), "--output", str(folder / "out"), *more]


def run(folder: Path, model: str | Path, *more: str) -> dict[str, list[str]]:
    """Names of what one successful call wrote and skipped."""
    assert not job("upscale")(arguments(folder, model, *more, "--json", str(folder / "result.json")))
    result = json.loads((folder / "result.json").read_text())
    assert result.keys() == {"written", "skipped", "failed"}
    return {
        key: [str(Path(entry).relative_to(folder / "out")) for entry in result[key]]
        for key in ("written", "skipped")
    }


def rejected(folder: Path, model: str | Path, *more: str) -> str:
    """The error of a call, which leaves the output folder unchanged."""
    before = contents(folder / "out")
    text = user_error("upscale", *arguments(folder, model, *more))
    assert contents(folder / "out") == before
    assert "--overwrite" in text
    assert "another --output" in text
    return text


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_made_by(model: Path, output: Path, seed: int) -> None:
    np.testing.assert_array_equal(
        np.asarray(Image.open(output)), open_model(str(model)).upscale(synthetic_image(20, 24, seed))
    )


def write_inputs(folder: Path, *names: str) -> None:
    for seed, name in enumerate(names):
        write_image(folder / "in" / name, 20, 24, seed)


@pytest.mark.parametrize(
    "names",
    [
        ["a.jpg", "a.jpg.png", "a.png"],
        ["a.jpg", "a.jpg.jpg", "a.jpg.png", "a.jpg.png.png", "a.png", "a.png.png"],
        ["a.PNG", "a.png", "b/a.jpg", "b/a.jpg.png", "b/a.webp"],
    ],
)
def test_every_input_has_its_own_output(tmp_path: Path, first: Path, names: list[str]) -> None:
    write_inputs(tmp_path, *names)
    assert len(set(run(tmp_path, first)["written"])) == len(names)
    output, tasks = plan(str(tmp_path / "in"), str(tmp_path / "out"), "png")
    for name in names:
        (target,) = (task.target for task in tasks if task.photo.name == name)
        lr = np.asarray(Image.open(tmp_path / "in" / name))
        sr = open_model(str(first)).upscale(lr)
        np.testing.assert_array_equal(np.asarray(Image.open(output.path(target))), sr, err_msg=name)
    assert len(run(tmp_path, first)["skipped"]) == len(names)


def test_outputs_of_another_model_are_an_error_and_overwritten_on_request(
    tmp_path: Path, first: Path, second: Path
) -> None:
    write_inputs(tmp_path, "a.png", "b.png")
    run(tmp_path, first)
    text = rejected(tmp_path, second)
    assert str(first) in text
    assert "generator_sha256" in text
    rejected(tmp_path, "bicubic")
    assert run(tmp_path, second, "--overwrite") == {"written": ["a.png", "b.png"], "skipped": []}
    assert_made_by(second, tmp_path / "out" / "a.png", 0)
    assert run(tmp_path, second) == {"written": [], "skipped": ["a.png", "b.png"]}
    rejected(tmp_path, first)


def test_the_weights_decide_and_not_the_models_name(tmp_path: Path, first: Path, second: Path) -> None:
    write_inputs(tmp_path, "a.png")
    run(tmp_path, first)
    copied = tmp_path / "copy.safetensors"
    copied.write_bytes(first.read_bytes())
    assert run(tmp_path, copied)["skipped"] == ["a.png"]
    first.write_bytes(second.read_bytes())
    rejected(tmp_path, first)


def test_other_settings_are_an_error_unless_only_rounding_differs(tmp_path: Path, first: Path) -> None:
    write_inputs(tmp_path, "a.png")
    run(tmp_path, first)
    assert "format png is now webp" in rejected(tmp_path, first, "--format", "webp")
    assert "precision fp32 is now bf16" in rejected(tmp_path, first, "--precision", "bf16")
    assert run(tmp_path, first, "--tile", "16", "--device", "cpu")["skipped"] == ["a.png"]
    scaled = write_generator(tmp_path / "scaled.safetensors", seed=1, residual_scale=0.1)
    assert "residual_scale 0.2 is now 0.1" in rejected(tmp_path, scaled)
    assert run(tmp_path, first, "--format", "webp", "--overwrite")["written"] == ["a.webp"]


def test_an_output_of_another_input_is_not_skipped(tmp_path: Path, first: Path) -> None:
    write_inputs(tmp_path, "a.png")
    run(tmp_path, first)
    (tmp_path / "in" / "a.png").unlink()
    write_inputs(tmp_path, "b.png", "a.jpg")
    text = rejected(tmp_path, first)
    inputs = tmp_path / "in"
    assert f"a.png was made from {inputs}/a.png, and is now the output of {inputs}/a.jpg" in text
    assert run(tmp_path, first, "--overwrite")["written"] == ["a.png", "b.png"]


def test_two_folders_with_equal_names_do_not_share_outputs(tmp_path: Path, first: Path) -> None:
    write_inputs(tmp_path, "a.png")
    run(tmp_path, first)
    write_image(tmp_path / "other" / "a.png", 20, 24, seed=7)
    text = rejected(tmp_path, first, "--input", str(tmp_path / "other"))
    assert f"{tmp_path}/in/a.png" in text
    assert f"{tmp_path}/other/a.png" in text


def test_images_without_a_record_are_not_skipped(tmp_path: Path, first: Path) -> None:
    write_inputs(tmp_path, "a.png", "b.png")
    write_image(tmp_path / "out" / "a.png", 80, 96, seed=5)
    assert "a.png exists, but upscale.json does not list it" in rejected(tmp_path, first)
    assert len(run(tmp_path, first, "--overwrite")["written"]) == 2
    (tmp_path / "out" / "upscale.json").write_text("[1")
    assert "(2 such files)" in rejected(tmp_path, first)
    assert len(run(tmp_path, first, "--overwrite")["written"]) == 2


def test_a_record_replaced_by_a_parallel_process_with_the_same_settings_is_harmless(
    tmp_path: Path, first: Path
) -> None:
    write_inputs(tmp_path, "a.png")
    run(tmp_path, first)
    file = tmp_path / "out" / "upscale.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"inputs": {"other.png": "other.png"}}))
    assert run(tmp_path, first)["skipped"] == ["a.png"]


def killed_at_the_second_image(monkeypatch: pytest.MonkeyPatch, call: list[str]) -> None:
    upscale, calls = Model.upscale, iter([False, True])

    def interrupted(self: Model, lr: np.ndarray, *options: object) -> np.ndarray:
        if next(calls):
            raise KeyboardInterrupt
        return upscale(self, lr, *options)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(Model, "upscale", interrupted)
        with pytest.raises(KeyboardInterrupt):
            job("upscale")(call)


def test_a_killed_run_is_resumed_by_the_same_model_alone(
    tmp_path: Path, first: Path, second: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_inputs(tmp_path, "a.png", "b.png", "c.png")
    killed_at_the_second_image(monkeypatch, arguments(tmp_path, first))
    rejected(tmp_path, second)
    assert run(tmp_path, first) == {"written": ["b.png", "c.png"], "skipped": ["a.png"]}


def test_a_killed_overwrite_leaves_no_skippable_outputs_of_the_earlier_model(
    tmp_path: Path, first: Path, second: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_inputs(tmp_path, "a.png", "b.png", "c.png")
    run(tmp_path, first)
    killed_at_the_second_image(monkeypatch, arguments(tmp_path, second, "--overwrite"))
    assert run(tmp_path, second) == {"written": ["b.png", "c.png"], "skipped": ["a.png"]}
    for seed, name in enumerate("abc"):
        assert_made_by(second, tmp_path / "out" / f"{name}.png", seed)


def test_outputs_that_an_overwrite_did_not_reach_are_not_skipped(
    tmp_path: Path, first: Path, second: Path
) -> None:
    write_inputs(tmp_path, "a.png", "b.png")
    run(tmp_path, first)
    run(tmp_path, second, "--overwrite", "--input", str(tmp_path / "in" / "a.png"))
    assert "b.png exists, but" in rejected(tmp_path, second)


def test_an_output_that_would_replace_an_input_is_an_error(tmp_path: Path, first: Path) -> None:
    write_inputs(tmp_path, "a.png", "in/a.png")
    text = user_error(
        "upscale", "--model", first, "--input", tmp_path / "in", "--output", tmp_path, "--overwrite"
    )
    assert f"would replace the input {tmp_path / 'in' / 'a.png'}" in text
