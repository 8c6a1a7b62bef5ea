"""Wrong input of every kind to every command: exit code 2, one line that names it, no traceback."""

import sys
from pathlib import Path

import pytest
from evaluation_helpers import exit_code, write_generator, write_image
from tracking_helpers import new_database

NO_TRACKING = "--tracking.uri none"
TRAIN = (
    "train_gan --config empty.yaml --data.root data --storage runs --workers 0 --perceptual.weights random "
    + NO_TRACKING
)
EVALUATE = "evaluate --model bicubic --hr hr --out out"
UPSCALE = "upscale --model bicubic --input hr --output out"
EXPORT = "export_model --model g.safetensors --output out.pth"

# Command and a text of its error; paths are relative to `folder`.
CASES = [
    # Flags that do not exist, lack a value, or have a wrong one.
    (f"{UPSCALE} --tlie 3", "did you mean --tile?"),
    (f"{EVALUATE} --bordr 3", "did you mean --border?"),
    (f"{EXPORT} --outputs x", "did you mean --output?"),
    (f"{TRAIN} --gan.stepz 3", "--gan.stepz"),
    ("promote --version 3", "--model-version"),
    ("send_metrics --runs x", "--run"),
    ("demo --output x", "did you mean --out?"),
    ("upscale --model bicubic --input hr", "--output"),
    ("evaluate --hr hr --out out", "--model"),
    ("export_model --output x.pth", "--model"),
    (f"{UPSCALE} --tile -1", "--tile='-1'"),
    (f"{UPSCALE} --tile big", "--tile='big'"),
    (f"{UPSCALE} -s 0", "--outscale='0'"),
    (f"{UPSCALE} --format tiff", "--format"),
    (f"{UPSCALE} --max-megapixels nan", "--max-megapixels='nan'"),
    (f"{UPSCALE} --workers -1", "--workers='-1'"),
    (f"{UPSCALE} --precision int8", "--precision"),
    (f"{UPSCALE} --device abacus", "--device abacus"),
    (f"{EVALUATE} --border -2", "--border='-2'"),
    (f"{EVALUATE} --limit 0", "--limit='0'"),
    (f"{EVALUATE} --scale 5", "--scale='5'"),
    (f"{EVALUATE} --crop a.png:1,2", "NAME:X,Y,W,H"),
    (f"{EVALUATE} --crop none.png:0,0,8,8", "no image of this name"),
    (f"{EVALUATE} --interpolate g.safetensors g.safetensors two", "--interpolate"),
    (f"{EVALUATE} --interpolate g.safetensors g.safetensors 2", "not between 0 and 1"),
    (f"{EVALUATE} --interpolate bicubic g.safetensors 0.5", "bicubic has no weights"),
    # Files and folders.
    (f"{UPSCALE} --input none", "no such folder or file"),
    (f"{UPSCALE} --input empty", "no images"),
    (f"{UPSCALE} --output hr", "is the input's folder"),
    (f"{UPSCALE} --output file/x", "--output"),
    (f"{UPSCALE} --output out.png", "--input is a folder"),
    (f"{UPSCALE} --json none/x.json", "--json"),
    (f"{EVALUATE} --hr none", "no such folder or file"),
    (f"{EVALUATE} --hr empty", "no images"),
    (f"{EVALUATE} --lr none", "no such folder or file"),
    (f"{EVALUATE} --lr other", "no file name matches"),
    (f"{EVALUATE} --lr wrong_size", "are not 4 times"),
    (f"{EVALUATE} --out file/x", "--out"),
    (f"{EVALUATE} --hr ftp://host/x", "ftp://host/x"),
    (f"{EXPORT} --output out.txt", "must end in"),
    (f"{EXPORT} --output none/x.pth", "not a file in an existing folder"),
    # Models.
    (f"{UPSCALE} --model none.pth", "no such file"),
    (f"{UPSCALE} --model hr", "neither a checkpoint"),
    (f"{UPSCALE} --model lfs.pth", "git lfs pull"),
    (f"{UPSCALE} --model page.pth", "HTML"),
    (f"{UPSCALE} --model empty.pth", "an empty file"),
    (f"{UPSCALE} --model cut.safetensors", "not readable as weights"),
    (f"{UPSCALE} --model model.onnx", "an .onnx file's source"),
    (f"{EXPORT} --model bicubic", "no weights to export"),
    (f"{EVALUATE} --model bicubic bicubic", "two models have the label"),
    (f"{EVALUATE} --model g.safetensors x2.safetensors", "one scale"),
    (f"{UPSCALE} --model models:/x@champion", "no tracking server is configured"),
    (f"{UPSCALE} --model models:/x@champion --tracking.uri sqlite:///none/mlflow.db", "create"),
    (f"{UPSCALE} --model models:/x@champion --tracking.uri sqlite:///mlflow.db", "no such registered model"),
    (f"{UPSCALE} --model models:/x --tracking.uri sqlite:///mlflow.db", "not a registered model"),
    (f"{UPSCALE} --model models:/x@champion --tracking.uri runs", "not the URI of an MLflow server"),
    (f"{UPSCALE} --model models:/x@champion --tracking.uri http://127.0.0.1:1", "127.0.0.1:1"),
    ("promote --model-version 3 --tracking.uri sqlite:///mlflow.db --config empty.yaml", "no such"),
    ("promote --model-version three --config empty.yaml", "three"),
    ("send_metrics --run none", "none"),
    # Configurations.
    (f"{TRAIN} --config none.yaml", "--config none.yaml: no such file"),
    (f"{TRAIN} --config list.yaml", "contains a list"),
    (f"{TRAIN} --config broken.yaml", "not valid YAML"),
    (f"{TRAIN} --gan.steps -1", "gan.steps"),
    (f"{TRAIN} --gan.steps many", "gan.steps"),
    (f"{TRAIN} --precision fp8", "precision"),
    (f"{TRAIN} --data.source none", "data.source"),
    (f"{TRAIN} --data.source empty", "no images"),
    (f"{TRAIN} --data.source hr --tracking.uri sqlite:///a?b/mlflow.db", "cannot hold"),
    (f"{TRAIN} --tracking.model_name a/b", "tracking.model_name"),
    ("prepare_data --data.source none --data.root data", "data.source=none"),
    ("prepare_data --data.source empty --data.root data", "no images"),
    ("prepare_data --data.source page.pth --data.root data", "not a .zip archive"),
    ("prepare_data --data.source hr --data.root data --data.patch_px 0", "data.patch_px"),
    ("prepare_data --data.root none --verify", "none"),
    ("tune_gan --config none.yaml", "--config none.yaml: no such file"),
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("wrong")
    write_image(root / "hr" / "a.png", 64, 80)
    for name in ("y.png", "z.png"):
        write_image(root / "other" / name, 16, 20)
    write_image(root / "wrong_size" / "a.png", 20, 20)
    for name in ("empty", "runs"):
        (root / name).mkdir()
    write_generator(root / "g.safetensors")
    write_generator(root / "x2.safetensors", scale=2)
    (root / "cut.safetensors").write_bytes((root / "g.safetensors").read_bytes()[:100])
    (root / "lfs.pth").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    (root / "page.pth").write_text("<!DOCTYPE html><html>404</html>")
    (root / "model.onnx").write_bytes(b"\x08\x07")
    (root / "list.yaml").write_text("- 1\n")
    (root / "broken.yaml").write_text("gan: {steps: 1\n")
    for name in ("empty.pth", "empty.yaml", "file"):
        (root / name).write_text("")
    new_database(root)
    return root


@pytest.mark.parametrize(("command", "text"), CASES, ids=[command for command, _ in CASES])
def test_a_wrong_input_is_one_line_and_exit_code_2(
    folder: Path, command: str, text: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    for name in ("ESRGAN_TRACKING__URI", "MLFLOW_TRACKING_URI", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    job, *arguments = command.split()
    assert exit_code(job, *arguments) == 2
    error = capfd.readouterr().err.strip()
    assert error.startswith("error: ")
    assert "\n" not in error
    assert text in error
    assert "ray" not in sys.modules or not sys.modules["ray"].is_initialized()


def test_every_command_has_cases() -> None:
    jobs = {path.stem for path in (Path(__file__).parent.parent / "jobs").glob("*.py")} - {"__init__"}
    assert {command.split()[0] for command, _ in CASES} == jobs
    assert len(CASES) >= 60
