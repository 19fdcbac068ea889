"""What every stage of a run reads: the tokenizer, and the three splits as streams of tokens."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from training.data import check_splits, file_checksums, load_texts, tokenise_documents
from training.objectives import SpecialTokens
from training.recipe import Recipe, resolve_files
from training.record import fingerprint, read_json, write_json
from training.stages import check_same, replace_folder
from training.tokenizer import special_tokens_of, token_byte_lengths, tokenizer_checksum, train_tokenizer

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Inputs:
    """Tokenizer and text of a run.

    Attributes:
        tokenizer (`PreTrainedTokenizerBase`): The tokenizer.
        special_tokens (`SpecialTokens`): Ids of its special tokens.
        tokens (`dict[str, torch.Tensor]`): Split -> its stream of tokens.
        byte_lengths (`torch.LongTensor`, *optional*): Bytes of each token, of a byte-level tokenizer.
        description (`dict`): For the record: files with checksums, counts, the tokenizer.
        fingerprint (`str`): Differs whenever text or tokenizer do.
    """

    tokenizer: PreTrainedTokenizerBase
    special_tokens: SpecialTokens
    tokens: dict[str, torch.Tensor]
    byte_lengths: torch.Tensor | None
    description: dict[str, Any]
    fingerprint: str


def prepare_inputs(recipe: Recipe, folder: Path, state: PartialState) -> Inputs:
    """Read the splits, check that they share nothing, train or load the tokenizer, tokenise.

    The main process goes first and leaves tokenizer and streams in `folder`; others and later calls find them there.

    Args:
        recipe (`Recipe`): Its `data` and `tokenizer` say what to read.
        folder (`Path`): Where tokenizer and tokens are kept.
        state (`PartialState`): Tells the main process from others.

    Raises:
        ValueError: If a file is missing or damaged, splits overlap, or the folder holds another recipe's tokenizer.
    """
    data = recipe.data
    files = {split: resolve_files(getattr(data, split), f"data.{split}") for split in SPLITS}
    with state.main_process_first():
        texts = {split: load_texts(files[split], data.text_column) for split in SPLITS}
        check_splits(*(texts[split] for split in SPLITS))
        tokenizer = _tokenizer(recipe, folder / "tokenizer", texts["train"], files)
        streams = {split: tokenise_documents(tokenizer, texts[split], cache_folder=folder) for split in SPLITS}
    tokens = {split: stream.tokens for split, stream in streams.items()}
    if data.max_train_tokens is not None:
        tokens["train"] = tokens["train"][: data.max_train_tokens]
    description = {
        "files": {split: file_checksums(files[split]) for split in SPLITS},
        "tokens": {split: tokens[split].numel() for split in SPLITS},
        "documents": {split: stream.num_documents for split, stream in streams.items()},
        "bytes": {split: stream.num_bytes for split, stream in streams.items()},
        "tokenizer": {"entries": len(tokenizer), "checksum": tokenizer_checksum(tokenizer)},
    }
    return Inputs(
        tokenizer,
        special_tokens_of(tokenizer),
        tokens,
        byte_lengths_of(tokenizer),
        description,
        fingerprint(description),
    )


def byte_lengths_of(tokenizer: PreTrainedTokenizerBase) -> torch.Tensor | None:
    """Return the bytes of each token, or `None` for a tokenizer whose tokens do not stand for fixed bytes."""
    try:
        return token_byte_lengths(tokenizer)
    except ValueError:
        return None


def _tokenizer(
    recipe: Recipe, folder: Path, texts: list[str], files: dict[str, list[Path]]
) -> PreTrainedTokenizerBase:
    """Load the run's tokenizer, training it first if the recipe says so and it is not there yet."""
    settings = recipe.tokenizer
    if settings.path is not None:
        return AutoTokenizer.from_pretrained(settings.path)
    asked = {"tokenizer": recipe.to_mapping()["tokenizer"], "files": file_checksums(files["train"])}
    before = read_json(folder / "asked.json")
    check_same(before, asked, folder)
    if before is None:
        tokenizer = train_tokenizer(texts, settings.vocab_size, max_bytes=settings.max_train_bytes)
        replace_folder(folder, lambda part: _save(tokenizer, asked, part))
    return AutoTokenizer.from_pretrained(folder)


def _save(tokenizer: PreTrainedTokenizerBase, asked: dict[str, Any], folder: Path) -> None:
    tokenizer.save_pretrained(folder)
    write_json(folder / "asked.json", asked)
