"""Tables of what models reach and what memories hold, each from its record."""

import statistics
from typing import Any

from benchmarks.table import TOKENS, Record, Table, count, percent, pick
from training.records.sample import sample_lines

MINUTE, GIBIBYTE = 60, 2**30


def quickstart(record: Record) -> Table:
    """The quickstart's figures, what they must reach, what was reached."""
    blank, copy, causal = (pick(record, f"metrics.{suite}") for suite in ("blank_copy", "copy", "clm"))
    name = pick(record, "recipe.evaluation.autoencoder")
    model = next(stage["model"] for stage in pick(record, "recipe.stages") if stage["name"] == name)
    tokens = model["chunk_length"] / model.get("memories_per_chunk", 1)
    chunks = blank["memory"]["num_tokens"] / blank["memory"]["num_rows"] / model["chunk_length"]
    minutes = sum(pick(record, "times").values()) / MINUTE
    peak = max(pick(record, "peak_memory_bytes.process"), pick(record, "peak_memory_bytes.largest_child")) / GIBIBYTE
    controls = [blank[control]["token_accuracy"] for control in ("wrong_memory", "no_memory")]
    autoencoder = pick(record, "metrics.autoencoder.memory")
    parts = ("memory", "wrong_memory", "no_memory_model", "full_context_model")
    loss, wrong, without, full = (pick(causal, f"{part}.loss") for part in parts)
    rows = [
        ["figure", "must reach", "reached"],
        ["whole run, package download not counted", "20 min", _goal(f"{minutes:.1f} min", minutes <= 20)],
        [
            f"autoencoder, {tokens:g} tokens a vector: tokens right",
            "99%",
            _goal(percent(autoencoder), autoencoder["token_accuracy"] >= 0.99 and tokens >= 16),
        ],
        [
            f"blank copy of {chunks:g} chunks through frozen memories, teacher-forced",
            "95%",
            _goal(percent(blank["memory"]), blank["memory"]["token_accuracy"] >= 0.95 and chunks >= 2),
        ],
        [
            "the same with another text's memories, and with none",
            "under 25%",
            _goal(", ".join(f"{control:.1%}" for control in controls), max(controls) < 0.25),
        ],
        ["copy, teacher-forced", "98%", _goal(percent(copy["memory"]), copy["memory"]["token_accuracy"] >= 0.98)],
        ["copy, free-running: texts without an error", "reported", free_running(copy["memory"])],
        [
            "next-token loss after memories (nats per token)",
            "under a decoder trained without",
            _goal(
                f"{loss:.3f}; another text's {wrong:.3f}; trained without {without:.3f} ({loss - without:+.3f}); full "
                f"text {full:.3f}",
                loss < without,
            ),
        ],
        ["peak memory of a process", "4 GiB", _goal(f"{peak:.1f} GiB", peak <= 4)],
    ]
    return Table(rows, f"Test split of the shipped books, one seed. {TOKENS}")


def quickstart_stages(record: Record) -> Table:
    """Time by part of the run, and how much text each stage read."""
    rows = [["part", "seconds", "steps", "tokens of text", "tokens per second"]]
    times = pick(record, "times")
    for part, seconds in times.items():
        stage = pick(record, "stages").get(part.removeprefix("stage ")) if part.startswith("stage ") else None
        counts = ["", "", ""]
        if stage is not None:
            counts = [f"{stage['steps']:,}", f"{stage['text_tokens']:,}", f"{stage['text_tokens_per_second']:,.0f}"]
        rows.append([part.replace("_", " "), f"{seconds:.0f}", *counts])
    rows.append(["**all**", f"**{sum(times.values()):.0f}**", "", "", ""])
    return Table(rows)


def quickstart_sample(record: Record) -> Table:
    """A text, its memories, and what the decoder writes from them, wrong tokens in brackets."""
    return Table(text=sample_lines(pick(record, "sample")))


def use(record: Record) -> Table:
    """What the README's snippet printed."""
    return Table(text=pick(record, "output").rstrip("\n").splitlines())


