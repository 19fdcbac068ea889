"""Records of pairs whose encoder and decoder have a tokenizer each, gathered into one.

```bash
python -m training.run minilm_quickstart --grid 'stages.memory.adapters=[{}, {parts: [decoder], r: 8, lora_alpha: 16}]' --to runs/minilm
python -m benchmarks.pairs runs/minilm --out benchmarks/results/pairs.json
```
"""  # noqa: E501

import sys
from typing import Any

from benchmarks.measure import gather_command

Record = dict[str, Any]
KEPT = ("token_accuracy", "token_accuracy_interval", "loss", "loss_interval", "num_rows", "num_tokens")
GAIN = ("gain_of_memory", "gain_of_memory_interval")


def show(record: Record) -> Record:
    """What is shown of one run."""
    name = record["published_stage"]
    stage = next(stage for stage in record["recipe"]["stages"] if stage["name"] == name)
    done = record["stages"][name]
    norms = [log["projector_norm"] for log in done["series"] if "projector_norm" in log]
    decoder = next((stage for stage in record["recipe"]["stages"] if stage.get("kind") == "causal_lm"), {})
    return {
        "adapters": stage["adapters"],
        "decoder": {
            "fields": decoder.get("model", {}),
            "from": decoder.get("from", {}),
            "steps": decoder.get("training", {}).get("max_steps"),
        },
        "projector_type": stage.get("model", {}).get("projector_type"),
        "parameters": done["parameters_by_part"],
        "steps": done["steps"],
        "rows": done["rows"],
        "seconds": done["seconds"],
        "projector_norm": {"first": norms[0], "last": norms[-1]},
        "suites": {
            suite: {
                condition: {key: values[key] for key in (*KEPT, *GAIN) if key in values}
                for condition, values in conditions.items()
            }
            for suite, conditions in record["metrics"].items()
        },
    }


def pairs_lines(record: Record, link: str) -> list[str]:
    """A row for each run, task and number of memories: loss and accuracy beside their controls."""
    lines = [
        "| trained | task | memories a chunk | own memories | another text's | none | plain decoder, none | "
        "plain decoder, full text | gain over another text's (95 %) |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for run in record["metrics"]["runs"].values():
        trained = "projector and LoRA" if run["adapters"] else "projector"
        for suite, conditions in run["suites"].items():
            task, _, budget = suite.partition(", ")
            task = {"clm": "go on", "copy": "write it again"}[task]
            cells = [
                _cell(conditions.get(name) or conditions.get(name.removeprefix("plain_")))
                for name in ("memory", "wrong_memory", "no_memory", "plain_no_memory", "plain_full_context")
            ]
            wrong = conditions["wrong_memory"]
            low, high = wrong["gain_of_memory_interval"]
            gain = f"{wrong['gain_of_memory']:+.3f} ({low:+.3f} to {high:+.3f})"
            cells[0] = f"[{cells[0]}]({link})"
            lines.append(f"| {trained} | {task} | {budget.partition(' ')[0]} | {' | '.join(cells)} | {gain} |")
    counts = next(iter(record["metrics"]["runs"].values()))
    scored = next(iter(counts["suites"].values()))["memory"]
    return [
        *lines,
        "",
        f"{counts['steps']} steps of {counts['rows'] // counts['steps']} rows each; {scored['num_rows']} rows of the "
        "test split. Loss in nats a token, token accuracy.",
    ]


def decoder_sizes_lines(record: Record, link: str) -> list[str]:
    """A row for each decoder that read the same memories: what it writes again from them, beside the controls."""
    lines = [
        "| decoder | its parameters | projector | own memories | another text's | none | "
        "gain over another text's (95 %) |",
        "|---|---:|---|---:|---:|---:|---:|",
    ]
    runs = sorted(record["metrics"]["runs"].values(), key=lambda run: run["parameters"]["decoder"]["total"])
    for run in runs:
        conditions = next(values for suite, values in run["suites"].items() if suite.startswith("copy"))
        fields = run["decoder"]["fields"]
        what = f"fresh, width {fields['hidden_size']}" if fields else "stories260K, pretrained"
        memory, wrong, none = (_cell(conditions.get(name)) for name in ("memory", "wrong_memory", "no_memory"))
        low, high = conditions["wrong_memory"]["gain_of_memory_interval"]
        gain = f"{conditions['wrong_memory']['gain_of_memory']:+.3f} ({low:+.3f} to {high:+.3f})"
        lines.append(
            f"| {what} | {run['parameters']['decoder']['total']:,} | {run['projector_type'] or 'linear'} | "
            f"[{memory}]({link}) | {wrong} | {none} | {gain} |"
        )
    first = next(iter(runs))
    scored = next(iter(first["suites"].values()))["memory"]
    return [
        *lines,
        "",
        f"MiniLM frozen, four memories for 32 tokens; {first['decoder']['steps']} steps of next-token training, then "
        f"{first['steps']} steps of {first['rows'] // first['steps']} rows to write the text again; "
        f"{scored['num_rows']} rows of the test split. Loss in "
        "nats a token, token accuracy.",
    ]


def _cell(values: Record | None) -> str:
    return "" if values is None else f"{values['loss']:.3f}, {values['token_accuracy']:.1%}"


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    return gather_command("pairs", "Gather records of pairs into one.", show, arguments)


if __name__ == "__main__":
    sys.exit(main())
