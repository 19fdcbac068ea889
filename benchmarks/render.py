"""Tables and figures from records: what README and docs show is what `benchmarks/results/*.json` say.

```bash
python -m benchmarks.render            # rewrite tables between markers, draw figures into docs/figures
python -m benchmarks.render --check    # exit status 1 if a page or figure differs from the records
```

A page asks for a table by two lines, `<!-- table:NAME -->` and `<!-- end -->`; what stands between them is replaced.
`TABLES` lists the names. Each table is one function from its record to lines; the record `benchmarks/results/X.json`
has the same form as the file that the benchmark, or `python -m training.run`, wrote.
"""

import argparse
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from benchmarks.claims.figures import draw_claims
from benchmarks.claims.report import fault_lines, headline_lines, overview_lines, scale_lines, statement_lines
from benchmarks.fidelity_curve import draw_fidelity_curve, fidelity_curve_lines
from benchmarks.instruments import capacity_lines, ceiling_lines, fidelity_lines, probe_lines, retrieval_lines
from benchmarks.measure import duration
from benchmarks.merging import merging_lines
from benchmarks.pairs import decoder_sizes_lines, pairs_lines
from benchmarks.rolling_tables import (
    draw_rolling,
    first_token_lines,
    folding_lines,
    generation_lines,
    goal_lines,
    quality_lines,
    reading_lines,
)
from benchmarks.starters import starters_lines
from training.figures import COLOURS, write_ceiling_figure, write_figures, write_probe_figure
from training.record import fingerprint, read_json
from training.sample import sample_lines
from training.strict_yaml import REPOSITORY, nearest

Record = dict[str, Any]

PAGES = ("README.md", "docs/*.md", "benchmarks/README.md", "configuration/README.md")
BLOCK = re.compile(
    # No second opening inside: a block that was left open must not swallow the next one.
    r"^<!-- table:(?P<name>[\w-]+) -->\n(?P<body>(?:(?!^<!-- table:).)*?)^<!-- end -->$",
    re.MULTILINE | re.DOTALL,
)
OPENING = re.compile(r"^<!-- table:([\w-]+) -->$", re.MULTILINE)
STAMP = "record"

MINUTE, GIBIBYTE = 60, 2**30


@dataclass(frozen=True)
class Row:
    """A figure of a record beside its goal."""

    figure: str
    goal: str
    reached: str
    met: bool = True


def quickstart_rows(record: Record) -> list[Row]:
    """The main job's figures and what they must reach: the one place that maps the record to the table."""
    autoencoder = pick(record, "metrics.autoencoder.memory")
    blank, copy, clm = (pick(record, f"metrics.{suite}") for suite in ("blank_copy", "copy", "clm"))
    stage = recipe_stage(record, pick(record, "recipe.evaluation.autoencoder"))
    chunk_length = pick(stage, "model.chunk_length")
    tokens_per_memory = chunk_length / stage["model"].get("memories_per_chunk", 1)
    num_chunks = pick(blank, "memory.num_tokens") / pick(blank, "memory.num_rows") / chunk_length
    seconds = sum(pick(record, "times").values())
    peak = max(pick(record, "peak_memory_bytes.process"), pick(record, "peak_memory_bytes.largest_child"))
    wrong, none = (pick(blank, f"{name}.token_accuracy") for name in ("wrong_memory", "no_memory"))
    loss, without, full = (pick(clm, f"{name}.loss") for name in ("memory", "no_memory_model", "full_context_model"))
    share = clm.get("share_of_gap_recovered")
    recovered = "no gap to recover" if share is None else f"{share:.0%} of the gap recovered"
    rows = [
        Row(
            "whole run, package download not counted", "20 min", f"{seconds / MINUTE:.1f} min", seconds <= 20 * MINUTE
        ),
        Row(
            f"autoencoder, token accuracy, one vector per {tokens_per_memory:g} tokens",
            "99 %",
            percent(autoencoder),
            autoencoder["token_accuracy"] >= 0.99 and tokens_per_memory >= 16,
        ),
        Row(
            f"blank copy of {num_chunks:g} chunks through frozen memories, token accuracy",
            "95 %",
            percent(pick(blank, "memory")),
            pick(blank, "memory.token_accuracy") >= 0.95 and num_chunks >= 2,
        ),
        Row(
            "the same with another text's memories, and with none",
            "under 25 %",
            f"{wrong:.1%}, {none:.1%}",
            max(wrong, none) < 0.25,
        ),
        Row(
            "copy, token accuracy", "98 %", percent(pick(copy, "memory")), pick(copy, "memory.token_accuracy") >= 0.98
        ),
    ]
    if "exact_match" in copy["memory"]:
        exact, count = copy["memory"]["exact_match"], copy["memory"]["num_generated_rows"]
        rows.append(Row("copy written freely, rows without an error", "reported", f"{exact:.0%} of {count}"))
    rows += [
        Row(
            "causal loss with memory (nats per token)",
            "under no memory",
            f"{loss:.3f}; no memory {without:.3f}, full context {full:.3f}: {recovered}",
            loss < without,
        ),
        Row("peak memory of a process", "4 GiB", f"{peak / GIBIBYTE:.1f} GiB", peak <= 4 * GIBIBYTE),
    ]
    return rows


