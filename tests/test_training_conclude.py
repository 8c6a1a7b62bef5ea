"""The lines at the end of a run."""

from pipeline.run_folder import TrainingResult
from pipeline.training.conclude import result_lines


def result(metrics: dict[str, float], bicubic: dict[str, float]) -> TrainingResult:
    return TrainingResult("first", "id", "gan", 20, "0" * 64, "runs/first/x", 3, metrics, metrics, bicubic)


def test_the_last_lines_have_the_registered_models_metrics_next_to_bicubics() -> None:
    better = result({"psnr_y": 26.75, "lpips": 0.3}, {"psnr_y": 26.5, "lpips": 0.5})
    lines = result_lines(better, "models:/x4/3")
    assert lines[0] == "run first: step 20 of stage gan"
    assert lines[2:] == [
        "registered: models:/x4/3: psnr_y 26.7500 (bicubic 26.5000), lpips 0.3000 (bicubic 0.5000)"
    ]


def test_a_result_below_bicubic_is_a_warning_also_without_registration() -> None:
    _, _, metrics, warning = result_lines(result({"psnr_y": 26.1}, {"psnr_y": 26.5}), None)
    assert metrics == "not registered: psnr_y 26.1000 (bicubic 26.5000)"
    assert warning.startswith("warning: PSNR (Y) is below bicubic's")


def test_a_run_without_validation_has_no_metrics() -> None:
    assert result_lines(result({}, {}), "models:/x4/3")[-1] == "registered: models:/x4/3: not validated"
