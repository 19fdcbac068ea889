"""Figures of the docs, each drawn from its record alone. A function draws into a folder and returns names of files."""

from pathlib import Path

from benchmarks.table import Record
from training.records.figures import write_figures, write_probe_figure


def draw_quickstart(record: Record, folder: Path) -> list[str]:
    """The losses, as the run itself draws them; its other figures are flat at 100% and shown nowhere."""
    return [name for name in write_figures(record, folder) if name == "loss.png"]


def draw_probe(record: Record, folder: Path) -> list[str]:
    """Tokens that come back from frozen embeddings, by length and by position."""
    return [write_probe_figure(record, folder)]


DRAWINGS = {
    "quickstart": draw_quickstart,
    "probe": draw_probe,
}