def starters(record: Record) -> Table:
    """A row for each starter and task: load, goal, teacher-forced and free-running."""
    rows = [["starter", "task", "numbers a token", "must reach", "teacher-forced, worst split", "free-running"]]
    sizes = []
    for name, found in pick(record, "metrics.starters").items():
        seconds = statistics.median(found["seconds_to_load"])
        sizes.append(f"{name} {found['parameters'] / 1e6:.1f} M, {found['bytes'] / 1e6:.1f} MB, {seconds:.1f} s")
        rows += [[name, *cells] for cells in _starter_rows(found)]
    return Table(
        rows,
        "Tokens right of the published, rounded weights, vocabulary 2,048; the worst of the validation and test "
        "splits of books and news. Free-running: texts copied without an error, on the worst split that was measured; "
        "where it says books, news was not measured: expect less there. A one-pass task has no free-running figure. "
        "Losses in nats per token, the model trained without memory and the same model without its memories beside "
        f"it. Parameters, size and time to load: {'; '.join(sizes)}.",
    )


def works(record: Record) -> Table:
    """What the starters give back, in few words: for the README."""
    made = starters(record)
    rows = [[row[0], row[1], row[2], row[4], row[5]] for row in made.rows]
    return Table(
        rows,
        "The worst of the validation and test splits of books and news; free-running: texts copied without an error.",
    )


def _starter_rows(found: Record) -> list[list[str]]:
    if found["model_type"] == "memory_autoencoder":
        length = found["chunk_length"]
        goal = {32: "99.5%", 64: "97%"}.get(length, "reported")
        task = f"{length} tokens through one vector"
        return [[task, f"{found['width'] / length:g}", goal, lowest(found, "retention"), "one pass"]]
    if found["model_type"] != "memory_encoder_decoder":
        loss = next(iter(found["run_metrics"].values()))["validation_split"]["loss"]
        return [["next tokens", "", "reported", f"{loss:.3f} nats", ""]]
    length, load = found["source_length"], f"{found['width'] / found['chunk_length']:g}"
    goal, vectors = ("98%" if length >= 512 else "reported"), length // found["chunk_length"]
    free = _worst_free(found)
    rows = [
        [f"blank copy of {length} tokens, {vectors} vectors", load, goal, lowest(found, "blank_copy"), "one pass"],
        [f"copy of {length} tokens, {vectors} vectors", load, goal, lowest(found, "copy"), free],
    ]
    causal = found["run_metrics"].get("clm", {})
    if "memory" in causal:
        own = causal["memory"]["loss"]
        beside = {"no_memory_model": "trained without", "no_memory": "its memories taken away"}
        told = [f"{text} {causal[name]['loss']:.3f}" for name, text in beside.items() if name in causal]
        met = all(own < causal[name]["loss"] for name in beside if name in causal)
        goal = "under no memory" if length >= 512 else "reported"
        shown = f"{own:.3f} nats; {', '.join(told)}"
        rows.append(["next tokens after memories", load, goal, _goal(shown, met or length < 512), ""])
    return rows


def lowest(found: Record, suite: str) -> str:
    """Lowest accuracy over the splits, and where it is."""
    accuracy, split = min((parts[suite]["memory"]["token_accuracy"], name) for name, parts in found["splits"].items())
    return f"{accuracy:.2%} ({split})"


def _worst_free(found: Record) -> str:
    """The worst free-running figure over the splits, else that of the run which made the model, on books."""
    parts = {name: suites["copy"]["memory"] for name, suites in found["splits"].items()}
    measured = {name: memory for name, memory in parts.items() if "exact_match" in memory}
    if not measured:
        return f"{free_running(found['run_metrics']['copy']['memory'])} (books, test)"
    name = min(measured, key=lambda split: measured[split]["exact_match"])
    return f"{free_running(measured[name])} ({name})"


def free_running(memory: Record) -> str:
    """Share of the texts that `generate` copied without an error, and of how many."""
    if "exact_match" not in memory:
        return "not measured"
    return f"{percent(memory, 'exact_match', 0)} of {memory['num_generated_rows']}"


def _goal(shown: str, met: bool) -> str:
    return shown if met else f"{shown} (missed)"