def quickstart_table(record: Record, link: str) -> list[str]:
    """Figure, goal, and what was reached, linked to the record."""
    lines = ["| figure | must reach | reached |", "|---|---|---|"]
    for row in quickstart_rows(record):
        missed = "" if row.met else " (missed)"
        lines.append(f"| {row.figure} | {row.goal} | [{row.reached}]({link}){missed} |")
    return [*lines, "", source_line(record, link)]


def quickstart_stages_table(record: Record, link: str) -> list[str]:
    """Time by part of the run, and how much text each stage read."""
    lines = ["| part | seconds | steps | tokens of text | tokens per second |", "|---|---:|---:|---:|---:|"]
    times = pick(record, "times")
    for part, seconds in times.items():
        stage = pick(record, "stages").get(part.removeprefix("stage ")) if part.startswith("stage ") else None
        counts = (
            ["", "", ""]
            if stage is None
            else [f"{stage['steps']:,}", f"{stage['text_tokens']:,}", f"{stage['text_tokens_per_second']:,.0f}"]
        )
        lines.append(f"| {part.replace('_', ' ')} | {seconds:.0f} | {' | '.join(counts)} |")
    lines.append(f"| **all** | **{sum(times.values()):.0f}** |  |  |  |")
    return [*lines, "", source_line(record, link)]


def speed_table(record: Record, link: str) -> list[str]:
    """Plain loop against batched model, then the cost by number of windows."""
    metrics = pick(record, "metrics")
    encode, train, generate = (pick(metrics, name) for name in ("encode", "train_step", "generate"))
    what = {
        "encode": "encode {contexts} contexts of {chunks} chunks of {chunk_length} tokens".format(**encode["given"]),
        "train_step": "training step, {texts} texts of {tokens} tokens in {windows} windows".format(**train["given"]),
        "generate": ("write {new_tokens} tokens behind {prompt_tokens}; roll-overs on the way: {roll_overs}").format(
            **generate["given"]
        ),
    }
    lines = ["| float32 | plain loop | batched | ratio (quartiles) |", "|---|---:|---:|---:|"]
    for name, text in what.items():
        spreads, ratio = metrics[name]["spread"], metrics[name]["ratio"]
        lines.append(
            f"| {text} | {duration(spreads['plain']['median'])} | {duration(spreads['fast']['median'])} | "
            f"[{ratio['median']:.1f}]({link}) ({ratio['first_quartile']:.1f} to {ratio['third_quartile']:.1f}) |"
        )
    windows = pick(metrics, "scaling.given.windows")
    goal = pick(metrics, "scaling.target_exponent")
    lines += [
        "",
        f"| one text of so many windows of {metrics['scaling']['given']['window_length']} tokens | "
        + " | ".join(map(str, windows))
        + " | exponent | R² |",
        "|---|" + "---:|" * (len(windows) + 2),
    ]
    for key in ("scaling", "scaling_short_chunks"):
        for name, text in (("train_step", "training step"), ("read", "reading")):
            result = pick(metrics, f"{key}.{name}")
            tokens = metrics[key]["given"]["chunk_length"] // metrics[key]["given"]["memories_per_chunk"]
            times = [duration(result["spread"][str(n)]["median"]) for n in windows]
            exponent = f"[{result['fit']['exponent']:.3f}]({link})"
            if key == "scaling":
                exponent += f" (at most {goal}{'' if result['fit']['exponent'] <= goal else ': missed'})"
            lines.append(
                f"| {text}, {tokens} tokens per memory | {' | '.join(times)} | {exponent} | "
                f"{result['fit']['r_squared']:.3f} |"
            )
    peak = pick(record, "peak_memory_bytes.process") / GIBIBYTE
    note = f"Medians of {record['repetitions']} rounds, timed in turn; peak memory {peak:.1f} GiB. "
    return [*lines, "", note + source_line(record, link)]


