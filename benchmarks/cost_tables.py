"""Tables of what things cost: speed, memories at use."""

from benchmarks.table import Record, Table, count, duration, pick, quartiles

MIB = 2**20
PATHS = {
    "stored_16": "stored, 16 tokens a memory",
    "stored_64": "stored, 64 tokens a memory",
    "encode": "encoded first, small encoder",
    "encode_own": "encoded first, encoder as large as the decoder",
}
READINGS = {
    "reading/1024": "1,024 tokens a memory",
    "reading/16": "16 tokens a memory",
    "reading/16_bounded": "16 tokens a memory, the newest {bound} memories only",
}


def speed(record: Record) -> Table:
    """The plain loop against the batched model."""
    metrics = pick(record, "metrics")
    titles = {
        "encode": "encode {contexts} contexts of {chunks} chunks of {chunk_length} tokens",
        "train_step": "training step, {texts} texts of {tokens} tokens in {windows} windows",
        "generate": "generate {new_tokens} tokens after {prompt_tokens}, windows compressed on the way: {roll_overs}",
    }
    rows = [["float32", "plain loop", "batched", "times as fast (quartiles)"]]
    for name, title in titles.items():
        spreads = metrics[name]["spread"]
        times = [duration(spreads[path]["median"]) for path in ("plain", "fast")]
        rows.append([title.format(**metrics[name]["given"]), *times, quartiles(metrics[name]["ratio"])])
    peak = pick(record, "peak_memory_bytes.process") / 2**30
    return Table(rows, f"Medians of {record['repetitions']} rounds, timed in turn; peak memory {peak:.1f} GiB.")


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


def rolling(record: Record) -> Table:
    """What memories save at use: figure, what it must reach, what was reached."""
    targets = record["targets"]
    rows = [["figure", "must reach", "reached"]]
    for shape in measured_shapes(record, "first_token"):
        rows += _first_token_goals(record, shape, targets["tokens"])
    for shape in measured_shapes(record, "generation"):
        cell = by_length(record, "generation", shape).get(targets["tokens"])
        if cell is not None:
            share = cell["cache_share"]["memories"]
            goal = f"1/{1 / targets['cache_share']:.0f}"
            shown = _goal(f"1/{1 / share:.1f}", share <= targets["cache_share"])
            title = record["shapes"][shape]["title"]
            rows.append([f"cache after {targets['tokens']:,} tokens against the full text, {title}", goal, shown])
    for name, title in READINGS.items():
        cell = record["metrics"].get(name)
        if cell is not None:
            exponent, free = cell["fit"]["exponent"], name == "reading/16"
            first, *_, last = cell["given"]["lengths"]
            what = f"cost exponent of reading {first:,} to {last:,} tokens in windows of 1,024, "
            shown = f"{exponent:.2f} by the clock, {cell['cpu_fit']['exponent']:.2f} in CPU time"
            goal = "reported" if free else f"{targets['exponent']}"
            met = free or exponent <= targets["exponent"]
            rows.append([what + title.format(**cell["given"]), goal, _goal(shown, met)])
    return Table(
        rows,
        "Decoders named by a shape have random weights: their times are measured, their texts mean nothing. No figure "
        "here is of a starter, which reads at most 512 tokens of context and gains far less. " + _noise(record),
    )


def _first_token_goals(record: Record, shape: str, tokens: int) -> list[list[str]]:
    about, cells = record["shapes"][shape], by_length(record, "first_token", shape)
    target, cell, rows = about["target_ratio"], cells.get(tokens), []
    if cell is not None:
        clock, cpu = (cell[key]["stored_16"] for key in ("ratio", "cpu_ratio"))
        title = about["title"] + (", one layer's time counted for all" if cell["full_is_scaled_by_layers"] else "")
        goal = "reported" if target is None else f"{target:g} times faster"
        met = target is None or min(clock, cpu) >= target  # the clock may count a quiet moment of one side only
        busy = cell["load_before"] is not None and cell["load_before"] > record["hardware"]["cores"]
        by_clock = "" if busy else f", {clock:.0f} by the clock"
        shown = _goal(f"{cpu:.0f} times in CPU time{by_clock}", met)
        rows.append([f"time to first token, stored memories of {tokens:,} tokens against their text, {title}", goal,
                     shown])  # fmt: skip
    starts = [faster_from(cells, path) for path in ("encode", "encode_own")]
    small, own = (f"from {n:,} tokens on" if n else "at no length measured" for n in starts)
    shown = _goal(f"{small}; {own} with an encoder as large as the decoder", starts[0] is not None)
    return [*rows, [f"the same, memories encoded first, {about['title']}", "faster from some length on", shown]]


def _goal(shown: str, met: bool) -> str:
    return shown if met else f"{shown} (missed)"


