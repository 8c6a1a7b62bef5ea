"""The report in a real browser, and the comparison figure."""

import json
import os
import re
import shutil
import signal
import subprocess
import threading
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from evaluation_helpers import job, synthetic_image, write_generator, write_image

from pipeline.data.ingest.image_set import find_pairs
from pipeline.evaluation.crops import Box, most_different
from pipeline.evaluation.models import open_model
from pipeline.evaluation.report import render_report, tradeoff_figure
from pipeline.evaluation.result import Evaluation
from pipeline.evaluation.scoring import ImageScore, Scorer, Settings
from pipeline.imaging.panels import Panel, draw_panels
from pipeline.metrics import CONSISTENCY_AND_DETAIL, FIDELITY, MetricSet

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
    "--no-first-run", "--hide-scrollbars",
]  # fmt: skip

# Operates the page's controls, and posts what it read to the frame around it.
DRIVER = """
<script>
const seen = {};
const names = () => [...document.querySelectorAll("#every tbody tr")].map((row) => row.cells[0].textContent);
const values = () => [...document.querySelectorAll("#every tbody tr")].map((row) => +row.cells[1].textContent);
seen.names = names();
document.querySelectorAll("#every th button")[1].click();
seen.down = values();
document.querySelectorAll("#every th button")[1].click();
seen.up = values();
document.querySelectorAll("#tabs button")[1].click();
seen.ssim = values();
const card = document.querySelector(".image"), range = card.querySelector(".slider input");
range.value = 80; range.dispatchEvent(new Event("input"));
seen.at = getComputedStyle(card.querySelector(".slider")).getPropertyValue("--at");
const source = (place) => card.querySelector(place).getAttribute("src");
const before = source(".slider .under");
card.querySelector(".pick button").click();
seen.swapped = source(".slider .under") === source(".pick img") && source(".slider .over") === before;
document.querySelectorAll("#every th button")[4].focus();
document.querySelectorAll("#every th button")[4].click();
seen.range = [...document.querySelectorAll("#every tbody tr")].map((row) => +row.cells[4].textContent);
seen.focus = document.activeElement.textContent;
const click = (mode) => card.querySelector(`button[data-mode=${mode}]`).click();
click("flicker");
seen.flicker = getComputedStyle(card.querySelector(".over")).animationName;
click("difference");
seen.blend = getComputedStyle(card.querySelector(".over")).mixBlendMode;
click("split");
card.querySelector(".overview").dispatchEvent(new KeyboardEvent("keydown", { key: "Enter" }));
seen.zoomed = card.querySelector(".overview").classList.contains("zoomed");
card.querySelector(".overview").dispatchEvent(new KeyboardEvent("keydown", { key: "Escape" }));
seen.small = !card.querySelector(".overview").classList.contains("zoomed");
const made = [];
URL.createObjectURL = (blob) => (made.push(blob), "#");
document.getElementById("csv").click();
seen.csv = made[0].type;
const order = document.querySelector("#every").compareDocumentPosition(document.querySelector(".image"));
seen.before = order & Node.DOCUMENT_POSITION_FOLLOWING;
seen.broken = [...document.images].filter((image) => !image.complete || !image.naturalWidth).length;
seen.wide = document.documentElement.scrollWidth > innerWidth;
parent.postMessage("seen " + JSON.stringify(seen), "*");
</script>
"""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    for seed in range(3):
        write_image(folder / "hr" / f"image-{seed}.png", 160, 200, seed)
    weights = [str(write_generator(folder / f"stage-{seed}.safetensors", seed)) for seed in (1, 2)]
    arguments = ["--model", "bicubic", *weights, "--hr", str(folder / "hr"), "--out", str(folder / "out")]
    assert not job("evaluate")([*arguments, "--crop", "image-1.png:40,20,64,48"])
    return folder / "out"


def test_the_report_needs_no_network(report: Path) -> None:
    page = (report / "report.html").read_text()
    assert not re.search(r"""(src|href)=["']?(https?:)?//|@import|url\(""", page)
    assert len(page) < 15e6
    assert "image-1.png" in page
    assert "crop 64 × 48 at 40, 20" in page
    assert "PSNR and SSIM prefer the safe mean" in page
    assert "<li>detail ratio: energy of the result" in page
    assert "<li>lr: computed from the HR images by MATLAB" in page
    assert "sha256 of the weights" in page