def reproduced(quick: Record, shipped: Record, curve: Record, rolling: Record) -> Table:
    """What the paper reports beside what stands here today, load and vocabulary with each figure, and one word."""
    found = pick(shipped, "metrics.starters")
    auto, memory = found["starter-autoencoder-64"], found["starter-tiny"]
    longest = max(pick(curve, "metrics.runs").values(), key=lambda run: run["chunk_length"])
    causal = pick(quick, "metrics.clm")
    share = pick(rolling, "metrics")["generation/quickstart/16384"]["cache_share"]["memories"]
    loads = {
        "auto": f"{auto['width'] / auto['chunk_length']:g}",
        "curve": f"{longest['width'] / longest['chunk_length']:g}",
        "memory": f"{memory['width'] / memory['chunk_length']:g}",
    }
    difference = causal["memory"]["loss"] - causal["no_memory_model"]["loss"]
    own = longest["conditions"]["memory"]["token_accuracy"]
    rows = [
        ["the paper", "its load", "here", "our load", "word"],
        [
            "autoencoders give back over 95% of 256 tokens (6)",
            "2 numbers a token, vocabulary 8,000, web text",
            f"64 tokens: {lowest(auto, 'retention')}; at {loads['curve']} numbers {own:.1%}, not at plateau",
            f"{loads['auto']} numbers a token, vocabulary 2,048, books and news",
            "reproduced in part",
        ],
        [
            "copying 512 tokens through a frozen encoder after blank copy; 94.7%, all objectives at once (13 to 16)",
            "2 numbers a token, vocabulary 8,000, web text",
            f"{memory['source_length']} tokens, teacher-forced: {lowest(memory, 'copy')}; free-running "
            f"{_worst_free(memory)} texts",
            f"{loads['memory']} numbers a token, vocabulary 2,048, books and news",
            "reproduced in part",
        ],
        [
            "a model that copies also predicts better with memories than without (11, 16)",
            "windows of 256 tokens",
            f"{difference:+.3f} nats against the same decoder trained without memory",
            "windows of 16 tokens",
            "not converged here",
        ],
        [
            "the cache holds memories and one window in the place of all tokens (23)",
            "counted",
            f"after 16,384 tokens 1/{1 / share:.1f} of the bytes",
            "16 tokens a memory",
            "reproduced",
        ],
    ]
    return Table(rows, "One seed each; numbers in brackets are those of the statements below.")


def fidelity_curve(record: Record) -> Table:
    """A row for each chunk length: tokens right and loss beside the controls."""
    rows = [["tokens per vector", "numbers a token", "tokens right", "loss (nats per token)", "another text's vector",
             "no vector", "test tokens", "minutes of training"]]  # fmt: skip
    runs = sorted(pick(record, "metrics.runs").values(), key=lambda run: run["chunk_length"])
    for run in runs:
        own, wrong, none = (run["conditions"][name] for name in ("memory", "wrong_memory", "no_memory"))
        rows.append([
            str(run["chunk_length"]), f"{run['width'] / run['chunk_length']:g}", percent(own, digits=2),
            f"{own['loss']:.4f}", f"{wrong['token_accuracy']:.1%}", f"{none['token_accuracy']:.1%}",
            f"{own['num_tokens']:,}", f"{run['seconds'] / MINUTE:.1f}",
        ])  # fmt: skip
    return Table(
        rows,
        f"Vectors of {runs[0]['width']} numbers, {runs[0]['text_tokens']:,} tokens of training text and the same "
        f"steps for all lengths: long chunks are not at their plateau. {TOKENS}",
    )


def pairs(record: Record) -> Table:
    """A row for each run, task and number of memories: loss and accuracy beside their controls."""
    rows = [["trained", "task", "memories a chunk", "own memories", "another text's", "none", "plain decoder, none",
             "plain decoder, full text", "gain over another text's (95%)"]]  # fmt: skip
    runs = pick(record, "metrics.runs")
    for run in runs.values():
        trained = "projector and LoRA" if run["adapters"] else "projector"
        for suite, conditions in run["suites"].items():
            task, _, budget = suite.partition(", ")
            names = ("memory", "wrong_memory", "no_memory", "plain_no_memory", "plain_full_context")
            cells = [_loss(conditions.get(name) or conditions.get(name.removeprefix("plain_"))) for name in names]
            task = {"clm": "continue", "copy": "copy"}[task]
            rows.append([trained, task, budget.partition(" ")[0], *cells, _gain(conditions)])
    first = next(iter(runs.values()))
    scored = next(iter(first["suites"].values()))["memory"]
    return Table(
        rows,
        f"{first['steps']} steps of {first['rows'] // first['steps']} rows each; {scored['num_rows']} rows of the "
        "test split. Loss in nats per token, tokens right, teacher-forced; gains in nats per token, over rows.",
    )


