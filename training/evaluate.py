"""Measure a trained model on held-out text, with controls; prints a table and writes a record.

```bash
python -m training.evaluate runs/quickstart/hub --suite blank_copy --suite copy --limit 64
python -m training.evaluate runs/quickstart/stages/autoencoder/model --suite retention --text notes.txt
python -m training.evaluate runs/quickstart/hub --suite fidelity --domain news=training/corpora/wikinews/test.parquet
python -m training.evaluate runs/quickstart/hub --suite benchmarks --data FOLDER --tasks xquad,boolq --limit 200
```

What each suite asks is described in `training/measure/suites.py`, in `training/fidelity.py` and,
for the benchmarks, in `training/measure/benchmarks.py`.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .command_line import Parser, check_place, named_file, run_command, whole_number
from .data.texts import file_checksums, load_texts, tokenise_documents
from .data.tokenizer import special_tokens_of, tokenizer_checksum
from .fidelity import evaluate_fidelity, text_lines
from .measure.benchmarks import LANGUAGE, MODES, benchmark_lines, chosen_tasks, measure_benchmarks
from .measure.suites import (
    FIDELITY,
    SUITES,
    Evaluation,
    check_suite,
    default_length,
    evaluate_suite,
    results_table,
    spread_rows,
)
from .places import REPOSITORY, portable_path, program
from .publishing.hub_folder import check_complete, load_checkpoint, load_processor
from .recipes.recipe import resolve_files
from .records.record import Cells, Measurement, read_json, write_record
from .train.build import count_parameters
from .train.inputs import byte_lengths_of

BENCHMARKS = "benchmarks"
WAYS = (*MODES, "unrelated")


def measure_suites(
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
    keep: Callable[[dict[str, Any]], None] | None = None,
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
        num_generated_rows (`int`): Rows of the suite copy that are also written free-running.
        keep (`Callable`, *optional*): Is given what is measured so far after each suite.

    Returns:
        `dict`: Suite -> condition -> metrics.

    Raises:
        ValueError: If a suite is unknown or does not fit the model, or the text is too short.
    """
    config = model.config
    evaluation = Evaluation(
        model,
        special_tokens_of(tokenizer, getattr(config, "copy_token_id", None), getattr(config, "blank_token_id", None)),
        chunk_length=config.chunk_length,
        window_length=getattr(config, "window_length", config.chunk_length),
        byte_lengths=byte_lengths_of(tokenizer),
        batch_size=batch_size,
        num_generated_rows=min(limit, num_generated_rows),
    )
    for suite in suites:
        check_suite(evaluation, suite)
    tokens = tokenise_documents(tokenizer, texts).tokens
    # All rows are cut before the first suite is measured: a text that is too short for the last one says so now.
    lengths = {suite: length or default_length(evaluation, suite) for suite in suites}
    rows = {suite: spread_rows(tokens, row_length=lengths[suite], limit=limit) for suite in suites}
    metrics: dict[str, Any] = {}
    for suite in suites:
        if suite == FIDELITY:
            metrics[suite] = evaluate_fidelity(evaluation, tokenizer, rows[suite])
        else:
            metrics[suite] = evaluate_suite(evaluation, suite, rows[suite], baselines)
        if keep is not None:
            keep(dict(metrics))
    return metrics


def find_model(name: str) -> Path:
    """Return the folder of a model: the one named, the shipped starter, or what the Hub has under that name.

    Raises:
        ValueError: If there is neither.
    """
    folder = Path(name).expanduser()
    shipped = REPOSITORY / "model_cards" / name
    if not folder.is_dir() and "/" not in name and (shipped / "config.json").is_file():
        return shipped
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


def model_config(name: str, option: str = "MODEL") -> PreTrainedConfig:
    """Read the configuration of a model, to say early that there is none.

    Args:
        name (`str`): Folder or Hub id.
        option (`str`): What it was given as, for the message.

    Raises:
        ValueError: If there is no model of that name.
    """
    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{option} {name} is no folder or Hub id of a model ({str(error).splitlines()[0]}); correct the name"
        ) from error