def test_names_cannot_break_out_of_the_page(tmp_path: Path) -> None:
    write_image(tmp_path / "hr" / "a<b></script><i>&.png".replace("/", "_"))
    job("evaluate")(["--model", "bicubic", "--hr", str(tmp_path / "hr"), "--out", str(tmp_path / "out")])
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<b>&" not in page
    assert "<i>&" not in page
    assert "a&lt;b&gt;" in page


def in_browser(page: Path, folder: Path) -> tuple[str, str]:
    """The page's content after its scripts, and Chromium's errors; it is killed, because it does not always end."""
    assert CHROMIUM
    errors, content = folder / "errors.txt", ""
    command = [
        CHROMIUM, *FLAGS, f"--user-data-dir={folder / 'profile'}", "--window-size=1300,900", "--dump-dom",
        "--allow-file-access-from-files", "--virtual-time-budget=5000", page.as_uri(),
    ]  # fmt: skip
    with (
        errors.open("w") as file,
        subprocess.Popen(
            command, text=True, stdout=subprocess.PIPE, stderr=file, start_new_session=True
        ) as chromium,
    ):
        assert chromium.stdout is not None
        limit = threading.Timer(300, os.killpg, (chromium.pid, signal.SIGKILL))
        limit.start()
        for line in chromium.stdout:
            content += line
            if "</html>" in line:
                break
        limit.cancel()
        with suppress(ProcessLookupError):
            os.killpg(chromium.pid, signal.SIGKILL)
    return content, errors.read_text()


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (Debian: apt-get install chromium)")
@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1280])
def test_the_report_works_in_a_browser(report: Path, tmp_path: Path, width: int) -> None:
    page = tmp_path / "driven.html"
    page.write_text((report / "report.html").read_text().replace("</body>", DRIVER + "</body>"))
    # Chromium's window is never narrower than 500 px: the phone is a frame in it.
    frame = tmp_path / "frame.html"
    frame.write_text(f'<iframe src="driven.html" style="width: {width}px; height: 800px; border: 0"></iframe>'
                     "<script>onmessage = (event) => document.title = event.data</script>")  # fmt: skip
    content, errors = in_browser(frame, tmp_path)
    found = re.search(r"<title>seen (.*)</title>", content)
    assert found, errors[-1000:]
    seen = json.loads(found[1])
    assert seen["names"] == ["image-0.png", "image-1.png", "image-2.png"]
    assert seen["down"] == sorted(seen["down"], reverse=True)
    assert seen["up"] == sorted(seen["down"])
    assert len(set(seen["down"])) == 3
    assert all(0 < value <= 1 for value in seen["ssim"])
    assert seen["at"] == "80%"
    assert seen["swapped"] is True
    assert seen["broken"] == 0
    assert seen["wide"] is False
    assert seen["range"] == sorted(seen["range"], reverse=True)
    assert seen["range"][0] > 0
    assert seen["focus"] == "Range"
    assert (seen["flicker"], seen["blend"]) == ("flicker", "difference")
    assert seen["zoomed"] is True
    assert seen["small"] is True
    assert seen["csv"] == "text/csv"
    assert seen["before"] == 4


def test_the_comparison_figure_has_rows_of_labeled_crops() -> None:
    crops = [synthetic_image(32, 32, seed) for seed in range(3)]
    row = [Panel(f"stage {number}", "28.10 dB", crop) for number, crop in enumerate(crops)]
    image = draw_panels([row], zoom=3)
    x = 16 + 2 * (32 * 3 + 10)
    shown = np.asarray(image)[8 + 48 :, x:][: 32 * 3 : 3, : 32 * 3 : 3]
    np.testing.assert_array_equal(shown, crops[2])
    assert draw_panels([row, row], zoom=3).height > image.height


def test_the_crop_is_where_the_results_differ_most() -> None:
    a = synthetic_image(80, 120)
    b = a.copy()
    b[44:60, 72:88] ^= 64
    box = most_different([a, b], 16, 4)
    assert (box.x, box.y, box.width, box.height) == (72, 44, 16, 16)


def test_a_crop_near_the_edge_is_moved_inside() -> None:
    assert Box(100, 100, 64, 64).fitted((64, 120, 3), 4) == Box(56, 0, 64, 64)
    assert Box(0, 0, 128, 128).fitted((30, 50, 3), 4) == Box(0, 0, 48, 28)


