"""One walk of folders for ingest, evaluation and upscaling: the same files, and counts of what was not read."""

import os
from pathlib import Path

import pytest
from evaluation_helpers import job, user_error, write_image

from pipeline.data.config import DataConfig
from pipeline.data.ingest.image_set import find_pairs
from pipeline.data.ingest.plan import make_plan
from pipeline.evaluation.output_plan import plan


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two images, one in a loop of links, and one file of every kind that is not read."""
    root = tmp_path / "in"
    write_image(root / "a.png", 20, 24)
    write_image(root / "deep" / "b.webp", 20, 24)
    (root / "deep" / "loop").symlink_to(root, target_is_directory=True)
    for name in ("x.heic", "y.heic", "z.psd", "notes.txt", "more.txt"):
        (root / name).write_bytes(b"content")
    write_image(root / ".hidden.png", 20, 24)
    (root / ".DS_Store").write_bytes(b"\0")
    return root


SKIPPED = "2 .heic (not supported), 1 .psd (not supported), 1 hidden, 2 other files"


def test_all_commands_find_the_same_files_and_count_the_others(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ingest = make_plan(DataConfig(source=str(folder), root="unused"))
    assert [each.photo.name for each in ingest.jobs] == ["a.png", "deep/b.webp"]
    assert ingest.notes == (f"data.source={folder}: not read: {SKIPPED}",)
    pairs, rejected = find_pairs(str(folder), None, 4)
    assert ([pair.name for pair in pairs], rejected) == (["a.png", "deep/b.webp"], [])
    assert f"note: --hr {folder}: not read: {SKIPPED}\n" in capsys.readouterr().out
    _, tasks = plan(str(folder), str(folder.parent / "out"), "png")
    assert [task.photo.name for task in tasks] == ["a.png", "deep/b.webp"]
    assert capsys.readouterr().out == f"note: --input {folder}: not read: {SKIPPED}\n"


def test_a_folder_of_unsupported_images_is_an_error_that_counts_them(tmp_path: Path) -> None:
    (tmp_path / "a.dng").write_bytes(b"II*\0" + b"x" * 60)
    (tmp_path / "b.exr").write_bytes(b"\x76\x2f\x31\x01")
    for name, flag in (("upscale", "--input"), ("evaluate", "--hr")):
        out = "--output" if name == "upscale" else "--out"
        text = user_error(name, "--model", "bicubic", flag, tmp_path, out, tmp_path / "out")
        assert "no images (of 2 files: 1 .dng (not supported), 1 .exr (not supported))" in text


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\0\0\0\x18ftypheic" + bytes(40), "HEIC is not supported; convert it to PNG"),
        (b"8BPS\0\1" + bytes(40), "Photoshop is not supported; convert it to PNG"),
        (b"\xff\x0a" + bytes(40), "JPEG XL is not supported; convert it to PNG"),
    ],
)
def test_a_file_of_an_unsupported_format_fails_with_its_name(
    tmp_path: Path, content: bytes, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.png").write_bytes(content)
    code = job("upscale")(
        ["--model", "bicubic", "--input", str(tmp_path / "a.png"), "--output", str(tmp_path / "out")]
    )
    assert code == 1
    assert f"failed: {tmp_path}/a.png: {reason}" in capsys.readouterr().err


def test_broken_links_pipes_and_locked_folders_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_image(tmp_path / "in" / "a.png", 40, 40)
    (tmp_path / "in" / "broken.png").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "in" / "pipe.png")
    (tmp_path / "in" / "broken").symlink_to(tmp_path / "nowhere")
    arguments = ["--model", "bicubic", "--input", str(tmp_path / "in"), "--output", str(tmp_path / "out")]
    assert job("upscale")(arguments) == 1
    output = capsys.readouterr()
    assert "broken.png: broken link" in output.err
    assert "pipe.png: not a regular file" in output.err
    assert "not read: 1 broken link" in output.out
    assert "1 written, 0 skipped, 2 failed" in output.out
    _, rejected = find_pairs(str(tmp_path / "in"), None, 4)
    assert {Path(each.path).name: each.reason for each in rejected} == {
        "broken.png": "broken link",
        "pipe.png": "not a regular file",
    }


def test_a_name_that_is_not_utf8_is_upscaled_evaluated_and_resumed(tmp_path: Path) -> None:
    content = write_image(tmp_path / "a.png", 40, 40).read_bytes()
    name = os.fsdecode(b"\xff\xe9.png")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_bytes(content)
    arguments = ["--model", "bicubic", "--input", str(tmp_path / "in"), "--output", str(tmp_path / "out")]
    for key in ("written", "skipped"):
        result = tmp_path / "result.json"
        assert job("upscale")([*arguments, "--json", str(result)]) == 0
        assert f'"{key}": [\n    "{tmp_path}/out/\\udcff\\udce9.png"' in result.read_text()
    assert (tmp_path / "out" / name).exists()
    job("evaluate")(["--model", "bicubic", "--hr", str(tmp_path / "in"), "--out", str(tmp_path / "report")])
    assert '"name": "\\udcff\\udce9.png"' in (tmp_path / "report" / "metrics.json").read_text()


def test_a_name_of_the_maximal_length_is_written_and_a_longer_output_fails_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a.png", "m" * 251 + ".png", "n" * 250 + ".jpg", "n" * 250 + ".bmp"):
        write_image(tmp_path / "in" / name, 20, 24)
    arguments = ["--model", "bicubic", "--input", str(tmp_path / "in"), "--output", str(tmp_path / "out")]
    assert job("upscale")(arguments) == 1
    output = capsys.readouterr()
    assert "2 written, 0 skipped, 2 failed" in output.out
    assert output.err.count("the output's name is too long") == 2
    assert sorted(len(path.name) for path in (tmp_path / "out").iterdir()) == [5, 12, 255]
