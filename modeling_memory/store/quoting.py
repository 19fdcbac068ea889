"""What a model can quote: chunks written back from their memories alone, and the check that they come back whole.

One pass writes all chunks of a window beside each other, as in training, with no text in sight.

n chunks, L chunk length, K memories per chunk, D decoder width.
"""

from collections.abc import Sequence
from typing import Any

import torch

from ..memory_chunking import CutText

WINDOWS_AT_ONCE = 64
LONGEST_CHARACTER = 4
"""Tokens of a character at most: bytes of UTF-8."""


def why_not_checkable(model: Any, processor: Any) -> str | None:
    """Say why a model cannot write chunks back in one pass; `None` if it can."""
    if not hasattr(model, "lm_head") and not hasattr(model.decoder, "lm_head"):
        return "it has no head that writes text"
    if getattr(model.config, "blank_token_id", None) is None:
        return "it knows no BLANK token by which to ask for a text"
    if processor.encoder_tokenizer is not None:
        return "encoder and decoder cut text differently, so that chunks cannot be laid beside what is written"
    return None


@torch.no_grad()
def write_back(model: Any, memories: torch.Tensor, groups: Sequence[int]) -> torch.Tensor:
    """Write chunks from their memories alone.

    Args:
        model ([`MemoryEncoderDecoderForCausalLM`]): One that [`why_not_checkable`] has nothing against.
        memories (`torch.FloatTensor` of shape `(n, K, D)`): Memories of chunks, those of a window after each other.
        groups (`Sequence[int]`): How many chunks each window has; together n.

    Returns:
        `torch.LongTensor` of shape `(n, L)`: The tokens written; of a chunk that is not full the first ones count.
    """
    config = model.config
    length, slots = config.chunk_length, [config.memory_token_id] * config.memories_per_chunk
    written = torch.empty(len(memories), length, dtype=torch.long)
    starts = torch.tensor([0, *groups]).cumsum(0)[:-1]
    memories = memories.to(model.device, model.decoder.dtype)
    for size in sorted(set(groups)):
        row = torch.tensor(slots * size + [config.blank_token_id] * (length * size), device=model.device)
        own = starts[torch.tensor([group == size for group in groups])]
        for some in own.split(WINDOWS_AT_ONCE):
            chunks = some[:, None] + torch.arange(size)  # (windows, size)
            embeds = memories[chunks.to(memories.device)].flatten(1, 2)  # (windows, size * K, D)
            ids = row.expand(len(some), -1)
            logits = model(input_ids=ids, memory_embeds=embeds, use_cache=False).logits[:, len(slots) * size :]
            written[chunks.flatten()] = logits.argmax(-1).view(-1, length).cpu()
    return written


def window_groups(counts: Sequence[int], per_window: int) -> list[int]:
    """Return the sizes of the windows that texts of so many chunks each fill.

    >>> window_groups([5, 2], 4)
    [4, 1, 2]
    """
    return [min(per_window, count - first) for count in counts for first in range(0, count, per_window)]


def as_text(tokenizer: Any, ids: Sequence[int], num_characters: int | None) -> str:
    """Return the text of a chunk's tokens; some tokenizers leave out the space in front, which its length tells."""
    text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    return f" {text}" if num_characters == len(text) + 1 else text


def as_texts(tokenizer: Any, rows: Sequence[Sequence[int]], sizes: Sequence[int | None]) -> list[str]:
    """Return the texts of chunks that follow each other; a character of several tokens counts where it begins.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): Whose tokens they are.
        rows (`Sequence`): The tokens of each chunk.
        sizes (`Sequence[int]`): How many characters each has; `None` where that is not known.
    """
    texts: list[str] = []
    first = 0
    for place in range(len(rows)):
        # A chunk that ends inside a character is read together with those that hold the rest of it.
        is_open = as_text(tokenizer, rows[place], None).endswith("\N{REPLACEMENT CHARACTER}")
        if is_open and place + 1 < len(rows) and sizes[place] is not None:
            continue
        own = sizes[first : place + 1]
        size = None if own[-1] is None else sum(own)  # type: ignore[arg-type]
        text = as_text(tokenizer, [token for row in rows[first : place + 1] for token in row], size)
        for one in own[:-1]:
            texts.append(text[:one])
            text = text[one:]
        texts.append(text)
        first = place + 1
    return texts


def come_back(tokenizer: Any, written: torch.Tensor, cut: CutText, text: str) -> list[bool]:
    """Say of each chunk of a text whether what was written `(n, L)` begins with its tokens, and reads as it does.

    Where a chunk ends inside a character the rest of that must have been written, too.
    """
    rows = [line[: len(row)] for line, row in zip(written.tolist(), cut.chunks, strict=True)]
    right = [own == row for own, row in zip(rows, cut.chunks, strict=True)]
    if cut.spans is None:
        return right
    texts = as_texts(tokenizer, rows, [end - start for start, end in cut.spans])
    return [one and read == text[start:end] for one, read, (start, end) in zip(right, texts, cut.spans, strict=True)]


def halve(lengths: Sequence[int], whole: Sequence[bool]) -> list[int]:
    """Cut chunks that did not come back whole in two; chunks of one token stay.

    >>> halve([8, 8, 3, 1], [True, False, False, False])
    [8, 4, 4, 2, 1, 1]
    """
    cut: list[int] = []
    for length, is_whole in zip(lengths, whole, strict=True):
        cut += [length] if is_whole or length == 1 else [length - length // 2, length // 2]
    return cut
