"""Texts to memories that can be stored: chunks of many texts encoded together, and where each stands in its text.

A text is data: what looks like a marker of the model in it is read letter by letter, as any other word.

n chunks, L chunk length, K memories per chunk, D decoder width.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers.utils import logging

from .texts import StoredText, check_id, is_writable, text_digest

logger = logging.get_logger(__name__)


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

    Returns:
        `list` of [`StoredText`]; `num_unknown` counts tokens that the encoder's tokenizer has no word for, of which a
        warning is given too.

    Raises:
        ValueError: If a text is empty, or no text, naming it.
    """
    rows: list[list[int]] = []
    cut = {}
    for text_id, text in texts.items():
        check_id(text_id)
        if not is_writable(text):
            raise ValueError(f"The text {text_id!r} is {text!r:.60}; expected a string of valid Unicode.")
        try:
            own = processor.cut_context(text)
        except ValueError as error:
            raise ValueError(f"The text {text_id!r} cannot be remembered. {error}") from error
        cut[text_id] = (own.num_tokens, own.spans, own.num_unknown)
        # Chunks of all texts in one list, so that short texts share batches.
        rows += own.chunks
    _warn_of_unknown({text_id: (unknown, sum(counts)) for text_id, (counts, _, unknown) in cut.items() if unknown})
    memories = encode_chunk_ids(model, rows, batch_size, progress)
    stored, first = [], 0
    for text_id, (counts, spans, unknown) in cut.items():
        own, text = memories[first : first + len(counts)], texts[text_id]
        first += len(own)
        kept = text if keep_text else None
        # The digest in any case: a text that is not kept can still be seen to have changed.
        stored.append(StoredText(text_id, own, counts, spans, kept, text_digest(text), unknown))
    return stored


def _warn_of_unknown(unknown: dict[str, tuple[int, int]]) -> None:
    """Tell of tokens that the encoder reads as nothing: their text cannot be found or written again."""
    if unknown:
        worst = max(unknown, key=lambda text_id: unknown[text_id][0] / unknown[text_id][1])
        number, total = unknown[worst]
        tokens = sum(one for one, _ in unknown.values())
        logger.warning(
            f"The encoder's tokenizer does not know {tokens} tokens of {len(unknown)} texts, which "
            f"are remembered as nothing; most of {worst!r}: {number} of {total} ({number / total:.0%})."
        )


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
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"`batch_size` is {batch_size!r}; expected a whole number, 1 or more.")
    memories = torch.empty(len(rows), model.config.memories_per_chunk, model.config.decoder.hidden_size)
    order = sorted(range(len(rows)), key=lambda number: -len(rows[number]))
    for start in range(0, len(rows), batch_size):
        numbers = order[start : start + batch_size]
        lengths = torch.tensor([len(rows[number]) for number in numbers])
        width = int(lengths[0])
        mask = (torch.arange(width) < lengths[:, None])[:, None]  # (n, 1, L)
        ids = torch.zeros(mask.shape, dtype=torch.long)
        ids[mask] = torch.tensor([token for number in numbers for token in rows[number]])
        # Without a mask an encoder may take its faster attention.
        partial = None if bool(mask.all()) else mask.long().to(model.device)
        memory_embeds, _ = model.encode_memories(ids.to(model.device), partial)  # (n, K, D)
        # Off the device at once: what is remembered may be larger than its memory.
        memories[numbers] = memory_embeds.float().cpu()
        if progress is not None:
            progress(len(numbers))
    return memories
