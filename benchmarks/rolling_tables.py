"""Tables and the figure of what memories cost and save at use, from the record of `benchmarks/rolling.py`."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.measure import duration
from training.records.figures import COLOURS

Record = dict[str, Any]

PATHS = {
    "stored_16": "stored, 16 tokens per memory",
    "stored_64": "stored, 64 tokens per memory",
    "encode": "encoded first, small encoder",
    "encode_own": "encoded first, encoder as large as the decoder",
}
READERS = {
    "rolling": "rolling memory",
    "rolling_newest": "rolling memory, the newest {newest_memories} memories only",
    "no_memory": "no memory, the same windows of {window_length}",
    "no_memory_sliding": "no memory, always the {window_length} tokens before",
    "full_context": "full context",
    "full_context_rows": "full context in rows of {trained_tokens}, as trained",
}
READINGS = {
    "reading/1024": "1,024 tokens per memory, windows of 1,024",
    "reading/16": "16 tokens per memory, windows of 1,024",
    "reading/16_bounded": "the same, the newest {bound} memories only",
}


def by_length(record: Record, kind: str, shape: str) -> dict[int, Record]:
    """Return the finished cells of a kind and shape by number of tokens; one that ran all layers goes first."""
    found: dict[int, Record] = {}
    for name, result in record["metrics"].items():
        tokens = result["given"].get("tokens")
        if name.startswith(f"{kind}/{shape}/") and (tokens not in found or not result["full_is_scaled_by_layers"]):
            found[tokens] = result
    return dict(sorted(found.items()))


def measured_shapes(record: Record, kind: str) -> list[str]:
    """Return the shapes that a kind of cell was measured for."""
    return [shape for shape in record["shapes"] if by_length(record, kind, shape)]


def faster_from(cells: dict[int, Record], path: str) -> int | None:
    """Return the length from which on a path was faster, by clock and CPU time, at all lengths measured."""
    first = None
    for tokens, cell in cells.items():
        if path in cell["ratio"] and min(cell["ratio"][path], cell["cpu_ratio"][path]) <= 1:
            first = None
        elif first is None and path in cell["ratio"]:
            first = tokens
    return first


def goal_lines(record: Record, link: str) -> list[str]:
    """Figure, what it must reach, what was reached."""
    tokens, lines = record["targets"]["tokens"], ["| figure | must reach | reached |", "|---|---|---|"]

    def row(figure: str, goal: str, reached: str, met: bool = True) -> None:
        lines.append(f"| {figure} | {goal} | {reached}{'' if met else ' (missed)'} |")

    for shape in measured_shapes(record, "first_token"):
        cells, about = by_length(record, "first_token", shape), record["shapes"][shape]
        target, cell = about["target_ratio"], cells.get(tokens)
        if cell is not None:
            clock, cpu = (cell[key]["stored_16"] for key in ("ratio", "cpu_ratio"))
            least = min(clock, cpu)  # on a busy machine the clock may count a quiet moment of one side only
            scaled = ", one or two layers' time counted for all" if cell["full_is_scaled_by_layers"] else ""
            row(
                f"first token behind {tokens:,} tokens, stored memories against the text in clear, "
                f"{about['title']}{scaled}",
                "reported" if target is None else f"{target:g} times faster",
                f"[{cpu:.0f} times]({link}) of CPU time, {clock:.0f} by the clock; at 64 tokens per memory "
                f"{cell['cpu_ratio']['stored_64']:.0f} and {cell['ratio']['stored_64']:.0f}",
                target is None or least >= target,
            )
        starts = [faster_from(cells, path) for path in ("encode", "encode_own")]
        small, own = (f"from {n:,} tokens on" if n else "at no length measured" for n in starts)
        row(
            f"the same, memories encoded first, {about['title']}",
            "faster from some length on",
            f"[{small}]({link}); {own} with an encoder as large as the decoder",
            starts[0] is not None,
        )
    for shape in measured_shapes(record, "generation"):
        cell = by_length(record, "generation", shape).get(tokens)
        if cell is not None:
            share = cell["cache_share"]["memories"]
            row(
                f"cache behind {tokens:,} tokens, {record['shapes'][shape]['title']}",
                f"1/{1 / record['targets']['cache_share']:.0f}",
                f"[1/{1 / share:.1f}]({link})",
                share <= record["targets"]["cache_share"],
            )
    for name, title in READINGS.items():
        cell = record["metrics"].get(name)
        if cell is not None:
            goal, exponent = record["targets"]["exponent"], cell["fit"]["exponent"]
            free, lengths = name == "reading/16", cell["given"]["lengths"]
            row(
                f"cost exponent of reading {lengths[0]:,} to {lengths[-1]:,} tokens, {title.format(**cell['given'])}",
                "reported" if free else f"{goal}",
                f"[{exponent:.2f}]({link}), of CPU time {cell['cpu_fit']['exponent']:.2f}",
                free or exponent <= goal,
            )
    return lines


def first_token_lines(record: Record, link: str) -> list[str]:
    """Time to the first token of each way, by length; how many times faster than the text in clear."""
    lines = [
        "| decoder | tokens of context | text in clear | " + " | ".join(PATHS.values()) + " |",
        "|---|---:|" + "---:|" * (len(PATHS) + 1),
    ]
    for shape in measured_shapes(record, "first_token"):
        for tokens, cell in by_length(record, "first_token", shape).items():
            star = "\\*" if cell["full_is_scaled_by_layers"] else ""
            median, ratio, cpu_ratio = cell["median"], cell["ratio"], cell["cpu_ratio"]
            shown = [
                f"{duration(median[path])} ([{ratio[path]:.1f}]({link}); {cpu_ratio[path]:.1f})"
                if path in ratio
                else ""
                for path in PATHS
            ]
            full = duration(cell["median"]["full"]) + star
            lines.append(f"| {record['shapes'][shape]['title']} | {tokens:,} | {full} | {' | '.join(shown)} |")
    return [
        *lines,
        "",
        f"Behind the context a prompt of {record['prompt_tokens']} tokens; logits of its last token, cache kept. In "
        "brackets: how many times faster than the text in clear, by the clock and by CPU time of the process, which "
        "other work on the machine disturbs less. \\* Not run whole: one or two layers were, and their time was "
        "taken as often as the decoder has them.",
        *missing(record, "first_token/"),
    ]


def generation_lines(record: Record, link: str) -> list[str]:
    """Time per token and bytes of the cache, by length."""
    lines = [
        "| decoder | tokens of context | text in clear | memories | newest memories only | cache: clear | memories | "
        "newest only | share |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for shape in measured_shapes(record, "generation"):
        for tokens, cell in by_length(record, "generation", shape).items():
            names = ("full", "memories", "bounded")
            times = [duration(cell["median"][name]) for name in names]
            sizes = [f"{cell['cache_bytes'][name] / 2**20:,.1f} MiB" for name in names]
            share = f"[1/{1 / cell['cache_share']['memories']:.1f}]({link})"
            columns = " | ".join([*times, *sizes])
            lines.append(f"| {record['shapes'][shape]['title']} | {tokens:,} | {columns} | {share} |")
    given = next((c["given"] for name, c in record["metrics"].items() if name.startswith("generation/")), None)
    note = []
    if given is not None:
        note = [
            "",
            f"Median of {given['steps']} tokens, written in turn. 16 tokens per memory; newest only: at most "
            f"{given['bound']} memories. Keys and values of the text in clear are random numbers: only their size "
            "counts here.",
        ]
    return [*lines, *note, *missing(record, "generation/")]


def folding_lines(record: Record, link: str) -> list[str]:
    """Time per token of plain text through roll-overs, by length of the text before."""
    lines = [
        "| decoder | window | tokens before | all memories: a token | one that folds a window | mean | newest only: "
        "a token | one that folds a window | mean |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    shapes = measured_shapes(record, "folding")
    for shape in shapes:
        for tokens, cell in by_length(record, "folding", shape).items():
            median = cell["median"]
            columns = []
            for name in ("memories", "newest"):
                columns += [duration(median[f"{name}_{kind}"]) for kind in ("step", "fold")]
                columns.append(f"[{duration(cell['per_token'][name])}]({link})")
            title, window = record["shapes"][shape]["title"], cell["window_length"]
            lines.append(f"| {title} | {window} | {tokens:,} | {' | '.join(columns)} |")
    if not shapes:
        return missing(record, "folding/") or ["", "Not measured."]
    return [*lines, *missing(record, "folding/")]


def reading_lines(record: Record, link: str) -> list[str]:
    """Time to read a text of n tokens in windows, and the exponent of the cost."""
    cells = {title: record["metrics"][name] for name, title in READINGS.items() if name in record["metrics"]}
    if not cells:
        return missing(record, "reading/")
    lengths = next(iter(cells.values()))["given"]["lengths"]
    lines = [
        "| tokens read | " + " | ".join(f"{n:,}" for n in lengths) + " | exponent | of CPU time |",
        "|---|" + "---:|" * (len(lengths) + 2),
    ]
    for title, cell in cells.items():
        times = [duration(cell["median"][str(n)]) for n in lengths]
        lines.append(
            f"| {title.format(**cell['given'])} | {' | '.join(times)} | [{cell['fit']['exponent']:.2f}]({link}) | "
            f"{cell['cpu_fit']['exponent']:.2f} |"
        )
    return [*lines, *missing(record, "reading/")]


def quality_lines(record: Record, link: str) -> list[str]:
    """Loss by position in long documents, one line a way of reading."""
    cell = record["metrics"].get("quality")
    if cell is None:
        return missing(record, "quality")
    edges, given = cell["edges"], {**cell, **cell["given"]}
    lines = [
        "| nats per token, tokens | "
        + " | ".join(f"{start:,} to {end:,}" for start, end in zip(edges, edges[1:], strict=False))
        + " |",
        "|---|" + "---:|" * (len(edges) - 1),
    ]
    for name, title in READERS.items():
        shown = ["" if loss is None else f"[{loss:.3f}]({link})" for loss in cell["losses"][name]]
        lines.append(f"| {title.format(**given)} | {' | '.join(shown)} |")
    return [
        *lines,
        "",
        f"{given['documents']} stretches of {given['tokens']:,} tokens of the test split. All models learnt from rows "
        f"of {given['trained_tokens']} tokens; full context ends where the decoder's positions do.",
    ]


def missing(record: Record, prefix: str) -> list[str]:
    """Name the cells that were not measured; one that ran some layers only is no loss where the whole was run."""
    whole = set(record["metrics"])
    names = [
        name for name in record["not_measured"] if name.startswith(prefix) and name.removesuffix("/part") not in whole
    ]
    return ["", f"Not measured: {', '.join(names)}."] if names else []


def draw_rolling(record: Record, folder: Path) -> list[str]:
    """Draw time to the first token against length, a panel a shape; and loss against position."""
    written = []
    shapes = measured_shapes(record, "first_token")
    if shapes:
        figure = Figure(figsize=(3.6 * len(shapes), 3.8), layout="constrained")
        panels = figure.subplots(1, len(shapes), squeeze=False)[0]
        for panel, shape in zip(panels, shapes, strict=True):
            cells = by_length(record, "first_token", shape)
            for colour, (path, label) in zip(COLOURS, {"full": "text in clear", **PATHS}.items(), strict=False):
                shown = {tokens: cell for tokens, cell in cells.items() if path in cell["median"]}
                times = [cell["median"][path] for cell in shown.values()]
                panel.plot(list(shown), times, "-", color=colour, label=label, linewidth=1.4)
                for tokens, cell in shown.items():  # hollow: scaled by layers
                    fill = "none" if path == "full" and cell["full_is_scaled_by_layers"] else colour
                    panel.plot(tokens, cell["median"][path], "o", color=colour, markerfacecolor=fill, markersize=4)
            panel.set_xscale("log", base=2)
            panel.set_yscale("log")
            panel.set_xticks(list(cells), [f"{n:,}" for n in cells], rotation=45, fontsize=7)
            panel.set_title(record["shapes"][shape]["title"], fontsize=10)
            panel.set_xlabel("tokens of context")
            _grid(panel)
        panels[0].set_ylabel("seconds to the first token")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
        written.append(_save(figure, folder / "first_token.png"))
    cell = record["metrics"].get("quality")
    if cell is not None:
        figure = Figure(figsize=(6, 4), layout="constrained")
        panel = figure.subplots()
        edges = cell["edges"]
        for colour, (name, label) in zip(COLOURS, READERS.items(), strict=False):
            points = [
                (end, loss) for end, loss in zip(edges[1:], cell["losses"][name], strict=True) if loss is not None
            ]
            label = label.format(**{**cell, **cell["given"]})
            panel.plot(*zip(*points, strict=True), "o-", color=colour, label=label, markersize=3, linewidth=1.4)
        panel.set_xscale("log", base=2)
        panel.set_xticks(edges[1:], [f"{n:,}" for n in edges[1:]], fontsize=8)
        panel.set_xlabel("position in the document, up to")
        panel.set_ylabel("loss (nats per token)")
        _grid(panel)
        panel.legend(fontsize=7, frameon=False)
        written.append(_save(figure, folder / "loss.png"))
    return written


def _grid(panel: Any) -> None:
    panel.grid(alpha=0.3, linewidth=0.6)
    panel.spines[["top", "right"]].set_visible(False)


def _save(figure: Figure, path: Path) -> str:
    figure.savefig(path, dpi=150, metadata={"Software": None})
    return path.name
