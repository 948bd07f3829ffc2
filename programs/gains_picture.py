"""The picture of a report: bars of what kNN-LM gains by classes of tokens, with their intervals,
and how well the model and kNN-LM are calibrated."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

COLORS = ("#0072B2", "#E69F00")
"""Of ways in a picture: the colour-blind tell them apart."""


def picture(found: Mapping[str, Any]) -> bytes:
    """The gains by classes with their intervals, and the calibration, as PNG."""
    from matplotlib.figure import Figure  # an extra

    by = list(dict.fromkeys(row["by"] for row in found["slices"]))
    sizes = [1 + sum(row["by"] == name for row in found["slices"]) for name in by]
    height = 1 + 0.32 * sum(sizes)
    figure = Figure(figsize=(14 if found["calibration"] else 9, height), layout="constrained")
    left = figure
    if found["calibration"]:
        left, right = figure.subfigures(1, 2, width_ratios=(9, 5))
        panels = right.subplots(
            2, 1, height_ratios=(min(4.6, 0.8 * height), max(height - 4.6, 0.1))
        )
        panels[1].set_axis_off()
        draw_calibration(panels[0], found["calibration"])
    panels = left.subplots(len(by), 1, sharex=True, squeeze=False, height_ratios=sizes)[:, 0]
    for panel, name in zip(panels, by, strict=True):
        draw_gains(panel, [row for row in found["slices"] if row["by"] == name], name)
    panels[-1].set_xlabel("nats that a token gains over the LM, with 95% intervals")
    figure.suptitle(f"{found['corpus']}, {found['split']} split")
    if len(found["ways"]) > 2:
        left.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center")
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=150)
    return file.getvalue()


def draw_gains(panel: Any, rows: Sequence[Mapping[str, Any]], title: str) -> None:
    """Bars of the classes of one kind."""
    ways = list(rows[0]["gains"])
    thickness = 0.8 / len(ways)
    for i, (way, color) in enumerate(zip(ways, COLORS, strict=False)):
        of = [row["gains"][way] for row in rows]
        values = np.array([gain["value"] for gain in of])
        ends = np.array([[gain["low"], gain["high"]] for gain in of]).T
        places = np.arange(len(rows)) + (i - (len(ways) - 1) / 2) * thickness
        panel.barh(places, values, thickness, color=color, label=way)
        reach = np.maximum(np.abs(ends - values), 0)  # NaN draws nothing
        panel.errorbar(values, places, xerr=reach, fmt="none", ecolor="black", capsize=2)
    panel.set_yticks(range(len(rows)), [f"{row['label']} ({row['share']:.0%})" for row in rows])
    panel.invert_yaxis()
    panel.axvline(0, color="black", linewidth=0.8)
    if title != rows[0]["label"]:
        panel.set_title(title, loc="left", fontsize=10, fontweight="bold")


def draw_calibration(panel: Any, found: Mapping[str, Any]) -> None:
    """What was said of favourites against how often they were right."""
    panel.plot([0, 1], [0, 1], color="0.7", linewidth=0.8)
    styles = zip(("0.35", *COLORS), ("--", "-", "-."), ("s", "o", "^"), strict=True)
    for (name, of), (color, line, marker) in zip(found.items(), styles, strict=False):
        parts = [part for part in of["parts"] if part["share"]]
        said, right = ([part[key] for part in parts] for key in ("said", "right"))
        label = f"{name} (error {of['error']:.3f})"
        panel.plot(said, right, line, marker=marker, markersize=4, color=color, label=label)
    panel.set(xlabel="probability of the favourite", ylabel="share that was right", aspect="equal")
    panel.set_title("calibration", loc="left", fontsize=10, fontweight="bold")
    panel.legend(fontsize="small", loc="upper left", bbox_to_anchor=(0, -0.15))
