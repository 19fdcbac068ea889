"""Tables of the measuring instruments: probe, ceiling, capacity. Each turns a record's metrics into lines."""

from typing import Any

CONDITIONS = {"embedding": "", "untrained": ", untrained", "shuffled": ", another text's embedding"}


def probe_lines(record: dict[str, Any], link: str) -> list[str]:
    """A line for each model and condition, token accuracy and information ratio by length of the text."""
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
        "Token accuracy with its 95 % interval, and the information ratio against a uniform guess, on test texts; "
        "beside them the share of test tokens that occur more than once in the training texts, which bounds the "
        "accuracy. "
        f"Decoder: {decoder['model_type'].replace('_', ' ')}, {decoder['num_hidden_layers']} layers of width "
        f"{decoder['hidden_size']}, {decoder['expansion']}, trained for {budget['steps']:,} steps of "
        f"{budget['batch_tokens']:,} tokens, the same for all; {record['seconds'] / 60:.0f} minutes in all.",
    ]
    return lines


def _cell(cell: dict[str, Any], link: str | None) -> str:
    low, high = cell["token_accuracy_interval"]
    accuracy = f"{cell['token_accuracy']:.1%}"
    accuracy = accuracy if link is None else f"[{accuracy}]({link})"
    return f"{accuracy} ({100 * low:.1f} to {100 * high:.1f}), {cell['information_ratio']:.2f}"


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
        f"the ceiling's gain. {one['num_texts']} texts of {tokens} tokens in {result['num_vectors']} vectors, "
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
    vectors = f"{result['num_vectors']} vector{'' if result['num_vectors'] == 1 else 's'}"
    return [
        *lines,
        "",
        f"{vectors} a text, at most {recipe['steps']} optimiser steps, {first['num_texts']} texts, their beginnings.",
    ]
