"""Rows that are documents: each read by itself, none across a border, padded to the longest of its batch.

Packed rows waste nothing and are the default. Documents of their own cost padding, which `group_by_length` takes away
again: rows of about the same length stand in one step.
"""

from typing import Any

import torch
from torch.utils.data import Dataset

BATCHES_SORTED_AT_ONCE = 50


class DocumentRows(Dataset):
    """Documents, or pieces of at most `row_length` tokens of longer ones, in an order given by seed and index alone.

    Each pass over the documents has an order of its own. A pass is whole steps: the few rows that fill none are left
    out, other ones in each pass. With `group_by_length` 50 steps of the shuffled rows at a time are sorted by length,
    cut into steps and these shuffled, so that a pass has the same rows with and without.

    Args:
        tokens (`torch.Tensor` of shape `(num_tokens,)`): Documents, each with the end token after it.
        eos_token_id (`int`): The end token; it belongs to the document before it.
        row_length (`int`): Most tokens of a row.
        shortest (`int`): Fewest tokens of a row: shorter pieces are left out.
        num_items (`int`): Length of the dataset.
        step_rows (`int`): Rows of one optimizer step, over all processes and accumulation steps.
        seed (`int`): Seed of the order.
        group_by_length (`bool`): Whether the rows of a step are of about the same length.

    Raises:
        ValueError: If no document is long enough.
    """

    def __init__(
        self,
        tokens: torch.Tensor,
        *,
        eos_token_id: int,
        row_length: int,
        shortest: int,
        num_items: int,
        step_rows: int,
        seed: int,
        group_by_length: bool = False,
    ) -> None:
        self.tokens = tokens
        self.row_length = row_length
        self.num_items = num_items
        self.step_rows = step_rows
        self.seed = seed
        self.group_by_length = group_by_length
        self.starts, self.lengths = cut_documents(tokens, eos_token_id, row_length)
        long_enough = self.lengths >= shortest
        self.starts, self.lengths = self.starts[long_enough], self.lengths[long_enough]
        if not len(self.starts):
            raise ValueError(
                f"no document has {shortest} tokens, the fewest that a row of this stage takes; give longer "
                "documents, or leave data.documents out"
            )
        self._pass: tuple[int, torch.Tensor] | None = None

    def __len__(self) -> int:
        return self.num_items

    @property
    def per_pass(self) -> int:
        """Rows of one pass."""
        return max(len(self.starts) // self.step_rows, 1) * min(self.step_rows, len(self.starts))

    def num_tokens(self) -> int:
        """Tokens of all items together."""
        order = torch.cat([self._order(i) for i in range(-(-self.num_items // self.per_pass))])
        return int(self.lengths[order[: self.num_items]].sum())

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        passed, place = divmod(index, self.per_pass)
        if self._pass is None or self._pass[0] != passed:
            self._pass = passed, self._order(passed)
        number = int(self._pass[1][place])
        start, length = int(self.starts[number]), int(self.lengths[number])
        return number, self.tokens[start : start + length].long()

    def _order(self, passed: int) -> torch.Tensor:
        """Return the rows of a pass in their order, `(per_pass,)`."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + passed)
        order = torch.randperm(len(self.starts), generator=generator)[: self.per_pass]
        if not self.group_by_length:
            return order
        blocks = order.split(self.step_rows * BATCHES_SORTED_AT_ONCE)
        order = torch.cat([block[self.lengths[block].argsort(stable=True)] for block in blocks])
        steps = order.view(-1, min(self.step_rows, len(self.starts)))
        return steps[torch.randperm(len(steps), generator=generator)].flatten()


def cut_documents(tokens: torch.Tensor, eos_token_id: int, row_length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return start and length of each piece of a stream, `(pieces,)` each; the last document may lack its end token.

    >>> starts, lengths = cut_documents(torch.tensor([5, 6, 7, 8, 2, 9, 2, 5]), eos_token_id=2, row_length=3)
    >>> starts.tolist(), lengths.tolist()
    ([0, 3, 5, 7], [3, 2, 2, 1])
    """
    ends = (tokens == eos_token_id).nonzero()[:, 0] + 1
    if not len(ends) or ends[-1] < len(tokens):
        ends = torch.cat([ends, torch.tensor([len(tokens)])])
    begins = torch.cat([torch.zeros(1, dtype=ends.dtype), ends[:-1]])
    pieces = (ends - begins + row_length - 1) // row_length
    first = begins.repeat_interleave(pieces)
    index = torch.arange(len(first)) - (pieces.cumsum(0) - pieces).repeat_interleave(pieces)
    starts = first + index * row_length
    return starts, (ends.repeat_interleave(pieces) - starts).clamp(max=row_length)


def pad_rows(rows: list[torch.Tensor], multiple: int, pad_token_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Join rows of different lengths to `(B, n)`, padded on the right, n a multiple of `multiple`; and their mask.

    >>> tokens, mask = pad_rows([torch.tensor([5, 6, 7]), torch.tensor([8])], multiple=2, pad_token_id=0)
    >>> tokens.tolist(), mask.tolist()
    ([[5, 6, 7, 0], [8, 0, 0, 0]], [[1, 1, 1, 0], [1, 0, 0, 0]])
    """
    lengths = torch.tensor([len(row) for row in rows])
    width = -(-int(lengths.max()) // multiple) * multiple
    tokens = torch.full((len(rows), width), pad_token_id)
    for row, place in zip(rows, tokens, strict=True):
        place[: len(row)] = row
    return tokens, (torch.arange(width) < lengths[:, None]).long()
