"""Cut texts into windows and lay the windows' results back to the texts' columns.

B rows, T columns, W window length, N windows of the longest row, P windows of all rows together, X features.
"""

from dataclasses import dataclass

import torch
from torch.nn import functional as F


@dataclass
class Windows:
    """The windows of a batch of texts, padding removed.

    Attributes:
        input_ids (`torch.LongTensor` of shape `(P, W)`): Tokens in row order; the last window of a row may end in
            padding.
        attention_mask (`torch.LongTensor` of shape `(P, W)`): 1 for tokens, 0 for padding.
        row (`torch.LongTensor` of shape `(P,)`): The text that a window belongs to.
        index (`torch.LongTensor` of shape `(P,)`): The window's number in its text, from 0.
        counts (`torch.LongTensor` of shape `(B,)`): Windows of each text.
        column_to_token (`torch.LongTensor` of shape `(B, T)`): For each column of the texts the place of its token in
            the flattened windows. A padding column points to the last token before it, so that what is laid back
            there is what predicts the next token.
        num_windows (`int`): Windows of the longest text (N).
        dense (`bool`): Whether every text is known, without looking at the data, to have N windows.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    row: torch.Tensor
    index: torch.Tensor
    counts: torch.Tensor
    column_to_token: torch.Tensor
    num_windows: int
    dense: bool

    @property
    def last(self) -> torch.Tensor:
        """Numbers of each text's last window among the P windows, of shape `(B,)`."""
        is_last = self.index == self.counts[self.row] - 1
        return torch.zeros_like(self.counts).index_copy(0, self.row[is_last], is_last.nonzero()[:, 0])

    def lay_back(self, features: torch.Tensor) -> torch.Tensor:
        """Turn features of the windows `(P, W, X)` into features of the texts' columns `(B, T, X)`."""
        return features.flatten(0, 1)[self.column_to_token]

    def keep(self, columns: torch.Tensor) -> "Windows":
        """Return only each text's last window and those that hold the given columns, and only those columns.

        Args:
            columns (`torch.LongTensor` of shape `(num_columns,)`): Columns of the texts whose features are wanted.
        """
        window_length = self.input_ids.shape[1]
        token = self.column_to_token[:, columns]  # (B, num_columns)
        window, offset = token // window_length, token % window_length
        wanted = (self.index == self.counts[self.row] - 1).index_fill(0, window.flatten(), True)
        renumbered = wanted.cumsum(0) - 1
        return Windows(
            self.input_ids[wanted],
            self.attention_mask[wanted],
            self.row[wanted],
            self.index[wanted],
            self.counts,
            renumbered[window] * window_length + offset,
            self.num_windows,
            dense=False,
        )


def split_windows(input_ids: torch.Tensor, attention_mask: torch.Tensor | None, window_length: int) -> Windows:
    """Cut each row of a batch into windows of `window_length` tokens, skipping padding wherever it stands.

    The rank of a token is the number of tokens before it in its row; its window is `rank // window_length`. Windows
    that a short row lacks do not appear.

    Args:
        input_ids (`torch.LongTensor` of shape `(B, T)`): Tokens.
        attention_mask (`torch.LongTensor` of shape `(B, T)`, *optional*): 1 for tokens, 0 for padding.
        window_length (`int`): Tokens per window (W).

    Returns:
        [`Windows`]: The windows. No row is empty.
    """
    batch_size, length = input_ids.shape
    device = input_ids.device
    if attention_mask is None:  # no data-dependent shape: P = B * N
        num_windows = -(-length // window_length)
        padding = num_windows * window_length - length
        offsets = torch.arange(num_windows * window_length, device=device)
        return Windows(
            F.pad(input_ids, (0, padding)).view(-1, window_length),
            (offsets < length).long().expand(batch_size, -1).reshape(-1, window_length),
            torch.arange(batch_size, device=device).repeat_interleave(num_windows),
            torch.arange(num_windows, device=device).repeat(batch_size),
            torch.full((batch_size,), num_windows, device=device),
            torch.arange(batch_size, device=device)[:, None] * num_windows * window_length + offsets[:length],
            num_windows,
            dense=True,
        )
    present = attention_mask.bool()
    rank = present.cumsum(1) - 1  # (B, T)
    counts = (rank[:, -1] + window_length) // window_length  # (B,)
    first = counts.cumsum(0) - counts  # number of the first window of each row
    num_windows, total = int(counts.max()), int(counts.sum())
    column_to_token = first[:, None] * window_length + rank.clamp(min=0)
    token = column_to_token[present]
    flat = torch.zeros(total * window_length, dtype=input_ids.dtype, device=device)
    row = torch.arange(batch_size, device=device).repeat_interleave(counts)  # (P,)
    return Windows(
        flat.index_copy(0, token, input_ids[present]).view(total, window_length),
        torch.zeros_like(flat).index_fill(0, token, 1).view(total, window_length),
        row,
        torch.arange(total, device=device) - first[row],
        counts,
        column_to_token,
        num_windows,
        dense=False,
    )


def predicting_column(attention_mask: torch.Tensor) -> torch.Tensor:
    """Return for each column the last column up to it that holds a token; the first column where there is none.

    Args:
        attention_mask (`torch.LongTensor` of shape `(B, T)`): 1 for tokens, 0 for padding.

    Returns:
        `torch.LongTensor` of shape `(B, T)`.

    Example:
    ```python
    >>> predicting_column(torch.tensor([[0, 1, 0, 1, 0]])).tolist()
    [[0, 1, 1, 3, 3]]

    ```
    """
    columns = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    return (columns * attention_mask.bool()).cummax(1).values


def has_inner_padding(attention_mask: torch.Tensor) -> bool:
    """Whether padding stands between two tokens of some row. Reads the data: not for compiled code."""
    present = attention_mask.bool()
    starts = present[:, 1:] & ~present[:, :-1]
    return bool((starts & (present.cumsum(1)[:, :-1] > 0)).any())


def scatter_present(values: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
    """Lay rows of `values` `(n, ...)` where `present` `(B, C)` is true, zeros elsewhere. Returns `(B, C, ...)`."""
    return values.new_zeros(*present.shape, *values.shape[1:]).index_put((present,), values)


def pack_present(
    values: torch.Tensor, mask: torch.Tensor, rows: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Move the present values `(B, M, X)` of each row to the front and drop columns that no row needs.

    With `rows` `(P,)` each mask `(P, M)` is about that row of the values, and so is what is returned.
    """
    width = int(mask.sum(1).max()) if mask.shape[1] else 0
    order = torch.argsort(mask, dim=1, descending=True, stable=True)[:, :width]
    rows = torch.arange(len(mask), device=mask.device) if rows is None else rows
    return values[rows[:, None], order], mask.gather(1, order)
