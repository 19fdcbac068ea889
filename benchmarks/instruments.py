"""Tables of the measuring instruments, from the probe to fidelity. Each turns a record's metrics into lines."""

from typing import Any

CONDITIONS = {"embedding": "", "untrained": ", untrained", "shuffled": ", another text's embedding"}


def probe_lines(record: dict[str, Any], link: str) -> list[str]:
    """A line for each model and condition: token accuracy, information ratio, bits per byte by length of the text."""
    models, recipe = record["metrics"]["models"], record["recipe"]
    lengths = list(models[0]["lengths"])
    lines = [
        "| model, state read, numbers per text | at most | "
        + " | ".join(f"{length} tokens" for length in lengths)
        + " |",
        "|---|" + "---:|" * (len(lengths) + 1),
    ]
    for model in models:
        for condition, suffix in CONDITIONS.items():
            cells = [model["lengths"][length].get(condition) for length in lengths]
            if None in cells:
                continue
            sizes = sorted({cell["numbers_per_text"] for cell in cells})
            size = f"{sizes[0]:,}" if len(sizes) == 1 else f"{sizes[0]:,} to {sizes[-1]:,}"
            what = f"{model['name']}, {model['position']}, {size}" if not suffix else f"{model['name']}{suffix}"
            shown = [_cell(cell, link if not suffix else None) for cell in cells]
            most = min(1 - cell["unknown_test_tokens"] / cell["num_tokens"] for cell in cells)
            lines.append(f"| {what} | {most:.0%} | {' | '.join(shown)} |")
    decoder, budget = recipe["decoder"], recipe["budget"]
    lines += [
        "",
        "Token accuracy with its 95 % interval, information ratio against a uniform guess, and bits per byte of text "
        "(the memory's own not counted), on test texts; beside them the share of test tokens that occur more than "
        f"once in the training texts, which bounds the accuracy. Decoder: {decoder['model_type'].replace('_', ' ')}, "
        f"{decoder['num_hidden_layers']} layers of width {decoder['hidden_size']}, {decoder['expansion']}, trained "
        f"for {budget['steps']:,} steps of "
        f"{budget['batch_tokens']:,} tokens, the same for all; {record['seconds'] / 60:.0f} minutes in all.",
    ]
    return lines


def _cell(cell: dict[str, Any], link: str | None) -> str:
    low, high = cell["token_accuracy_interval"]
    accuracy = f"{cell['token_accuracy']:.1%}"
    accuracy = accuracy if link is None else f"[{accuracy}]({link})"
    rest = f"{cell['information_ratio']:.2f}, {cell['bits_per_byte']:.2f}"
    return f"{accuracy} ({100 * low:.1f} to {100 * high:.1f}), {rest}"


def ceiling_lines(record: dict[str, Any], link: str) -> list[str]:
    """What a decoder writes from the encoder's memories, from refined ones, and from ones made for the text."""
    result, recipe = record["metrics"]["against_ceiling"], record["recipe"]
    rows = {
        "one_pass": "the encoder's, one pass",
        "refined": f"the same after {recipe['steps']} optimiser steps",
        "optimised": f"random ones after {recipe['steps']} optimiser steps",
        "ceiling": "the better of both for each text: the ceiling",
    }
    lines = ["| memories | tokens | texts without an error | loss (nats per token) | gain over none (nats a text) |",
             "|---|---:|---:|---:|---:|"]  # fmt: skip
    for name, label in rows.items():
        part = result[name]
        low, high = part["gain_nats_interval"]
        lines.append(
            f"| {label} | {part['token_accuracy']:.1%} | {part['exact_match']:.0%} | {part['loss']:.4f} | "
            f"{part['gain_nats']:.1f} ({low:.1f} to {high:.1f}) |"
        )
    low, high = result["percent_of_nats_interval"]
    one = result["one_pass"]
    tokens = one["num_tokens"] // one["num_texts"]
    return [
        *lines,
        "",
        f"One pass of the encoder reaches [{result['percent_of_nats']:.1f} %]({link}) ({low:.1f} to {high:.1f}) of "
        f"the ceiling's gain. {one['num_texts']} texts of {tokens} tokens in {_vectors(result)} each, "
        f"objective {result['objective'].replace('_', ' ')}.",
    ]