def decoder_sizes(record: Record) -> Table:
    """A row for each decoder that read the same memories: what it copies from them, beside the controls."""
    rows = [["decoder", "its parameters", "projector", "own memories", "another text's", "none",
             "gain over another text's (95%)"]]  # fmt: skip
    runs = sorted(pick(record, "metrics.runs").values(), key=lambda run: run["parameters"]["decoder"]["total"])
    for run in runs:
        conditions = next(values for suite, values in run["suites"].items() if suite.startswith("copy"))
        fields = run["decoder"]["fields"]
        what = f"fresh, width {fields['hidden_size']}" if fields else "stories260K, pretrained"
        cells = [_loss(conditions.get(name)) for name in ("memory", "wrong_memory", "no_memory")]
        size = f"{run['parameters']['decoder']['total']:,}"
        rows.append([what, size, run["projector_type"] or "linear", *cells, _gain(conditions)])
    first = runs[0]
    scored = next(iter(first["suites"].values()))["memory"]
    return Table(
        rows,
        f"MiniLM frozen, four memories for 32 tokens; {first['decoder']['steps']} steps of next-token training, then "
        f"{first['steps']} steps of {first['rows'] // first['steps']} rows of copying; {scored['num_rows']} rows of "
        "the test split. Loss in nats per token, tokens right, teacher-forced; intervals over rows.",
    )


def _loss(values: Record | None) -> str:
    return "" if values is None else f"{values['loss']:.3f}, {values['token_accuracy']:.1%}"


def _gain(conditions: Record) -> str:
    wrong = conditions["wrong_memory"]
    low, high = wrong["gain_of_memory_interval"]
    return f"{wrong['gain_of_memory']:+.3f} ({low:+.3f} to {high:+.3f})"


def probe(record: Record) -> Table:
    """A line for each model and condition: tokens right, information ratio, bits per byte by length of the text."""
    models, recipe = pick(record, "metrics.models"), pick(record, "recipe")
    lengths = list(models[0]["lengths"])
    rows = [["model, state read, numbers per text", "at most", *(f"{length} tokens" for length in lengths)]]
    suffixes = {"embedding": "", "untrained": ", untrained", "shuffled": ", another text's embedding"}
    for model in models:
        for condition, suffix in suffixes.items():
            cells = [model["lengths"][length].get(condition) for length in lengths]
            if None in cells:
                continue
            sizes = sorted({cell["numbers_per_text"] for cell in cells})
            size = " to ".join(f"{n:,}" for n in dict.fromkeys((sizes[0], sizes[-1])))
            what = model["name"] + (suffix or f", {model['position']}, {size}")
            shown = []
            for length, cell in zip(lengths, cells, strict=True):
                mark = "\\*" if not suffix and at_floor(model["lengths"][length]) else ""
                shown.append(f"{percent(cell)}{mark}, {cell['information_ratio']:.2f}, {cell['bits_per_byte']:.2f}")
            most = min(1 - cell["unknown_test_tokens"] / cell["num_tokens"] for cell in cells)
            rows.append([what, f"{most:.0%}", *shown])
    decoder, budget = recipe["decoder"], recipe["budget"]
    return Table(
        rows,
        "**A lower bound, never a statement about privacy:** published inversions give back 77 to 92% of 32 tokens of "
        "a sentence embedding (Morris et al. 2023, arXiv 2310.06816, correct their text in rounds); this probe is one "
        f"pass of a small decoder ({decoder['model_type'].replace('_', ' ')}, {decoder['num_hidden_layers']} layers "
        f"of width {decoder['hidden_size']}, {decoder['expansion']}) after {budget['steps']:,} steps of "
        f"{budget['batch_tokens']:,} tokens, and no cell was trained to a plateau. \\* No more than another text's "
        "embedding gives: the probe read nothing here. Tokens right, information ratio against a uniform guess, and "
        "bits per byte of text (the memory's own not counted), on test texts; *at most* is the share of test tokens "
        f"that occur more than once in the training texts. {TOKENS}",
    )