def time_to_accuracy_table(record: Record, link: str) -> list[str]:
    """Recipe against baseline: steps, time and accuracy of each, and the ratio of the times."""
    metrics, given = pick(record, "metrics"), pick(record, "given")
    names = {
        "baseline": "float32, AdamW at {learning_rate:g}, plain loop".format(**given["baseline"]),
        "recipe": f"recipe {given['recipe']} as shipped",
    }
    lines = ["| | steps | seconds | seconds per step | token accuracy |", "|---|---:|---:|---:|---:|"]
    for side, text in names.items():
        result = pick(metrics, side)
        lines.append(
            f"| {text} | {result['steps']:,} | {result['seconds']:.0f} | "
            f"{duration(result['seconds'] / result['steps'])} | {result['token_accuracy']:.1%} |"
        )
    bound = "More than " if metrics["is_lower_bound"] else ""
    missed = "" if metrics["ratio"] >= 10 else " (missed: at least 10)"
    sentence = (
        f"{bound}[{metrics['ratio']:.1f} times]({link}) faster{missed} to {record['target']:.0%} of the validation "
        f"tokens, {given['tokens_per_memory']:g} tokens per vector. "
    )
    return [*lines, "", sentence + source_line(record, link)]


def quickstart_sample_table(record: Record, link: str) -> list[str]:
    """A text, its memories, and what the decoder regenerates from them, wrong tokens in brackets."""
    return ["```text", *sample_lines(pick(record, "sample")), "```", "", source_line(record, link)]


def use_table(record: Record, link: str) -> list[str]:
    """What the snippet printed."""
    return ["```text", *pick(record, "output").rstrip("\n").splitlines(), "```", "", source_line(record, link)]


def kills_table(record: Record, link: str) -> list[str]:
    """What a run was doing when it was killed, how often, and what that cost."""
    metrics = pick(record, "metrics")
    lines = ["| killed while | times |", "|---|---:|"]
    lines += [f"| {moment} | {count} |" for moment, count in metrics["moments"].items()]
    equal = "equal bit by bit" if metrics["weights_equal"] else "NOT equal"
    sentence = (
        f"[{metrics['kills']} kills]({link}) with SIGKILL at random moments of {metrics['runs']} runs; final weights "
        f"of all stages {equal}; at most {metrics['most_steps_lost']} steps done again, with a checkpoint every "
        f"{metrics['steps_between_checkpoints']}. "
    )
    return [*lines, "", sentence + source_line(record, link)]