def capacity_lines(record: dict[str, Any], link: str) -> list[str]:
    """How many tokens a decoder writes back from vectors made for one text, by length."""
    result, recipe = record["metrics"]["capacity"], record["recipe"]
    by_length = result["by_length"]
    first = next(iter(by_length.values()))
    rows = {
        "tokens of the text": list(by_length),
        "texts without an error": [f"{part['exact_match']:.0%}" for part in by_length.values()],
        "tokens": [f"[{part['token_accuracy']:.1%}]({link})" for part in by_length.values()],
        "gain over none (nats a text)": [f"{part['gain_nats']:.1f}" for part in by_length.values()],
    }
    lines = [f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items()]
    lines.insert(1, "|---|" + "---:|" * len(by_length))
    return [
        *lines,
        "",
        f"{_vectors(result)} a text, at most {recipe['steps']} optimiser steps, {first['num_texts']} texts, their "
        "beginnings.",
    ]


def _vectors(result: dict[str, Any]) -> str:
    return f"{result['num_vectors']} vector{'' if result['num_vectors'] == 1 else 's'}"


def retrieval_lines(record: dict[str, Any], link: str) -> list[str]:
    """How often a piece of a text finds the text, before and after training, by start and kind of query."""
    models, recipe = record["metrics"]["models"], record["recipe"]
    kinds = list(models[0]["before"])
    heads = [f"{name.split('_')[0]} of {name.split('_')[1]}: {what}" for name in kinds for what in ("top-1", "top-10")]
    lines = [f"| start | {' | '.join(heads)} |", "|---|" + "---:|" * len(heads)]
    for model in models:
        for when, label in (("before", "as it is"), ("after", "trained")):
            if when not in model:
                continue
            shown = []
            for kind in kinds:
                found = model[when][kind]
                low, high = found["top_1_interval"]
                shown += [f"[{found['top_1']:.1%}]({link}) ({100 * low:.1f} to {100 * high:.1f})",
                          f"{found['recall_at_10']:.1%}"]  # fmt: skip
            lines.append(f"| {model['name']}, {label} | {' | '.join(shown)} |")
    found = models[0]["before"][kinds[0]]
    kind = {"ngram": "tokens in a row", "bag": "tokens in any order"}[recipe["query"]]
    return [
        *lines,
        "",
        f"{found['num_texts']} test texts of {recipe['length']} tokens, each searched by {recipe['query_tokens']} of "
        f"its tokens; 95 % intervals; chance is {found['chance']:.1%}. Trained on {kind}, {recipe['steps']} steps of "
        f"{recipe['batch_tokens'] // recipe['length']} texts, {record['seconds'] / 60:.0f} minutes in all.",
    ]


def fidelity_lines(record: dict[str, Any], link: str) -> list[str]:
    """How faithfully texts are written back: a column for each domain, and the controls."""
    domains = {name.partition(", ")[2] or "books": result for name, result in record["metrics"].items()}
    memory = [result["memory"] for result in domains.values()]
    text = [part["text"] for part in memory]

    def interval(found: dict[str, Any], name: str) -> str:
        low, high = found[f"{name}_interval"]
        return f"{found[name]:.1%} ({100 * low:.1f} to {100 * high:.1f})"

    def kept(name: str) -> list[str]:
        counts = [found[f"num_{name}"] for found in text]
        return [f"{interval(found, f'{name}_kept')} of {count}" if count else "none there"
                for found, count in zip(text, counts, strict=True)]  # fmt: skip

    def control(name: str) -> list[str]:
        return [interval(result[name], "token_accuracy") for result in domains.values()]

    first = text[0]
    rows = {
        "token accuracy": [f"[{interval(part, 'token_accuracy')}]({link})" for part in memory],
        "start, middle, end, at chunk borders": [
            ", ".join(f"{part['by_part'][place]:.1%}" for place in ("start", "middle", "end", "boundary"))
            for part in memory
        ],
        "written freely: texts without an error": [interval(part, "exact_match") for part in text],
        "characters, precision": [interval(part, "character_precision") for part in text],
        "BLEU": [f"{part['bleu']:.1f}" for part in text],
        "digits kept": kept("digits"),
        "dates kept": kept("dates"),
        "names kept": kept("names"),
        "bits per byte of the text": [f"{part['bits_per_byte']:.3f}" for part in memory],
        "the same with the memories' own bits": [f"{part['bits_per_byte_with_memory']:.0f}" for part in memory],
        "token accuracy, another text's memories": control("wrong_memory"),
        "token accuracy, no memories": control("no_memory"),
    }
    lines = [f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items()]
    random = next(iter(domains.values()))["random_tokens"]
    return [
        f"| | {' | '.join(domains)} |",
        "|---|" + "---:|" * len(domains),
        *lines,
        "",
        f"Random tokens, which nothing about language helps to write: [{interval(random, 'token_accuracy')}]({link}). "
        f"{memory[0]['num_rows']} texts of {memory[0]['num_tokens'] // memory[0]['num_rows']} tokens, "
        f"{first['num_texts']} of them written freely; 95 % intervals.",
    ]
