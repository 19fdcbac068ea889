"""The table of the speed of the code."""

from benchmarks.table import Record, Table, duration, pick, quartiles


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