def switches_table(record: Record, link: str) -> list[str]:
    """Speed of a training step by switch, and peak memory of the loss."""
    lines = [
        "| training step, float32 unless said | tokens per second | times as fast (quartiles) |",
        "|---|---:|---:|",
    ]

    def add(part: str, names: list[str], ratios: list[Record]) -> None:
        speeds = pick(record, f"metrics.{part}.tokens_per_second")
        for name, ratio in zip(names, ratios, strict=True):
            quartiles = f"{ratio['first_quartile']:.2f} to {ratio['third_quartile']:.2f}"
            lines.append(f"| {name} | {speeds[name]:,.0f} | [{ratio['median']:.2f}]({link}) ({quartiles}) |")

    compiled = record["metrics"].get("compile")
    for part in ("steps", "compile") if compiled else ("steps",):
        ratios = pick(record, f"metrics.{part}.times_as_fast")
        names = [name for name in ratios if name != "plain" or part == "steps"]  # the compiled ones' own plain is near
        add(part, names, [ratios[name] for name in names])
    for part, name in (("lengths", "rows grouped by length"), ("processes", "2 processes")):
        add(part, [name], [pick(record, f"metrics.{part}.times_as_fast")])
    lengths, memory = pick(record, "metrics.lengths"), pick(record, "metrics.loss_memory")
    before, after = lengths["padding"].values()
    compiling = "`compile` was not measured"
    if compiled:
        compiling = f"compiled, the first step took {compiled['seconds_of_first_step']['compiled']:.0f} s"
    whole, chunked = (memory[name]["bytes"] / 2**20 for name in ("whole", "chunked"))
    sentence = (
        f"Each against the plain step of the same rows, timed in turn on a machine with other work; {compiling}. Rows "
        f"grouped by length: a pass over {lengths['rows']} documents of the shipped text, against steps of any "
        f"length; [{after:.1%}]({link}) of the columns are padding instead of {before:.1%}. 2 processes share the "
        f"rows of one, a core each of {pick(record, 'metrics.processes.cores')}. The loss of {memory['tokens']:,} "
        f"tokens over a vocabulary of {memory['vocab_size']:,}, both ways: [{whole:,.0f} MiB]({link}) with all "
        f"logits, [{chunked:,.0f} MiB]({link}) with those of {memory['chunk']} tokens at a time. "
    )
    return [*lines, "", sentence + source_line(record, link)]


@dataclass(frozen=True)
class Table:
    """A table: the record it is made from, the function that makes it, the command that writes the record."""

    record: str
    lines: Callable[[Record, str], list[str]]
    command: str


def _sourced(lines: Callable[[Record, str], list[str]]) -> Callable[[Record, str], list[str]]:
    """Let a table end with where its numbers come from."""

    def with_source(record: Record, link: str) -> list[str]:
        *before, last = lines(record, link)
        return [*before, f"{last} {source_line(record, link)}"]

    return with_source


def _with_source_below(lines: Callable[[Record, str], list[str]]) -> Callable[[Record, str], list[str]]:
    """Let a table be followed by where its numbers come from."""
    return lambda record, link: [*lines(record, link), "", source_line(record, link)]


