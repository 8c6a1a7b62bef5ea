"""Computes PSNR and SSIM of models on images, as the papers do, and writes an HTML report."""

from pipeline import command
from pipeline.storage import Storage


def main(argv: list[str]) -> None:
    """Loads the configuration, evaluates, prints the result."""
    command.announce("evaluating models: loading libraries and the models")
    from pipeline.evaluation.config import EvaluateConfig
    from pipeline.evaluation.evaluate import run_evaluation

    config = command.parse_section("evaluate", EvaluateConfig, argv, __doc__ or "")
    command.require_writable_file(config.json_file, "--json")
    result = run_evaluation(config)
    command.write_json(config.json_file, result.means_as_json())
    for each in result.rejected:
        print(f"rejected: {each.path}: {each.reason}")
    settings = result.settings
    print(
        f"{len(result.images)} images, x{settings.scale}, border {settings.border}; PSNR in dB; y: BT.601 luma"
    )
    print(command.table(*result.table()))
    header, rows = result.comparison_table()
    if rows:
        print(f"\n{command.table(header, rows)}\n")
    out = Storage(config.out)
    print(f"report: {out.path('report.html' if out.exists('report.html') else 'metrics.json')}")


if __name__ == "__main__":
    command.run(main)
