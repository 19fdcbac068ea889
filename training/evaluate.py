"""Measure a trained model on held-out text, with controls; prints a table and writes a record.

```bash
python -m training.evaluate runs/quickstart/hub --suite blank_copy --suite copy --limit 64
python -m training.evaluate runs/quickstart/stages/autoencoder/model --suite retention --text notes.txt
python -m training.evaluate runs/quickstart/hub --suite fidelity --domain news=training/corpora/wikinews/test.parquet
```

What each suite asks is described in `training/measure/suites.py`, and in `training/fidelity.py`.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from training.command_line import run_command
from training.data.texts import file_checksums, load_texts, tokenise_documents
from training.data.tokenizer import special_tokens_of, tokenizer_checksum
from training.fidelity import evaluate_fidelity, text_lines
from training.measure.suites import SUITES, Evaluation, default_length, evaluate_suite, results_table, spread_rows
from training.places import portable_path
from training.publish import load_checkpoint
from training.recipes.recipe import resolve_files
from training.records.record import describe_code, describe_hardware, peak_memory_bytes, read_json, write_record
from training.train.build import count_parameters
from training.train.inputs import byte_lengths_of

FIDELITY = "fidelity"


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    suites: Sequence[str],
    *,
    limit: int = 256,
    length: int | None = None,
    batch_size: int = 32,
    baselines: dict[str, PreTrainedModel] | None = None,
    num_generated_rows: int = 32,
) -> dict[str, Any]:
    """Run suites on texts.

    Args:
        model (`PreTrainedModel`): A memory autoencoder or a memory encoder-decoder.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        texts (`Sequence[str]`): Documents.
        suites (`Sequence[str]`): Names of suites.
        limit (`int`): Most rows of a suite, spread evenly over the text.
        length (`int`, *optional*): Tokens of a row; default: a chunk, two windows for copies, four for clm.
        batch_size (`int`): Rows per forward call.
        baselines (`dict[str, PreTrainedModel]`, *optional*): `no_memory` and `full_context` decoders, for clm.
        num_generated_rows (`int`): Rows of the suite copy that are also written freely.

    Returns:
        `dict`: Suite -> condition -> metrics.

    Raises:
        ValueError: If a suite is unknown or does not fit the model, or the text is too short.
    """
    config = model.config
    evaluation = Evaluation(
        model,
        special_tokens_of(tokenizer),
        chunk_length=config.chunk_length,
        window_length=getattr(config, "window_length", config.chunk_length),
        byte_lengths=byte_lengths_of(tokenizer),
        batch_size=batch_size,
        num_generated_rows=min(limit, num_generated_rows),
    )
    tokens = tokenise_documents(tokenizer, texts).tokens
    metrics = {}
    for suite in suites:
        rows = spread_rows(tokens, row_length=length or default_length(evaluation, suite), limit=limit)
        if suite == FIDELITY:
            metrics[suite] = evaluate_fidelity(evaluation, tokenizer, rows)
        else:
            metrics[suite] = evaluate_suite(evaluation, suite, rows, baselines)
    return metrics


def find_model(name: str) -> Path:
    """Return the folder of a model: the one named, or what the Hub has under that name.

    Raises:
        ValueError: If there is neither.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(name))
        except Exception as error:  # the client raises a dozen unrelated classes here
            raise ValueError(f"{name} is no folder and no Hub repository that can be read ({error})") from error
    return folder


def load_model(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Path]:
    """Load a model and its tokenizer from a folder or the Hub; also return the folder.

    Raises:
        ValueError: If there is neither, the folder is incomplete, or encoder and decoder have a tokenizer each.
    """
    folder = find_model(name)
    model, processor = load_checkpoint(folder)
    if processor is None:
        return model, AutoTokenizer.from_pretrained(folder), folder
    if processor.encoder_tokenizer is not None:
        raise ValueError(
            f"the encoder of {name} has a tokenizer of its own; these suites read text that both parts share, so "
            "evaluate a model with one tokenizer"
        )
    return model, processor.tokenizer, folder


def find_texts(folder: Path, given: Sequence[str]) -> list[Path]:
    """Return the text files to evaluate on: those given, else the test split in the model's record.

    Raises:
        ValueError: If there is nothing to read.
    """
    if given:
        return resolve_files(list(given), "--text")
    # Beside a Hub folder's weights, or above a stage's model in the folder of its run.
    for place in (folder, *folder.resolve().parents[:3]):
        record = read_json(place / "record.json")
        if record is not None:
            return resolve_files(record["recipe"]["data"]["test"], "data.test of the model's record")
    raise ValueError(f"{folder} has no record that names a test split; give the text with --text FILE")


