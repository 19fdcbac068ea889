"""Figures of the claims, each drawn from the record alone and left out where the record lacks what it shows."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, PercentFormatter

from benchmarks.claims.evidence import NotMeasuredError, Number, Study
from benchmarks.claims.stages import sizes_of
from training.records.figures import COLOURS

Record = dict[str, Any]

ENCODERS = {
    "probe_ae_16": "autoencoder, mixer",
    "probe_ae_transformer_16": "autoencoder, transformer",
    "probe_copy_trainable_16": "memory model, copying",
    "probe_combined_16": "memory model, combined",
    "probe_memory_16": "memory model, next tokens",
    "probe_oracle_token_16_16": "oracle's encoder",
    "probe_retrieval_ae_16": "autoencoder, then retrieval",
    "probe_retrieval_clm_mixer_16": "causal mixer, then retrieval",
    "probe_clm_mixer_16": "causal mixer",
    "probe_decoder_16": "causal transformer",
    "probe_untrained_16": "untrained mixer",
    "probe_untrained_transformer_16": "untrained transformer",
    "probe_ae_16_shuffled": "another text's vector",
}
HIGHLIGHTED = ("probe_ae_16", "probe_ae_transformer_16")
CONTROLS = ("probe_untrained_16", "probe_untrained_transformer_16", "probe_ae_16_shuffled")
LENGTHS = (16, 32, 64)
BY_LENGTH = {
    "ae": "autoencoder",
    "clm_mixer": "causal mixer",
    "decoder": "causal transformer",
    "untrained": "untrained mixer",
}
COPIES = {
    "copy_trainable": ("copy", "trainable encoder, copy"),
    "copy_direct": ("copy", "frozen autoencoder, copy"),
    "blank_only": ("blank_copy", "frozen autoencoder, blank copy"),
    "curriculum": ("copy", "frozen autoencoder, blank copy, then copy"),
    "blank_transformer": ("blank_copy", "frozen transformer autoencoder, blank copy"),
    "blank_clm": ("blank_copy", "frozen causal mixer, blank copy"),
    "curriculum_clm": ("copy", "frozen causal mixer, blank copy, then copy"),
    "blank_untrained": ("blank_copy", "frozen untrained mixer, blank copy"),
}
FIRST_HALVES = {"curriculum": "curriculum_blank", "curriculum_clm": "curriculum_clm_blank"}
READERS = {
    "stage_no_memory.clm.memory": "no memory",
    "stage_memory.clm.memory": "memory",
    "recurrent_100.all": "recurrent memory",
    "stage_full_context.clm.memory": "full context",
}
WINDOW = 16


def draw_claims(record: Record, folder: Path) -> list[str]:
    """Draw what the record allows; returns the names of the files."""
    return [name for figure in FIGURES for name in draw_one(figure, record, folder)]


def draw_one(name: str, record: Record, folder: Path) -> list[str]:
    """Draw one figure into `folder`, or nothing."""
    try:
        figure = FIGURES[name](Study(record))
    except NotMeasuredError:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"{name}.png", dpi=150, metadata={"Software": None})
    return [f"{name}.png"]


def is_drawn(name: str, record: Record) -> bool:
    """Whether the record holds what a figure shows."""
    try:
        FIGURES[name](Study(record))
    except NotMeasuredError:
        return False
    return True


def information(study: Study) -> Figure:
    """Tokens written back by encoder, with factors over the causal LM, and by length."""
    found = dict(_measured(study, ENCODERS))
    base = study.number("probe_clm_mixer_16", "accuracy")
    study.number("probe_ae_16", "accuracy")  # without it there is nothing to compare
    figure, (bars, lines) = _panels((10, 4.2), (1.25, 1))
    labels = sorted(found, key=lambda path: found[path].value)
    for row, path in enumerate(labels):
        number = found[path]
        _bar(bars, row, number, COLOURS[0] if path in HIGHLIGHTED else "grey" if path in CONTROLS else COLOURS[5])
        factor = "" if path == "probe_clm_mixer_16" else f", {number.value / base.value:.1f} × causal mixer"
        bars.text(number.high + 0.015, row, f"{100 * number.value:.1f} %{factor}", va="center", fontsize=7)
    bars.set_yticks(range(len(labels)), [ENCODERS[path] for path in labels], fontsize=8)
    bars.set_xlim(0, 1.38)
    bars.set_xticks([0, 0.25, 0.5, 0.75, 1])
    bars.set_title("16 tokens in one vector of 128 numbers", fontsize=10)
    bars.set_xlabel("tokens written back, test text")
    _grid(bars, PercentFormatter(1.0), "x")
    for colour, (encoder, label) in zip(COLOURS, BY_LENGTH.items(), strict=False):
        paths = {length: f"probe_{encoder}_{length}" for length in LENGTHS}
        if encoder == "ae":
            paths |= {length: f"probe_ae_{length}_{length}" for length in LENGTHS[1:]}
        _curve(lines, {x: number for x, number in _at(study, paths)}, colour, label)
    _curve(
        lines,
        dict(_at(study, {16: "probe_oracle_token_16_16", 64: "probe_oracle_token_64"})),
        COLOURS[4],
        "oracle's encoder",
    )
    lines.set_xscale("log", base=2)
    lines.set_xticks(LENGTHS, [str(length) for length in LENGTHS])
    lines.set_xlim(14, 73)
    lines.set_ylim(0, 1.02)
    lines.set_xlabel("tokens in one vector of 128 numbers")
    lines.set_title("by length of the text", fontsize=10)
    lines.legend(fontsize=8, frameon=False)
    _grid(lines, PercentFormatter(1.0), "y")
    return figure


def fidelity(study: Study) -> Figure:
    """Token accuracy of autoencoders by tokens per vector, and by numbers per token reached in three ways."""
    stages = ("ae", "ae_32", "ae_64", "ae_64_width_256", "ae_64_width_384", "ae_64_two_vectors", "ae_64_four_vectors")
    paths = {f"stage_{name}.retention.memory": name for name in stages}
    numbers = {paths[path]: number for path, number in _measured(study, paths)}
    sizes = {name: sizes_of(study.stage(name)["model"]) for name in numbers}
    if not {"ae", "ae_64"} <= numbers.keys():
        raise NotMeasuredError("autoencoders of 16 and of 64 tokens")
    figure, (left, right) = _panels((9, 3.8), (1, 1))
    shorter = ("ae_64", "ae_32", "ae")
    _curve(
        left,
        {sizes[n]["tokens_per_vector"]: numbers[n] for n in shorter if n in numbers},
        COLOURS[0],
        "this study, 128 numbers, 400 steps",
    )
    try:
        runs = study.other("fidelity_curve")["runs"].values()
        curve = {run["chunk_length"]: _accuracy(run["conditions"]["memory"]) for run in runs}
        width = next(iter(runs))["width"]
        _curve(left, dict(sorted(curve.items())), COLOURS[1], f"quickstart's, {width} numbers")
    except NotMeasuredError:
        pass
    ticks = (4, 8, 16, 32, 64)
    left.set_xscale("log", base=2)
    left.set_xticks(ticks, [str(tick) for tick in ticks])
    left.set_xlabel("tokens in one vector")
    ways = {
        "shorter texts in one vector of 128 numbers": shorter,
        "a wider vector for 64 tokens": ("ae_64", "ae_64_width_256", "ae_64_width_384"),
        "more vectors of 128 numbers for 64 tokens": ("ae_64", "ae_64_two_vectors", "ae_64_four_vectors"),
    }
    for colour, (label, names) in zip(COLOURS, ways.items(), strict=False):
        _curve(
            right,
            {sizes[name]["numbers_per_token"]: numbers[name] for name in names if name in numbers},
            colour,
            label,
        )
    right.set_xlabel("numbers for each token")
    for panel in (left, right):
        panel.set_ylim(0, 1.02)
        panel.legend(fontsize=8, frameon=False)
        _grid(panel, PercentFormatter(1.0), "y")
    left.set_ylabel("tokens written back, test text")
    return figure


def copying(study: Study) -> Figure:
    """Copied tokens while training, and at the end beside another text's memories and none."""
    found = {name: entry for name, entry in COPIES.items() if _has(study, f"stage_{name}")}
    for needed in ("copy_trainable", "copy_direct", "blank_only", "curriculum"):
        study.part(f"stage_{needed}")
    figure, (curves, bars) = _panels((11, 4.4), (1, 1.15))
    for colour, (name, (suite, label)) in zip(COLOURS * 2, found.items(), strict=False):
        points = list(_learning_curve(study, name, suite))
        style = "--" if name.startswith(("blank_clm", "curriculum_clm", "blank_untrained")) else "-"
        curves.plot(*zip(*points, strict=True), style, color=colour, label=label, linewidth=1.4)
    curves.set_xlabel("step of training (32 rows of 32 tokens, 2 vectors)")
    curves.set_ylabel("tokens copied, training text")
    curves.set_ylim(0, 1.02)
    curves.legend(fontsize=7, frameon=False, loc="upper left")
    _grid(curves, PercentFormatter(1.0), "y")
    conditions = {"memory": "own memories", "wrong_memory": "another text's", "no_memory": "none"}
    for offset, (condition, label) in enumerate(conditions.items()):
        for row, (name, (suite, _)) in enumerate(reversed(found.items())):
            number = study.number(f"stage_{name}.{suite}.{condition}", "accuracy")
            height = row + 0.26 * (1 - offset)
            _bar(bars, height, number, COLOURS[offset], height=0.24, label=label if row == 0 else None)
    bars.set_yticks(range(len(found)), [label for _, label in reversed(found.values())], fontsize=7)
    bars.set_xlim(0, 1.02)
    bars.set_xlabel("tokens copied, test text")
    bars.legend(fontsize=8, frameon=False, loc="lower right")
    _grid(bars, PercentFormatter(1.0), "x")
    return figure


