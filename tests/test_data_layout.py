"""HR and LR files are distinguished by the names of folders and files, by one rule for ingest and evaluation."""

from pathlib import Path

import pytest
from evaluation_helpers import write_image

from pipeline.data import load_manifest, prepare
from pipeline.data.config import DataConfig
from pipeline.data.ingest.image_set import find_pairs
from pipeline.data.ingest.layout import lr_candidates, lr_next_to_hr, split_folders
from pipeline.data.ingest.plan import Plan, make_plan
from pipeline.errors import UserError

DIV2K = [
    f"DIV2K_{part}_HR/{name}.png" for part, name in (("train", "0001"), ("train", "0002"), ("valid", "0801"))
]
DIV2K_LR = [
    f"DIV2K_{part}_LR_bicubic/X{scale}/{name}x{scale}.png"
    for part, name in (("train", "0001"), ("train", "0002"), ("valid", "0801"))
    for scale in (2, 3, 4)
]


def tree(folder: Path, *names: str, lr: tuple[str, ...] = ()) -> Path:
    """Images of these names below `folder`: HR of 64 px, LR of 16."""
    for seed, name in enumerate([*names, *lr]):
        side = 16 if name in lr else 64
        write_image(folder / name, side, side, seed)
    return folder


def plan(source: Path, **fields: object) -> Plan:
    return make_plan(DataConfig.model_validate({"source": str(source), **fields}))


def used(source: Path, **fields: object) -> list[str]:
    return [job.photo.name for job in plan(source, **fields).jobs]


LAYOUTS = [
    (["HR/a.png"], ["LR/a.png"]),
    (["hr/a.png"], ["lr/X4/ax4.png"]),
    (["GT/000/a.png", "GT/001/a.png"], ["LQ/000/a.png", "LQ/001/a.png"]),
    (["gt/a.png"], ["lq/a.png"]),
    (["set_HR/a.png"], ["set_LR_mild/aX4.png"]),
    (["HR/a.png"], ["x4/a.png"]),
    (["HR/Set5/x4/a_HR_x4.png"], ["LR/LRBI/Set5/x4/a_LRBI_x4.png"]),
    (["GTmod12/a.png"], ["LRbicx4/a.png"]),
]


