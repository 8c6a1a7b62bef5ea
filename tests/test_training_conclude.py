"""The lines at the end of a run."""

from types import SimpleNamespace

from pipeline.training.conclude import _against_bicubic


def test_the_registration_line_has_bicubics_metric_of_the_deciding_kind() -> None:
    scalars = {"metrics": {"psnr_y": 26.5, "lpips": 0.3}, "bicubic": {"psnr_y": 26.75, "lpips": 0.5}}
    chosen = SimpleNamespace(scalars=scalars)
    assert _against_bicubic(chosen, "psnr_y") == "psnr_y 26.5000, bicubic 26.7500\n"  # type: ignore[arg-type]
    assert _against_bicubic(chosen, "lpips") == "lpips 0.3000, bicubic 0.5000\n"  # type: ignore[arg-type]
    assert _against_bicubic(SimpleNamespace(scalars={"metrics": {}, "bicubic": {}}), "psnr_y") == ""  # type: ignore[arg-type]
