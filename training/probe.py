"""Measure how much of its input a model's embedding holds: freeze the model, train a decoder on its vectors, count.

```bash
python -m training.probe sentence-transformers/all-MiniLM-L6-v2 --lengths 8,16,32,64
python -m training.probe mine=runs/quickstart/stages/autoencoder/model other=some/model@mean --text notes.txt
```

| condition | vectors that a text is written back from | says |
|---|---|---|
| embedding | its own, of the model as given | what comes back |
| untrained | its own, of the same architecture with fresh weights | what any such network lets through |
| shuffled | another text's, in training too | what is guessed from the language alone |

What comes back is a lower bound, whatever it is: the output names the budget, says where the decoder's loss was still
falling, and what published inversions reach. Nothing here shows that an embedding hides its text.

Every model, length and condition is a cell of its own, kept in a file; a second call does only what is missing.
Source: Badger 2026, arXiv 2602.13466, information retention of frozen models.
"""

import argparse
import hashlib
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from .command_line import Parser, check_place, positive_number, run_command, whole_number
from .data.texts import file_checksums, load_texts
from .measure.frozen import POSITIONS, UNTRAINED, FrozenEncoder, TextRows, cut_rows, load_encoder, read_all
from .measure.inversion import DecoderSize, invert
from .places import portable_path, program
from .recipes.recipe import resolve_files
from .records.figures import write_probe_figure
from .records.record import Measurement, data_digest, read_json, write_json, write_record
from .train.fit import Budget

PUBLISHED = (
    "published inversions of 32 tokens: 92% exact texts (vec2text, arXiv 2310.06816, GTR, corrected in rounds), 77 to "
    "81% of the tokens (arXiv 2602.11047, Qwen3, Gemma and jina embeddings)"
)
CONDITIONS = ("embedding", "untrained", "shuffled")
TABLES = ("frozen", "replaced")


@dataclass(frozen=True)
class Probe:
    """How models are probed.

    Attributes:
        train (`list[str]`): Documents that decoders are trained on, in random order up to `train_tokens`.
        test (`list[str]`): Other documents, which are counted, likewise up to `test_tokens`.
        lengths (`tuple[int, ...]`): Tokens of a text, by each model's own tokenizer.
        conditions (`tuple[str, ...]`): Of `CONDITIONS`.
        size (`DecoderSize`): The decoder, the same for all models.
        budget (`Budget`): Its training, the same for all models.
        train_tokens (`int`): Most tokens of text to train on. With fewer than the budget reads texts come again, and a
            decoder learns them by heart before it learns the vectors.
        test_tokens (`int`): Most tokens of text to count.
        table (`str`): `"frozen"`: the model as it is. `"replaced"`: with a new token table, trained with the decoder.
        only_finished (`bool`): Train nothing; report the cells that earlier, perhaps interrupted, calls finished.
    """

    train: list[str] = field(repr=False)
    test: list[str] = field(repr=False)
    lengths: tuple[int, ...] = (8, 16, 32, 64)
    conditions: tuple[str, ...] = CONDITIONS
    size: DecoderSize = DecoderSize()
    budget: Budget = Budget(steps=200, batch_tokens=1024)
    train_tokens: int = 204_800
    test_tokens: int = 8192
    table: str = "frozen"
    only_finished: bool = False

    def settings(self) -> dict[str, Any]:
        """Everything but text and model that decides the numbers."""
        names = ("train_tokens", "test_tokens", "table")
        return {name: getattr(self, name) for name in names} | {
            "decoder": asdict(self.size),
            "budget": asdict(self.budget),
        }


