"""Measure what a model holds of text unlike its training text: random strings, digits, other domains and languages.

```bash
python -m training.domains runs/quickstart/hub --to domains.json --text "encyclopedia=wikipedia_test.parquet"
python -m training.publish runs/quickstart/hub --to ~/my-model --domains domains.json
```

Every domain is asked what the model's own test split is asked, with the same controls, free-running copies included;
and every token of the vocabulary is tried in random order. The card shows it.
"""

import argparse
import random
import string
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .command_line import Parser, check_place, named_file, run_command, whole_number
from .data.objectives import next_tokens
from .data.texts import file_checksums, load_texts, tokenise_documents
from .data.tokenizer import special_tokens_of
from .evaluate import load_model, measure_suites
from .measure.suites import (
    Evaluation,
    Scores,
    default_length,
    results_table,
    score,
    spread_rows,
    summarise_scores,
)
from .places import portable_path, program
from .recipes.recipe import resolve_files
from .records.record import Measurement, write_record

LETTERS = string.ascii_letters + string.digits + string.punctuation
CAUSAL_LENGTH = 256
TRIES = 4
SUITES = {"memory_autoencoder": ["retention"], "memory_encoder_decoder": ["blank_copy", "copy"]}
DESCRIPTIONS = {"random_strings": "random strings of letters, digits and signs", "digits": "random digits"}


def made_up_texts(domain: str, num_texts: int, length: int = 2000, seed: int = 0) -> list[str]:
    """Return texts of characters drawn at random: nothing in one part of them tells anything about another.

    Args:
        domain (`str`): `random_strings` or `digits`.
        num_texts (`int`): How many.
        length (`int`): Characters of each.
        seed (`int`): Equal seeds give equal texts.

    >>> made_up_texts("digits", 1, 8), len(made_up_texts("random_strings", 2, 100)[1])
    (['85444066'], 100)
    """
    draw = random.Random(f"{domain} {seed}")
    characters = string.digits if domain == "digits" else LETTERS
    return ["".join(draw.choices(characters, k=length)) for _ in range(num_texts)]


