r"""How many tokens does one vector hold? Autoencoders of several chunk lengths, gathered into one record.

```bash
python -m training.run fidelity_curve --to runs/fidelity \
    --grid 'stages.autoencoder.model.chunk_length=[4, 8, 16, 32, 64]'
python -m benchmarks.fidelity_curve runs/fidelity
```
"""

import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from benchmarks.measure import gather_command
from training.records.figures import COLOURS

Record = dict[str, Any]
KEPT = ("token_accuracy", "token_accuracy_interval", "loss", "num_rows", "num_tokens")


def show(record: Record) -> Record:
    """Keep what the curve shows of one run."""
    (stage,) = record["recipe"]["stages"]
    done, found = record["stages"][stage["name"]], record["metrics"]["autoencoder"]
    return {
        "chunk_length": stage["model"]["chunk_length"],
        "width": stage["model"]["encoder"]["hidden_size"],
        "parameters": done["parameters"]["total"],
        "text_tokens": done["text_tokens"],
        "seconds": done["seconds"],
        "conditions": {name: {key: values[key] for key in KEPT} for name, values in found.items()},
    }


def fidelity_curve_lines(record: Record, link: str) -> list[str]:
    """A row for each chunk length: token accuracy and loss beside the controls."""
    runs = by_length(record)
    lines = [
        "| tokens per vector | tokens right | loss (nats per token) | another text's vector | no vector | "
        "test tokens | minutes of training |",
        "|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for run in runs:
        own, wrong, none = (run["conditions"][name] for name in ("memory", "wrong_memory", "no_memory"))
        low, high = own["token_accuracy_interval"]
        lines.append(
            f"| {run['chunk_length']} | [{own['token_accuracy']:.2%}]({link}) ({100 * low:.2f} to {100 * high:.2f}) | "
            f"{own['loss']:.4f} | {wrong['token_accuracy']:.1%} | {none['token_accuracy']:.1%} | "
            f"{own['num_tokens']:,} | {run['seconds'] / 60:.1f} |"
        )
    first = runs[0]
    return [
        *lines,
        "",
        f"Vectors of {first['width']} numbers; {first['text_tokens']:,} tokens of text, the same steps and sizes for "
        "all lengths.",
    ]


def draw_fidelity_curve(record: Record, folder: Path) -> list[str]:
    """Token accuracy against tokens per vector."""
    runs = by_length(record)
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    panel = figure.subplots()
    labels = {"memory": "its own vector", "wrong_memory": "another text's vector"}
    for colour, (name, label) in zip(COLOURS, labels.items(), strict=False):
        accuracies = [run["conditions"][name]["token_accuracy"] for run in runs]
        panel.plot([run["chunk_length"] for run in runs], accuracies, "o-", color=colour, label=label, linewidth=1.4)
    panel.set_xscale("log", base=2)
    panel.set_xticks([run["chunk_length"] for run in runs], [str(run["chunk_length"]) for run in runs])
    panel.set_xlabel("tokens in one vector")
    panel.set_ylabel("tokens written back, test split")
    panel.set_ylim(0, 1.02)
    panel.yaxis.set_major_formatter(PercentFormatter(1.0))
    panel.grid(alpha=0.3, linewidth=0.6)
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(fontsize=8, frameon=False, loc="center left")
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "accuracy.png", dpi=150, metadata={"Software": None})
    return ["accuracy.png"]


def by_length(record: Record) -> list[Record]:
    """Runs in the order of their chunk length."""
    return sorted(record["metrics"]["runs"].values(), key=lambda run: run["chunk_length"])


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    return gather_command("fidelity_curve", "Gather autoencoders of several lengths into one.", show, arguments)


if __name__ == "__main__":
    sys.exit(main())
