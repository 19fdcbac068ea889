"""Measure the starters as they are published: what they hold of held-out text, and how long loading takes.

```bash
python -m benchmarks.starters          # all folders of model_cards/, record in benchmarks/results/starters.json
```

The run that made a starter measured the weights it trained; here the folders' own weights, rounded as they are
published, read the validation and test splits of the text that ships.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from benchmarks.measure import benchmark_parser, describe_run, run_benchmark
from benchmarks.quality_tables import starters as starters_table
from benchmarks.table import print_table
from training.data.texts import load_texts
from training.evaluate import measure_suites
from training.places import REPOSITORY
from training.publishing.hub_folder import load_checkpoint, load_processor
from training.records.record import read_json

Record = dict[str, Any]

FOLDERS = REPOSITORY / "model_cards"
CORPORA = REPOSITORY / "training" / "corpora"
TEXTS = ("books", "wikinews")
SPLITS = ("validation", "test")
KEPT = (
    *("token_accuracy", "token_accuracy_interval", "loss", "num_tokens", "num_rows", "short_chunks"),
    *("exact_match", "exact_match_interval", "num_generated_rows", "generated_token_accuracy"),
)
ROW_LENGTH = 512

# Seconds from imported libraries to a model that can be called, in a process that has loaded nothing yet.
LOADING = """
import sys, time
from transformers import AutoModel, AutoModelForCausalLM, AutoProcessor, AutoTokenizer
import torch
started = time.perf_counter()
kind, folder = sys.argv[1:]
(AutoProcessor if kind == "memory_encoder_decoder" else AutoTokenizer).from_pretrained(folder, trust_remote_code=True)
(AutoModel if kind == "memory_autoencoder" else AutoModelForCausalLM).from_pretrained(folder, trust_remote_code=True)
print(time.perf_counter() - started)
"""


def measure_starter(folder: Path, *, limit: int, repetitions: int) -> Record:
    """Measure one folder.

    Args:
        folder (`Path`): A starter's Hub folder.
        limit (`int`): Most rows of 512 tokens of a suite; of shorter rows as many more.
        repetitions (`int`): Times that it is loaded.
    """
    model, _ = load_checkpoint(folder)
    processor = load_processor(folder)
    tokenizer = getattr(processor, "tokenizer", processor)
    config = model.config
    record = read_json(folder / "record.json") or {}
    found: Record = {
        "model_type": config.model_type,
        "dtype": str(model.dtype).removeprefix("torch."),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "bytes": sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
        "seconds_to_load": [seconds_to_load(folder, config.model_type) for _ in range(repetitions)],
        "description": ModelCard.load(folder / "README.md").data.model_name,
        "trained_by": {"run": record.get("run"), "commit": record.get("code", {}).get("commit")},
        "run_metrics": record.get("metrics", {}),
        "splits": {},
    }
    if config.model_type == "memory_autoencoder":
        suites, length = ["retention"], None
        found |= {"chunk_length": config.chunk_length, "width": config.encoder.hidden_size}
    elif config.model_type == "memory_encoder_decoder":
        suites, length = ["blank_copy", "copy"], record["recipe"]["evaluation"]["source_length"]
        found |= {"chunk_length": config.chunk_length, "width": config.encoder.hidden_size, "source_length": length}
    else:
        return found
    for text in TEXTS:
        for split in SPLITS:
            documents = load_texts([CORPORA / text / f"{split}.parquet"])
            rows = limit * ROW_LENGTH // (length or config.chunk_length)
            metrics = measure_suites(model, tokenizer, documents, suites, limit=rows, length=length, batch_size=16)
            found["splits"][f"{text}, {split}"] = {
                suite: {
                    condition: {name: values[name] for name in KEPT if name in values}
                    for condition, values in conditions.items()
                    if isinstance(values, dict)
                }
                for suite, conditions in metrics.items()
            }
    return found


def seconds_to_load(folder: Path, model_type: str) -> float:
    """Load a folder in a fresh process, libraries imported before, and return the seconds."""
    done = subprocess.run(
        [sys.executable, "-c", LOADING, model_type, str(folder)],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    return float(done.stdout.split()[-1])


def run(options: argparse.Namespace, command: str) -> Record:
    """Measure the folders asked for and return the record."""
    folders = [Path(name) for name in options.folders] or sorted(path for path in FOLDERS.iterdir() if path.is_dir())
    record = describe_run("starters", command, {})
    record["metrics"] = {
        "starters": {
            folder.name: measure_starter(folder, limit=options.limit, repetitions=options.repetitions)
            for folder in folders
        }
    }
    print("\n".join(print_table(starters_table(record), [])))
    return record


def main(arguments: list[str] | None = None) -> int:
    """Run the command line."""
    parser = benchmark_parser("starters", "Measure the starters as they are published.", quick=False)
    parser.add_argument("folders", nargs="*", help="folders (default: all of model_cards/)")
    parser.add_argument("--limit", type=int, default=64, metavar="N", help="most rows of 512 tokens (default 64)")
    parser.add_argument("--repetitions", type=int, default=3, metavar="N", help="times each is loaded (default 3)")
    return run_benchmark(parser, run, arguments)


if __name__ == "__main__":
    sys.exit(main())
