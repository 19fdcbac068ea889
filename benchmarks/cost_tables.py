"""Tables of what things cost: speed, time to an accuracy, switches of a stage, memories at use."""

from benchmarks.table import Record, Table, count, duration, pick, quartiles

MIB = 2**20
PATHS = {
    "stored_16": "stored, 16 tokens a memory",
    "stored_64": "stored, 64 tokens a memory",
    "encode": "encoded first, small encoder",
    "encode_own": "encoded first, encoder as large as the decoder",
}
SWITCHES = {
    "activations computed again": "`gradient_checkpointing`",
    "bf16": "`bf16`",
    "logits in chunks": "`loss_chunk`",
    "all three": "these three",
    "states encoded once": "`encode_once`",
    "compiled": "`compile`",
    "compiled, all three": "`compile` and the three",
    "rows grouped by length": "`group_by_length`",
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
    return Table(rows, _rounds(record))


def speed_scaling(record: Record) -> Table:
    """The cost of one text by its number of windows, and the exponent of that cost."""
    metrics = pick(record, "metrics")
    windows, goal = pick(metrics, "scaling.given.windows"), pick(metrics, "scaling.target_exponent")
    length = metrics["scaling"]["given"]["window_length"]
    rows = [[f"one text of so many windows of {length} tokens", *map(str, windows), "exponent", "R²"]]
    for key in ("scaling", "scaling_short_chunks"):
        given = metrics[key]["given"]
        tokens = given["chunk_length"] // given["memories_per_chunk"]
        for name, title in (("train_step", "training step"), ("read", "reading")):
            result = pick(metrics, f"{key}.{name}")
            times = [duration(result["spread"][str(n)]["median"]) for n in windows]
            exponent = f"{result['fit']['exponent']:.3f}"
            if key == "scaling":
                exponent += f" (at most {goal}{'' if result['fit']['exponent'] <= goal else ': missed'})"
            rows.append([f"{title}, {tokens} tokens a memory", *times, exponent, f"{result['fit']['r_squared']:.3f}"])
    return Table(rows, _rounds(record))


def _rounds(record: Record) -> str:
    peak = pick(record, "peak_memory_bytes.process") / 2**30
    return f"Medians of {record['repetitions']} rounds, timed in turn; peak memory {peak:.1f} GiB."


def time_to_accuracy(record: Record) -> Table:
    """Recipe against baseline: steps, time and accuracy of each, and the ratio of the times."""
    metrics, given = pick(record, "metrics"), pick(record, "given")
    names = {
        "baseline": f"float32, AdamW at {given['baseline']['learning_rate']:g}, plain loop",
        "recipe": f"recipe {given['recipe']} as shipped",
    }
    rows = [["", "steps", "seconds", "seconds per step", "tokens right"]]
    for side, text in names.items():
        result = pick(metrics, side)
        rows.append([
            text, f"{result['steps']:,}", f"{result['seconds']:.0f}",
            duration(result["seconds"] / result["steps"]), f"{result['token_accuracy']:.1%}",
        ])  # fmt: skip
    bound = "More than " if metrics["is_lower_bound"] else ""
    missed = "" if metrics["ratio"] >= 10 else " (missed: at least 10)"
    cpu = metrics.get("cpu_ratio")
    clock = "" if cpu is None else f" by the clock, {cpu:.1f} in CPU time"
    return Table(
        rows,
        f"{bound}{metrics['ratio']:.1f} times faster{clock}{missed} to {record['target']:.0%} of the validation "
        f"tokens, {given['tokens_per_memory']:g} tokens a vector. Part of that is the optimiser (Muon with a schedule "
        "against AdamW at a constant rate), part the batched model.",
    )


def switches(record: Record) -> Table:
    """Speed of a training step by switch, and peak memory of the loss."""
    rows = [["training step, float32 unless said", "tokens per second", "times as fast (quartiles)"]]

    def add(part: str, name: str, ratio: Record) -> None:
        speed = pick(record, f"metrics.{part}.tokens_per_second")[name]
        rows.append([SWITCHES.get(name, name), f"{speed:,.0f}", quartiles(ratio, 2)])

    compiled = record["metrics"].get("compile")
    for part in ("steps", "compile") if compiled else ("steps",):
        for name, ratio in pick(record, f"metrics.{part}.times_as_fast").items():
            if name != "plain" or part == "steps":  # the compiled ones' own plain step is nearly the same
                add(part, name, ratio)
    for part, name in (("lengths", "rows grouped by length"), ("processes", "2 processes")):
        add(part, name, pick(record, f"metrics.{part}.times_as_fast"))
    lengths, memory = pick(record, "metrics.lengths"), pick(record, "metrics.loss_memory")
    before, after = lengths["padding"].values()
    compiling = "`compile` was not measured"
    if compiled:
        compiling = f"compiled, the first step took {compiled['seconds_of_first_step']['compiled']:.0f} s"
    whole, chunked = (memory[name]["bytes"] / MIB for name in ("whole", "chunked"))
    return Table(
        rows,
        f"Each against the plain step of the same rows, timed in turn, other work on the machine; {compiling}. Rows "
        f"grouped by length: a pass over {lengths['rows']} documents of the shipped text; {after:.1%} of the columns "
        f"are padding in the place of {before:.1%}. 2 processes share the rows of one, on "
        f"{pick(record, 'metrics.processes.cores')} cores. The loss of {memory['tokens']:,} tokens over a vocabulary "
        f"of {memory['vocab_size']:,} takes {whole:,.0f} MiB with all logits, {chunked:,.0f} MiB with those of "
        f"{memory['chunk']} tokens at a time.",
    )


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
