"""Figures of a run, drawn from its record: loss, token accuracy, accuracy by position in the chunk."""

import os
from pathlib import Path
from typing import Any

os.environ.setdefault("MPLBACKEND", "Agg")  # files only: no window, no display needed

import matplotlib.pyplot as plt  # noqa: E402  (the backend must be chosen first)
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.ticker import PercentFormatter  # noqa: E402

# Okabe and Ito's colours: distinct for colour-blind readers and in grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")

PANELS_PER_ROW = 4


def write_figures(record: dict[str, Any], folder: Path) -> list[str]:
    """Draw the figures of a record as PNG files.

    Args:
        record (`dict`): With `stages.<name>.series` (one mapping per log) and `metrics`.
        folder (`Path`): Where the files go.

    Returns:
        `list[str]`: Names of the files written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stages = {name: stage["series"] for name, stage in record["stages"].items() if stage.get("series")}
    written = []
    if stages:
        written.append(_draw_series(stages, "loss", "loss (nats per token)", folder / "loss.png"))
        written.append(_draw_series(stages, "token_accuracy", "token accuracy", folder / "token_accuracy.png"))
    curves = position_curves(record.get("metrics", {}))
    if curves:
        written.append(_draw_positions(curves, folder / "accuracy_by_position.png"))
    return written


def series_curves(series: list[dict[str, Any]], suffix: str) -> dict[str, tuple[list[int], list[float]]]:
    """Collect the curves of one quantity from a stage's logs, by name.

    >>> logs = [{"step": 1, "copy_loss": 3.0}, {"step": 2, "copy_loss": 2.0, "eval_copy_loss": 2.5}]
    >>> series_curves(logs, "loss")
    {'copy': ([1, 2], [3.0, 2.0]), 'copy, validation': ([2], [2.5])}
    """
    curves: dict[str, tuple[list[int], list[float]]] = {}
    for log in series:
        for key, value in log.items():
            if not key.endswith(f"_{suffix}") or key in ("eval_loss", "train_loss"):
                continue
            name = key[: -len(suffix) - 1]
            name = f"{name[5:]}, validation" if name.startswith("eval_") else name
            steps, values = curves.setdefault(name.replace("_", " "), ([], []))
            steps.append(log["step"])
            values.append(value)
    return curves


def position_curves(metrics: dict[str, Any]) -> dict[str, list[float]]:
    """Pick the accuracies by position in the chunk that were measured with the right memories."""
    curves = {}
    for suite, result in metrics.items():
        positions = result.get("memory", {}).get("token_accuracy_by_position")
        if positions and suite != "clm":
            curves[suite.replace("_", " ")] = positions
    return curves


def _draw_series(stages: dict[str, list[dict[str, Any]]], suffix: str, label: str, path: Path) -> str:
    """One panel a stage, four in a row, on a common vertical axis; validation dashed in its objective's colour."""
    width = min(len(stages), PANELS_PER_ROW)
    height = -(-len(stages) // width)
    figure, grid = plt.subplots(
        height, width, figsize=(max(3.2 * width, 5), 2.8 * height), sharey=True, squeeze=False, layout="constrained"
    )
    panels = grid.flatten().tolist()
    for panel, (stage, series) in zip(panels, stages.items(), strict=False):
        curves = series_curves(series, suffix)
        names = sorted({name.removesuffix(", validation") for name in curves})
        for name, (steps, values) in curves.items():
            colour = COLOURS[names.index(name.removesuffix(", validation")) % len(COLOURS)]
            style = "o--" if name.endswith("validation") else "-"
            style = "o" if len(steps) == 1 else style  # measured once: the legend must not promise a line
            panel.plot(steps, values, style, color=colour, label=name, markersize=3, linewidth=1.4)
        panel.set_title(stage.replace("_", " "), fontsize=10)
        panel.set_xlabel("step")
        _tidy(panel, suffix)
    for panel in panels[len(stages) :]:
        panel.set_visible(False)
    for row in grid:
        row[0].set_ylabel(label)
    return _save(figure, path)


def _draw_positions(curves: dict[str, list[float]], path: Path) -> str:
    figure, panel = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for colour, (name, values) in zip(COLOURS, curves.items(), strict=False):
        panel.plot(range(len(values)), values, "o-", color=colour, label=name, markersize=3, linewidth=1.4)
    panel.set_title("accuracy by position in the chunk", fontsize=10)
    panel.set_xlabel("position in the chunk")
    panel.set_ylabel("token accuracy, test split")
    _tidy(panel, "token_accuracy")
    return _save(figure, path)


def _tidy(panel: Axes, suffix: str) -> None:
    if suffix == "token_accuracy":
        panel.set_ylim(0, 1.02)
        panel.yaxis.set_major_formatter(PercentFormatter(1.0))
    else:
        panel.set_ylim(bottom=0, auto=True)  # the other panels of the row may still raise the top
    _tidy_axes(panel)


def _tidy_axes(panel: Axes) -> None:
    panel.grid(alpha=0.3, linewidth=0.6)
    panel.spines[["top", "right"]].set_visible(False)
    if panel.get_legend_handles_labels()[0]:
        panel.legend(fontsize=8, frameon=False)


def _save(figure: Any, path: Path) -> str:
    figure.savefig(path, dpi=150, metadata={"Software": None})
    plt.close(figure)
    return path.name


def _bars(cells: list[dict[str, Any]]) -> list[list[float]]:
    """How far the intervals of some cells reach below and above their accuracy."""
    sides = [(cell["token_accuracy"], *cell["token_accuracy_interval"]) for cell in cells]
    return [[value - low for value, low, _ in sides], [high - value for value, _, high in sides]]


def _sizes(cells: list[dict[str, Any]]) -> str:
    """Say how many numbers an embedding has, from the shortest text to the longest."""
    sizes = sorted({cell["numbers_per_text"] for cell in cells})
    return " to ".join(f"{size:,}" for size in dict.fromkeys((sizes[0], sizes[-1])))


def write_probe_figure(record: dict[str, Any], folder: Path) -> str:
    """Draw what a probe found: tokens that come back against the length, and by position in the longest texts.

    Args:
        record (`dict`): Of `python -m training.probe`.
        folder (`Path`): Where the PNG file goes.

    Returns:
        `str`: Its name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    models = record["metrics"]["models"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    styles = {"embedding": ("o-", 1.6), "untrained": ("s--", 1.0), "shuffled": ("^:", 1.0)}
    controls = {"untrained": "untrained (control)", "shuffled": "another text's embedding (control)"}
    drawn = set()
    for colour, model in zip(COLOURS, models, strict=False):
        lengths = [int(length) for length in model["lengths"]]
        for condition, (style, width) in styles.items():
            cells = [cells.get(condition) for cells in model["lengths"].values()]
            if None in cells:
                continue
            drawn.add(condition)
            values = [cell["token_accuracy"] for cell in cells]
            label = f"{model['name']}, {_sizes(cells)} numbers a text" if condition == "embedding" else None
            left.errorbar(lengths, values, yerr=_bars(cells), fmt=style, color=colour, label=label, capsize=2,
                          linewidth=width, markersize=4)  # fmt: skip
            curve = cells[-1]["token_accuracy_by_position"]
            right.plot(range(1, len(curve) + 1), curve, style[1:], color=colour, linewidth=width)
    for condition, (style, width) in list(styles.items())[1:]:
        if condition not in drawn:
            continue
        left.plot([], [], style, color="grey", linewidth=width, markersize=4, label=controls[condition])
    left.set_xscale("log", base=2)
    left.set_xticks(lengths, [str(length) for length in lengths])
    left.set_xlabel("tokens of the text")
    left.set_ylabel("tokens written back from the frozen embedding")
    left.set_title("by length: a lower bound, from a small probe", fontsize=10)
    right.set_xlabel("position in the text")
    right.set_title(f"by position, {lengths[-1]} tokens", fontsize=10)
    for panel in (left, right):
        _tidy(panel, "token_accuracy")
    return _save(figure, folder / "accuracy.png")