def probe(
    models: dict[str, str], setting: Probe, folder: Path, *, device: torch.device | None = None, **loading: Any
) -> list[dict[str, Any]]:
    """Probe models.

    Args:
        models (`dict[str, str]`): Name in the table -> what [`load_encoder`] takes.
        setting (`Probe`): How.
        folder (`Path`): Where finished cells, vectors and checkpoints are kept.
        device (`torch.device`, *optional*): Where to compute.
        loading: Further arguments of [`load_encoder`].

    Returns:
        `list`: For each model its name, sizes, and `lengths`: length -> condition -> metrics.

    Raises:
        ValueError: If a model, a length or the text does not fit; all are checked before the first training.
    """
    device = device or torch.device("cpu")
    for name, place in models.items():
        encoder = load_encoder(place, seed=setting.budget.seed, **loading)
        for length in setting.lengths:
            try:
                encoder.num_vectors(length)
                cut_rows(encoder.tokenizer, setting.train, length, limit=2)
                cut_rows(encoder.tokenizer, setting.test, length, limit=2)
            except ValueError as error:
                raise ValueError(f"{name}, length {length}: {error}") from error
    results = []
    for name, place in models.items():
        results.append(_probe_model(name, place, setting, folder, device, loading))
    return results


def _probe_model(
    name: str, place: str, setting: Probe, folder: Path, device: torch.device, loading: dict[str, Any]
) -> dict[str, Any]:
    trained = load_encoder(place, seed=setting.budget.seed, **loading).to(device)
    encoders = {"trained": trained}
    train_texts, test_texts = (in_random_order(texts, setting.budget.seed) for texts in (setting.train, setting.test))
    lengths: dict[str, dict[str, Any]] = {}
    for length in setting.lengths:
        train = cut_rows(trained.tokenizer, train_texts, length, max(2, setting.train_tokens // length))
        test = cut_rows(trained.tokenizer, test_texts, length, max(2, setting.test_tokens // length))
        conditions = lengths.setdefault(str(length), {})
        for condition in setting.conditions:
            if condition == "untrained" and place.startswith(UNTRAINED):
                continue
            which = "untrained" if condition == "untrained" else "trained"
            if which not in encoders:
                encoders[which] = load_encoder(UNTRAINED + place, seed=setting.budget.seed, **loading).to(device)
            encoder = encoders[which]
            if setting.table == "replaced":
                encoder = encoder.with_fresh_table(setting.budget.seed).to(device)
            result = _cell(name, encoder, condition, train, test, setting, folder, device)
            if result is not None:
                conditions[condition] = result
    return {
        "name": name,
        "model": portable_path(place),
        "model_type": trained.body.config.model_type,
        "position": trained.position,
        "width": trained.width,
        "vocab_size": trained.vocab_size,
        "parameters": sum(parameter.numel() for parameter in trained.body.parameters()),
        "weights": weights_checksum(trained.body),
        "lengths": lengths,
    }


def _cell(
    name: str,
    encoder: FrozenEncoder,
    condition: str,
    train: TextRows,
    test: TextRows,
    setting: Probe,
    folder: Path,
    device: torch.device,
) -> dict[str, Any] | None:
    length = train.tokens.shape[1]
    read_by = {
        "weights": weights_checksum(encoder.body),
        "position": encoder.position,
        "chunk_length": encoder.chunk_length,
        "bottleneck": encoder.bottleneck and weights_checksum(encoder.bottleneck),
    }
    texts = {"train": tokens_checksum(train.tokens), "test": tokens_checksum(test.tokens)}
    asked = {"encoder": read_by, "texts": texts, "shuffled": condition == "shuffled", **setting.settings()}
    file = folder / "cells" / f"{data_digest(asked)}.json"
    before = read_json(file)
    if before is not None or setting.only_finished:
        return before and before["result"]

    def vectors(rows: TextRows) -> torch.Tensor:
        kept = folder / "vectors" / f"{data_digest({**read_by, 'tokens': tokens_checksum(rows.tokens)})}.safetensors"
        if kept.is_file():
            return load_file(kept)["vectors"]
        read = read_all(encoder, rows.tokens)
        if setting.table == "frozen":
            kept.parent.mkdir(parents=True, exist_ok=True)
            save_file({"vectors": read}, kept.with_suffix(".part"))
            kept.with_suffix(".part").replace(kept)
        return read

    started = time.perf_counter()
    checkpoint = file.with_suffix(".checkpoint")
    label = f"{name}, {length} tokens, {condition}"
    result = invert(
        encoder,
        train,
        test,
        setting.size,
        setting.budget,
        shuffled=condition == "shuffled",
        checkpoint=checkpoint,
        vectors=vectors,
        device=device,
        label=label,
    )
    result["seconds"] = round(time.perf_counter() - started, 1)
    write_json(file, {"label": label, "asked": asked, "result": result})
    checkpoint.unlink(missing_ok=True)
    print(f"{label}: {result['token_accuracy']:.1%} of the tokens, {result['loss']:.3f} nats", flush=True)
    return result


def weights_checksum(module: torch.nn.Module) -> str:
    """Return a digest of a module's weights, in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def tokens_checksum(tensor: torch.Tensor) -> str:
    """Return a digest of token ids and of their shape."""
    return hashlib.sha256(str(tuple(tensor.shape)).encode() + tensor.contiguous().numpy().tobytes()).hexdigest()[:16]


def in_random_order(texts: Sequence[str], seed: int) -> list[str]:
    """Return documents in another order, so that the most tokens to read are not all of the first book.

    >>> sorted(in_random_order(["a", "b", "c"], seed=0))
    ['a', 'b', 'c']
    """
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed))
    return [texts[index] for index in order.tolist()]


def split_texts(texts: Sequence[str], share: float = 0.1) -> tuple[list[str], list[str]]:
    r"""Split documents into training and test: the last documents, or the end of a single one, are the test.

    >>> split_texts(["a", "b", "c"], share=0.3)
    (['a', 'b'], ['c'])
    >>> split_texts(["one line\nand another\nand a third\n"], share=0.3)
    (['one line\nand another\n'], ['and a third\n'])
    """
    if len(texts) > 1:
        num_test = max(1, round(share * len(texts)))
        return list(texts[:-num_test]), list(texts[-num_test:])
    cut = round((1 - share) * len(texts[0]))
    cut = texts[0].rfind("\n", 0, cut) + 1 or cut
    return [texts[0][:cut]], [texts[0][cut:]]


def results_table(models: Sequence[dict[str, Any]]) -> str:
    """Lay results out: a line for each model and condition, token accuracy and information ratio by length."""
    lengths = list(models[0]["lengths"])
    head = "".join(f"{length + ' tokens':>24}" for length in lengths)
    lines = ["token accuracy (95 % interval), information ratio against uniform", f"{'':<36}{head}"]
    for model in models:
        for condition in CONDITIONS:
            cells = [model["lengths"][length].get(condition) for length in lengths]
            if any(cell is None for cell in cells):
                continue
            text = "".join(
                f"{cell['token_accuracy']:>9.1%} ±{_half(cell):.1%}{cell['information_ratio']:>8.2f}".rjust(24)
                for cell in cells
            )
            lines.append(f"{model['name'] + ', ' + condition:<36}{text}")
    return "\n".join(lines)


def budget_lines(models: Sequence[dict[str, Any]], setting: Probe) -> list[str]:
    """Say what was spent, which decoders could have been trained further, and what others reach.

    Args:
        models (`Sequence[dict]`): From [`probe`].
        setting (`Probe`): How they were probed.
    """
    budget = setting.budget
    lines = [
        f"budget: one pass of a {setting.size.model_type} of {setting.size.num_hidden_layers} layers and width "
        f"{setting.size.hidden_size}, {budget.steps:,} steps of {budget.batch_tokens:,} tokens"
    ]
    for model in models:
        for length, cells in model["lengths"].items():
            cell = cells.get("embedding")
            if cell is None or cell.get("at_plateau"):
                continue
            fall = cell.get("fall")
            told = "too few texts to tell whether its loss still falls"
            if fall is not None:
                told = f"its loss still fell by {fall:.1%} over the last 20% of the steps: more steps give more"
            lines.append(f"{model['name']}, {length} tokens: {told}")
    return [*lines, f"a lower bound, no measure of what an attacker reaches; {PUBLISHED}"]


def _half(cell: dict[str, Any]) -> float:
    low, high = cell["token_accuracy_interval"]
    return (high - low) / 2


def named_models(given: Sequence[str]) -> dict[str, str]:
    """Read `NAME=MODEL` or `MODEL`.

    Raises:
        ValueError: If two models have one name.

    >>> named_models(["mine=runs/x/model@mean", "some/bert"])
    {'mine': 'runs/x/model@mean', 'some/bert': 'some/bert'}
    """
    models: dict[str, str] = {}
    for word in given:
        name, equals, place = word.partition("=")
        name, place = (name, place) if equals else (portable_path(word), word)
        if name in models:
            raise ValueError(f"two models are called {name!r}; name them apart: NAME=MODEL")
        models[name] = place
    return models


def numbers(text: str) -> tuple[int, ...]:
    """Read lengths: `8,16,32`."""
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError:
        found = (0,)
    if min(found) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected whole numbers above 0 with commas between, such as 8,16")
    return found


def names(text: str) -> tuple[str, ...]:
    """Read controls: `untrained,shuffled`, or `none`."""
    chosen = () if text == "none" else tuple(text.split(","))
    for name in chosen:
        if name not in CONDITIONS[1:]:
            raise argparse.ArgumentTypeError(f"{name!r} is no control; known: {', '.join(CONDITIONS[1:])}, none")
    return (CONDITIONS[0], *chosen)


def build_parser() -> argparse.ArgumentParser:
    """Build the command line."""
    parser = Parser(
        prog=program("probe"),
        description="How much of its input does a model's embedding hold? Freeze it, train a decoder, count tokens.",
        epilog="example: %(prog)s mine=some/model@mean --text notes.txt --lengths 16,64",
    )
    add = parser.add_argument
    add("models", nargs="+", metavar="MODEL", help="folder or Hub id; NAME=MODEL names it in the table, "
        f"MODEL@mean reads another state ({', '.join(POSITIONS)}), untrained:MODEL has fresh weights")  # fmt: skip
    add("--text", action="append", default=[], metavar="FILE", help="text to train the decoder on (default: the books "
        "of this repository); without --test its last tenth is the test")  # fmt: skip
    add("--test", action="append", default=[], metavar="FILE", help="text to count on")
    add("--lengths", type=numbers, default=(8, 16, 32, 64), metavar="N,N", help="tokens of a text (8,16,32,64)")
    add("--controls", type=names, default=CONDITIONS, metavar="NAMES", help="untrained,shuffled (default) or none")
    add("--table", choices=TABLES, default="frozen", help="the model's token table: frozen, or replaced and trained")
    add("--position", choices=POSITIONS, help="which state is the vector (default: as the model says, else last)")
    add("--chunk", type=whole_number(), metavar="N", help="read texts in pieces of N tokens, a vector each")
    add("--tokenizer", metavar="MODEL", help="folder or Hub id of the tokenizer, if it is not beside the model")
    add("--trust-remote-code", action="store_true", help="run code that comes with a model")
    add("--decoder", choices=("masked_mixer", "llama"), default="masked_mixer", help="kind of decoder")
    add("--width", type=whole_number(), default=256, metavar="N", help="width of the decoder (256)")
    add("--layers", type=whole_number(), default=2, metavar="N", help="layers of the decoder (2)")
    add("--heads", type=whole_number(0), default=4, metavar="N", help="heads of the decoder (4)")
    add("--expansion", choices=("unroll", "repeat"), default="unroll", help="how the decoder reads a vector")
    spend = parser.add_mutually_exclusive_group()
    spend.add_argument(
        "--steps", type=whole_number(), default=200, metavar="N", help="training steps of each decoder (200)"
    )
    spend.add_argument(
        "--tokens", type=whole_number(), metavar="N", help="instead: tokens that each decoder is trained on"
    )
    add("--batch-tokens", type=whole_number(), default=1024, metavar="N", help="tokens of a step (1024)")
    add("--optimizer", choices=("muon", "adamw"), default="muon", help="optimizer of the decoder")
    add("--learning-rate", type=positive_number, default=5e-3, metavar="X", help="peak of AdamW (5e-3)")
    add(
        "--train-tokens",
        type=whole_number(),
        metavar="N",
        help="most tokens of text to train on (default: each text read once)",
    )
    add("--test-tokens", type=whole_number(), default=8192, metavar="N", help="most tokens of text to count on (8192)")
    add("--finished", action="store_true", help="train nothing: table and figure of what is finished so far")
    add("--seed", type=int, default=0, metavar="N", help="of fresh weights and of the order of texts")
    add("--threads", type=whole_number(), metavar="N", help="processor threads")
    add("--to", default="runs/probe", metavar="FOLDER", help="where cells, record and figure go (runs/probe)")
    return parser


def read_texts(text: Sequence[str], test: Sequence[str]) -> tuple[list[str], list[str], list[Path]]:
    """Return training documents, test documents and their files.

    Raises:
        ValueError: If a file cannot be read, or there is a test but no training text.
    """
    if test and not text:
        raise ValueError("--test is given without --text; name the text to train the decoder on as well")
    if not text:
        text, test = ["training/corpora/books/train.parquet"], ["training/corpora/books/test.parquet"]
    train_files = resolve_files(list(text), "--text")
    test_files = resolve_files(list(test), "--test") if test else []
    documents = load_texts(train_files)
    train, held_out = (documents, load_texts(test_files)) if test_files else split_texts(documents)
    return train, held_out, train_files + test_files


def run(options: argparse.Namespace, command: str) -> dict[str, Any]:
    """Probe as the command line says; return the record."""
    measurement, folder = Measurement(command), check_place(options.to)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    train, test, files = read_texts(options.text, options.test)
    steps = options.steps if options.tokens is None else max(1, options.tokens // options.batch_tokens)
    setting = Probe(
        train=train,
        test=test,
        lengths=options.lengths,
        conditions=options.controls,
        size=DecoderSize(options.decoder, options.width, options.layers, options.heads, options.expansion),
        budget=Budget(
            steps=steps,
            batch_tokens=options.batch_tokens,
            optimizer=options.optimizer,
            learning_rate=options.learning_rate,
            decay=0.5,
            rest=0.25,  # rates that fall to zero would bring any loss to rest
            floor=0.1,
            seed=options.seed,
        ),
        train_tokens=steps * options.batch_tokens if options.train_tokens is None else options.train_tokens,
        test_tokens=options.test_tokens,
        table=options.table,
        only_finished=options.finished,
    )
    results = probe(
        named_models(options.models),
        setting,
        folder,
        device=device,
        position=options.position,
        chunk_length=options.chunk,
        tokenizer=options.tokenizer,
        trust_remote_code=options.trust_remote_code,
    )
    seconds = [cell["seconds"] for model in results for cells in model["lengths"].values() for cell in cells.values()]
    record = measurement.record(
        device,
        inputs={"files": file_checksums(files)},
        recipe=setting.settings() | {"lengths": list(setting.lengths), "conditions": list(setting.conditions)},
        seeds={"probe": options.seed},
        metrics={"models": results},
        seconds=round(sum(seconds), 1),
    )
    write_record(folder / "record.json", record)
    figure = write_probe_figure(record, folder)
    print("\n".join([results_table(results), *budget_lines(results, setting)]))
    print(f"record: {folder / 'record.json'}\nfigure: {folder / figure}")
    return record


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    return run_command(build_parser(), run, arguments)


if __name__ == "__main__":
    sys.exit(main())
