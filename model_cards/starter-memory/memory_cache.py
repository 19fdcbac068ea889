"""The cache of a text that folds into memories while it grows.

B rows, M memories, S columns of the decoder's cache, H heads, W window length, D decoder width.
"""

from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import DynamicCache


class MemoryCache(DynamicCache):
    """Keys and values of each row's open window and of the memories before it.

    Beside the decoder's keys and values the cache holds what a roll-over needs: the tokens of the open window, which
    become memories when it is full, and the memories so far. `get_seq_length()` counts columns of *text*, as
    everything outside the model expects; the number of columns in the decoder's cache differs from it.

    Args:
        rolling (`bool`): Whether a full window folds into memories when the next token comes. If not, the last window
            grows on.

    Attributes:
        column_mask (`torch.LongTensor` of shape `(B, S)`): 1 where a column of the decoder's cache holds a memory or
            token of the row.
        window_input_ids (`torch.LongTensor` of shape `(B, at most W)`): Tokens of the open windows, padded on the
        right.
        window_fill (`torch.LongTensor` of shape `(B,)`): Number of tokens in each open window.
        memory_embeds (`torch.FloatTensor` of shape `(B, M, D)`): Memories before the open windows.
        memory_mask (`torch.LongTensor` of shape `(B, M)`): 1 for present memories.
        asked (`torch.BoolTensor` of shape `(B,)`): Whether a marker stands before the open window.
        num_pinned (`torch.LongTensor` of shape `(B,)`): How many of the memories belong to the context in the slots,
            which stays in front whatever folds behind it.
        num_clear (`torch.LongTensor` of shape `(B,)`): How many of those are embedded tokens around the slots.
        folded_input_ids (`torch.LongTensor` of shape `(B, F)`): Under `memory_policy="merge"` the tokens of all folded
            windows; else none.
        segment_sizes (`torch.LongTensor` of shape `(B, S)`): Under that policy the chunks that each K memories behind
            the pinned stand for; 0 where a row has fewer.
        rolls_behind_slots (`bool`): Whether a text with slots that fills the cache folds behind them.
    """

    def __init__(self, rolling: bool = True):
        super().__init__()
        self.rolling = rolling
        self.num_columns = 0
        self.column_mask: Any = None
        self.window_input_ids: Any = None
        self.window_fill: Any = None
        self.memory_embeds: Any = None
        self.memory_mask: Any = None
        self.asked: Any = None
        self.num_pinned: Any = None
        self.num_clear: Any = None
        self.folded_input_ids: Any = None
        self.segment_sizes: Any = None
        self.rolls_behind_slots = False

    _row_state = (
        "column_mask",
        "window_input_ids",
        "window_fill",
        "memory_embeds",
        "memory_mask",
        "asked",
        "num_pinned",
        "num_clear",
        "folded_input_ids",
        "segment_sizes",
    )

    _merging_state = ("folded_input_ids", "segment_sizes")

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of text columns read so far, padding included."""
        return self.num_columns

    def decoder_cache(self) -> DynamicCache:
        """Return a plain cache over the same keys and values, for the decoder to read and extend."""
        cache = DynamicCache()
        cache.layers = self.layers
        return cache

    def start(self, cache: DynamicCache, **state: torch.Tensor) -> None:
        """Take over the keys and values of `cache` and the row state that belongs to them.

        Args:
            cache (`DynamicCache`): Cache of B rows and S columns.
            state: Every attribute of the row state, see the class. What merging needs may be left out where nothing
                has folded, or under another policy.
        """
        self.layers = cache.layers
        nothing = torch.zeros_like(state["window_input_ids"][:, :0])
        for name in self._row_state:
            setattr(self, name, state.get(name, nothing) if name in self._merging_state else state[name])

    def row_state(self) -> dict[str, torch.Tensor]:
        """Return the tensors of the row state by name."""
        return {name: getattr(self, name) for name in self._row_state}

    def append(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> None:
        """Note tokens that the decoder has just read behind the open windows.

        Args:
            input_ids (`torch.LongTensor` of shape `(B, Q)`): The tokens.
            attention_mask (`torch.LongTensor` of shape `(B, Q)`): 1 for tokens, 0 for padding.
        """
        present = attention_mask.bool()
        place = self.window_fill[:, None] + present.cumsum(1) - 1  # (B, Q)
        fill = self.window_fill + present.sum(1)
        width = max(int(fill.max()), self.window_input_ids.shape[1])
        window = self.window_input_ids.new_zeros(len(fill), width)
        window[:, : self.window_input_ids.shape[1]] = self.window_input_ids
        row = torch.arange(len(fill), device=fill.device)[:, None].expand_as(place)
        window[row[present], place[present]] = input_ids[present]
        self.window_input_ids, self.window_fill = window, fill
        self.column_mask = torch.cat([self.column_mask, attention_mask.to(self.column_mask)], 1)

    def replace_rows(self, rows: torch.Tensor, other: "MemoryCache") -> None:
        """Put the rows of another cache in the place of some rows of this one, each row at its own length.

        Args:
            rows (`torch.LongTensor` of shape `(R,)`): Rows to replace.
            other ([`MemoryCache`]): Cache of R rows.
        """
        keep = torch.ones(len(self.column_mask), dtype=torch.bool, device=rows.device).index_fill(0, rows, False)
        num_columns = max(int(self.column_mask[keep].sum(1).max()), int(other.column_mask.sum(1).max()))
        self._pack_columns(num_columns)
        other._pack_columns(num_columns)
        for layer, other_layer in zip(self.layers, other.layers, strict=True):
            layer.keys = layer.keys.index_copy(0, rows, other_layer.keys)
            layer.values = layer.values.index_copy(0, rows, other_layer.values)
        for name in self._row_state:
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine.dim() > 1:
                width = max(mine.shape[1], theirs.shape[1])
                mine, theirs = _widen(mine, width), _widen(theirs, width)
            setattr(self, name, mine.index_copy(0, rows, theirs))

    def _pack_columns(self, num_columns: int) -> None:
        """Move the held columns of each row to the front, in order, and keep `num_columns` of them."""
        order = torch.argsort(self.column_mask, dim=1, descending=True, stable=True)[:, :num_columns]  # (B, S')
        for layer in self.layers:
            index = order[:, None, :, None]
            layer.keys = _widen(
                layer.keys.gather(2, index.expand(-1, layer.keys.shape[1], -1, layer.keys.shape[3])),
                num_columns,
                2,
            )
            layer.values = _widen(
                layer.values.gather(2, index.expand(-1, layer.values.shape[1], -1, layer.values.shape[3])),
                num_columns,
                2,
            )
        self.column_mask = _widen(self.column_mask.gather(1, order), num_columns)

    def _apply_to_rows(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        for name in self._row_state:
            if getattr(self, name) is not None:
                setattr(self, name, function(getattr(self, name)))

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Reorder the rows for beam search."""
        super().reorder_cache(beam_idx)
        self._apply_to_rows(lambda state: state.index_select(0, beam_idx.to(state.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times."""
        super().batch_repeat_interleave(repeats)
        self._apply_to_rows(lambda state: state.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows of the given numbers."""
        super().batch_select_indices(indices)
        self._apply_to_rows(lambda state: state[indices])

    def crop(self, max_length: int) -> None:
        """Refuse: a folded window cannot be unread.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            f"A memory cache was asked to shrink to {max_length} columns, but windows that became memories cannot be "
            "taken back. Start again with `past_key_values=None`."
        )

    def reset(self) -> None:
        """Empty the cache."""
        fresh = MemoryCache(rolling=self.rolling)
        fresh.rolls_behind_slots = self.rolls_behind_slots
        for name, value in vars(fresh).items():
            setattr(self, name, value)


def join_rows(parts: list[tuple[DynamicCache, torch.Tensor]]) -> tuple[DynamicCache, torch.Tensor]:
    """Put the rows of caches of unequal width under each other; the columns that some lack are empty.

    Args:
        parts (`list`): Caches with their column masks `(rows, columns)`.

    Returns:
        The joined cache, which is the first one, and its column mask.
    """
    cache, mask = parts[0]
    if len(parts) > 1:
        width = max(mask.shape[1] for _, mask in parts)
        for layers in zip(*(part.layers for part, _ in parts), strict=True):
            layers[0].keys = torch.cat([_widen(layer.keys, width, 2) for layer in layers])
            layers[0].values = torch.cat([_widen(layer.values, width, 2) for layer in layers])
        mask = torch.cat([_widen(mask, width) for _, mask in parts])
    return cache, mask


def share_columns(cache: DynamicCache, width: int, rows: torch.Tensor) -> DynamicCache:
    """Return a cache of the first `width` columns of some rows of another, which stays as it is.

    Args:
        cache (`DynamicCache`): The cache to take from.
        width (`int`): Columns to take.
        rows (`torch.LongTensor` of shape `(R,)`): Rows to take; one may be taken more than once.
    """
    shared = DynamicCache()
    for number, layer in enumerate(cache.layers if width else []):
        shared.update(layer.keys[:, :, :width][rows], layer.values[:, :, :width][rows], number)
    return shared


def _widen(tensor: torch.Tensor, width: int, dim: int = 1) -> torch.Tensor:
    """Pad a tensor with zeros at the end of a dimension."""
    missing = width - tensor.shape[dim]
    if missing <= 0:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = missing
    return torch.cat([tensor, tensor.new_zeros(shape)], dim)
