"""Bicubic as a baseline of validations."""

from pipeline.training.baseline import comparison, is_below

BICUBIC = {"psnr_y": 25.0, "ssim_y": 0.5, "Set5/psnr_y": 28.0}


def test_a_set_whose_psnr_is_worse_than_bicubics_is_below() -> None:
    assert is_below({"psnr_y": 24.9, "ssim_y": 0.9}, BICUBIC)
    assert is_below({"psnr_y": 25.5, "Set5/psnr_y": 27.0}, BICUBIC)
    assert not is_below({"psnr_y": 25.1, "ssim_y": 0.1, "Set5/psnr_y": 28.0}, BICUBIC)


def test_without_psnr_on_y_nothing_is_below() -> None:
    assert not is_below({"lpips": 0.9}, {"lpips": 0.5})


def test_metrics_are_compared_by_name() -> None:
    text = comparison({"psnr_y": 24.5, "ssim_y": 0.1}, BICUBIC)
    assert text == "psnr_y 24.5000 (bicubic 25.0000), ssim_y 0.1000 (bicubic 0.5000)"