def whole_numbers(text: str) -> list[int]:
    """Read whole numbers with commas between them, for `add_argument(type=...)`."""
    return [whole_number()(word) for word in text.split(",")]


def build_parser() -> argparse.ArgumentParser:
    """Build the command line."""
    parser = Parser(
        prog=program("evaluate"),
        description="Measure a trained model with controls: other texts' memories, no memory.",
    )
    add = parser.add_argument
    add("model", help="folder of a model (runs/<name>/hub), or a Hub repository")
    add("--suite", action="append", required=True, choices=(*SUITES, FIDELITY, BENCHMARKS), help="what to "
        "measure; may be given several times")  # fmt: skip
    add("--domain", action="append", default=[], type=named_file, metavar="NAME=FILE", help="fidelity: other text to "
        "measure it on")  # fmt: skip
    add("--tasks", metavar="NAMES", help="benchmarks: which, with commas between them, and =ITEMS where --limit "
        "is not to hold (default: all)")  # fmt: skip
    add("--modes", default=",".join(WAYS), metavar="NAMES", help="benchmarks: ways of reading (default: all, "
        f"unrelated for {', '.join(LANGUAGE)} only)")  # fmt: skip
    add("--begin", action="store_true", help="benchmarks: a begin token before what is left of a context, for models "
        "that were trained so")  # fmt: skip
    add("--sizes", type=whole_numbers, metavar="NUMBERS", help="benchmarks: tokens of needle prompts, with commas "
        "between them (default: 512 to 8,192)")  # fmt: skip
    add("--keep", default="runs/evaluations/benchmarks.json", metavar="FILE", help="benchmarks: keeps items; what is "
        "there is not measured again (default runs/evaluations/benchmarks.json)")  # fmt: skip
    add("--data", metavar="FOLDER", help="benchmarks: folder of their files")
    add("--clear", type=whole_number(), metavar="N", help="benchmarks: tokens of a context that stay text (default: "
        "the model's window)")  # fmt: skip
    add("--min-memory-chunks", type=whole_number(0), default=1, metavar="N", help="benchmarks: chunks of a context "
        "that become memories however short it is (default 1)")  # fmt: skip
    add("--limit", type=whole_number(), default=256, metavar="N", help="most rows of a suite (default 256)")
    add("--text", action="append", default=[], metavar="FILE", help="text to read (default: the model's own test "
        "split)")  # fmt: skip
    add("--length", type=whole_number(), metavar="N", help="tokens of a row (default: by suite)")
    add("--batch-size", type=whole_number(), default=32, metavar="N", help="rows at a time (default 32)")
    add("--no-memory", metavar="MODEL", help="clm: decoder trained without memory, as baseline")
    add("--full-context", metavar="MODEL", help="clm: decoder trained with full context, as baseline")
    add("--record", metavar="FILE", help="where the record goes (default: runs/evaluations/<time>.json)")
    return parser


