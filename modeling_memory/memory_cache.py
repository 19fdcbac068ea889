"""Memories, and the cache of a text that is read token by token while full windows become memories.

B rows, M memories, S columns of the decoder's cache, T columns of a call, W window length, D decoder width.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch.nn import functional as F
from transformers.cache_utils import Cache, DynamicCache


@dataclass
class Memories:
    """What stands before a text: memories, and the tokens around them where a context was laid into slots.

    Attributes:
        embeds (`torch.FloatTensor` of shape `(B, M, D)`): Vectors in the decoder's input space.
        mask (`torch.LongTensor` of shape `(B, M)`): 1 for present ones.
        num_tokens (`torch.LongTensor` of shape `(B, M)`): How many tokens each stands for, counted from the end of the
            one before it.
        num_pinned (`torch.LongTensor` of shape `(B,)`): How many belong to a context, which stays in front whatever
            becomes a memory after it.
        num_embedded (`torch.LongTensor` of shape `(B,)`): How many of the pinned are embedded tokens.
        is_token (`torch.LongTensor` of shape `(B, M)`): 1 for those that are embedded tokens.
    """

    embeds: torch.Tensor
    mask: torch.Tensor
    num_tokens: torch.Tensor
    num_pinned: torch.Tensor
    num_embedded: torch.Tensor
    is_token: torch.Tensor

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "Memories":
        """Apply a function of rows, such as a selection, to every tensor."""
        return Memories(*(function(getattr(self, field.name)) for field in fields(self)))

    @property
    def batch_size(self) -> int:
        """Rows (B)."""
        return self.embeds.shape[0]


@dataclass
class Opening:
    """What a cache has to know to go on after the last column of every text; see [`MemoryCache`].

    Attributes:
        window (`torch.LongTensor` of shape `(B, w)`, *optional*): Flat text columns of the open windows.
        fill (`torch.LongTensor` of shape `(B,)`): Tokens in them.
        next_position (`torch.LongTensor` of shape `(B,)`): Position of the next token.
        max_fill (`int`): Bound of `fill`.
        column_mask (`torch.LongTensor` of shape `(B, S)`, *optional*): Of the decoder's columns; `None`: the row's.
        asked (`torch.BoolTensor` of shape `(B,)`, *optional*): Whether a marker stands before the open window.
        marked (`torch.BoolTensor` of shape `(B,)`, *optional*): Whether one stands anywhere.
        has_gaps (`bool`): Whether a column may hold nothing.
        rolling (`bool`): Whether the window becomes memories when it is full.
        sees_memories (`bool` or `torch.BoolTensor` of shape `(B,)`): Whether the next tokens see memories.
    """

    window: torch.Tensor | None
    fill: torch.Tensor
    next_position: torch.Tensor
    max_fill: int
    column_mask: torch.Tensor | None = None
    asked: torch.Tensor | None = None
    marked: torch.Tensor | None = None
    has_gaps: bool = True
    rolling: bool = True
    sees_memories: bool | torch.Tensor = False


class MemoryCache(DynamicCache):
    """Keys and values of each row's open window and of the memories before it.

    Beside the decoder's keys and values the cache holds what compressing needs: the tokens of the open window, which
    become memories when it is full, and the memories so far. `get_seq_length()` counts columns of *text*, as
    everything outside the model expects; the number of columns in the decoder's cache differs from it.

    Args:
        rolling (`bool`): Whether a full window becomes memories when the next token comes. If not, the last window
            grows on.

    Attributes:
        num_columns (`int`): Columns of text read so far, padding included.
        column_mask (`torch.LongTensor` of shape `(B, S)`): 1 where a column of the decoder's cache holds a memory or
            token of the row.
        has_gaps (`bool`): Whether some column may hold none. Without gaps the decoder needs no mask.
        next_position (`torch.LongTensor` of shape `(B,)`): Position of the next token.
        end (`int`): No row's next position is higher.
        window_input_ids (`torch.LongTensor` of shape `(B, at most W)`): Tokens of the open windows, padded on the
            right; empty where nothing will be compressed.
        window_fill (`torch.LongTensor` of shape `(B,)`): Number of tokens in each open window.
        max_fill (`int`): No window holds more tokens: known without asking the device.
        asked (`torch.BoolTensor` of shape `(B,)`): Whether a marker stands before the open window.
        marked (`torch.BoolTensor` of shape `(B,)`): Whether one was read so far, the open window included.
        memories ([`Memories`]): Those before the open windows.
        sees_memories (`bool` or `torch.BoolTensor` of shape `(B,)`): Whether the next tokens see memories.
        first_memory (`int`, *optional*): First column of text that is a memory, where the decoder is short-sighted.
    """

    def __init__(self, rolling: bool = True):
        super().__init__()
        # Two of them, since a call may stop the rolling of a text for good, and `reset` must bring back what was asked
        # for.
        self.rolling = self._made_rolling = rolling
        self.num_columns = self.max_fill = self.end = 0
        self.has_gaps = False
        self.sees_memories: bool | torch.Tensor = False
        self.first_memory: int | None = None
        self.column_mask: Any = None
        self.next_position: Any = None
        self.window_input_ids: Any = None
        self.window_fill: Any = None
        self.asked: Any = None
        self.marked: Any = None
        self.memories: Any = None

    _rows = ("column_mask", "next_position", "window_input_ids", "window_fill", "asked", "marked")

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of text columns read so far, padding included."""
        return self.num_columns

    def decoder_cache(self) -> DynamicCache:
        """Return a plain cache over the same keys and values, for the decoder to read and extend."""
        # The decoder counts columns of its own cache for positions and masks, where this class counts those of the
        # text.
        cache = DynamicCache()
        cache.layers = self.layers
        return cache

    def open(
        self,
        cache: Cache,
        memories: Memories,
        column_mask: torch.Tensor,
        opening: Opening,
        *,
        num_columns: int,
        end: int,
        window_input_ids: torch.Tensor | None = None,
        first_memory: int | None = None,
    ) -> "MemoryCache":
        """Take over the keys and values of a decoder's cache, and what belongs to them; see the class.

        Args:
            cache (`Cache`): Cache of B rows and S columns.
            memories ([`Memories`]): Those in its rows.
            column_mask (`torch.LongTensor` of shape `(B, S)`): Which of its columns count.
            opening ([`Opening`]): Where the texts go on. A cache that was made not to roll never does.
            num_columns (`int`): Columns of text.
            end (`int`): Bound of the next positions.
            window_input_ids (`torch.LongTensor` of shape `(B, w)`, *optional*): Tokens of the open windows.
            first_memory (`int`, *optional*): As above.
        """
        fill = opening.fill
        self.layers = cache.layers
        self.memories, self.column_mask, self.next_position = memories, column_mask, opening.next_position
        self.window_fill, self.max_fill, self.end = fill, opening.max_fill, end
        none = torch.zeros_like(fill, dtype=torch.bool)
        self.asked = none if opening.asked is None else opening.asked
        self.marked = none if opening.marked is None else opening.marked
        # No tokens rather than none at all, so that rows can be selected and repeated without a question.
        self.window_input_ids = fill[:, None][:, :0] if window_input_ids is None else window_input_ids
        # Columns of padding count, as in the library's caches: a mask of the caller's has one column for each.
        self.num_columns, self.has_gaps, self.sees_memories = num_columns, opening.has_gaps, opening.sees_memories
        self.rolling, self.first_memory = self._made_rolling and opening.rolling, first_memory
        return self

    def append(
        self, input_ids: torch.Tensor | None, mask: torch.Tensor, marked: torch.Tensor | None, masked: bool
    ) -> None:
        """Note tokens that the decoder has just read after those of the open windows.

        Args:
            input_ids (`torch.LongTensor` of shape `(B, T)`, *optional*): The tokens, if they may be compressed.
            mask (`torch.LongTensor` of shape `(B, T)`): 1 for tokens, 0 for padding.
            marked (`torch.BoolTensor` of shape `(B,)`, *optional*): Whether a marker was read by now.
            masked (`bool`): Whether there may be padding among them.
        """
        length, number = mask.shape[1], mask.sum(1)
        if self.rolling and input_ids is not None:
            # Padding goes to a column too many, which is cut off: no row's number of tokens is asked for.
            width = max(self.max_fill + length, self.window_input_ids.shape[1])
            place = self.window_fill[:, None] + mask.cumsum(1) - 1
            room = F.pad(self.window_input_ids, (0, width + 1 - self.window_input_ids.shape[1]))
            room = room.scatter(1, place.masked_fill(mask == 0, width), input_ids.to(room))
            self.window_input_ids = room[:, :width]
        self.window_fill, self.next_position = self.window_fill + number, self.next_position + number
        self.column_mask = torch.cat([self.column_mask, mask.to(self.column_mask)], 1)
        self.marked = self.marked if marked is None else marked
        # Bounds, not counts: how many of the new columns are padding only the device knows, and it is not asked.
        self.max_fill, self.end = self.max_fill + length, self.end + length
        self.num_columns, self.has_gaps = self.num_columns + length, self.has_gaps or masked

    def select(self, rows: torch.Tensor) -> "MemoryCache":
        """Return some rows as a cache of their own.

        Args:
            rows (`torch.LongTensor` of shape `(R,)`): Their numbers.
        """
        part = MemoryCache()
        # Shallow: every field of rows is replaced below, and the rest is the same for all rows.
        part.__dict__.update(self.__dict__)
        part.layers = share_columns(self, self.column_mask.shape[1], rows).layers
        part._apply_to_rows(lambda state: state[rows])
        return part

    def join(self, parts: "list[tuple[torch.Tensor, MemoryCache]]") -> None:
        """Take over the rows of other caches, each row at its own length.

        Args:
            parts (`list`): Numbers of rows `(R,)`, which together are all, and a cache of those rows.
        """
        order = torch.cat([rows for rows, _ in parts]).argsort()
        caches = [cache for _, cache in parts]
        # One look at the device a part, once in a window's length; without it the columns would grow with every
        # joining.
        width = max(int(cache.column_mask.sum(1).max()) for cache in caches)
        for cache in caches:
            cache._pack_columns(width)
        self.layers = caches[0].layers
        for layers in zip(*(cache.layers for cache in caches), strict=True):
            layers[0].keys = torch.cat([layer.keys for layer in layers])[order]
            layers[0].values = torch.cat([layer.values for layer in layers])[order]
        for name in self._rows:
            setattr(self, name, _stack([getattr(cache, name) for cache in caches])[order])
        self.memories = Memories(
            *(_stack([getattr(cache.memories, field.name) for cache in caches])[order] for field in fields(Memories))
        )
        sees = [_per_row(cache.sees_memories, cache.window_fill) for cache in caches]
        self.sees_memories = torch.cat(sees)[order]
        # Rows of unequal length in one rectangle leave columns that hold nothing.
        self.has_gaps = True
        self.num_columns = caches[0].num_columns
        self.max_fill = max(cache.max_fill for cache in caches)
        # A bound of all rows has to be that of the furthest one.
        self.end = max(cache.end for cache in caches)

    def _pack_columns(self, num_columns: int) -> None:
        """Move the held columns of each row to the front, in order, and keep `num_columns` of them."""
        order = torch.argsort(self.column_mask, dim=1, descending=True, stable=True)[:, :num_columns]  # (B, S')
        row = torch.arange(len(order), device=order.device)[:, None]
        for layer in self.layers:
            # (B, S', H, head) by plain indexing, which needs no index as large as what it moves
            layer.keys = _widen(layer.keys.transpose(1, 2)[row, order].transpose(1, 2), num_columns, 2)
            layer.values = _widen(layer.values.transpose(1, 2)[row, order].transpose(1, 2), num_columns, 2)
        self.column_mask = _widen(self.column_mask.gather(1, order), num_columns)

    def _apply_to_rows(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        # An empty cache has no rows yet, and may be repeated or reordered all the same.
        if self.window_fill is None:
            return
        for name in self._rows:
            setattr(self, name, function(getattr(self, name)))
        self.memories = self.memories.map(function)
        if isinstance(self.sees_memories, torch.Tensor):
            self.sees_memories = function(self.sees_memories)

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
        """Refuse: a compressed window cannot be unread.

        Raises:
            ValueError: Always.
        """
        # Rejected tokens of a draft may lie in a window that is a memory by now.
        raise ValueError(
            f"A memory cache was asked to shrink to {max_length} columns, but windows that became memories cannot be "
            "taken back. Start again with `past_key_values=None`."
        )

    def reset(self) -> None:
        """Empty the cache: it is then what a fresh one is."""
        # In place, since `generate` and its caller hold on to this object.
        self.__dict__.update(MemoryCache(rolling=self._made_rolling).__dict__)


@dataclass
class ReadMark:
    """What a cache of the library's own kinds cannot say of what it holds.

    Attributes:
        sees_memories (`bool` or `torch.BoolTensor` of shape `(B,)`): Whether memories are among it.
        first_memory (`int`, *optional*): Their first column, where the decoder is short-sighted.
        has_gaps (`bool`): Whether padding may be among it.
    """

    sees_memories: bool | torch.Tensor = False
    first_memory: int | None = None
    has_gaps: bool = True

    def rows(self, batch_size: int) -> bool | torch.Tensor:
        """Return `sees_memories` for so many rows: each may have been repeated for beams since."""
        sees = self.sees_memories
        if isinstance(sees, bool) or len(sees) == batch_size:
            return sees
        # `generate` repeats rows for beams after the prompt was prepared, and tells the mark nothing of it.
        return sees.repeat_interleave(batch_size // len(sees))


def mark_cache(cache: Cache | None, mark: ReadMark | None) -> None:
    """Note what a cache of the library's holds; its next tokens are then read with all that is in it."""
    if cache is not None and not isinstance(cache, MemoryCache):
        # On the object itself: a table beside it would need weak keys, and would be lost when the cache is copied.
        cache.memory_mark = mark


def mark_of(cache: Cache | None) -> ReadMark | None:
    """Return what was noted on a cache of the library's. One that is empty, because it was reset, holds nothing."""
    mark = getattr(cache, "memory_mark", None)
    return None if cache is None or mark is None or int(cache.get_seq_length()) == 0 else mark


def join_rows(parts: list[tuple[Cache, torch.Tensor]]) -> tuple[Cache, torch.Tensor]:
    """Put the rows of caches of unequal width under each other; the columns that some lack are empty.

    Args:
        parts (`list`): Caches with their column masks `(rows, columns)`.

    Returns:
        The joined cache, which is the first one, and its column mask.
    """
    # Joined into the first, so that the class of the caller's cache is kept.
    cache, mask = parts[0]
    if len(parts) > 1:
        width = max(mask.shape[1] for _, mask in parts)
        for layers in zip(*(part.layers for part, _ in parts), strict=True):
            layers[0].keys = torch.cat([_widen(layer.keys, width, 2) for layer in layers])
            layers[0].values = torch.cat([_widen(layer.values, width, 2) for layer in layers])
        mask = torch.cat([_widen(mask, width) for _, mask in parts])
    return cache, mask


def share_columns(cache: Cache, width: int, rows: torch.Tensor) -> DynamicCache:
    """Return a cache of the first `width` columns of some rows of another, which stays as it is.

    Args:
        cache (`Cache`): The cache to take from.
        width (`int`): Columns to take.
        rows (`torch.LongTensor` of shape `(R,)`): Rows to take; one may be taken more than once.
    """
    shared = DynamicCache()
    for number, layer in enumerate(cache.layers if width else []):
        # By indexing, which copies: each group of windows appends its own tokens to it.
        shared.update(layer.keys[:, :, :width][rows], layer.values[:, :, :width][rows], number)
    return shared


def cut_columns(cache: Cache, mask: torch.Tensor, width: int) -> torch.Tensor:
    """Keep the first `width` columns of a cache, and of the mask over them `(B, S)`, which is returned."""
    for layer in cache.layers if width < mask.shape[1] else []:
        layer.keys, layer.values = layer.keys[:, :, :width], layer.values[:, :, :width]
    return mask[:, :width]


def _per_row(value: bool | torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return value if isinstance(value, torch.Tensor) else torch.full_like(rows, value, dtype=torch.bool)


def _stack(parts: list[torch.Tensor]) -> torch.Tensor:
    """Put rows under each other, those of two dimensions and more at the width of the widest."""
    if parts[0].dim() > 1:
        width = max(part.shape[1] for part in parts)
        parts = [_widen(part, width) for part in parts]
    return torch.cat(parts)


def _widen(tensor: torch.Tensor, width: int, dim: int = 1) -> torch.Tensor:
    """Pad a tensor with zeros at the end of a dimension."""
    missing = width - tensor.shape[dim]
    if missing <= 0:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = missing
    return torch.cat([tensor, tensor.new_zeros(shape)], dim)