def _noise(record: Record, prefix: str = "") -> str:
    """Say how busy the machine was."""
    loads = [cell["load_before"] for name, cell in record["metrics"].items() if name.startswith(prefix)]
    loads = [load for load in loads if load is not None]
    if not loads or max(loads) <= record["hardware"]["cores"]:
        return ""
    return (
        f"Other work ran on the machine (load {min(loads):.0f} to {max(loads):.0f} on {record['hardware']['cores']} "
        "cores), so times by the clock are off by a factor of several: go by CPU time."
    )


def rolling_first_token(record: Record) -> Table:
    """CPU time to the first token of each way, by length; how many times faster than the full text."""
    rows = [["decoder", "tokens of context", "full text", *PATHS.values()]]
    for shape in measured_shapes(record, "first_token"):
        for tokens, cell in by_length(record, "first_token", shape).items():
            cpu, clock = cell["cpu_median"], cell["ratio"]
            shown = [
                f"{duration(cpu[path])} ({cell['cpu_ratio'][path]:.1f}; {clock[path]:.1f})" if path in clock else ""
                for path in PATHS
            ]
            full = duration(cpu["full"]) + ("\\*" if cell["full_is_scaled_by_layers"] else "")
            rows.append([record["shapes"][shape]["title"], f"{tokens:,}", full, *shown])
    return Table(
        rows,
        f"CPU seconds of the process to the logits after a prompt of {record['prompt_tokens']} tokens, cache kept. In "
        "brackets: how many times faster than the full text, in CPU time and by the clock. \\* Not run whole: one to "
        f"three layers were, their time counted for all. "
        f"{_noise(record, 'first_token/')}{missing(record, 'first_token/')}",
    )


def rolling_generation(record: Record) -> Table:
    """Time per token and bytes of the cache, by length."""
    rows = [["decoder", "tokens of context", "full text", "memories", "newest memories only", "cache: full text",
             "memories", "newest only", "share"]]  # fmt: skip
    given: Record = {}
    for shape in measured_shapes(record, "generation"):
        for tokens, cell in by_length(record, "generation", shape).items():
            given, names = cell["given"], ("full", "memories", "bounded")
            times = [duration(cell["cpu_median"][name]) for name in names]
            sizes = [f"{cell['cache_bytes'][name] / MIB:,.1f} MiB" for name in names]
            share = f"1/{1 / cell['cache_share']['memories']:.1f}"
            rows.append([record["shapes"][shape]["title"], f"{tokens:,}", *times, *sizes, share])
    return Table(
        rows,
        f"CPU time, median of {given.get('steps')} tokens generated in turn. 16 tokens a memory; newest only: at most "
        f"{given.get('bound')} memories. Keys and values of the full text are random numbers: only their size counts "
        f"here.{missing(record, 'generation/')}",
    )


def rolling_folding(record: Record) -> Table:
    """CPU time per token of plain text whose full windows are compressed, by length of the text before."""
    rows = [["decoder", "window", "tokens before", "all memories: a token", "one that compresses a window", "mean",
             "newest only: a token", "one that compresses a window", "mean"]]  # fmt: skip
    for shape in measured_shapes(record, "folding"):
        for tokens, cell in by_length(record, "folding", shape).items():
            columns = []
            for name in ("memories", "newest"):
                columns += [duration(cell["cpu_median"][f"{name}_{kind}"]) for kind in ("step", "fold")]
                columns.append(duration(cell["cpu_per_token"][name]))
            rows.append([record["shapes"][shape]["title"], str(cell["window_length"]), f"{tokens:,}", *columns])
    return Table(rows, f"CPU time, medians.{missing(record, 'folding/')}")


def rolling_reading(record: Record) -> Table:
    """CPU time to read a text of n tokens in windows, and the exponent of the cost."""
    cells = {title: record["metrics"][name] for name, title in READINGS.items() if name in record["metrics"]}
    if not cells:
        return Table(note=missing(record, "reading/"))
    lengths = next(iter(cells.values()))["given"]["lengths"]
    rows = [["tokens read in windows of 1,024", *(f"{n:,}" for n in lengths), "exponent", "by the clock"]]
    for title, cell in cells.items():
        times = [duration(cell["cpu_median"][str(n)]) for n in lengths]
        exponents = [f"{cell[fit]['exponent']:.2f}" for fit in ("cpu_fit", "fit")]
        rows.append([title.format(**cell["given"]), *times, *exponents])
    return Table(rows, f"CPU time.{missing(record, 'reading/')}")


def missing(record: Record, prefix: str) -> str:
    """Say how many cells were not measured; one that ran some layers is no loss where the whole was run."""
    whole = set(record["metrics"])
    names = [
        name for name in record["not_measured"] if name.startswith(prefix) and name.removesuffix("/part") not in whole
    ]
    return f" Planned and not measured: {count(len(names), 'combination')} of decoder and length." if names else ""
