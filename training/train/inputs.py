"""What every stage of a run reads: the tokenizer, and the three splits as streams of tokens."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..data.objectives import SpecialTokens
from ..data.sources import take_bytes
from ..data.texts import check_splits, tokenise_documents
from ..data.token_stream import TokenStream, source_checksums
from ..data.tokenizer import (
    complete_tokenizer,
    special_tokens_of,
    token_byte_lengths,
    tokenizer_checksum,
    train_tokenizer,
)
from ..data.typed import with_typed_text
from ..recipes.recipe import PretrainedRecipe, Recipe, resolve_documents
from ..records.record import data_digest, read_json, write_json
from .checkpoints import check_same, replace_folder

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Inputs:
    """Tokenizer and text of a run.

    Attributes:
        tokenizer (`PreTrainedTokenizerBase`): The tokenizer.
        special_tokens (`SpecialTokens`): Ids of its special tokens.
        tokens (`dict[str, torch.Tensor]`): Split -> its tokens; of a streaming recipe without the train split.
        stream (`TokenStream`, *optional*): The train split of a streaming recipe.
        byte_lengths (`torch.LongTensor`, *optional*): Bytes of each token, of a byte-level tokenizer.
        description (`dict`): For the record: files with checksums, counts, the tokenizer.
        fingerprint (`str`): Differs whenever text or tokenizer do.
        texts (`dict[str, list[str]]`): Split -> its documents, where an encoder with its own tokenizer reads them.
    """

    tokenizer: PreTrainedTokenizerBase
    special_tokens: SpecialTokens
    tokens: dict[str, torch.Tensor]
    byte_lengths: torch.Tensor | None
    description: dict[str, Any]
    fingerprint: str
    stream: TokenStream | None = None
    texts: dict[str, list[str]] = field(default_factory=dict)


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
    sources = {split: resolve_documents(getattr(data, split), data.text_column, f"data.{split}") for split in SPLITS}
    whole = [split for split in SPLITS if split != "train" or not data.streaming]
    stream = None
    with state.main_process_first():
        texts = {split: list(sources[split].read()) for split in whole}
        check_splits(texts.get("train", []), texts["validation"], texts["test"])
        if data.folded or data.typed:
            texts["train"] = with_typed_text(texts["train"], data.folded, data.typed, recipe.seed)
        checksums = {split: source_checksums(source) for split, source in sources.items()}
        sample = texts["train"] if "train" in texts else sources["train"].read()
        tokenizer = _tokenizer(recipe, folder / "tokenizer", sample, checksums["train"])
        cache = Path(data.cache_dir or folder)
        streams = {split: tokenise_documents(tokenizer, texts[split], cache_folder=cache) for split in whole}
        if data.streaming:
            held_out = [*texts["validation"], *texts["test"]]
            stream = TokenStream(sources["train"], tokenizer, folder, held_out=held_out, limit=data.max_train_tokens)
            stream.reach(1)
    limits = {"train": data.max_train_tokens}
    tokens = {split: streamed.tokens[: limits.get(split)] for split, streamed in streams.items()}
    description = {
        "files": checksums,
        **_counts(tokens, streams),
        "tokenizer": {"entries": len(tokenizer), "checksum": tokenizer_checksum(tokenizer)},
        **({} if stream is None else {"stream": stream.identity}),
        **({"folded": data.folded, "typed": data.typed} if data.folded or data.typed else {}),
    }
    return Inputs(
        tokenizer,
        special_tokens_of(tokenizer, recipe.tokenizer.copy_token, recipe.tokenizer.blank_token),
        tokens,
        byte_lengths_of(tokenizer),
        description,
        data_digest(description),
        stream,
        texts if any(recipe.encoder_of(stage) is not None for stage in recipe.stages) else {},
    )


def _counts(tokens: Mapping[str, torch.Tensor], streams: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """Count tokens, documents and bytes of each split that was read whole."""
    return {
        "tokens": {split: tokens[split].numel() for split in streams},
        "documents": {split: streamed.num_documents for split, streamed in streams.items()},
        "bytes": {split: streamed.num_bytes for split, streamed in streams.items()},
    }


def byte_lengths_of(tokenizer: PreTrainedTokenizerBase) -> torch.Tensor | None:
    """Return the bytes of each token, or `None` for a tokenizer whose tokens do not stand for fixed bytes."""
    try:
        return token_byte_lengths(tokenizer)
    except ValueError:
        return None


def _tokenizer(
    recipe: Recipe, folder: Path, texts: Iterable[str], checksums: dict[str, str]
) -> PreTrainedTokenizerBase:
    """Load the run's tokenizer, training it first if the recipe says so and it is not there yet."""
    settings = recipe.tokenizer
    if settings.path is not None:
        source = PretrainedRecipe(settings.path, settings.revision, settings.gguf_file)
        return complete_tokenizer(AutoTokenizer.from_pretrained(source.source, **source.options))
    asked = {"tokenizer": recipe.to_mapping()["tokenizer"], "files": checksums}
    before = read_json(folder / "asked.json")
    check_same(before, asked, folder)
    if before is None:
        max_bytes = settings.max_train_bytes
        if recipe.data.streaming and max_bytes is not None:  # the beginning of the text; more of it is not read yet
            texts, max_bytes = take_bytes(texts, max_bytes), None
        tokenizer = train_tokenizer(texts, settings.vocab_size, max_bytes=max_bytes)
        replace_folder(folder, lambda part: _save(tokenizer, asked, part))
    return AutoTokenizer.from_pretrained(folder)


def _save(tokenizer: PreTrainedTokenizerBase, asked: dict[str, Any], folder: Path) -> None:
    tokenizer.save_pretrained(folder)
    write_json(folder / "asked.json", asked)