def test_a_shift_of_all_colors_does_not_hide_where_detail_differs() -> None:
    a = np.full((80, 120, 3), 100, np.uint8)
    b = a + 40
    b[44:60, 72:88] += (synthetic_image(16, 16) > 128).astype(np.uint8) * 30
    box = most_different([a, b], 32, 4)
    assert 40 <= box.x <= 88
    assert 12 <= box.y <= 60


def test_the_tradeoff_figure_has_a_numbered_point_for_each_model() -> None:
    means = [{"psnr_y": psnr, "lpips": lpips} for psnr, lpips in ((28.0, 0.30), (28.001, 0.30), (26.0, 0.12))]
    figure = tradeoff_figure(means, "lpips")
    figure.canvas.draw()
    (axes,) = figure.axes
    points = [axes.transData.transform(each.get_offsets()[0]) for each in axes.collections]
    assert len(points) == 3
    assert points[2][0] < points[0][0]  # less PSNR: to the left
    assert points[2][1] < points[0][1]  # better perceptual quality: lower
    numbers = [(text.get_text(), text.get_window_extent()) for text in axes.texts]
    assert [number for number, _ in numbers] == ["1", "2", "3"]
    assert not numbers[0][1].overlaps(numbers[1][1])


def test_the_tradeoff_figure_is_in_the_report_if_a_perceptual_metric_was_computed(tmp_path: Path) -> None:
    assert "LPIPS over PSNR" in report_with(tmp_path, feature_distance=0.3, lpips=0.2)
    assert "feature distance over PSNR" in report_with(tmp_path, feature_distance=0.3)
    assert "over PSNR" not in report_with(tmp_path, color_drift=1.0)


def test_columns_name_unit_and_direction_of_each_metric(tmp_path: Path) -> None:
    text = report_with(
        tmp_path, feature_distance=0.31234, color_drift=1.234, color_drift_r=1.0, detail_ratio=0.7
    )
    for title in (
        "detail ratio → 1",
        "PSNR (Y), dB ↑",
        "SSIM (Y) ↑",
        "feature distance ↓",
        "color drift, levels ↓",
    ):
        assert f"<th>{title}</th>" in text
    assert re.search(r"<td[^>]*>0\.3123</td>", text)
    assert re.search(r"<td[^>]*>1\.23</td>", text)
    assert "color_drift_r" not in text


def test_the_report_compares_each_model_with_the_first(tmp_path: Path) -> None:
    scores = []
    for seed in range(4):
        score = scored(tmp_path, f"{seed}.png", seed)
        first = score.metrics[0]
        better = {**first, "psnr_y": first["psnr_y"] + 1 + seed / 10, "feature_distance": 0.2}
        metrics = [{**first, "feature_distance": 0.3 + seed / 100}, better]
        scores.append(replace(score, metrics=metrics, baseline=better, sr=[*score.sr, *score.sr]))
    text = render_report(Evaluation(["a", "b"], ["a", "b"], Settings(), scores, []))
    section = text[text.index("<h2>Against a</h2>") : text.index("<h2>Perception")]
    psnr = r'<td class="best">\+1\.15<small>\+1\.0\d to \+1\.2\d</small><small>better on 4 of 4</small></td>'
    assert re.search(psnr, section)
    assert re.search(r'<td class="best">-0\.1150<small>-0\.1\d+ to -0\.1\d+</small>', section)
    worse = replace(scores[0], metrics=[scores[0].metrics[1], scores[0].metrics[0]])
    reverse = render_report(Evaluation(["a", "b"], ["a", "b"], Settings(), [worse, worse], []))
    assert '<td class="worse">-1.00<small>' in reverse
    assert "<td>+0.0000<small>+0.0000 to +0.0000</small><small>better on 0 of 4</small></td>" in section
    alone = render_report(Evaluation(["a", "b"], ["a", "b"], Settings(), scores[:1], []))
    assert "Against a" not in alone


def scored(folder: Path, name: str = "a.png", seed: int = 0) -> ImageScore:
    write_image(folder / name, 40, 40, seed)
    pair = next(pair for pair in find_pairs(str(folder), None, 4)[0] if pair.name == name)
    score = Scorer([open_model("bicubic")], Settings(), MetricSet([*FIDELITY, *CONSISTENCY_AND_DETAIL]))(pair)
    assert isinstance(score, ImageScore)
    return score


def report_with(folder: Path, **more: float) -> str:
    score = scored(folder)
    values = {**score.metrics[0], **more}
    score = replace(score, metrics=[values], baseline=values)
    return render_report(Evaluation(["bicubic"], ["bicubic"], Settings(), [score], []))
