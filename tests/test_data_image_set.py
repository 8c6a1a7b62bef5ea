"""Folder layouts of sets of images, in evaluation and validation."""

from pathlib import Path

import pytest
from evaluation_helpers import write_image

from pipeline.data.ingest.image_set import find_pairs
from pipeline.errors import UserError


def tree(folder: Path, *names: str) -> Path:
    for name in names:
        write_image(folder / name, 16, 16)
    return folder


def pair_names(folder: Path, lr: Path | None = None) -> list[tuple[str, str | None]]:
    pairs, _ = find_pairs(str(folder), str(lr) if lr else None, 4)
    return [(pair.name, Path(pair.lr).name if pair.lr else None) for pair in pairs]


def test_hr_images_alone_in_all_subfolders_sorted(tmp_path: Path) -> None:
    tree(tmp_path, "b.png", "a.jpg", "more/c.webp", ".hidden.png")
    (tmp_path / "notes.txt").write_text("not an image")
    assert pair_names(tmp_path) == [("a.jpg", None), ("b.png", None), ("more/c.webp", None)]


@pytest.mark.parametrize(
    ("hr", "lr"),
    [("HR/a.png", "LR/a.png"), ("GTmod12/a.png", "LRbicx4/a.png"), ("hr/a.png", "LR_bicubic/X4/ax4.png")],
)
def test_two_subfolders_are_recognized(tmp_path: Path, hr: str, lr: str) -> None:
    assert pair_names(tree(tmp_path, hr, lr)) == [("a.png", Path(lr).name)]


def test_the_subfolder_of_another_scale_is_not_used(tmp_path: Path) -> None:
    assert pair_names(tree(tmp_path, "HR/a.png", "LRbicx2/a.png", "LRbicx4/a.png")) == [("a.png", "a.png")]
    pairs, _ = find_pairs(str(tmp_path), None, 4)
    assert "LRbicx4" in str(pairs[0].lr)


def test_adjacent_hr_and_lr_files_are_recognized_and_others_rejected(tmp_path: Path) -> None:
    tree(tmp_path, "img_SRF_4_HR.png", "img_SRF_4_LR.png", "b_HR.png", "other.png")
    pairs, rejected = find_pairs(str(tmp_path), None, 4)
    assert [(pair.name, Path(str(pair.lr)).name) for pair in pairs] == [
        ("img_SRF_4_HR.png", "img_SRF_4_LR.png")
    ]
    assert {Path(each.path).name for each in rejected} == {"b_HR.png", "other.png"}


def test_div2k_names_match(tmp_path: Path) -> None:
    hr = tree(tmp_path / "DIV2K_valid_HR", "0801.png", "0802.png")
    lr = tree(tmp_path / "DIV2K_valid_LR_bicubic", "X2/0801x2.png", "X4/0801x4.png", "X4/0802x4.png")
    assert pair_names(hr, lr) == [("0801.png", "0801x4.png"), ("0802.png", "0802x4.png")]


def test_the_exact_name_takes_precedence_over_the_shortened_one(tmp_path: Path) -> None:
    hr = tree(tmp_path / "a", "view.png", "view_x4.png")
    lr = tree(tmp_path / "b", "view.png", "view_x4.png")
    assert pair_names(hr, lr) == [("view.png", "view.png"), ("view_x4.png", "view_x4.png")]


def test_hr_images_without_an_lr_file_are_rejected(tmp_path: Path) -> None:
    hr, lr = tree(tmp_path / "hr", "a.png", "b.png"), tree(tmp_path / "lr", "a.png", "c.png")
    pairs, rejected = find_pairs(str(hr), str(lr), 4)
    assert [pair.name for pair in pairs] == ["a.png"]
    assert sorted(Path(each.path).name for each in rejected) == ["b.png", "c.png"]


def test_no_match_at_all_is_an_error_with_an_expected_name(tmp_path: Path) -> None:
    hr, lr = tree(tmp_path / "hr", "a.png", "b.png"), tree(tmp_path / "lr", "c.png", "d.png")
    with pytest.raises(UserError, match=r"ax4\.png"):
        find_pairs(str(hr), str(lr), 4)


def test_messages_name_the_field_that_the_folder_comes_from(tmp_path: Path) -> None:
    flags = ("validation.sets.Set5.hr=", "validation.sets.Set5.lr=")
    with pytest.raises(UserError, match=rf"^validation\.sets\.Set5\.hr={tmp_path}/none: no such folder"):
        find_pairs(f"{tmp_path}/none", None, 4, flags)
    tree(tmp_path, "HR/a.png", "LR/a.png", "LRbic/a.png")
    with pytest.raises(
        UserError, match=rf"choose: validation\.sets\.Set5\.hr={tmp_path}/HR validation\.sets"
    ):
        find_pairs(str(tmp_path), None, 4, flags)