_CLAIMS = "python -m benchmarks.claims runs/claims"
_ROLLING = "python -m benchmarks.rolling --threads 2"
_QUICKSTART = "python -m training.run configuration/recipes/quickstart.yaml"
TABLES = {
    "quickstart": Table("quickstart", quickstart_table, _QUICKSTART),
    "quickstart_stages": Table("quickstart", quickstart_stages_table, _QUICKSTART),
    "quickstart_sample": Table("quickstart", quickstart_sample_table, _QUICKSTART),
    "use": Table("use", use_table, "python -m benchmarks.snippet use"),
    "kills": Table("kills", kills_table, "python -m benchmarks.kills"),
    "switches": Table("switches", switches_table, "python -m benchmarks.switches"),
    "speed": Table("speed", speed_table, "python -m benchmarks.speed"),
    "time_to_accuracy": Table("time_to_accuracy", time_to_accuracy_table, "python -m benchmarks.time_to_accuracy"),
    "probe": Table("probe", _sourced(probe_lines), "python -m training.probe"),
    "ceiling": Table("ceiling", _sourced(ceiling_lines), "python -m training.ceiling runs/quickstart/hub"),
    "pairs": Table("pairs", _sourced(pairs_lines), "python -m benchmarks.pairs"),
    "decoder_sizes": Table("decoder_sizes", _sourced(decoder_sizes_lines), "python -m benchmarks.pairs"),
    "capacity": Table("capacity", _sourced(capacity_lines), "python -m training.ceiling"),
    "retrieval": Table("retrieval", _sourced(retrieval_lines), "python -m training.retrieval"),
    "fidelity": Table("fidelity", _sourced(fidelity_lines), "python -m training.evaluate runs/quickstart/hub"),
    "fidelity_curve": Table("fidelity_curve", _sourced(fidelity_curve_lines), "python -m benchmarks.fidelity_curve"),
    "starters": Table("starters", _sourced(starters_lines), "python -m benchmarks.starters"),
    "claims_headline": Table("claims", headline_lines, _CLAIMS),
    "claims_scale": Table("claims", _sourced(scale_lines), _CLAIMS),
    "claims_overview": Table("claims", _sourced(overview_lines), _CLAIMS),
    "claims_statements": Table("claims", statement_lines, _CLAIMS),
    "claims_faults": Table("claims", fault_lines, _CLAIMS),
    "merging": Table("merging", _with_source_below(merging_lines), "python -m benchmarks.merging"),
    "rolling": Table("rolling", _with_source_below(goal_lines), _ROLLING),
    "rolling_first_token": Table("rolling", _with_source_below(first_token_lines), _ROLLING),
    "rolling_generation": Table("rolling", _with_source_below(generation_lines), _ROLLING),
    "rolling_folding": Table("rolling", _with_source_below(folding_lines), _ROLLING),
    "rolling_reading": Table("rolling", _with_source_below(reading_lines), _ROLLING),
    "rolling_quality": Table("rolling", _with_source_below(quality_lines), _ROLLING),
}


def pick(record: Record, path: str) -> Any:
    """Return the value at a dotted path.

    Raises:
        ValueError: If the record has no such key.

    >>> pick({"a": {"b": 1}}, "a.b")
    1
    """
    value: Any = record
    for key in path.split("."):
        if not isinstance(value, dict) or key not in value:
            raise ValueError(
                f"the record has no {path} (no {key!r}); it was written by another version: measure again"
            )
        value = value[key]
    return value


def recipe_stage(record: Record, name: str) -> Record:
    """Return a stage of the record's recipe."""
    stages = [stage for stage in pick(record, "recipe.stages") if stage["name"] == name]
    if not stages:
        raise ValueError(f"the record's recipe has no stage {name!r}")
    return stages[0]


def percent(condition: Record) -> str:
    """Token accuracy with its 95 % interval.

    >>> percent({"token_accuracy": 0.987, "token_accuracy_interval": [0.98, 0.992]})
    '98.7% (98.0 to 99.2)'
    """
    low, high = condition["token_accuracy_interval"]
    return f"{condition['token_accuracy']:.1%} ({100 * low:.1f} to {100 * high:.1f})"


def source_line(record: Record, link: str) -> str:
    """Say where the numbers of a table come from."""
    commit, hardware = record["code"]["commit"], record["hardware"]
    code = f"commit {commit[:7]}" if commit else "no commit"
    if record["code"]["dirty"]:
        code += " with changes that are not committed"
    threads = f"{hardware['threads']} thread{'s' if hardware['threads'] != 1 else ''}"
    device = hardware["cpu"] if hardware["device"] == "cpu" else hardware["device"]
    return f"[Record]({link}): {code}, {threads} on {device}, {record['run']['created_at'][:10]}."