def at_floor(cells: Record) -> bool:
    """Whether the interval of an embedding's accuracy overlaps that of another text's embedding."""
    if "shuffled" not in cells:
        return False
    return cells["embedding"]["token_accuracy_interval"][0] <= cells["shuffled"]["token_accuracy_interval"][1]


def ceiling(record: Record) -> Table:
    """What a decoder writes from the encoder's memories, from refined ones, and from ones made for the text."""
    result, steps = pick(record, "metrics.against_ceiling"), pick(record, "recipe.steps")
    names = {
        "one_pass": "the encoder's, one pass",
        "refined": f"the same after {steps} optimiser steps",
        "optimised": f"random ones after {steps} optimiser steps",
        "ceiling": "the better of both for each text: the ceiling",
    }
    rows = [["memories", "tokens right", "texts without an error", "loss (nats per token)",
             "gain over none (nats per text)"]]  # fmt: skip
    for name, label in names.items():
        part = result[name]
        low, high = part["gain_nats_interval"]
        rows.append([
            label, f"{part['token_accuracy']:.1%}", f"{part['exact_match']:.0%}", f"{part['loss']:.4f}",
            f"{part['gain_nats']:.1f} ({low:.1f} to {high:.1f})",
        ])  # fmt: skip
    low, high = result["percent_of_nats_interval"]
    one = result["one_pass"]
    return Table(
        rows,
        f"One pass of the encoder reaches {result['percent_of_nats']:.1f}% ({low:.1f} to {high:.1f}, over texts) of "
        f"the ceiling's gain. {one['num_texts']} texts of {one['num_tokens'] // one['num_texts']} tokens in "
        f"{count(result['num_vectors'], 'vector')} each, objective {result['objective'].replace('_', ' ')}.",
    )


def capacity(record: Record) -> Table:
    """How many tokens a decoder writes back from vectors made for one text, by length."""
    result = pick(record, "metrics.capacity")
    parts = result["by_length"]
    rows = [
        ["tokens of the text", *parts],
        ["texts without an error", *(f"{part['exact_match']:.0%}" for part in parts.values())],
        ["tokens right", *(f"{part['token_accuracy']:.1%}" for part in parts.values())],
        ["gain over none (nats per text)", *(f"{part['gain_nats']:.1f}" for part in parts.values())],
    ]
    texts = next(iter(parts.values()))["num_texts"]
    return Table(
        rows,
        f"{count(result['num_vectors'], 'vector')} a text, at most {pick(record, 'recipe.steps')} optimiser steps, "
        f"the beginnings of {texts} texts: too few for intervals.",
    )


def fidelity(record: Record) -> Table:
    """How faithfully texts come back: a column for each domain, and the controls."""
    domains = {name.partition(", ")[2] or "books": result for name, result in pick(record, "metrics").items()}
    memory = [result["memory"] for result in domains.values()]
    text = [part["text"] for part in memory]

    def kept(name: str) -> list[str]:
        return [
            f"{percent(found, f'{name}_kept')} of {found[f'num_{name}']}" if found[f"num_{name}"] else "none there"
            for found in text
        ]

    def control(name: str) -> list[str]:
        return [percent(result[name]) for result in domains.values()]

    places = ("start", "middle", "end", "boundary")
    random = next(iter(domains.values()))["random_tokens"]
    rows = [
        ["", *domains],
        ["teacher-forced: tokens right", *(percent(part) for part in memory)],
        [
            "the same at start, middle, end, chunk borders",
            *(", ".join(f"{part['by_part'][place]:.1%}" for place in places) for part in memory),
        ],
        ["free-running: texts without an error", *(percent(part, "exact_match") for part in text)],
        ["characters, precision", *(percent(part, "character_precision") for part in text)],
        ["BLEU", *(f"{part['bleu']:.1f}" for part in text)],
        *([f"{name} kept", *kept(name)] for name in ("digits", "dates", "names")),
        ["bits per byte of the text", *(f"{part['bits_per_byte']:.3f}" for part in memory)],
        ["the same with the memories' own bits", *(f"{part['bits_per_byte_with_memory']:.0f}" for part in memory)],
        ["teacher-forced, another text's memories", *control("wrong_memory")],
        ["teacher-forced, no memories", *control("no_memory")],
    ]
    length = memory[0]["num_tokens"] // memory[0]["num_rows"]
    return Table(
        rows,
        f"Random tokens, which language does not help to guess: {percent(random)}. {memory[0]['num_rows']} texts of "
        f"{length} tokens, {text[0]['num_texts']} of them free-running. Intervals of 95% over texts for exact matches "
        "and characters, over digits, dates and names for those kept. Of tokens: " + TOKENS[0].lower() + TOKENS[1:],
    )