def by_position(study: Study) -> Figure:
    """Next-token loss by window and by place in the window."""
    losses = {label: study.part(path)["loss_by_position"] for path, label in READERS.items() if _has(study, path)}
    if len(losses) < len(READERS) - 1 or "memory" not in losses:
        raise NotMeasuredError("readers")
    figure, (left, right) = _panels((9.5, 3.8), (1, 1))
    for colour, (label, values) in zip(COLOURS, losses.items(), strict=False):
        windows = [values[start : start + WINDOW] for start in range(0, len(values), WINDOW)]
        left.plot(range(1, len(windows) + 1), [sum(w) / len(w) for w in windows], "o-", color=colour, label=label,
                  markersize=4, linewidth=1.4)  # fmt: skip
        whole = [window for window in windows[1:] if len(window) == WINDOW]
        places = [sum(window[i] for window in whole) / len(whole) for i in range(WINDOW)]
        right.plot(range(1, WINDOW + 1), places, "o-", color=colour, label=label, markersize=3, linewidth=1.4)
    left.set_xlabel(f"window of {WINDOW} tokens")
    left.set_ylabel("loss of the next token (nats)")
    right.set_xlabel("tokens of the window read so far, windows behind the first")
    left.legend(fontsize=8, frameon=False)
    for panel in (left, right):
        _grid(panel, None, "y")
    return figure


