"""Parts of the model card: the table of metrics, what chose the checkpoint, the note on licenses."""

from collections.abc import Mapping

from pipeline.metrics import METRICS, metric_of

LICENSE_CHARACTERS = 1500
NO_LICENSE = "Not stated. Whether weights may be redistributed depends on the training images."


def set_of(key: str) -> str:
    """The set in a metric's name: `Set14` of `Set14/lpips`; empty for the held-out images."""
    return key.rpartition("/")[0]


def measured(metrics: Mapping[str, float], bicubic: Mapping[str, float], selected_by: str) -> str:
    """The card's table of metrics, and what chose the checkpoint.

    Args:
        metrics: the generator's validation metrics, such as psnr_y and Set14/lpips; may be empty.
        bicubic: those of bicubic upscaling; may be empty.
        selected_by: the metric that chose the generator among the checkpoints of its stage.
    """
    if not metrics:
        return "It was not validated: there were no images for that."
    name, metric = set_of(selected_by), METRICS.get(metric_of(selected_by))
    return (
        f"{_table(metrics, bicubic)}\n\n"
        "Measured on images that were not used in training (`held out`: of the training data set below). Among the "
        f"checkpoints of its stage this one was chosen by {metric.label if metric else selected_by} on "
        f"{name or 'the held-out images'}."
    )


def _table(metrics: Mapping[str, float], bicubic: Mapping[str, float]) -> str:
    """A row for this generator and one for bicubic on each set, a column for each metric."""
    names = [name for name in METRICS if name in {metric_of(key) for key in metrics}]
    header = ["images", "upscaled by", *(_title(name) for name in names)]
    rows = []
    for each in dict.fromkeys(map(set_of, metrics)):
        for label, values in (("bicubic", bicubic), ("**this model**", metrics)):
            found = [values.get(f"{each}/{name}" if each else name) for name in names]
            if any(value is not None for value in found):
                pairs = zip(names, found, strict=True)
                cells = ["" if value is None else METRICS[name].shown(value) for name, value in pairs]
                rows.append([each or "held out", label, *cells])
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _title(name: str) -> str:
    """A metric with its unit and the direction in which it is better, such as `PSNR (Y), dB ↑`."""
    metric = METRICS[name]
    unit = f", {metric.unit}" if metric.unit else ""
    return f"{metric.label}{unit} {'↑' if metric.higher_is_better else '↓'}"


def license_note(licenses: Mapping[str, str | None]) -> str:
    """The card's note on licenses.

    Args:
        licenses: subset of the images (`train`, `held_out`) to the text that came with them, from the manifest.
    """
    subsets: dict[str, list[str]] = {}
    for name, text in licenses.items():
        if text and text.strip():
            subsets.setdefault(text.strip(), []).append(name)
    if not subsets:
        return NO_LICENSE
    notes = []
    for text, names in subsets.items():
        shown = text if len(text) <= LICENSE_CHARACTERS else text[:LICENSE_CHARACTERS] + " ..."
        quoted = "\n".join(f"    {line}" for line in shown.splitlines())
        notes.append(f"Images ({', '.join(names)}):\n\n{quoted}")
    return "Whether weights may be redistributed depends on the training images.\n\n" + "\n\n".join(notes)
