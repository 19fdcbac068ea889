"""Texts to memories that can be stored: chunks of many texts encoded together, and where each stands in its text.

n chunks, L chunk length, K memories per chunk, D decoder width.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from .memory_shard import StoredText, text_digest


def remember_texts(
    model: Any,
    processor: Any,
    texts: Mapping[str, str],
    *,
    batch_size: int,
    keep_text: bool,
    progress: Callable[[int], Any] | None = None,
) -> list[StoredText]:
    """Encode texts, chunks of all of them in common batches.

    Args:
        model ([`MemoryEncoderDecoderModel`]): The model, in `eval()` mode.
        processor ([`MemoryProcessor`]): Its processor.
        texts (`Mapping[str, str]`): Id -> text.
        batch_size (`int`): Chunks that the encoder reads at a time.
        keep_text (`bool`): Whether the results carry the texts.
        progress (`Callable`, *optional*): Called with the number of chunks after each batch.

    Raises:
        ValueError: If a text is empty or holds the memory token, naming it.
    """
    chunks = {}
    for text_id, text in texts.items():
        try:
            chunks[text_id] = processor.split_context(text)
        except ValueError as error:
            raise ValueError(f"The text {text_id!r} cannot be remembered: {error}") from error
    memories = encode_chunk_ids(model, [chunk for row in chunks.values() for chunk in row], batch_size, progress)
    tokenizer = processor.encoder_tokenizer or processor.tokenizer
    stored, first = [], 0
    for text_id, text in texts.items():
        counts, spans = cut_text(tokenizer, text, processor.chunk_length)
        own = memories[first : first + len(chunks[text_id])]
        first += len(own)
        stored.append(StoredText(text_id, own, counts, spans, text if keep_text else None, text_digest(text)))
    return stored


@torch.no_grad()
def encode_chunk_ids(
    model: Any, rows: Sequence[Sequence[int]], batch_size: int, progress: Callable[[int], Any] | None = None
) -> torch.Tensor:
    """Encode chunks of token ids into memories `(n, K, D)` in float32, on the CPU.

    Full chunks go first, so that only the last batches, of shorter ones, carry a mask.

    Args:
        model ([`MemoryEncoderDecoderModel`]): The model, in `eval()` mode.
        rows (`Sequence`): Ids of each chunk, at least one.
        batch_size (`int`): Chunks that the encoder reads at a time.
        progress (`Callable`, *optional*): Called with the number of chunks after each batch.

    Raises:
        ValueError: If the model is in training mode, in which memories carry noise, or `batch_size` is below 1.
    """
    if model.training:
        raise ValueError("The model is in training mode, where noise may be added to memories. Call `model.eval()`.")
    if batch_size < 1:
        raise ValueError(f"`batch_size` is {batch_size}; expected 1 or more.")
    memories = torch.empty(len(rows), model.config.memories_per_chunk, model.config.decoder.hidden_size)
    order = sorted(range(len(rows)), key=lambda number: -len(rows[number]))
    for start in range(0, len(rows), batch_size):
        numbers = order[start : start + batch_size]
        lengths = torch.tensor([len(rows[number]) for number in numbers])
        width = int(lengths[0])
        mask = (torch.arange(width) < lengths[:, None])[:, None]  # (n, 1, L)
        ids = torch.zeros(mask.shape, dtype=torch.long)
        ids[mask] = torch.tensor([token for number in numbers for token in rows[number]])
        partial = None if bool(mask.all()) else mask.long().to(model.device)
        memory_embeds, _ = model.encode_memories(ids.to(model.device), partial)  # (n, K, D)
        memories[numbers] = memory_embeds.float().cpu()
        if progress is not None:
            progress(len(numbers))
    return memories


def cut_text(tokenizer: Any, text: str, chunk_length: int) -> tuple[list[int], list[tuple[int, int]] | None]:
    """Return how many tokens each chunk of a text has, and which characters.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The one that cuts contexts.
        text (`str`): The text.
        chunk_length (`int`): Tokens per chunk.

    Returns:
        Tokens of each chunk; the first character and the one behind the last of each, which joined are the whole text,
        or `None` from a tokenizer that knows no offsets.
    """
    options = {"add_special_tokens": False, "truncation": False, "padding": False, "verbose": False}
    is_fast = getattr(tokenizer, "is_fast", False)
    encoded = tokenizer(text, return_offsets_mapping=True, **options) if is_fast else tokenizer(text, **options)
    total = len(encoded["input_ids"])
    firsts = range(0, total, chunk_length)
    counts = [min(chunk_length, total - first) for first in firsts]
    if not is_fast:
        return counts, None
    # A chunk ends where the next begins, so that white space between tokens is not lost. A character that two chunks
    # share belongs to the first.
    offsets = encoded["offset_mapping"]
    starts = [0]
    for first in firsts[1:]:
        starts.append(max(starts[-1], offsets[first - 1][1], min(offsets[first][0], len(text))))
    return counts, list(zip(starts, [*starts[1:], len(text)], strict=True))
