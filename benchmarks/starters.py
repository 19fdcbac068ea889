"""Measure the starters as they are published: what they hold of held-out text, and how long loading takes.

```bash
python -m benchmarks.starters          # all folders of model_cards/, record in benchmarks/results/starters.json
```

The run that made a starter measured the weights it trained; here the folders' own weights, rounded as they are
published, read the validation and test splits of the text that ships.
"""

import argparse
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard

from benchmarks.measure import describe_run, save_record
from training.data.texts import load_texts
from training.evaluate import measure_suites
from training.places import REPOSITORY, portable_path
from training.publishing.hub_folder import load_checkpoint, load_processor
from training.records.record import read_json

Record = dict[str, Any]

FOLDERS = REPOSITORY / "model_cards"
CORPORA = REPOSITORY / "training" / "corpora"
TEXTS = ("books", "wikinews")
SPLITS = ("validation", "test")
KEPT = ("token_accuracy", "token_accuracy_interval", "loss", "num_tokens", "num_rows", "short_chunks")
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
            metrics = measure_suites(
                model, tokenizer, documents, suites, limit=rows, length=length, batch_size=16, num_generated_rows=0
            )
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


def starters_lines(record: Record, link: str) -> list[str]:
    """A row for each starter: what it is, its size, what it had to reach and what it reached."""
    lines = ["| starter | parameters | MB | seconds to load | must reach | reached |", "|---|---:|---:|---:|---|---|"]
    for name, found in record["metrics"]["starters"].items():
        goal, reached = goal_and_result(found)
        lines.append(
            f"| [{name}]({Path(link).parents[2] / 'model_cards' / name}) | {found['parameters'] / 1e6:.1f} M | "
            f"{found['bytes'] / 1e6:.1f} | {statistics.median(found['seconds_to_load']):.1f} | {goal} | "
            f"[{reached}]({link}) |"
        )
    return [
        *lines,
        "",
        "Token accuracy of the published, rounded weights on the validation and test splits of books and news, the "
        "lowest of the four named; causal losses in nats per token on the test split, by the run that made the model.",
    ]


def goal_and_result(found: Record) -> tuple[str, str]:
    """Return a starter's goal and what it reached, in words."""
    if found["model_type"] == "memory_autoencoder":
        length = found["chunk_length"]
        goal = {32: "99.5 %", 64: "97 %"}.get(length, "reported")
        return f"{goal} of {length} tokens a vector", f"{lowest(found, 'retention')}"
    if found["model_type"] == "memory_encoder_decoder":
        clm = found["run_metrics"].get("clm", {})
        length = found["source_length"]
        vectors = length // found["chunk_length"]
        goal = "98 % of blank copy and copy, causal loss under no memory" if length >= 512 else "reported"
        reached = (
            f"{length} tokens through {vectors} vectors: blank copy {lowest(found, 'blank_copy')}, "
            f"copy {lowest(found, 'copy')}"
        )
        if "no_memory_model" in clm:
            memory, without = clm["memory"]["loss"], clm["no_memory_model"]["loss"]
            reached += f"; causal {memory:.3f}, no memory {without:.3f}{'' if memory < without else ' (missed)'}"
        return goal, reached
    validation = next(iter(found["run_metrics"].values()), {}).get("validation_split", {})
    return "a causal decoder", f"{validation['loss']:.3f} nats per token" if "loss" in validation else "not measured"


def lowest(found: Record, suite: str) -> str:
    """Lowest accuracy over the splits, and where it is."""
    accuracy, split = min(
        (values[suite]["memory"]["token_accuracy"], name) for name, values in found["splits"].items()
    )
    return f"{accuracy:.2%} ({split})"


def build_parser() -> argparse.ArgumentParser:
    """Build the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.starters", description="Measure the starters as they are published."
    )
    parser.add_argument("folders", nargs="*", help="folders (default: all of model_cards/)")
    parser.add_argument("--limit", type=int, default=64, metavar="N", help="most rows of 512 tokens (default 64)")
    parser.add_argument("--repetitions", type=int, default=3, metavar="N", help="times each is loaded (default 3)")
    parser.add_argument("--threads", type=int, metavar="N", help="processor threads")
    parser.add_argument("--out", help="where the record goes (default: benchmarks/results/starters.json)")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    words = sys.argv[1:] if arguments is None else arguments
    options = build_parser().parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    folders = [Path(name) for name in options.folders] or sorted(path for path in FOLDERS.iterdir() if path.is_dir())
    command = " ".join(["python -m benchmarks.starters", *map(portable_path, words)])
    record = describe_run("starters", command, {})
    try:
        starters = {
            folder.name: measure_starter(folder, limit=options.limit, repetitions=options.repetitions)
            for folder in folders
        }
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    record["metrics"] = {"starters": starters}
    for name, found in starters.items():
        print(f"{name}: {goal_and_result(found)[1]}")
    print(f"record: {portable_path(save_record(record, 'starters', options.out))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