@pytest.mark.parametrize(("hr", "lr"), LAYOUTS)
def test_ingest_takes_the_hr_files_and_evaluation_pairs_them_with_the_lr_files(
    tmp_path: Path, hr: list[str], lr: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tree(tmp_path, *hr, lr=tuple(lr))
    made = plan(folder)
    assert [job.photo.name for job in made.jobs] == hr
    assert all(job.low is None for job in made.jobs)
    (note,) = made.notes
    lr_folder = lr[0].split("/")[0]
    assert note.startswith(
        f"data.source={folder}: HR images from {hr[0].split('/')[0]}; skipped as LR: {lr_folder}"
    )
    assert f"set data.lr_dir={folder}/{lr_folder}" in note
    pairs, refused = find_pairs(str(folder), None, 4)
    assert [(pair.hr, pair.lr) for pair in pairs] == [
        (str(folder / a), str(folder / b)) for a, b in zip(hr, lr, strict=True)
    ]
    assert refused == []
    assert f"LR images from {lr_folder}" in capsys.readouterr().out
    own = plan(folder, lr_dir=str(folder / lr_folder))
    assert [job.low and job.low.path for job in own.jobs] == [str(folder / name) for name in lr]
    assert "data.lr_dir" not in own.notes[0]


def test_an_unpacked_div2k_trains_on_its_training_images_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tree(tmp_path / "DIV2K", *DIV2K, lr=tuple(DIV2K_LR))
    data = DataConfig(source=str(folder), root=str(tmp_path / "data"), patch_px=64, patch_stride_px=32)
    result = prepare(data, on_ray=False)
    assert (result.patches, result.sources, result.rejected) == (2, 2, 0)
    (note,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    assert "HR images from DIV2K_train_HR; skipped as LR: DIV2K_train_LR_bicubic/X2, " in note
    assert f"set data.lr_dir={folder}/DIV2K_train_LR_bicubic/X4" in note
    assert "skipped as validation images: DIV2K_valid_HR (data.held_out takes them)" in note
    assert [entry["path"] for entry in load_manifest(data.root).sources] == DIV2K[:2]
    both = make_plan(data.model_copy(update={"held_out": str(folder)}))
    assert [job.photo.name for job in both.jobs if job.held_out] == DIV2K[2:]
    for scale in (2, 3, 4):
        lr = plan(folder, lr_dir=str(folder / "DIV2K_train_LR_bicubic"), scale=scale)
        assert [job.low and job.low.name for job in lr.jobs] == [
            f"X{scale}/000{n}x{scale}.png" for n in (1, 2)
        ]


def test_an_unpacked_div2k_is_evaluated_on_its_hr_images_alone(tmp_path: Path) -> None:
    folder = tree(tmp_path, *DIV2K, lr=tuple(DIV2K_LR))
    for scale in (2, 4):
        pairs, refused = find_pairs(str(folder), None, scale)
        assert [pair.name for pair in pairs] == DIV2K
        assert [pair.lr for pair in pairs] == [
            str(folder / n) for n in DIV2K_LR if n.endswith(f"x{scale}.png")
        ]
        assert refused == []


def test_lr_folders_that_all_fit_are_refused_in_evaluation_and_not_recommended_in_ingest(
    tmp_path: Path,
) -> None:
    folder = tree(tmp_path, "HR/a.png", lr=("LR_bicubic/X4/a.png", "LR_unknown/X4/a.png"))
    with pytest.raises(
        UserError, match=r"LR_bicubic/X4 and LR_unknown/X4 both hold LR files of HR; choose: --hr .*/HR --lr"
    ):
        find_pairs(str(folder), None, 4)
    assert "set data.lr_dir to one of these" in plan(folder).notes[0]


def test_one_version_of_an_image_is_used_and_other_folders_are_kept(tmp_path: Path) -> None:
    folder = tree(
        tmp_path, "GTmod12/a.png", "original/a.png", "more/b.png", lr=("LRbicx2/a.png", "LRbicx4/a.png")
    )
    assert used(folder) == ["GTmod12/a.png", "more/b.png"]
    (note,) = plan(folder).notes
    assert "HR images from GTmod12 and 1 files in other folders" in note
    assert "other versions of the same images: original" in note


def test_marked_files_in_an_hr_folder_alone_are_paired(tmp_path: Path) -> None:
    folder = tree(tmp_path, "HR/a_HR.png", "other/b.png", lr=("HR/a_LR.png",))
    pairs, refused = find_pairs(str(folder), None, 4)
    assert [(pair.name, pair.lr) for pair in pairs] == [("a_HR.png", str(folder / "HR/a_LR.png"))]
    assert refused == []


@pytest.mark.parametrize(
    "names",
    [
        ["LR/a.png", "b.png"],  # no name marks the others as HR: Lightroom
        ["holiday hr 2019/a.png", "holiday hr 2020/a.png", "more/a.png"],
        ["train/a.png", "test/b.png"],  # railways
        ["fox.png", "foxx5.png", "foxx.png", "lr.png", "x4.png"],
    ],
)
def test_folders_and_files_with_similar_names_are_used(tmp_path: Path, names: list[str]) -> None:
    made = plan(tree(tmp_path, *names))
    assert [job.photo.name for job in made.jobs] == sorted(names)
    assert made.notes == ()


@pytest.mark.parametrize(
    "lr", ["ax4.png", "a_x4.png", "a_4x.png", "a_LR.png", "a_bicLRx4.png", "a_LRBI_x4.png", "aX2.png"]
)
def test_another_size_next_to_its_image_is_refused(tmp_path: Path, lr: str) -> None:
    folder = tree(tmp_path, "a.png", "b.png", lr=(lr,))
    with pytest.raises(UserError, match=rf"data\.source=.*: {lr} is next to a\.png .*data\.lr_dir"):
        plan(folder)
    with pytest.raises(UserError, match=rf"--hr .*: {lr} is next to a\.png .*--lr"):
        find_pairs(str(folder), None, 4)


def test_a_folder_that_is_also_the_lr_folder_is_split_by_name(tmp_path: Path) -> None:
    folder = tree(tmp_path, "a.png", lr=("ax4.png",))
    (job,) = plan(folder, lr_dir=str(folder)).jobs
    assert (job.photo.name, job.low and job.low.name) == ("a.png", "ax4.png")


def test_files_marked_hr_and_lr_in_one_folder_are_distinguished(tmp_path: Path) -> None:
    folder = tree(tmp_path, "a_HR.png", "b_HR.png", lr=("a_LR.png", "b_LRBI_x4.png"))
    assert used(folder) == ["a_HR.png", "b_HR.png"]
    assert plan(folder).notes == (f"data.source={folder}: skipped as LR: 2 files such as a_LR.png",)


@pytest.mark.parametrize(
    "form",
    [
        "{}.png",
        "{}x4.png",
        "{}_x4.png",
        "{}_X4.png",
        "{}_LR.png",
        "{}_4x.png",
        "{}_bicLRx4.png",
        "{}_LRBI_x4.png",
    ],
)
def test_lr_names_with_every_ending_are_paired(form: str) -> None:
    hr = {name: name for name in ("im0.png", "foxx4.png", "0001x4.png", "im0_x.png")}
    lr = {name: name for name in (form.format(Path(each).stem) for each in hr)}
    assert lr_candidates(hr, lr, 4) == {name: [form.format(Path(name).stem)] for name in hr}


def test_names_that_differ_by_an_ending_alone_keep_their_own_lr_file() -> None:
    names = {name: name for name in ("view.png", "view_x4.png")}
    assert lr_candidates(names, names, 4) == {name: [name] for name in names}


def test_names_alone_decide() -> None:
    assert split_folders(["a.png", "more/b.png", "LR/a.png"], 4) is None
    assert lr_next_to_hr(["HR/a.png", "LR/ax4.png", "c/ax4.png"]) == {}