def run_benchmarks(options: argparse.Namespace, measurement: Measurement, path: Path) -> dict[str, Any]:
    """Run benchmarks in all modes and return the record, which is written anew after each task."""
    if options.suite != [BENCHMARKS]:
        raise ValueError("--suite benchmarks has rows and options of its own; measure the other suites apart")
    if options.data is None or not Path(options.data).is_dir():
        raise ValueError(f"--data is {options.data}; expected the folder with the benchmarks' files")
    tasks = chosen_tasks(options.tasks, options.limit)
    modes = [name for name in WAYS if name in options.modes.split(",")]
    if set(options.modes.split(",")) - set(modes) or "full" not in modes:
        raise ValueError(f"--modes is {options.modes}; expected full and some of {', '.join(WAYS[1:])}")
    folder = find_model(options.model)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder).to(device).eval()
    tokenizer = load_processor(folder)
    if tokenizer is None:
        raise ValueError(f"{options.model} has no tokenizer beside it; save one there")
    cut = {name: getattr(options, name) for name in ("batch_size", "clear", "min_memory_chunks", "begin")}
    files = file_checksums([path for path in sorted(Path(options.data).iterdir()) if path.is_file()])
    record: dict[str, Any] = {}

    def keep(measured: dict[str, Any], status: str = "running") -> None:
        inputs = {"model": portable_path(options.model), "files": files}
        recipe = {**cut, "limit": options.limit, "tasks": tasks, "modes": modes, "sizes": options.sizes}
        parts = {"inputs": inputs, "recipe": recipe, "parameters": count_parameters(model)}
        record.update(measurement.record(device, status, metrics=measured, **parts))
        write_record(path, record)

    measured = measure_benchmarks(
        model, tokenizer, tasks, data=str(Path(options.data).resolve()), name=str(folder), inputs=files, modes=modes,
        sizes=options.sizes, cells=Cells(options.keep, BENCHMARKS), keep=keep, **cut
    )  # fmt: skip
    keep(measured, "success")
    print("\n".join(benchmark_lines(measured)))
    print(f"record: {path}")
    return record


def run(options: argparse.Namespace, command: str) -> dict[str, Any]:
    """Evaluate as the command line says; return the record.

    Everything that the command line names is looked for before the model is loaded, and the record is written anew
    after each suite, so that what was measured stays if a later one fails.
    """
    measurement = Measurement(command)
    default = f"runs/evaluations/{measurement.created_at:%Y%m%d-%H%M%S}.json"
    path = check_place(options.record or default)
    if BENCHMARKS in options.suite:
        return run_benchmarks(options, measurement, path)
    if options.domain and FIDELITY not in options.suite:
        raise ValueError("--domain is for --suite fidelity; add the suite or leave the domain out")
    domains = {name: resolve_files([file], "--domain")[0] for name, file in options.domain}
    given = {"no_memory": options.no_memory, "full_context": options.full_context}
    given = {name: place for name, place in given.items() if place is not None}
    for name, place in given.items():
        model_config(place, f"--{name.replace('_', '-')}")
    folder = find_model(options.model)
    check_complete(folder)
    files = find_texts(folder, options.text)
    texts = {name: load_texts(part) for name, part in {"": files, **{n: [f] for n, f in domains.items()}}.items()}

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, tokenizer, _ = load_model(options.model)
    model = model.to(device)
    baselines = {name: AutoModelForCausalLM.from_pretrained(place).to(device) for name, place in given.items()}
    limits = {"limit": options.limit, "length": options.length, "batch_size": options.batch_size}
    record: dict[str, Any] = {}
    measured: dict[str, Any] = {}

    def keep(found: dict[str, Any], domain: str = "", status: str = "running") -> None:
        measured.update({f"{suite}, {domain}" if domain else suite: result for suite, result in found.items()})
        inputs = {
            "model": portable_path(options.model),
            "files": file_checksums([*files, *domains.values()]),
            "tokenizer": tokenizer_checksum(tokenizer),
        }
        record.update(
            measurement.record(
                device, status, inputs=inputs, recipe=limits, parameters=count_parameters(model), metrics=measured
            )
        )
        write_record(path, record)

    measure_suites(model, tokenizer, texts[""], options.suite, baselines=baselines, keep=keep, **limits)
    for name in domains:
        keep(measure_suites(model, tokenizer, texts[name], [FIDELITY], **limits), name)
    keep({}, status="success")
    print(results_table(measured))
    for suite, result in measured.items():
        if "text" in result.get("memory", {}):
            print("\n".join([f"{suite}:", *text_lines(result["memory"]["text"])]))
    print(f"record: {path}")
    return record


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    return run_command(build_parser(), run, arguments)


if __name__ == "__main__":
    sys.exit(main())
