"""Text for an encoder and a decoder with a tokenizer each: the same characters, cut once, read twice.

A document is cut into chunks of the encoder's tokens, as `MemoryProcessor` cuts a context. Each chunk stands for some
characters of the document, and the decoder's tokens that begin there are the chunk's text. So nothing is lost and
nothing stands in two chunks, whatever the two tokenizers make of it.

A row is R chunks. The first S of them are the source, which becomes memories; the objectives read as text

| objective | text |
|---|---|
| causal | the R - S chunks after the source |
| copy, blank copy | the source again |
| recall | a stretch of the source |

N chunks of a text, L' columns of a chunk with the encoder's special tokens, E encoder width, K memories per chunk.
"""

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import Dataset

from modeling_memory import MemoryEncoderDecoderForCausalLM, MemoryProcessor

from ..measure.metrics import bootstrap_interval, token_results
from ..measure.suites import spread_rows
from .encoded import keep_states
from .objectives import IGNORED, BatchSpec, ReadyContext, build_batch, keep_columns, without_targets
from .questions import Questions, ask, split_questions
from .rows import REMEMBERED, TokenRows, draw_budget, draw_starts
from .tokenizer import tokenizer_checksum

WITH_MEMORY = ("memory", "wrong_memory")


@dataclass(frozen=True)
class PairedText:
    """A split, cut into chunks, in the tokens of both sides.

    Attributes:
        encoder_ids (`torch.IntTensor` of shape `(N, L')`): The encoder's ids, special tokens included, padded after.
        encoder_lengths (`torch.LongTensor` of shape `(N,)`): How many of them are real.
        tokens (`torch.IntTensor` of shape `(num_tokens,)`): The decoder's tokens; a document ends with its end token.
        bounds (`torch.LongTensor` of shape `(N + 1,)`): Chunk c has the decoder's tokens `bounds[c]` to
            `bounds[c + 1] - 1`.
        chunk_length (`int`): Text tokens of a whole chunk, in the encoder's tokens.
    """

    encoder_ids: torch.Tensor
    encoder_lengths: torch.Tensor
    tokens: torch.Tensor
    bounds: torch.Tensor
    chunk_length: int

    @property
    def num_chunks(self) -> int:
        """Chunks (N)."""
        return len(self.encoder_lengths)

    def first(self, num_tokens: int | None) -> "PairedText":
        """Return the chunks that lie within the first so many tokens of the decoder; all without a number."""
        if num_tokens is None:
            return self
        kept = int(torch.searchsorted(self.bounds, num_tokens, right=True)) - 1
        return PairedText(
            self.encoder_ids[:kept],
            self.encoder_lengths[:kept],
            self.tokens[: int(self.bounds[kept])],
            self.bounds[: kept + 1],
            self.chunk_length,
        )

    def encoder_side(self, chunks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ids and mask `(..., L')` of chunks with the given numbers `(...)`."""
        columns = torch.arange(self.encoder_ids.shape[1])
        return self.encoder_ids[chunks].long(), (columns < self.encoder_lengths[chunks][..., None]).long()

    def decoder_side(self, chunks: torch.Tensor, pad_token_id: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the tokens of rows of consecutive chunks, numbers `(B, n)`, with their mask, both `(B, T)`."""
        first, end = self.bounds[chunks[:, 0]], self.bounds[chunks[:, -1] + 1]  # (B,)
        columns = torch.arange(int((end - first).max()))
        mask = columns < (end - first)[:, None]
        places = (first[:, None] + columns).clamp(max=len(self.tokens) - 1)
        return self.tokens[places].long().masked_fill(~mask, pad_token_id), mask.long()


def pair_texts(processor: MemoryProcessor, texts: Sequence[str], *, limit: int | None = None) -> PairedText:
    """Cut documents into chunks and tokenise them for both sides.

    Args:
        processor (`MemoryProcessor`): With two tokenizers, both fast, and an end token.
        texts (`Sequence[str]`): Documents.
        limit (`int`, *optional*): Read no further once there are so many tokens of the decoder.

    Raises:
        ValueError: If there is no text, or the decoder's tokenizer has no end token.
    """
    tokenizer = processor.tokenizer
    if not texts or tokenizer.eos_token_id is None:
        raise ValueError("pairing needs at least one document, and an end token of the decoder's tokenizer.")
    ids: list[list[int]] = []
    tokens: list[np.ndarray] = []
    counts: list[np.ndarray] = []
    total = 0
    for text in texts:
        if limit is not None and total >= limit:
            break
        chunks, spans = processor.split_context(text), processor.chunk_spans(text)
        encoded = tokenizer(
            text, add_special_tokens=False, truncation=False, verbose=False, return_offsets_mapping=True
        )
        starts = np.maximum.accumulate(np.array([start for start, _ in encoded["offset_mapping"]], dtype=np.int64))
        chunk_of = np.searchsorted([start for start, _ in spans[1:]], starts, side="right")
        own = np.bincount(chunk_of, minlength=len(chunks))
        own[-1] += 1  # the end token
        ids += chunks
        counts.append(own)
        tokens.append(np.array([*encoded["input_ids"], tokenizer.eos_token_id], dtype=np.int32))
        total += len(tokens[-1])
    width = max(map(len, ids))
    padded = np.zeros((len(ids), width), dtype=np.int32)
    for row, chunk in zip(padded, ids, strict=True):
        row[: len(chunk)] = chunk
    return PairedText(
        torch.from_numpy(padded),
        torch.tensor([len(chunk) for chunk in ids]),
        torch.from_numpy(np.concatenate(tokens)),
        torch.from_numpy(np.concatenate([[0], np.concatenate(counts).cumsum()]).astype(np.int64)),
        processor.chunk_length,
    )


def cached_pairs(
    processor: MemoryProcessor, texts: Sequence[str], folder: Path, *, limit: int | None = None
) -> PairedText:
    """Pair texts as [`pair_texts`] does, or find them paired in `folder`."""
    digest = hashlib.sha256(f"{processor.chunk_length} {limit}".encode())
    for tokenizer in (processor.tokenizer, processor.encoder_tokenizer):
        digest.update(tokenizer_checksum(tokenizer).encode())
    for text in texts:
        digest.update(hashlib.sha256(text.encode()).digest())
    file = folder / f"pairs-{digest.hexdigest()[:32]}.safetensors"
    names = ("encoder_ids", "encoder_lengths", "tokens", "bounds")
    if not file.is_file():
        paired = pair_texts(processor, texts, limit=limit)
        folder.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(f".{os.getpid()}.part")
        save_file({name: getattr(paired, name).contiguous() for name in names}, part)
        os.replace(part, file)
    stored = load_file(file)
    return PairedText(**{name: stored[name] for name in names}, chunk_length=processor.chunk_length)


class PairedRows(Dataset):
    """Rows of R consecutive chunks, by number, in the order of [`TokenRows`].

    Args:
        text (`PairedText`): The split.
        chunks_per_row (`int`): Chunks of a row (R).
        num_items (`int`): Length of the dataset.
        seed (`int`, *optional*): Seed of the order; `None` reads in order.

    Raises:
        ValueError: If the text has fewer chunks than a row.
    """

    def __init__(self, text: PairedText, *, chunks_per_row: int, num_items: int, seed: int | None = None) -> None:
        if text.num_chunks < chunks_per_row:
            raise ValueError(
                f"the text has {text.num_chunks} chunks, fewer than the {chunks_per_row} of a row; give more text or "
                "shorten data.row_length"
            )
        self.text = text
        numbers = torch.arange(text.num_chunks)
        self.rows = TokenRows(numbers, row_length=chunks_per_row, num_items=num_items, seed=seed)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def row_length(self) -> int:
        """Tokens of a row, in the encoder's tokens."""
        return self.rows.row_length * self.text.chunk_length

    def padded_to(self, multiple: int) -> "PairedRows":
        """Return the same rows with items that count for nothing after them, up to a multiple of `multiple`."""
        num_items = -(-len(self) // multiple) * multiple
        return PairedRows(self.text, chunks_per_row=self.rows.row_length, num_items=num_items, seed=self.rows.seed)

    def __getitem__(self, index: int) -> tuple[int, torch.Tensor, PairedText]:
        return *self.rows[index], self.text


class PairCollator:
    """Turns rows of chunks into `{objective: inputs}`, plus `"rows"`, the rows' numbers.

    Args:
        objectives (`list[str]`): Names known to `build_batch`.
        spec (`BatchSpec`): How their batches are made, in the slots layout.
        source_chunks (`int`): Chunks of a row that become memories (S).
        encoded (`tuple`, *optional*): A text and the states `(N, L', E)` of all its tokens, from [`encode_pairs`]; its
            rows are then not encoded again.
    """

    def __init__(
        self,
        objectives: list[str],
        spec: BatchSpec,
        *,
        source_chunks: int,
        encoded: tuple[PairedText, np.ndarray] | None = None,
    ) -> None:
        self.objectives = objectives
        # The source is given as chunks, so nothing is cut into windows here.
        self.spec = replace(
            spec, layout="slots", chunk_length=1, window_length=1, mixed_with_causal="causal" in objectives
        )
        self.source_chunks = source_chunks
        self.encoded = encoded
        self.questions: Questions | None = None

    def __call__(self, items: list[tuple[Any, ...]]) -> dict[str, Any]:
        items, asked = split_questions(items)
        rows = torch.tensor([item[0] for item in items])
        chunks, text = torch.stack([item[1] for item in items]), items[0][2]  # (B, R)
        budget = draw_budget(self.spec.num_memories, rows, self.spec.num_memories_weights)
        batches: dict[str, Any] = {"rows": rows}
        for objective in self.objectives:
            step = self.spec.every.get(objective, 1)
            if self.spec.asked(objective) == "qa":
                batches[objective] = ask(self.questions, objective, self.spec, asked[::step], rows[::step], budget)
                continue
            batches[objective] = self.collate(objective, text, chunks[::step], rows[::step], budget=budget)
        return batches

    def collate(
        self,
        objective: str,
        text: PairedText,
        chunks: torch.Tensor,
        rows: torch.Tensor | None = None,
        *,
        budget: int | None = None,
        remembered: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """Build the batch of one objective.

        Args:
            objective (`str`): Its name.
            text (`PairedText`): What the chunks are of.
            chunks (`torch.LongTensor` of shape `(B, R)`): Numbers of the rows' chunks.
            rows (`torch.LongTensor` of shape `(B,)`, *optional*): Numbers of rows; negative ones get no target.
            budget (`int`, *optional*): Memories of each chunk. Default: K.
            remembered (`torch.LongTensor` of shape `(B, S)`, *optional*): Chunks that become memories instead of the
                row's own, for the control with another text's memories.
        """
        source, rest = chunks[:, : self.source_chunks], chunks[:, self.source_chunks :]
        pad = self.spec.special_tokens.pad
        asked = self.spec.asked(objective)
        tokens, mask = text.decoder_side(source if asked in REMEMBERED else rest, pad)
        clear = text.decoder_side(source, pad) if objective == "distillation" else (None, None)
        memories = source if remembered is None else remembered
        ids, ids_mask = text.encoder_side(memories)
        spec = self.spec if budget is None else replace(self.spec, memories_per_chunk=budget)
        starts = None
        if asked == "recall":
            numbers = torch.arange(len(chunks)) if rows is None else rows
            starts = draw_starts(numbers, mask.sum(1), spec.recall_prompt)
        context = ReadyContext(ids, ids_mask, *clear)
        batch = build_batch(objective, tokens, spec, attention_mask=mask, context=context, starts=starts)
        if budget is not None:
            batch["context_num_memories"] = torch.full(source.shape, budget)
        if rows is not None:
            batch = without_targets(batch, rows < 0)
        if self.encoded is not None and text is self.encoded[0]:
            del batch["context_input_ids"]
            batch["token_states"] = torch.from_numpy(self.encoded[1][memories.numpy()])  # (B, S, L', E)
        return keep_columns(batch)


def pair_conditions(
    model: MemoryEncoderDecoderForCausalLM,
    collator: PairCollator,
    objective: str,
    text: PairedText,
    chunks: torch.Tensor,
    others: torch.Tensor,
    budget: int | None = None,
    *,
    controls: bool = True,
) -> dict[str, Any]:
    """Score the text of an objective under every condition, on the same targets.

    Args:
        model (`MemoryEncoderDecoderForCausalLM`): The model, in eval mode.
        collator (`PairCollator`): Builds its batches.
        objective (`str`): `"causal"` or `"copy"`.
        text (`PairedText`): The split.
        chunks (`torch.LongTensor` of shape `(B, R)`): Numbers of the rows' chunks.
        others (`torch.LongTensor` of shape `(B, R)`): Rows whose memories are wrong here.
        budget (`int`, *optional*): Memories of each chunk.
        controls (`bool`): Whether to score also what no memory takes part in.

    Returns:
        `dict`: Condition -> losses and right tokens, summed by row, and the number of targets of each row, all `(B,)`.
        `plain_...` is the decoder without its adapters, that is, as it was before this stage if nothing else trained.
    """
    source = collator.source_chunks
    batch = collator.collate(objective, text, chunks, budget=budget)
    wrong = collator.collate(objective, text, chunks, budget=budget, remembered=others[:, :source])
    scores = {"memory": _score(model, batch), "wrong_memory": _score(model, wrong)}
    if not controls:
        return scores
    slots = source * (budget or collator.spec.memories_per_chunk)
    alone = {name: batch[name][:, slots:] for name in ("input_ids", "attention_mask", "shift_labels")}
    clear, clear_mask = text.decoder_side(chunks[:, :source], collator.spec.special_tokens.pad)
    whole = {
        name: torch.cat([first, alone[name]], 1)
        for name, first in (
            ("input_ids", clear),
            ("attention_mask", clear_mask),
            ("shift_labels", torch.full_like(clear, IGNORED)),
        )
    }
    order = torch.argsort(whole["attention_mask"], dim=1, descending=True, stable=True)  # no padding inside a text
    whole = {name: tensor.gather(1, order) for name, tensor in whole.items()}
    scores["no_memory"] = _score(model.decoder, alone)
    with model.adapters_off():
        if model.config.adapters:
            scores["plain_no_memory"] = _score(model.decoder, alone)
        scores["plain_full_context"] = _score(model.decoder, whole)
    return scores


@torch.no_grad()
def _score(model: Any, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Sum losses, right tokens and targets of each row."""
    device = next(model.parameters()).device
    inputs = {name: tensor.to(device) for name, tensor in batch.items() if name not in ("shift_labels", "columns")}
    targets = batch["shift_labels"].to(device)
    logits = model(**inputs, use_cache=False).logits
    correct, losses = token_results(logits, targets)
    present = targets != IGNORED
    found = {"loss": losses.double() * present, "correct": (correct & present).double(), "targets": present.double()}
    return {name: value.sum(1).cpu() for name, value in found.items()}


def evaluate_pairs(
    model: MemoryEncoderDecoderForCausalLM,
    collator: PairCollator,
    text: PairedText,
    *,
    objective: str,
    chunks_per_row: int,
    num_rows: int,
    batch_size: int = 32,
    budgets: Sequence[int | None] = (None,),
) -> list[dict[str, Any]]:
    """Measure a memory model whose encoder has a tokenizer of its own, with controls.

    Args:
        model (`MemoryEncoderDecoderForCausalLM`): The model.
        collator (`PairCollator`): Builds its batches.
        text (`PairedText`): Held-out text.
        objective (`str`): `"causal"` or `"copy"`.
        chunks_per_row (`int`): Chunks of a row.
        num_rows (`int`): Most rows, spread evenly over the text.
        batch_size (`int`): Rows at a time.
        budgets (`Sequence[int]`): Memories of each chunk, one after the other; `None` is what the model was made for.

    Returns:
        `list` of `dict`: For each budget: condition -> loss and token accuracy with intervals over rows; beside each
        control the gain of memory over it, in nats per token, with the interval of the difference on the same rows.

    Raises:
        ValueError: If the text has fewer than two rows.
    """
    rows = spread_rows(torch.arange(text.num_chunks), row_length=chunks_per_row, limit=num_rows)
    if len(rows) < 2:
        raise ValueError("the control with another text's memories needs two rows; give a longer text")
    model.eval()
    others = rows.roll(len(rows) // 2, 0)
    results = []
    without_memory: dict[str, dict[str, torch.Tensor]] = {}
    for budget in budgets:
        parts: dict[str, list[dict[str, torch.Tensor]]] = {}
        for own, other in zip(rows.split(batch_size), others.split(batch_size), strict=True):
            found = pair_conditions(model, collator, objective, text, own, other, budget, controls=not without_memory)
            for name, score in found.items():
                parts.setdefault(name, []).append(score)
        scores = {
            name: {key: torch.cat([part[key] for part in found]) for key in found[0]} for name, found in parts.items()
        }
        # What no memory takes part in is the same for every budget.
        without_memory = without_memory or {name: s for name, s in scores.items() if name not in WITH_MEMORY}
        results.append({name: _summarise(name, s, scores) for name, s in {**scores, **without_memory}.items()})
    return results


def _summarise(name: str, score: dict[str, torch.Tensor], scores: dict[str, Any]) -> dict[str, Any]:
    """Turn the sums of each row into metrics with intervals over rows."""
    counts = score["targets"]
    correct, total = score["correct"].sum().item(), counts.sum().item()
    result = {
        "token_accuracy": correct / total,
        "token_accuracy_interval": list(bootstrap_interval(score["correct"], counts)),
        "loss": score["loss"].sum().item() / total,
        "loss_interval": list(bootstrap_interval(score["loss"], counts)),
        "num_rows": len(counts),
        "num_tokens": int(total),
        "num_correct": int(correct),
    }
    if name != "memory":
        gained = score["loss"] - scores["memory"]["loss"]
        result["gain_of_memory"] = gained.sum().item() / total
        result["gain_of_memory_interval"] = list(bootstrap_interval(gained, counts))
    return result


@torch.no_grad()
def encode_pairs(
    model: MemoryEncoderDecoderForCausalLM, text: PairedText, folder: Path, *, bf16: bool, device: torch.device
) -> np.ndarray:
    """Read every chunk of a text with a frozen encoder, once, or find its states.

    What is kept are the states of all tokens, in front of the pooling: so they serve every K and every pooling, and
    poolings that learn.

    Args:
        model (`MemoryEncoderDecoderForCausalLM`): Its encoder must be frozen.
        text (`PairedText`): The text.
        folder (`Path`): Where the states are kept.
        bf16 (`bool`): Whether training autocasts to bfloat16: the encoder then does here, too.
        device (`torch.device`): Where to encode.

    Returns:
        `np.ndarray` of shape `(N, L', E)`: States in float32, memory-mapped.

    Raises:
        ValueError: If a parameter of the encoder trains, so that its states would be old after one step.
    """
    if any(parameter.requires_grad for parameter in model.encoder.parameters()):
        raise ValueError("data.encode_once needs a frozen encoder without adapters; set model.freeze_encoder: true")
    encoder = model.encoder.to(device).eval()

    def read(start: int, stop: int) -> torch.Tensor:
        ids, mask = (tensor.to(device) for tensor in text.encoder_side(torch.arange(start, stop)))
        states: torch.Tensor = encoder(input_ids=ids, attention_mask=mask, return_dict=True).last_hidden_state
        return states

    shape = (*text.encoder_ids.shape, model.config.encoder.hidden_size)
    return keep_states(model, text.encoder_ids, read, folder / "token-states", shape, {}, bf16)