def measure_domains(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Mapping[str, Sequence[str]],
    *,
    limit: int = 256,
    length: int | None = None,
    batch_size: int = 32,
) -> dict[str, dict[str, Any]]:
    """Measure a model on made-up text and on given texts.

    Args:
        model (`PreTrainedModel`): A memory autoencoder, a memory encoder-decoder with one tokenizer, or a causal LM,
            which is asked for the next token.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        texts (`Mapping[str, Sequence[str]]`): Description of a domain -> its documents.
        limit (`int`): Most rows of a suite.
        length (`int`, *optional*): Tokens of a row; default: that of the suite, for a causal LM 256.
        batch_size (`int`): Rows per forward call.

    Returns:
        `dict`: Domain -> `description` and `metrics` (suite -> condition -> metrics). For a model with memories also
        the domain `every_token`, with the tokens that never came back.

    Raises:
        ValueError: If a text is too short for a row.
    """
    suites = SUITES.get(model.config.model_type)
    own_length = getattr(model.config, "window_length", getattr(model.config, "chunk_length", CAUSAL_LENGTH))
    row = length or own_length
    enough = max(2, -(-limit * row // 500))  # a character of a random string is a token or nearly one
    domains = {
        **{name: (text, made_up_texts(name, enough)) for name, text in DESCRIPTIONS.items()},
        **{name: (name, list(documents)) for name, documents in texts.items()},
    }
    measured: dict[str, dict[str, Any]] = {
        name: {
            "description": description,
            "metrics": measure_suites(
                model, tokenizer, documents, suites, limit=limit, length=length, batch_size=batch_size
            )
            if suites is not None
            else next_token(model, tokenizer, documents, limit=limit, length=row, batch_size=batch_size),
        }
        for name, (description, documents) in domains.items()
    }
    if suites is not None:
        measured["every_token"] = every_token(model, tokenizer, suites[0], length=length, batch_size=batch_size)
    return measured


@torch.no_grad()
def every_token(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    suite: str,
    *,
    length: int | None = None,
    batch_size: int = 32,
) -> dict[str, Any]:
    """Ask for every token of the vocabulary among random others, so that nothing but its memory tells it.

    Args:
        model (`PreTrainedModel`): A memory autoencoder or a memory encoder-decoder.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer; special tokens are not asked for.
        suite (`str`): `retention` or `blank_copy`: the tokens are read back at once, with none of them in sight.
        length (`int`, *optional*): Tokens of a row; default: that of the suite.
        batch_size (`int`): Rows per forward call.

    Returns:
        `dict`: `description` and `metrics` as of a domain; `num_tokens` of the vocabulary, `tries` of each, and
        `lost_tokens`, written out: those that never came back.
    """
    chunk = model.config.chunk_length
    window = getattr(model.config, "window_length", chunk)
    evaluation = Evaluation(model.eval(), special_tokens_of(tokenizer), chunk, window, batch_size=batch_size)
    row = length or default_length(evaluation, suite)
    special = set(tokenizer.all_special_ids)
    ids = torch.tensor([i for i in range(min(len(tokenizer), evaluation.vocab_size)) if i not in special])
    draw = torch.Generator().manual_seed(0)
    stream = torch.cat([ids[torch.randperm(len(ids), generator=draw)] for _ in range(TRIES)])
    rows = torch.cat([stream, stream[: -len(stream) % row]]).view(-1, row)  # (R, row)
    objective = "reconstruction" if suite == "retention" else suite
    scores = Scores.join([score(model, evaluation.build(objective, own), len(own)) for own in rows.split(batch_size)])
    lost = sorted(set(ids.tolist()) - set(scores.targets[scores.correct].tolist()))
    return {
        "description": "every token of the vocabulary, in random order",
        "metrics": {suite: {"memory": summarise_scores(scores, evaluation.vocab_size, row)}},
        "num_tokens": len(ids),
        "tries": TRIES,
        "lost_tokens": [_written(tokenizer, token) for token in lost],
    }


def _written(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """A token as text, or by its name where it is only a part of a character."""
    text = tokenizer.decode([token])
    return text if text and "\ufffd" not in text else str(tokenizer.convert_ids_to_tokens(token))


def next_token(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[str],
    *,
    limit: int,
    length: int,
    batch_size: int,
) -> dict[str, Any]:
    """Score a causal LM on the next token of rows of text.

    Args:
        model (`PreTrainedModel`): The causal LM.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        documents (`Sequence[str]`): Text.
        limit (`int`): Most rows.
        length (`int`): Tokens of a row.
        batch_size (`int`): Rows per forward call.

    Returns:
        `dict`: Suite -> condition -> metrics, as [`measure_suites`] gives them: `clm` and `this_model`.

    Raises:
        ValueError: If a text is too short for a row.
    """
    tokens = tokenise_documents(tokenizer, list(documents)).tokens
    parts = []
    for own in spread_rows(tokens, row_length=length, limit=limit).split(batch_size):
        present = torch.ones_like(own)
        batch = {"input_ids": own, "attention_mask": present, "shift_labels": next_tokens(own, present)}
        parts.append(score(model.eval(), batch, len(own)))
    return {"clm": {"this_model": summarise_scores(Scores.join(parts), model.config.vocab_size, length)}}


def build_parser() -> argparse.ArgumentParser:
    """Build the command line."""
    parser = Parser(
        prog=program("domains"), description="Measure what a model holds of text unlike its training text."
    )
    parser.add_argument(
        "model", help="folder of a memory autoencoder, a memory model or a causal LM, or a Hub repository"
    )
    parser.add_argument("--to", required=True, metavar="FILE", help="where the record goes")
    parser.add_argument(
        "--text",
        action="append",
        default=[],
        type=named_file,
        metavar="NAME=FILE",
        help="other text to ask about; several are fine",
    )
    parser.add_argument(
        "--limit", type=whole_number(2), default=256, metavar="N", help="most rows of a domain (default 256)"
    )
    parser.add_argument("--length", type=whole_number(), metavar="N", help="tokens of a row (default: by suite)")
    parser.add_argument(
        "--batch-size", type=whole_number(), default=32, metavar="N", help="rows at a time (default 32)"
    )
    return parser


def run(options: argparse.Namespace, command: str) -> dict[str, Any]:
    """Measure as the command line says; return the record."""
    measurement, place = Measurement(command), check_place(options.to)
    named = {name: resolve_files([pattern], f"--text {name}") for name, pattern in options.text}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, tokenizer, _ = load_model(options.model)
    domains = measure_domains(
        model.to(device),
        tokenizer,
        {name: load_texts(files) for name, files in named.items()},
        limit=options.limit,
        length=options.length,
        batch_size=options.batch_size,
    )
    record = measurement.record(
        device,
        inputs={
            "model": portable_path(options.model),
            "files": {name: file_checksums(files) for name, files in named.items()},
        },
        recipe={"limit": options.limit, "length": options.length, "batch_size": options.batch_size},
        metrics={},
        domains=domains,
    )
    write_record(place, record)
    for name, domain in domains.items():
        print(f"{name}: {domain['description']}\n{results_table(domain['metrics'])}\n")
    print(f"record: {options.to}")
    return record


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    return run_command(build_parser(), run, arguments)


if __name__ == "__main__":
    sys.exit(main())