def build_parser() -> argparse.ArgumentParser:
    """Build the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m training.evaluate",
        description="Measure a trained model with controls: other texts' memories, no memory.",
    )
    parser.add_argument("model", help="folder of a model (runs/<name>/hub), or a Hub repository")
    parser.add_argument(
        "--suite",
        action="append",
        required=True,
        choices=(*SUITES, FIDELITY),
        help="what to measure; may be given several times",
    )
    parser.add_argument(
        "--domain", action="append", default=[], metavar="NAME=FILE", help="fidelity: other text to measure it on"
    )
    parser.add_argument("--limit", type=int, default=256, metavar="N", help="most rows of a suite (default 256)")
    parser.add_argument(
        "--text",
        action="append",
        default=[],
        metavar="FILE",
        help="text to read (default: the model's own test split)",
    )
    parser.add_argument("--length", type=int, metavar="N", help="tokens of a row (default: by suite)")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="rows at a time (default 32)")
    parser.add_argument("--no-memory", metavar="MODEL", help="clm: decoder trained without memory, as baseline")
    parser.add_argument("--full-context", metavar="MODEL", help="clm: decoder trained with full context, as baseline")
    parser.add_argument(
        "--record", metavar="FILE", help="where the record goes (default: results/scratch/evaluation-<time>.json)"
    )
    return parser


def run(options: argparse.Namespace, command: str) -> dict[str, Any]:
    """Evaluate as the command line says; return the record."""
    for name in ("limit", "length", "batch_size"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {value}, expected 1 or more")
    started = time.perf_counter()
    created_at = datetime.now(timezone.utc)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, tokenizer, folder = load_model(options.model)
    files = find_texts(folder, options.text)
    given = {"no_memory": options.no_memory, "full_context": options.full_context}
    baselines = {
        name: AutoModelForCausalLM.from_pretrained(place).to(device)
        for name, place in given.items()
        if place is not None
    }
    metrics = evaluate(
        model.to(device),
        tokenizer,
        load_texts(files),
        options.suite,
        limit=options.limit,
        length=options.length,
        batch_size=options.batch_size,
        baselines=baselines,
    )
    other = dict(_domain(word) for word in options.domain)
    if other and FIDELITY not in options.suite:
        raise ValueError("--domain is for --suite fidelity; add the suite or leave the domain out")
    for name, file in other.items():
        rest = {"limit": options.limit, "length": options.length, "batch_size": options.batch_size}
        found = evaluate(model, tokenizer, load_texts([file]), [FIDELITY], **rest)
        metrics[f"{FIDELITY}, {name}"] = found[FIDELITY]
    files = [*files, *other.values()]
    record = {
        "run": {
            "recipe_name": None,
            "command": command,
            "created_at": created_at.isoformat(timespec="seconds"),
            "status": "success",
        },
        "code": describe_code(),
        "hardware": describe_hardware(device),
        "inputs": {
            "model": portable_path(options.model),
            "files": file_checksums(files),
            "tokenizer": tokenizer_checksum(tokenizer),
        },
        "recipe": {"limit": options.limit, "length": options.length, "batch_size": options.batch_size},
        "parameters": count_parameters(model),
        "metrics": metrics,
        "seconds": round(time.perf_counter() - started, 2),
        "peak_memory_bytes": peak_memory_bytes(),
    }
    path = Path(options.record or f"results/scratch/evaluation-{created_at:%Y%m%d-%H%M%S}.json")
    write_record(path, record)
    print(results_table(metrics))
    for suite, result in metrics.items():
        if "text" in result.get("memory", {}):
            print("\n".join([f"{suite}:", *text_lines(result["memory"]["text"])]))
    print(f"record: {path}")
    return record


def _domain(word: str) -> tuple[str, Path]:
    name, equals, file = word.partition("=")
    if not (name and equals and file):
        raise ValueError(f"--domain {word}: expected NAME=FILE, e.g. news=training/corpora/wikinews/test.parquet")
    return name, resolve_files([file], "--domain")[0]


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    return run_command(build_parser(), run, arguments)


if __name__ == "__main__":
    sys.exit(main())
