"""Tables of `scores.json` and `presses.json`: benchmarks in every way of reading."""

from typing import Any

from benchmarks.table import Record, Table, percent, pick

WAYS = {"full": "full text", "memory": "memory", "truncated": "truncated", "none": "none"}
# What others report of the plain decoder, and what the paper's tracker lists of its own models. Of a row: metric here,
# its model card (lighteval, zero-shot), the same harness run by somebody else, the paper's model, and why they differ.
OTHERS: dict[str, tuple[str, str, str, str, str]] = {
    "hellaswag": ("acc_norm", "40.9", "43.0", "27.71", "the harness's prompt; the card's is another"),
    "arc_easy": ("acc", "", "54.1", "44.2", "the harness's prompt"),
    "arc_challenge": (
        "acc_norm",
        "37.3 with ARC-Easy",
        "27.7",
        "",
        "the card has the mean of both sets",
    ),
    "mmlu": ("acc", "29.3 cloze", "", "23.09", "here five examples and letters, where chance is 25"),
    "winogrande": ("acc", "51.3 the base model", "", "", ""),
    "openbookqa": ("acc_norm", "34.6 the base model", "", "", ""),
    "lambada_openai": ("acc", "", "", "18.65", ""),
    "gsm8k": ("exact_match", "1.4", "0.4", "", "not run: up to 256 new tokens an item for a score next to nothing"),
    "ifeval": ("prompt_level_strict_acc", "29.9", "", "25.06", "not run: up to 1,280 new tokens an item"),
    "swde": ("contains", "", "", "0.81", "not run: the official file is not here"),
}


def scores(record: Record) -> Table:
    """A row for each benchmark: its score in every way of reading, and what went through memories."""
    rows = [["task", "metric", "items", *WAYS.values(), "through memories"]]
    for task, result in pick(record, "metrics").items():
        modes = result["modes"]
        counts = modes.get("memory", {}).get("counts")
        share = "" if counts is None else f"{counts['memory_requests'] / max(1, counts['requests']):.0%}"
        known = modes["full"]["scores"]
        for metric in (result["headline"], *(name for name in known if name.isdigit())):
            name = f"{task}, {int(metric):,} tokens" if metric.isdigit() else task
            kind = result["headline"] if metric.isdigit() else metric
            cells = [_score(modes.get(mode), metric) for mode in WAYS]
            rows.append([name, kind, str(known[metric]["num_items"]), *cells, share])
    return Table(
        rows,
        f"The first items of each file, the same in every column; {pick(record, 'recipe.clear')} tokens of a context "
        "stay text. Intervals are of 95% over items. A score is called a memory's only where requests went through "
        f"memories; the last column has the share. {_commits(record)}",
    )


def retention(record: Record) -> Table:
    """Of tasks that the decoder solves with the full text: the share of that score that is left."""
    rows = [["task", *(f"{name} / full text" for name in list(WAYS.values())[1:]), "memory minus truncated, points",
             "memory minus full text, points"]]  # fmt: skip
    for task, result in pick(record, "metrics").items():
        modes, metric = result["modes"], result["headline"]
        if result["solved"] and "memory" in modes:
            shares = [_percent(modes[mode].get("of_full")) if mode in modes else "" for mode in list(WAYS)[1:]]
            minus = modes["memory"].get("minus", {})
            rows.append([task, *shares, *(_points(minus.get(mode), metric) for mode in ("truncated", "full"))])
    if len(rows) == 1:
        return Table(text=["No memory was measured yet on a task that the decoder solves with the full text."])
    return Table(
        rows,
        "Only tasks that the decoder solves with the full text: the whole interval of its score is above chance, or "
        "above 10% where answers are written. Intervals of 95% over paired items.",
    )


def language_kept(record: Record) -> Table:
    """What a memory of another text, in front of the full text, takes from a score."""
    rows = [["task", "full text", "after another text's memories", "difference, points"]]
    for task, result in pick(record, "metrics").items():
        modes, metric = result["modes"], result["headline"]
        if "scores" in modes.get("unrelated", {}):
            cells = [_score(modes[mode], metric) for mode in ("full", "unrelated")]
            rows.append([task, *cells, _points(modes["unrelated"]["minus"].get("full"), metric)])
    if len(rows) == 1:
        return Table(text=["Not measured yet."])
    return Table(rows, "Memories of the first chunk of an item half a file away. Intervals of 95% over paired items.")


def published(record: Record) -> Table:
    """The plain decoder's scores beside those that others report, in percent."""
    rows = [
        [
            "task",
            "metric",
            "items",
            "here, full text",
            "its card",
            "the harness elsewhere",
            "the paper's model",
            "note",
        ]
    ]
    for task, (metric, *others, note) in OTHERS.items():
        found = pick(record, "metrics").get(task, {}).get("modes", {}).get("full", {}).get("scores", {}).get(metric)
        here = "" if found is None else percent({"x": found["value"], "x_interval": found["interval"]}, "x")
        rows.append([task, metric, "" if found is None else str(found["num_items"]), here, *others, note])
    return Table(
        rows,
        "In percent. The card's were made by lighteval, zero-shot; the harness elsewhere is a run of all items. "
        "The weights here are the packaged ones, of four bits, and the paper's models are others.",
    )


def _commits(record: Record) -> str:
    """Name the commits of modes that were measured before the record's own."""
    found = {
        values["code"]["commit"][:7]
        for result in pick(record, "metrics").values()
        for values in result["modes"].values()
        if "code" in values and values["code"]["commit"] and values["code"]["commit"] != record["code"]["commit"]
    }
    return f"Parts were measured at commit {', '.join(sorted(found))}." if found else ""


def _score(values: dict[str, Any] | None, metric: str) -> str:
    if values is None:
        return ""
    if "refused" in values:
        return "refused: no memory is read"
    score = values["scores"][metric]
    if metric.endswith(("perplexity", "per_byte")):
        return f"{score['value']:.3f}"
    if "interval" not in score:
        return f"{score['value']:.1%}"
    return percent({metric: score["value"], f"{metric}_interval": score["interval"]}, metric)


def _percent(share: dict[str, Any] | None) -> str:
    return "" if share is None else percent({"x": share["value"], "x_interval": share["interval"]}, "x", 0)


def _points(differences: dict[str, Any] | None, metric: str) -> str:
    gap = (differences or {}).get(metric)
    if gap is None:
        return ""
    return "{:+.1f} ({:+.1f} to {:+.1f})".format(*(100 * value for value in (gap["value"], *gap["interval"])))


def presses(record: Record) -> Table:
    """What the decoder makes of its own cache after a press, by task."""
    rows = [["task", "what is kept", "score", "CPU seconds to the first token", "kB of cache, also to be stored"]]
    for task, found in pick(record, "metrics").items():
        for name, values in found.items():
            press, _, ratio = name.partition("/")
            kept = press if ratio == "1" else f"{press}, one of {ratio}"
            seconds, size = values["first_token_cpu_seconds"], values["cache_bytes"] / 1000
            rows.append([task, kept, _with_interval(values, task), f"{seconds:.2f}", f"{size:,.0f}"])
    number = pick(record, "recipe.limit")
    return Table(
        rows,
        f"{number} items of a task: F1, share of needles found, and nats of the last 64 tokens of a continuation. "
        "Intervals of 95% over items. The time holds the full prefill, which a press needs first.",
    )


def _with_interval(values: dict[str, Any], task: str) -> str:
    if task == "continuation":
        return "{:.3f} ({:.3f} to {:.3f})".format(values["score"], *values["score_interval"])
    return percent(values, "score")