def other_text(study: Study) -> Figure:
    """Loss of all autoencoders on other text, and tokens right by kind of text."""
    cells = study.record["metrics"]["cells"]
    trained = {
        name: cell["metrics"]["retention"]
        for name, cell in cells.items()
        if name.startswith("stage_") and "retention" in cell["metrics"] and cell["steps"] > 1
    }
    if len(trained) < 2:
        raise NotMeasuredError("autoencoders")
    figure, (left, right) = _panels((10, 4), (1, 1.1))
    books = [found["memory"]["loss"] for found in trained.values()]
    for colour, condition, label in ((COLOURS[0], "news", "news"), (COLOURS[1], "random", "random tokens")):
        left.scatter(books, [found[condition]["loss"] for found in trained.values()], s=18, color=colour, label=label)
    untrained = math.log(study.vocab_size) + 0.5
    left.axhline(untrained, color="grey", linestyle="--", linewidth=1)
    left.text(max(books), untrained * 1.04, "untrained", fontsize=7, color="grey", ha="right")
    left.loglog()
    for axis in (left.xaxis, left.yaxis):
        axis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(NullFormatter())
    left.set_xlabel("loss on books (nats), one point an autoencoder")
    left.set_ylabel("loss on other text (nats)")
    left.legend(fontsize=8, frameon=False)
    _grid(left, None, "both")
    shown = {f"stage_{name}.retention": name for name in ("ae", "ae_transformer", "ae_32", "ae_64")
             if _has(study, f"stage_{name}.retention")}  # fmt: skip
    kinds = (("memory", "books"), ("news", "news"), ("random", "random tokens"))
    for offset, (condition, label) in enumerate(kinds):
        for row, path in enumerate(reversed(shown)):
            height = row + 0.26 * (1 - offset)
            number = study.number(f"{path}.{condition}", "accuracy")
            _bar(right, height, number, COLOURS[(2, 0, 1)[offset]], height=0.24, label=label if row == 0 else None)
    names = [f"`{name}`".replace("`", "") for name in reversed(shown.values())]
    if _has(study, "random_tokens.random") and _has(study, "random_tokens.text"):
        names.append("ae, trained on random tokens")
        for offset, condition in ((0, "text"), (2, "random")):
            number = study.number(f"random_tokens.{condition}", "accuracy")
            _bar(right, len(names) - 1 + 0.26 * (1 - offset), number, COLOURS[(2, 0, 1)[offset]], height=0.24)
    right.set_yticks(range(len(names)), names, fontsize=8)
    right.set_xlim(0, 1.02)
    right.set_xlabel("tokens written back")
    right.legend(fontsize=8, frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=3)
    _grid(right, PercentFormatter(1.0), "x")
    return figure