READERS = {
    "rolling": "rolling memory",
    "rolling_newest": "rolling memory, the newest {newest_memories} memories only",
    "no_memory": "no memory, the same windows of {window_length}",
    "no_memory_sliding": "no memory, always the {window_length} tokens before",
    "full_context": "full text",
    "full_context_rows": "full text in rows of {trained_tokens}, as trained",
}


def rolling_quality(record: Record) -> Table:
    """Loss by position in long documents, a row for each way of reading."""
    cell = pick(record, "metrics").get("quality")
    if cell is None:
        return Table(note="Not measured: `python -m benchmarks.rolling --only quality`.")
    edges, given = cell["edges"], {**cell, **cell["given"]}
    rows = [["nats per token, tokens", *(f"{a:,} to {b:,}" for a, b in zip(edges, edges[1:], strict=False))]]
    for name, title in READERS.items():
        losses = ["" if loss is None else f"{loss:.3f}" for loss in cell["losses"][name]]
        rows.append([title.format(**given), *losses])
    return Table(
        rows,
        f"Means of {given['documents']} stretches of {given['tokens']:,} tokens of the test split, too few "
        f"for intervals. All models learnt from rows of {given['trained_tokens']} tokens; the full text ends where "
        "the decoder's positions do.",
    )


def document_losses(cell: Record, name: str) -> list[tuple[float, float, float]]:
    """Mean, least and largest loss over the documents of a cell, by position, as far as all were read.

    >>> document_losses({"losses_by_document": {"a": [[1.0, 4.0], [3.0, None]]}}, "a")
    [(2.0, 1.0, 3.0)]
    """
    columns: list[Any] = []
    for column in zip(*cell["losses_by_document"][name], strict=True):
        if None in column:
            break
        columns.append((statistics.fmean(column), min(column), max(column)))
    return columns


def scores(record: Record) -> Table:
    """A row for each benchmark: its score in every way of reading, and what went through memories."""
    rows = [["task", "metric", "items", "full text", "memory", "truncated", "none", "memory minus full (95%)",
             "through memories"]]  # fmt: skip
    for task, result in pick(record, "metrics").items():
        metric, modes = result["headline"], result["modes"]
        memory = modes.get("memory", {})
        gap = memory.get("minus_full", {}).get(metric)
        counts = memory.get("counts")
        share = "" if counts is None else f"{counts['memory_requests'] / max(1, counts['requests']):.0%}"
        rows.append([
            task, metric, str(modes["full"]["scores"][metric]["num_items"]),
            *(_benchmark_score(modes.get(mode), metric) for mode in ("full", "memory", "truncated", "none")),
            "" if gap is None else f"{gap['value']:+.3f} ({gap['interval'][0]:+.3f} to {gap['interval'][1]:+.3f})",
            share,
        ])  # fmt: skip
    return Table(
        rows,
        f"The first {pick(record, 'recipe.limit')} items at most of each file, the same in every column. Intervals "
        "are of 95% over items, those of a difference over paired items; of a perplexity the difference is in nats "
        "per word. A score is called a memory's only where requests went through memories; the last column has the "
        "share.",
    )


def _benchmark_score(values: dict[str, Any] | None, metric: str) -> str:
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
