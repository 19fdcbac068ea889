"""Rows of tokens in training order, and the collator that makes every objective's batch from them."""

import bisect
import copy
import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.utils.data import Dataset

from .documents import pad_rows
from .objectives import BatchSpec, build_batch, keep_columns, without_targets
from .questions import Questions, ask, split_questions

COPIES = ("copy", "blank_copy")
REMEMBERED = (*COPIES, "recall")  # objectives whose source is the row, not its beginning


class TokenRows(Dataset):
    """Rows of `row_length` tokens from one flat stream, in an order that depends on the seed and the index alone.

    Training (`seed` given) goes through the stream pass after pass: each pass has its own permutation and, after the
    first, its own starting offset, so that row boundaries move. Item i never depends on what was read before, which
    makes resuming and several processes exact. Evaluation (`seed=None`) reads rows from the start, once; items
    after the last row repeat the first one under the number -1 and count for nothing.

    Args:
        tokens (`torch.Tensor` of shape `(num_tokens,)`): Documents with an end token between them.
        row_length (`int`): Tokens per row.
        num_items (`int`): Length of the dataset.
        seed (`int`, *optional*): Seed of the order; `None` reads in order.

    Raises:
        ValueError: If the stream is shorter than one row.
    """

    def __init__(
        self,
        tokens: torch.Tensor,
        *,
        row_length: int,
        num_items: int,
        seed: int | None = None,
    ) -> None:
        if tokens.numel() < row_length:
            raise ValueError(
                f"the text has {tokens.numel()} tokens, fewer than one row of {row_length}; give more text or "
                "shorten data.row_length"
            )
        self.tokens = tokens
        self.row_length = row_length
        self.num_items = num_items
        self.seed = seed
        self._pass: tuple[int, int, torch.Tensor] | None = None

    def __len__(self) -> int:
        return self.num_items

    @property
    def num_rows(self) -> int:
        """Whole rows in one pass."""
        return self.tokens.numel() // self.row_length

    def padded_to(self, multiple: int) -> "TokenRows":
        """Return the same rows with items that count for nothing after them, up to a multiple of `multiple`.

        Whole batches on every process: otherwise accelerate fills the last ones with rows that were scored before.
        """
        num_items = -(-self.num_items // multiple) * multiple
        return TokenRows(self.tokens, row_length=self.row_length, num_items=num_items, seed=self.seed)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        number, start = self._locate(index)
        return number, self.tokens[start : start + self.row_length].long()

    def _locate(self, index: int) -> tuple[int, int]:
        """Return the number and the first token of an item's row."""
        if self.seed is None:
            real = index < self.num_rows
            return (index, index * self.row_length) if real else (-1, 0)
        # Shifted passes have one row less, so that all passes are equally long.
        per_pass = max(self.num_rows - 1, 1)
        passed, place = divmod(index, per_pass)
        if self._pass is None or self._pass[0] != passed:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + passed)
            slack = self.tokens.numel() - per_pass * self.row_length
            offset = int(torch.randint(min(slack, self.row_length) + 1, (), generator=generator)) if passed else 0
            self._pass = (passed, offset, torch.randperm(per_pass, generator=generator))
        _, offset, order = self._pass
        number = int(order[place])
        return number, offset + number * self.row_length


