"""Texts to memories that can be stored: chunks of many texts encoded together, and the check that they come back.

A text is data: what looks like a marker of the model in it is read letter by letter, as any other word.

n chunks, L chunk length, K memories per chunk, D decoder width.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers.utils import logging

from ..memory_chunking import CutText
from .codec import decode_vectors, encode_vectors
from .quoting import come_back, halve, why_not_checkable, window_groups, write_back
from .texts import StoredText, check_id, is_writable, text_digest

logger = logging.get_logger(__name__)

ON_LOSS = ("warn", "keep_text", "split")
"""What becomes of chunks that do not come back: they are counted, kept as text as well, or cut until they do."""


def remember_texts(
    model: Any,
    processor: Any,
    texts: Mapping[str, str],
    *,
    batch_size: int,
    keep_text: bool,
    progress: Callable[[int], Any] | None = None,
    on_loss: str | None = None,
    dtype: str = "float32",
) -> list[StoredText]:
    """Encode texts, chunks of all of them in common batches.

    Args:
        model ([`MemoryEncoderDecoderModel`]): The model, in `eval()` mode.
        processor ([`MemoryProcessor`]): Its processor.
        texts (`Mapping[str, str]`): Id -> text.
        batch_size (`int`): Chunks that the encoder reads at a time.
        keep_text (`bool`): Whether the results carry the texts.
        progress (`Callable`, *optional*): Called with the number of chunks after each batch.
        on_loss (`str`, *optional*): One of `ON_LOSS`: what becomes of chunks that the model does not write back from
            their memories; `None`: that is not tried.
        dtype (`str`): Number format in which the memories will be stored, and from which they must come back.

    Returns:
        `list` of [`StoredText`]; `num_unknown` counts tokens that the encoder's tokenizer has no word for, of which a
        warning is given too.

    Raises:
        ValueError: If a text is empty, or no text, naming it; if `on_loss` is unknown, or the model cannot be tried.
    """
    if on_loss is not None:
        _check_on_loss(on_loss, model, processor)
    cuts: dict[str, CutText] = {}
    for text_id, text in texts.items():
        check_id(text_id)
        if not is_writable(text):
            raise ValueError(f"The text {text_id!r} is {text!r:.60}; expected a string of valid Unicode.")
        try:
            cuts[text_id] = processor.cut_context(text)
        except ValueError as error:
            raise ValueError(f"The text {text_id!r} cannot be remembered. {error}") from error
    _warn_of_unknown({one: (cut.num_unknown, sum(cut.num_tokens)) for one, cut in cuts.items() if cut.num_unknown})
    memories = _encode(model, cuts, batch_size, progress)
    whole: dict[str, list[bool]] = {}
    if on_loss is not None and cuts:
        whole = _written_back(model, processor, cuts, memories, texts, dtype)
        # Each round halves what is lost, down to single tokens.
        for _ in range(processor.chunk_length.bit_length() if on_loss == "split" else 0):
            halves = {one: halve(cuts[one].num_tokens, whole[one]) for one in cuts}
            again = {
                one: processor.cut_context(texts[one], lengths)
                for one, lengths in halves.items()
                if lengths != cuts[one].num_tokens
            }
            if not again:
                break
            cuts |= again
            memories |= _encode(model, again, batch_size, None)
            whole |= _written_back(model, processor, again, memories, texts, dtype)
    return [
        StoredText(
            one,
            memories[one],
            cut.num_tokens,
            cut.spans,
            texts[one] if keep_text else None,
            # In any case: a text that is not kept can still be seen to have changed.
            text_digest(texts[one]),
            cut.num_unknown,
            whole.get(one),
            None if keep_text or on_loss in (None, "warn") else _lost_text(texts[one], cut, whole[one]),
        )
        for one, cut in cuts.items()
    ]


def _check_on_loss(on_loss: str, model: Any, processor: Any) -> None:
    if on_loss not in ON_LOSS:
        raise ValueError(f"`on_loss` is {on_loss!r}; expected one of {', '.join(map(repr, ON_LOSS))}, or None.")
    why = why_not_checkable(model, processor)
    if why is not None:
        raise ValueError(
            f"`on_loss={on_loss!r}` asks the model to write back what it remembers, but {why}. Leave `on_loss` out."
        )


def _encode(
    model: Any, cuts: Mapping[str, CutText], batch_size: int, progress: Callable[[int], Any] | None
) -> dict[str, torch.Tensor]:
    """Memories `(n, K, D)` of each text."""
    # Chunks of all texts in one list, so that short texts share batches.
    memories = encode_chunk_ids(model, [row for cut in cuts.values() for row in cut.chunks], batch_size, progress)
    return dict(zip(cuts, memories.split([len(cut.chunks) for cut in cuts.values()]), strict=True))


def _written_back(
    model: Any,
    processor: Any,
    cuts: Mapping[str, CutText],
    memories: Mapping[str, torch.Tensor],
    texts: Mapping[str, str],
    dtype: str,
) -> dict[str, list[bool]]:
    """Whether each chunk of each text comes back from its memories as they will be stored."""
    together = torch.cat([memories[one] for one in cuts])
    stored = decode_vectors(encode_vectors(together, dtype), dtype, *together.shape[1:])
    counts = [len(cut.chunks) for cut in cuts.values()]
    per_window = model.config.window_length // model.config.chunk_length
    written = write_back(model, stored, window_groups(counts, per_window))
    parts = zip(cuts.items(), written.split(counts), strict=True)
    return {one: come_back(processor.tokenizer, own, cut, texts[one]) for (one, cut), own in parts}


def _lost_text(text: str, cut: CutText, whole: Sequence[bool]) -> list[str | None] | None:
    """The text of chunks that do not come back, where it is known where they stand."""
    if cut.spans is None:
        return None
    spans = zip(cut.spans, whole, strict=True)
    return [None if is_whole else text[start:end] for (start, end), is_whole in spans]


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
