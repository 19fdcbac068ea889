"""Which memories of a store a prompt is answered from.

Q memories of a prompt, D decoder width.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..store import Chunk, MemoryStore

Embed = Callable[[list[str]], torch.Tensor]


@dataclass(frozen=True)
class Used:
    """A chunk that a prompt is answered from.

    Attributes:
        chunk ([`Chunk`]): The chunk.
        score (`float`, *optional*): How near it is to the prompt; `None` if that was not asked for.
        by (`str`): What the score is: `"BM25"` of its passage, `"fused"` with a sentence encoder's order, or
            `"cosine"` of its memories.
        in_clear (`bool`): Whether it stands in the prompt as text.
    """

    chunk: Chunk
    score: float | None = None
    by: str = "cosine"
    in_clear: bool = False


def choose(
    store: MemoryStore,
    prompt: str,
    texts: Sequence[str] | None = None,
    nearest: int | None = None,
    expand: int = 0,
    embed: Embed | None = None,
) -> list[Used]:
    """Choose the chunks that a prompt is answered from, in reading order.

    Args:
        store ([`MemoryStore`]): Opened with its model.
        prompt (`str`): The prompt.
        texts (`Sequence` of `str`, *optional*): Ids of texts to choose from. Default: all.
        nearest (`int`, *optional*): Only so many chunks, the nearest to the prompt. Default: all if the model has room
            for them, else as many as it has room for.
        expand (`int`): How many of the chunks, the nearest ones, stand as full text.
        embed (`Callable`, *optional*): A sentence encoder; see `MemoryStore.search`.

    Raises:
        ValueError: If there is no such text, nothing to choose from, or no token in the prompt to compare by.
    """
    chunks = store.chunks(texts)
    if not chunks:
        raise ValueError(f"{store.folder} holds no memories. Fill it with `modeling-memory remember`.")
    per_chunk, capacity = store.processor.memories_per_chunk, store.model.config.memory_capacity  # type: ignore[union-attr]
    room = len(chunks) if capacity is None else max(capacity // per_chunk, 1)
    wanted = min(room if nearest is None else nearest, len(chunks))
    if wanted == len(chunks) and nearest is None and not expand:
        return [Used(chunk) for chunk in chunks]
    by, scores = rank(store, prompt, max(wanted, expand), texts, embed)
    best = list(scores)
    kept = set(chunks) if nearest is None and wanted == len(chunks) else set(best[:wanted])
    in_clear = set(best[:expand])
    return [Used(chunk, scores.get(chunk), by, chunk in in_clear) for chunk in chunks if chunk in kept]


def rank(
    store: MemoryStore,
    prompt: str,
    number: int,
    texts: Sequence[str] | None = None,
    embed: Embed | None = None,
) -> tuple[str, dict[Chunk, float]]:
    """Find the chunks that are nearest to a prompt: by its words if text is kept and shares one, else by memories.

    Returns:
        `"BM25"`, `"fused"` or `"cosine"`, and chunks with their scores, nearest first; of a passage those that
        share more words.
    """
    question = without_markers(store, prompt)
    scores: dict[Chunk, float] = {}
    if store.keeps_text:
        words = set(re.findall(r"\w+", question.casefold()))
        for passage, score in store.search(question, number, text_ids=texts, embed=embed):
            parts = dict(zip(passage.chunks, store.expand(passage.chunks), strict=True))
            shared = {one: len(words & set(re.findall(r"\w+", parts[one].casefold()))) for one in parts}
            scores |= dict.fromkeys(sorted(parts, key=lambda one: -shared[one]), score)
            if len(scores) >= number:
                break
        if scores:
            return "BM25" if embed is None else "fused", scores
    for found in store.nearest(prompt_memories(store, question), number, text_ids=texts):
        for chunk, cosine in found:
            scores[chunk] = max(cosine, scores.get(chunk, -1.0))
    return "cosine", dict(sorted(scores.items(), key=lambda pair: -pair[1]))


def without_markers(store: MemoryStore, prompt: str) -> str:
    """Return a prompt without special tokens, to search by.

    Raises:
        ValueError: If nothing is left.
    """
    for token in sorted(store.processor.tokenizer.all_special_tokens, key=len, reverse=True):
        prompt = prompt.replace(token, "")
    if not prompt.strip():
        raise ValueError(
            "The prompt has no words to find memories by, and the store holds more than the model has room for. Name "
            "texts, or write what to look for."
        )
    return prompt


def prompt_memories(store: MemoryStore, prompt: str) -> torch.Tensor:
    """Return memories `(Q, D)` of a prompt's own chunks, to search by."""
    processor = store.processor
    inputs = processor(context=prompt, return_tensors="pt").to(store.model.device)  # type: ignore[union-attr]
    with torch.no_grad():
        memories, mask = store.model.encode_memories(  # type: ignore[union-attr]
            inputs["context_input_ids"], inputs["context_attention_mask"]
        )
    return memories[mask.bool()].float().cpu()