def render_page(text: str, page: Path, root: Path) -> str:
    """Fill the tables of a page.

    Args:
        text (`str`): The page.
        page (`Path`): Where it stands: links to records are relative to it.
        root (`Path`): The repository.

    Raises:
        ValueError: If a marker names no table or is not closed, or a record lacks what a table shows.
    """

    def fill(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in TABLES:
            raise ValueError(f"{page.name} asks for table {name!r}{nearest(name, list(TABLES))}; known: {known()}")
        body = "\n".join(table_lines(TABLES[name], page, root))
        return f"<!-- table:{name} -->\n{body}\n<!-- end -->"

    closed = {match.start() for match in BLOCK.finditer(text)}
    for match in OPENING.finditer(text):
        if match.start() not in closed:
            raise ValueError(f"{page.name}: table {match[1]} is not closed; write <!-- end --> on a line of its own")
    return BLOCK.sub(fill, text)


def known() -> str:
    """Names of the tables, for messages."""
    return ", ".join(TABLES)


def table_lines(table: Table, page: Path, root: Path) -> list[str]:
    """Lines of a table, or the command that would write its record."""
    path = root / "benchmarks" / "results" / f"{table.record}.json"
    record = read_json(path)
    if record is None:
        return [f"*Not measured yet: `{table.command}` writes the record.*"]
    try:
        return table.lines(record, Path(os.path.relpath(path, page.parent)).as_posix())
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from error


def find_pages(root: Path) -> Iterator[Path]:
    """Yield the pages that may hold tables."""
    for pattern in PAGES:
        yield from sorted(root.glob(pattern))


def draw_quickstart(record: Record, folder: Path) -> list[str]:
    """Loss, token accuracy and accuracy by position, as the run itself draws them."""
    return write_figures(record, folder)


def draw_speed(record: Record, folder: Path) -> list[str]:
    """Time against number of windows, both axes logarithmic, with the fitted lines."""
    figure = Figure(figsize=(8, 3.6))
    panels = figure.subplots(1, 2, sharex=True)
    for panel, (name, title) in zip(panels, (("train_step", "training step"), ("read", "reading")), strict=True):
        for colour, key in zip(COLOURS, ("scaling", "scaling_short_chunks"), strict=False):
            given, result = pick(record, f"metrics.{key}.given"), pick(record, f"metrics.{key}.{name}")
            windows, fit = given["windows"], result["fit"]
            spreads = [result["spread"][str(n)] for n in windows]
            medians = [values["median"] for values in spreads]
            errors = [
                [values["median"] - values["min"] for values in spreads],
                [values["max"] - values["median"] for values in spreads],
            ]
            tokens = given["chunk_length"] // given["memories_per_chunk"]
            label = f"{tokens} tokens per memory: exponent {fit['exponent']:.2f}"
            panel.errorbar(windows, medians, yerr=errors, fmt="o", color=colour, markersize=4, capsize=2, label=label)
            panel.plot(windows, [fit["factor"] * n ** fit["exponent"] for n in windows], color=colour, linewidth=1.2)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xticks(windows, [str(n) for n in windows])
        panel.set_xlabel(f"windows of {given['window_length']} tokens")
        panel.set_title(title, fontsize=10)
        tidy(panel)
    panels[0].set_ylabel("seconds")
    return save(figure, folder / "scaling.png")


def draw_time_to_accuracy(record: Record, folder: Path) -> list[str]:
    """Validation token accuracy against seconds of training, for recipe and baseline."""
    figure = Figure(figsize=(6, 3.6))
    panel = figure.subplots()
    labels = {"recipe": "recipe as shipped", "baseline": "float32 AdamW, plain loop"}
    for colour, (side, label) in zip(COLOURS, labels.items(), strict=False):
        curve = pick(record, f"metrics.{side}.curve")
        seconds, accuracies = ([point[key] for point in curve] for key in ("seconds", "token_accuracy"))
        panel.plot(seconds, accuracies, "o-", color=colour, label=label, markersize=3, linewidth=1.4)
    panel.axhline(record["target"], color="grey", linestyle="--", linewidth=1)
    panel.set_xscale("log")
    panel.set_xlabel("seconds of training")
    panel.set_ylabel("token accuracy, validation split")
    panel.set_ylim(0, 1.02)
    panel.yaxis.set_major_formatter(PercentFormatter(1.0))
    tidy(panel)
    panel.legend(fontsize=8, frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=2)  # above the dashed line
    return save(figure, folder / "curves.png")


DRAWINGS = {
    "quickstart": draw_quickstart,
    "speed": draw_speed,
    "time_to_accuracy": draw_time_to_accuracy,
    "probe": lambda record, folder: [write_probe_figure(record, folder)],
    "ceiling": lambda record, folder: [write_ceiling_figure(record, folder)],
    "capacity": lambda record, folder: [write_ceiling_figure(record, folder)],
    "fidelity_curve": draw_fidelity_curve,
    "rolling": draw_rolling,
    "claims": draw_claims,
}


def tidy(panel: Any) -> None:
    """Grid, frame and legend as in the figures of a run."""
    panel.grid(alpha=0.3, linewidth=0.6)
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(fontsize=8, frameon=False)


def save(figure: Figure, path: Path) -> list[str]:
    """Write a figure; returns its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(path, dpi=150, metadata={"Software": None})
    return [path.name]


def figure_path(root: Path, record: str, name: str) -> Path:
    """Where a figure of a record stands."""
    return root / "docs" / "figures" / f"{record}_{name}"


def render_figures(root: Path, *, check: bool) -> list[str]:
    """Draw every record's figures that are missing or older than the record; returns their names.

    Each file carries its record's fingerprint, so that whether it is up to date can be told without drawing it again.
    """
    changed = []
    for name, draw in DRAWINGS.items():
        record = read_json(root / "benchmarks" / "results" / f"{name}.json")
        if record is None:
            continue
        stamp = fingerprint(record)
        present = sorted(figure_path(root, name, "x").parent.glob(f"{name}_*.png"))
        if present and all(read_stamp(path) == stamp for path in present):
            continue
        if check:
            changed.append(f"docs/figures/{name}_*.png")
            continue
        with tempfile.TemporaryDirectory() as folder:
            for drawn in draw(record, Path(folder)):
                path = figure_path(root, name, drawn)
                write_stamped(Path(folder) / drawn, path, stamp)
                changed.append(path.relative_to(root).as_posix())
    return changed


def read_stamp(path: Path) -> str | None:
    """Return the fingerprint of the record that a figure was drawn from."""
    with Image.open(path) as image:
        return image.info.get(STAMP)


def write_stamped(drawn: Path, path: Path, stamp: str) -> None:
    """Copy a figure with the fingerprint of its record in it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = PngInfo()
    text.add_text(STAMP, stamp)
    with Image.open(drawn) as image:
        # A palette of 256 colours is a third of the size and looks the same for lines and text.
        image.convert("RGB").quantize(256).save(path, pnginfo=text, optimize=True)


def render(root: Path, *, check: bool = False) -> list[str]:
    """Bring pages and figures up to date, or only find those that are not.

    Args:
        root (`Path`): The repository.
        check (`bool`): Write nothing.

    Returns:
        `list[str]`: Pages and figures that were, or would be, changed.

    Raises:
        ValueError: If a marker or a record is wrong.
    """
    changed = []
    for page in find_pages(root):
        text = page.read_text(encoding="utf-8")
        filled = render_page(text, page, root)
        if filled != text:
            changed.append(page.relative_to(root).as_posix())
            if not check:
                page.write_text(filled, encoding="utf-8")
    return changed + render_figures(root, check=check)


def build_parser() -> argparse.ArgumentParser:
    """Build the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.render",
        description="Fill the tables of README and docs from benchmarks/results/*.json and draw docs/figures.",
        epilog=f"tables: {known()}",
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 if something differs")
    parser.add_argument("--root", default=str(REPOSITORY), help="folder with README.md, docs and benchmarks/results")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns 1 if `--check` found a difference, 2 for a user's mistake."""
    options = build_parser().parse_args(arguments)
    try:
        changed = render(Path(options.root), check=options.check)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name in changed:
        print(f"{name} differs from the records" if options.check else f"{name} written")
    if options.check and changed:
        print("run python -m benchmarks.render", file=sys.stderr)
    return 1 if options.check and changed else 0


if __name__ == "__main__":
    sys.exit(main())
