"""Figures of the docs, each drawn from its record alone. A function draws into a folder and returns names of files."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from benchmarks.cost_tables import PATHS, by_length, measured_shapes
from benchmarks.table import Record
from training.records.figures import COLOURS, write_figures, write_probe_figure


def draw_quickstart(record: Record, folder: Path) -> list[str]:
    """The losses, as the run itself draws them; its other figures are flat at 100% and shown nowhere."""
    return [name for name in write_figures(record, folder) if name == "loss.png"]


def draw_probe(record: Record, folder: Path) -> list[str]:
    """Tokens that come back from frozen embeddings, by length and by position."""
    return [write_probe_figure(record, folder)]


def draw_rolling(record: Record, folder: Path) -> list[str]:
    """CPU time to the first token against length, a panel a decoder."""
    cells = {shape: by_length(record, "first_token", shape) for shape in measured_shapes(record, "first_token")}
    shapes = [shape for shape, lengths in cells.items() if len(lengths) > 1]  # one length is no curve: see the table
    return _draw_first_token(record, shapes, folder) if shapes else []


def _draw_first_token(record: Record, shapes: list[str], folder: Path) -> list[str]:
    figure = Figure(figsize=(4.4 * len(shapes), 4.4), layout="constrained")
    panels = figure.subplots(1, len(shapes), squeeze=False)[0]
    ways = dict(zip({"full": "full text", **PATHS}.items(), COLOURS, strict=False))
    for panel, shape in zip(panels, shapes, strict=True):
        cells = by_length(record, "first_token", shape)
        for (path, _), colour in ways.items():
            shown = {tokens: cell for tokens, cell in cells.items() if path in cell["cpu_median"]}
            for key, style in (("cpu_median", "o-"), ("median", "x:")):
                times = [cell[key][path] for cell in shown.values()]
                panel.plot(list(shown), times, style, color=colour, linewidth=1.4 if key == "cpu_median" else 0.8,
                           markersize=4)  # fmt: skip
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xticks(list(cells), [f"{n:,}" for n in cells], rotation=45, fontsize=7)
        panel.set_title(record["shapes"][shape]["title"], fontsize=10)
        panel.set_xlabel("tokens of context")
        _tidy(panel)
    panels[0].set_ylabel("seconds to first token")
    lines = [Line2D([], [], color=colour, label=label) for (_, label), colour in ways.items()]
    lines += [Line2D([], [], color="black", marker="o", markersize=4, label="CPU time"),
              Line2D([], [], color="black", marker="x", markersize=4, linestyle=":", linewidth=0.8,
                     label="by the clock, on a busy machine")]  # fmt: skip
    figure.legend(handles=lines, loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    return _save(figure, folder / "first_token.png")


DRAWINGS = {
    "quickstart": draw_quickstart,
    "probe": draw_probe,
    "rolling": draw_rolling,
}


def _tidy(panel: Any) -> None:
    panel.grid(alpha=0.3, linewidth=0.6)
    panel.spines[["top", "right"]].set_visible(False)


def _save(figure: Figure, path: Path) -> list[str]:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, metadata={"Software": None})
    return [path.name]
