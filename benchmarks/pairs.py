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
    decoder: Record = next((stage for stage in record["recipe"]["stages"] if stage.get("kind") == "causal_lm"), {})
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


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    return gather_command("pairs", "Gather records of pairs into one.", show, arguments)


if __name__ == "__main__":
    sys.exit(main())
