r"""How many tokens does one vector hold? Autoencoders of several chunk lengths, gathered into one record.

```bash
python -m training.run fidelity_curve --to runs/fidelity \
    --grid 'stages.autoencoder.model.chunk_length=[4, 8, 16, 32, 64]'
python -m benchmarks.fidelity_curve runs/fidelity
```
"""

import sys
from typing import Any

from benchmarks.measure import gather_command

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


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    return gather_command("fidelity_curve", "Gather autoencoders of several lengths into one.", show, arguments)


if __name__ == "__main__":
    sys.exit(main())