FIGURES: dict[str, Callable[[Study], Figure]] = {
    "information": information,
    "fidelity": fidelity,
    "copying": copying,
    "by_position": by_position,
    "other_text": other_text,
}


def _panels(size: tuple[float, float], widths: Sequence[float]) -> tuple[Figure, Any]:
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(1, len(widths), width_ratios=widths)


def _has(study: Study, path: str) -> bool:
    try:
        study.part(path)
    except NotMeasuredError:
        return False
    return True


def _measured(study: Study, paths: Iterable[str]) -> Iterator[tuple[str, Number]]:
    for path in paths:
        if _has(study, path):
            yield path, study.number(path, "accuracy")


def _at(study: Study, paths: dict[int, str]) -> Iterator[tuple[int, Number]]:
    for place, path in paths.items():
        if _has(study, path):
            yield place, study.number(path, "accuracy")


def _accuracy(metrics: Record) -> Number:
    low, high = metrics["token_accuracy_interval"]
    return Number(metrics["token_accuracy"], low, high, "accuracy")


def _learning_curve(study: Study, name: str, suite: str) -> Iterator[tuple[int, float]]:
    """Steps and token accuracies, those of a curriculum's first half before its own."""
    start = 0
    first = FIRST_HALVES.get(name)
    if first is not None:
        stage = study.stage(first)
        yield from ((step, right) for step, _, right in stage["curves"]["blank_copy"])
        start = stage["steps"]
    yield from ((start + step, right) for step, _, right in study.stage(name)["curves"][suite])


def _curve(panel: Any, points: dict[Any, Number], colour: str, label: str) -> None:
    if not points:
        return
    places = sorted(points)
    values = [points[place] for place in places]
    errors = [[max(0.0, n.value - n.low) for n in values], [max(0.0, n.high - n.value) for n in values]]
    panel.errorbar(places, [n.value for n in values], yerr=errors, fmt="o-", color=colour, label=label, markersize=4,
                   capsize=2, linewidth=1.4)  # fmt: skip


def _bar(panel: Any, row: float, number: Number, colour: str, height: float = 0.7, label: str | None = None) -> None:
    errors = [[max(0.0, number.value - number.low)], [max(0.0, number.high - number.value)]]
    panel.barh(
        row, number.value, height, color=colour, xerr=errors, error_kw={"linewidth": 0.8, "capsize": 2}, label=label
    )


def _grid(panel: Any, percent: PercentFormatter | None, axis: str) -> None:
    panel.grid(alpha=0.3, linewidth=0.6, axis=axis)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
    if percent is not None:
        (panel.xaxis if axis == "x" else panel.yaxis).set_major_formatter(percent)