class ObjectiveCollator:
    """Turns rows into `{objective: inputs}`, plus `"rows"`, the rows' numbers.

    Args:
        objectives (`list[str]`): Names known to `build_batch`.
        spec (`BatchSpec`): How their batches are made.
    """

    def __init__(self, objectives: list[str], spec: BatchSpec) -> None:
        self.objectives = objectives
        self.spec = replace(spec, mixed_with_causal="causal" in objectives)
        self.questions: Questions | None = None
        self.evaluates = False

    def __call__(self, items: list[tuple[Any, ...]]) -> dict[str, Any]:
        items, asked = split_questions(items)
        rows = torch.tensor([item[0] for item in items])
        mask = None
        if self.spec.documents:
            tokens, mask = pad_rows([item[1] for item in items], self.spec.window_length, self.spec.special_tokens.pad)
        else:
            tokens = torch.stack([item[1] for item in items])  # (B, n)
        budget = draw_budget(self.spec.num_memories, rows, self.spec.num_memories_weights)
        batches: dict[str, Any] = {"rows": rows} if mask is None else {"rows": rows, "num_tokens": mask.sum()}
        for objective in self.objectives:
            step = self.spec.every.get(objective, 1)
            if self.spec.asked(objective) == "qa":
                batches[objective] = ask(self.questions, objective, self.spec, asked[::step], rows[::step], budget)
                continue
            options: dict[str, Any] = {} if mask is None else {"mask": mask[::step]}
            if budget is not None:
                options["budget"] = budget
            batches[objective] = self.collate(objective, tokens[::step], rows[::step], **options)
        return batches

    def for_evaluation(self) -> "ObjectiveCollator":
        """Return this collator as validation reads with it: no row is cut short."""
        evaluating = copy.copy(self)
        evaluating.evaluates = True
        return evaluating

    def collate(
        self,
        objective: str,
        tokens: torch.Tensor,
        rows: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        budget: int | None = None,
    ) -> dict[str, torch.Tensor]:
        """Build the batch of one objective from rows `(B, n)`; rows with a negative number get no target.

        With a `budget` each chunk of the context gets so many memories instead of the model's `memories_per_chunk`.
        """
        spec, end, asked = self.spec, False, self.spec.asked(objective)
        if spec.random_tokens and rows is not None and objective in (*COPIES, "reconstruction") and not self.evaluates:
            tokens = with_random_tokens(tokens, rows, spec)
        if budget is not None:
            spec = replace(spec, memories_per_chunk=budget)
        if mask is not None:
            spec, mask = self._padded_sources(asked, spec, mask)
        if spec.vary_source and asked in REMEMBERED:
            tokens, mask = self._varied_sources(tokens)
            spec = replace(spec, source_length=None)
        if spec.shortened and rows is not None and objective in (*COPIES, "reconstruction"):
            tokens, mask = self._shortened_sources(objective, tokens, rows)
            spec, end = replace(spec, source_length=None), objective in COPIES
        starts = self._starts(spec, tokens, rows, mask) if asked == "recall" else None
        batch = build_batch(objective, tokens, spec, attention_mask=mask, starts=starts, end=end)
        if budget is not None:
            batch["context_num_memories"] = budget * batch["context_attention_mask"].any(2).long()
        if rows is not None:
            batch = without_targets(batch, rows < 0)
        if spec.split_windows:
            batch = {name: tensor.reshape(-1, spec.window_length) for name, tensor in batch.items()}
        return keep_columns(batch)

    def _starts(
        self, spec: BatchSpec, tokens: torch.Tensor, rows: torch.Tensor | None, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Draw where in its source each prompt of recall begins, `(B,)`."""
        lengths = torch.full(tokens.shape[:1], tokens.shape[1]) if mask is None else mask.sum(1)
        lengths = lengths if spec.source_length is None else lengths.clamp(max=spec.source_length)
        return draw_starts(torch.arange(len(tokens)) if rows is None else rows, lengths, spec.recall_prompt)

    def _padded_sources(self, objective: str, spec: BatchSpec, mask: torch.Tensor) -> tuple[BatchSpec, torch.Tensor]:
        """Return the length of the sources of padded rows `(B, n)`, whole windows, and the rows' mask."""
        width, window = mask.shape[1], spec.window_length
        longest = width if objective in REMEMBERED else (width - 1) // window * window
        limit = longest if spec.source_length is None else min(spec.source_length, longest)
        if objective in REMEMBERED:
            whole = mask.sum(1, keepdim=True) // window * window
            mask = (torch.arange(width, device=mask.device) < whole).long()
        return replace(spec, source_length=limit if objective in REMEMBERED or limit else None), mask

    def _shortened_sources(
        self, objective: str, tokens: torch.Tensor, rows: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Cut some chunks of rows `(B, n)`, or some rows, short; return them with their mask."""
        spec = self.spec
        length = spec.chunk_length if objective == "reconstruction" else spec.source_length or tokens.shape[1]
        if objective == "reconstruction":
            if tokens.shape[1] % length:
                return tokens, None  # which is refused
            pieces = tokens.shape[1] // length
            tokens = tokens.reshape(-1, length)
            rows = (rows[:, None] * pieces + torch.arange(pieces)).flatten()
        lengths = draw_lengths(rows, length, 0.0 if self.evaluates else spec.shortened)
        return tokens[:, :length], (torch.arange(length) < lengths[:, None]).long()

    def _varied_sources(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cut rows `(B, n)` to sources of 1, 2, ... windows in turn; return them with their mask."""
        longest, window = self.spec.source_length or tokens.shape[1], self.spec.window_length
        num_windows = torch.arange(tokens.shape[0], device=tokens.device) % (longest // window) + 1
        columns = torch.arange(longest, device=tokens.device)
        return tokens[:, :longest], (columns < num_windows[:, None] * window).long()


def draw_lengths(numbers: torch.Tensor, longest: int, share: float) -> torch.Tensor:
    """Draw lengths: of a share of the rows 1 to `longest - 1`, all equally likely, of the others `longest`.

    Args:
        numbers (`torch.LongTensor` of shape `(B,)`): Numbers of the rows; equal numbers draw alike in every batch.
        longest (`int`): Length of a whole row.
        share (`float`): 0 to 1.

    Returns:
        `torch.LongTensor` of shape `(B,)`: Lengths.

    >>> draw_lengths(torch.arange(8), 16, 0.5).tolist(), draw_lengths(torch.arange(2), 16, 0.0).tolist()
    ([16, 15, 5, 12, 15, 12, 16, 16], [16, 16])
    """
    is_cut = _uniform(2 * numbers) < share
    lengths = 1 + (_uniform(2 * numbers + 1) * (longest - 1)).long()
    return torch.where(is_cut & (longest > 1), lengths, longest)


def with_random_tokens(tokens: torch.Tensor, rows: torch.Tensor, spec: BatchSpec) -> torch.Tensor:
    """Put random tokens, from one to all, into a share of rows `(B, n)`; equal numbers of rows draw alike."""
    numbers = (rows[:, None] * (tokens.shape[1] + 2) + torch.arange(tokens.shape[1] + 2)) * 2 + 1_000_003
    chosen, share = (_uniform(numbers[:, place, None]) for place in (-1, -2))  # (B, 1)
    drawn = (_uniform(numbers[:, :-2] + 1) * spec.vocab_size).long()  # (B, n)
    special = torch.tensor([i for i in vars(spec.special_tokens).values() if i is not None])
    is_new = (chosen < spec.random_tokens) & (_uniform(numbers[:, :-2]) < share) & ~torch.isin(drawn, special)
    return torch.where(is_new, drawn, tokens)


def _uniform(numbers: torch.Tensor) -> torch.Tensor:
    """Map integers to numbers in [0, 1) that look random, by the splitmix64 hash (Steele et al. 2014)."""
    state = (numbers + 1) * -7046029254386353131
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685), (31, 1)):
        state = (state ^ ((state >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return ((state >> 11) & ((1 << 53) - 1)).double() / 2**53


def draw_starts(numbers: torch.Tensor, lengths: torch.Tensor, prompt_length: int) -> torch.Tensor:
    """Draw where in its source each prompt of recall begins, so that at least one token follows it.

    Args:
        numbers (`torch.LongTensor` of shape `(B,)`): Numbers of the rows; equal numbers draw alike in every batch.
        lengths (`torch.LongTensor` of shape `(B,)`): Tokens of the rows' sources.
        prompt_length (`int`): Tokens of a prompt.

    Returns:
        `torch.LongTensor` of shape `(B,)`: Places; 0 where a source is no longer than a prompt.

    >>> draw_starts(torch.arange(6), torch.tensor([16, 16, 16, 16, 4, 5]), 4).tolist()
    [10, 0, 1, 2, 0, 0]
    """
    return (_uniform(2 * numbers) * (lengths - prompt_length).clamp(min=1)).long()


def draw_budget(num_memories: Sequence[int], rows: torch.Tensor, weights: Sequence[float] = ()) -> int | None:
    """Draw the memories per chunk of a batch; the same rows in the same order always draw the same.

    Args:
        num_memories (`Sequence[int]`): What there is to draw from; nothing: no budget.
        rows (`torch.LongTensor` of shape `(B,)`): Numbers of the batch's rows.
        weights (`Sequence[float]`): How often each is drawn, in any unit. Default: equally.

    >>> draw_budget([], torch.tensor([3, 4])), draw_budget([7], torch.tensor([3, 4]))
    (None, 7)
    >>> drawn = [draw_budget([1, 4], torch.tensor([row]), [3, 1]) for row in range(1000)]
    >>> drawn.count(1), drawn.count(4)
    (751, 249)
    """
    if not num_memories:
        return None
    digest = hashlib.sha256(rows.numpy().tobytes()).digest()
    drawn = int.from_bytes(digest[:8], "big")
    if not weights:
        return num_memories[drawn % len(num_memories)]
    place = bisect.bisect(list(itertools.accumulate(weights)), drawn / 2**64 * sum(weights))
    return num_memories[min(place, len(num_memories) - 1)]
