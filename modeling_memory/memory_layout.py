"""Where everything stands before the decoder: pure functions from a text, memories and a cache to one value.

```
 plain text      y y y y                      the text as it stands
 slots           y m m y y                    memories in the places of slot tokens
 windows         m m m m | y y y y            what stands before a row's windows, read once, then each window
 front           m m | y y y y y y            the same with one window of any length
 cached step     (keys and values) | y        what follows in an open window
```

Nothing here runs a model or asks the device for a number: sizes come from the one reading of `memory_checks`.

B texts, T columns of a text, M entries before a text, R rows of the decoder, S their columns, W window length, K
memories per chunk, L chunk length, D decoder width.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn import functional as F
from transformers.configuration_utils import PreTrainedConfig

from .memory_cache import Memories, MemoryCache, Opening, ReadMark


@dataclass
class Text:
    """Token ids `(B, T)` or embeddings `(B, T, D)`, with mask and positions.

    Attributes:
        input_ids (`torch.LongTensor` of shape `(B, T)`, *optional*): Tokens, slots among them.
        attention_mask (`torch.LongTensor` of shape `(B, T)` or `(B, past + T)`, *optional*): 1 for tokens, 0 for
            padding.
        inputs_embeds (`torch.FloatTensor` of shape `(B, T, D)`, *optional*): Embeddings instead of tokens.
        position_ids (`torch.LongTensor` of shape `(B, T)`, *optional*): Positions, if not those of the mask.
        tokens (`torch.Tensor`): Whichever of tokens and embeddings were given.
    """

    input_ids: Any
    attention_mask: Any = None
    inputs_embeds: Any = None
    position_ids: torch.Tensor | None = None
    tokens: Any = None

    def mask(self) -> torch.Tensor:
        """Return 1 for tokens and 0 for padding, of shape `(B, T)`."""
        if self.attention_mask is None or self.attention_mask.dim() != 2:
            return torch.ones(self.tokens.shape[:2], dtype=torch.long, device=self.tokens.device)
        return self.attention_mask[:, -self.tokens.shape[1] :].long()


@dataclass
class Layout:
    """What the decoder reads: R rows of S columns, each a column of the text or an entry before it.

    Attributes:
        source ([`Text`]): The text whose columns `text` counts.
        mask (`torch.Tensor` of shape `(R, past + S)`, *optional*): 1 for columns that count.
        positions (`torch.LongTensor` of shape `(R, S)`, *optional*): `None` leaves them to the decoder.
        text (`torch.LongTensor` of shape `(R, S)`, *optional*): Flat text columns; `None`: the text as it stands.
        entries (`torch.LongTensor` of shape `(R, S)`, *optional*): Flat numbers of memories, -1 for text columns.
        is_token (`torch.LongTensor` of shape `(R, S)`, *optional*): Of a prefix, 1 for entries that are tokens.
        places (`torch.LongTensor` of shape `(R, S)`, *optional*): Places in the window that tokens are given, or -1.
        sees_memories (`bool` or `torch.BoolTensor` of shape `(R,)`): Whether a row sees any memory.
        num_wanted (`int`, *optional*): Only the last so many columns of a row are of the text; `None`: all.
        back (`torch.LongTensor` of shape `(B, T)`, *optional*): For each column of the text the flat number of the
            column, among those of the prefix if its features are wanted, then those of the rows, that predicts what
            follows it.
        end (`int`): Every position is below it.
        has_filler (`bool`): Whether one more entry, the constant filler, stands after all others.
        compressed (`torch.LongTensor` of shape `(N, L)`, *optional*): Flat text columns of full windows, by chunks.
        prefix ([`Layout`], *optional*): The entries before each text `(B, M)`, of which `entries` counts; those of the
            prefix itself count the given memories and then the compressed chunks'.
        shares_prefix (`bool`): Whether the prefix runs once, and rows go on from its keys and values.
        wants_prefix (`bool`): Whether the features of the prefix are wanted: columns of the text stand in it.
        row (`torch.LongTensor` of shape `(R,)`, *optional*): The text that each row belongs to.
        last (`torch.LongTensor` of shape `(B,)`, *optional*): The row of each text's last window.
        seen (`torch.LongTensor` of shape `(R, M)`, *optional*): 1 for the shared entries that a row sees.
        kept (`torch.LongTensor` of shape `(B, M')`, *optional*): Entries that a cache keeps; `None`: all.
        memories ([`Memories`], *optional*): What is kept, without the vectors.
        opening ([`Opening`], *optional*): What a cache has to know.
        widths (`list` of `int`, *optional*): Entries that each row can see, on the host.
        lasts (`list` of `int`, *optional*): `last`, on the host.
        is_full (`bool`): Whether every column counts, so that with a cache to fill no mask is needed.
        continues (`bool`): Whether the text goes on from a memory cache.
        needs_own_cache (`bool`): Whether later steps need what only a memory cache knows.
        mark ([`ReadMark`], *optional*): What is noted on a cache of the library's.
        apart (`list` of `int`, *optional*): Nothing else is laid out: windows of these texts are full, those of the
            others are not, and each part is to be read by itself.
    """

    source: Any = None
    mask: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    text: torch.Tensor | None = None
    entries: torch.Tensor | None = None
    is_token: torch.Tensor | None = None
    places: torch.Tensor | None = None
    sees_memories: bool | torch.Tensor = False
    num_wanted: int | None = None
    back: torch.Tensor | None = None
    end: int = 0
    has_filler: bool = False
    compressed: torch.Tensor | None = None
    prefix: "Layout | None" = None
    shares_prefix: bool = False
    wants_prefix: bool = False
    row: torch.Tensor | None = None
    last: torch.Tensor | None = None
    seen: torch.Tensor | None = None
    kept: torch.Tensor | None = None
    memories: Memories | None = None
    opening: Opening | None = None
    widths: list[int] | None = None
    lasts: list[int] | None = None
    is_full: bool = False
    continues: bool = False
    needs_own_cache: bool = False
    mark: ReadMark | None = None
    apart: list[int] | None = None

    def rows(self, part: slice) -> "Layout":
        """Return some of the rows, alone."""
        names = ("mask", "positions", "text", "entries", "places", "sees_memories", "row", "seen")
        picked = {name: value[part] for name in names if isinstance(value := getattr(self, name), torch.Tensor)}
        return replace(self, **picked)


@dataclass
class Front:
    """The entries before a text that is read by windows: memories, and the tokens around them.

    Attributes:
        entries (`torch.LongTensor` of shape `(B, F)`): Flat numbers of the given memories, -1 for text columns; each
            row's own come first.
        text (`torch.LongTensor` of shape `(B, F)`, *optional*): Flat text columns.
        places (`torch.LongTensor` of shape `(B, F)`, *optional*): As in [`Layout`].
        num_tokens (`torch.LongTensor` of shape `(B, F)`): How many tokens each stands for.
        num (`torch.LongTensor` of shape `(B,)`): Entries of each row.
        num_pinned (`torch.LongTensor` of shape `(B,)`): How many of them stay whatever is compressed.
        num_embedded (`torch.LongTensor` of shape `(B,)`): How many of those are tokens.
        is_token (`torch.LongTensor` of shape `(B, F)`): 1 for tokens.
        counts (`list` of `int`): `num`, known on the host.
        num_given (`int`): Memories given for all texts together; those of compressed windows are counted after them.
        asked (`torch.BoolTensor` of shape `(B,)`, *optional*): Whether a marker stands among or before them.
        back (`torch.LongTensor` of shape `(B, T)`, *optional*): Place of each text column in the front.
    """

    entries: torch.Tensor
    text: torch.Tensor | None
    places: torch.Tensor | None
    num_tokens: torch.Tensor
    num: torch.Tensor
    num_pinned: torch.Tensor
    num_embedded: torch.Tensor
    is_token: torch.Tensor
    counts: list[int]
    num_given: int
    asked: torch.Tensor | None = None
    back: torch.Tensor | None = None


def no_memories(weight: torch.Tensor, batch_size: int, width: int) -> Memories:
    """Return no memories for so many texts, of the type and device of a weight."""
    none = torch.zeros(batch_size, 0, dtype=torch.long, device=weight.device)
    zero = torch.zeros(batch_size, dtype=torch.long, device=weight.device)
    return Memories(weight.new_zeros(batch_size, 0, width), none, none, zero, zero, none)


def tokens_of_memories(config: PreTrainedConfig, num_memories: int, device: torch.device) -> torch.Tensor:
    """Return how many tokens the memories of full chunks stand for `(M,)`; those of each chunk add up to L."""
    of_chunk = tokens_of_groups(torch.full((), config.chunk_length, device=device), config.memories_per_chunk)  # (K,)
    return of_chunk[torch.arange(num_memories, device=device) % config.memories_per_chunk]


def filled_length(config: PreTrainedConfig) -> int:
    """Return how many tokens a chunk is read as at least: where short ones are filled, those of a full one."""
    return 0 if config.short_chunks == "pad" else config.chunk_length


def tokens_of_groups(
    num_tokens: torch.Tensor, per_chunk: int, groups: torch.Tensor | None = None, filled_to: int = 0
) -> torch.Tensor:
    """Return how many tokens each memory of chunks stands for, counted from the end of the one before it.

    Args:
        num_tokens (`torch.LongTensor` of shape `(...)`): Tokens of each chunk, its encoder's special tokens included.
        per_chunk (`int`): Memories of a chunk (K).
        groups (`torch.LongTensor` of shape `(...)`, *optional*): How many of them are asked for. Default: K.
        filled_to (`int`): Tokens that a chunk is read as at least: the groups are cut of these, and what fills a
            chunk stands for no token of the text.

    Returns:
        `torch.LongTensor` of shape `(..., K)`; those of a chunk add up to its tokens.

    Example:
    ```python
    >>> tokens_of_groups(torch.tensor([8, 5]), 3).tolist()
    [[3, 3, 2], [2, 2, 1]]
    >>> tokens_of_groups(torch.tensor([8, 5]), 3, filled_to=8).tolist()
    [[3, 3, 2], [3, 2, 0]]

    ```
    """
    number = torch.arange(per_chunk, device=num_tokens.device)
    groups = torch.full_like(num_tokens, per_chunk) if groups is None else groups.clamp(min=1)
    num_tokens = num_tokens[..., None]
    # The tokens up to the end of each group, as `group_bounds` cuts a chunk
    num_read = num_tokens.clamp(min=filled_to)
    end = torch.minimum(-(-(number + 1) * num_read // groups[..., None]), num_tokens)  # (..., K)
    return torch.diff(end, dim=-1, prepend=torch.zeros_like(end[..., :1]))


def find_markers(config: PreTrainedConfig, input_ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Whether a token, not padding, asks for what the memories hold: COPY or BLANK."""
    found = torch.zeros_like(mask, dtype=torch.bool)
    for marker in (config.copy_token_id, config.blank_token_id):
        if marker is not None:
            found |= input_ids == marker
    return found & mask.bool()


def tell_places(config: PreTrainedConfig, rank: torch.Tensor, sees: torch.Tensor, asked: torch.Tensor) -> torch.Tensor:
    """Return places in the window, or in its chunk, from ranks `(R, S)`; -1 where a token is given none.

    It is given in rows that see some memory (`sees`, `(R,)`), from the text's first marker on (`asked`, `(R, S)`).
    """
    # Padding before the first token has rank -1; its place is never read, but must be a row of the table.
    return torch.where(sees[:, None] & asked, rank.clamp(min=0) % config.num_places, -1)


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


def _back_across_holes(mask: torch.Tensor) -> torch.Tensor:
    """Return for each column `(B, T)` the flat number of the column that predicts what follows it."""
    return torch.arange(len(mask), device=mask.device)[:, None] * mask.shape[1] + predicting_column(mask)


def pack(mask: torch.Tensor) -> torch.Tensor:
    """Return the columns of `(B, M)` that are set, those of each row first and in order; then the others."""
    # Stable: tokens and memories keep the order that the text has them in.
    return torch.argsort((mask == 0).to(torch.uint8), dim=1, stable=True)


def lay_plain(config: PreTrainedConfig, text: Text, facts: Any, past: int = 0) -> Layout:
    """Lay out a text as the plain decoder reads it.

    Args:
        config ([`MemoryEncoderDecoderConfig`]): The model's.
        text ([`Text`]): B texts of T columns.
        facts ([`Facts`], *optional*): What was read of the data; `None` where nothing was.
        past (`int`): Columns that a cache holds before it.
    """
    mask, positions = text.attention_mask, text.position_ids
    length = text.tokens.shape[1]
    layout = Layout(text, mask, positions, end=past + length)
    if mask is None or mask.dim() != 2:
        return layout
    if facts is not None and past == 0 and facts.is_full and positions is None:
        layout.mask = None  # nothing to hide, and the decoder would look at every value to find that out
        return layout
    if positions is None:
        # Padding on the left has no position, and 0 is a row of every decoder's table.
        layout.positions = (mask.long().cumsum(1) - 1).clamp(min=0)[:, -length:]
    if facts is not None and facts.has_holes:
        # What predicts the token after a hole stands before the hole.
        layout.back = _back_across_holes(mask[:, -length:])
    return layout


def open_plain(layout: Layout, text: Text, facts: Any, memories: Memories, rolling: bool = True) -> Layout:
    """Say what a cache has to know after a text of one window, or of any length that is not compressed."""
    mask = text.mask()
    fill, (batch_size, length) = mask.sum(1), mask.shape
    # Known on the host, so that a window without padding costs no sorting.
    full = layout.mask is None or (facts is not None and facts.is_full)
    window = None
    if rolling:  # tokens that may be compressed, padding last
        columns = torch.arange(length, device=mask.device).expand_as(mask) if full else pack(mask)
        window = torch.arange(batch_size, device=mask.device)[:, None] * length + columns
    most = length if facts is None else max(facts.num_tokens)
    window = window if window is None else window[:, :most]
    opening = Opening(window, fill, fill, most, mask, has_gaps=not full, rolling=rolling)
    return replace(layout, opening=opening, memories=memories)


def lay_slots(
    config: PreTrainedConfig, text: Text, memories: Memories, facts: Any, past: int = 0, mark: ReadMark | None = None
) -> Layout:
    """Lay out a text in which memories stand in the places of slots, wherever those are.

    Args:
        config ([`MemoryEncoderDecoderConfig`]): The model's.
        text ([`Text`]): B texts of T columns, with a slot for every memory that is present.
        memories ([`Memories`]): Those of every text.
        facts ([`Facts`], *optional*): What was read of the data; `None` where nothing was.
        past (`int`): Columns that a cache holds before it.
        mark ([`ReadMark`], *optional*): What was noted on that cache: memories of an earlier turn are seen as well.
    """
    layout = lay_plain(config, text, facts, past)
    slots = text.input_ids == config.memory_token_id  # (B, T)
    layout.entries = _entries_of_slots(slots, memories)
    sees = memories.mask.bool().any(1)
    layout.sees_memories = sees if facts is None or facts.sees_memories is None else facts.sees_memories
    mask = text.mask()
    # Slots are no tokens of the window, whose places count what is written there.
    words = mask * ~slots
    marked = None
    if config.window_positions:
        asked = find_markers(config, text.input_ids, mask).cumsum(1) > 0
        layout.places = torch.where(slots, -1, tell_places(config, words.cumsum(1) - 1, sees, asked))
        marked = asked[:, -1]
    next_position = mask.sum(1)
    if config.memory_positions == "source":
        takes = _takes_of_slots(slots, memories, layout.entries) * mask
        layout.positions = (takes.cumsum(1) - 1).clamp(min=0)
        next_position = takes.sum(1)
        layout.end = past + (mask.shape[1] if facts is None else facts.end)
        # Positions that jump would be taken for packed texts, with neither mask nor cache.
        layout.is_full = layout.mask is None
        layout.mask = mask if layout.mask is None else layout.mask
    gaps = layout.mask is not None and not layout.is_full and not (facts is not None and facts.is_full)
    layout.opening = Opening(
        None, words.sum(1), next_position, mask.shape[1], mask, None, marked, gaps, False, layout.sees_memories
    )
    layout.memories = memories
    # Elsewhere the next position is the number of columns, which any cache knows.
    layout.needs_own_cache = config.window_positions or config.memory_positions == "source"
    first = None if facts is None or layout.sees_memories is False else facts.first_slot
    first = None if first is None else past + first
    if mark is not None:
        first = first if mark.first_memory is None else mark.first_memory
        layout.sees_memories = _either(layout.sees_memories, mark.rows(len(mask)))
    layout.mark = ReadMark(layout.sees_memories, first, gaps)
    return layout


def _either(one: bool | torch.Tensor, other: bool | torch.Tensor) -> bool | torch.Tensor:
    """Whether one or the other is true, in each row or in all."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one | other
    return True if one is True or other is True else other if one is False else one


def _entries_of_slots(slots: torch.Tensor, memories: Memories) -> torch.Tensor:
    """Return flat numbers of memories `(B, T)`: a row's k-th slot `(B, T)` takes its k-th present memory."""
    batch_size, width = memories.mask.shape
    if width == 0:
        return torch.full_like(slots, -1, dtype=torch.long)
    row = torch.arange(batch_size, device=slots.device)[:, None]
    # Absent memories may stand between present ones, and slots only count those that are present.
    place = pack(memories.mask)[row, (slots.cumsum(1) - 1).clamp(0, width - 1)]
    return torch.where(slots, row * width + place, -1)


def _takes_of_slots(slots: torch.Tensor, memories: Memories, entries: torch.Tensor) -> torch.Tensor:
    """Return how many positions each column `(B, T)` takes: a memory those of its tokens, a token one."""
    if memories.mask.shape[1] == 0:
        return torch.ones_like(entries)
    return torch.where(slots, memories.num_tokens.flatten()[entries.clamp(min=0)], 1)


def front_of_memories(memories: Memories, counts: list[int], asked: torch.Tensor | None = None) -> Front:
    """Put memories before a text, the present ones of each row first; `counts` says how many, on the host."""
    batch_size, width = memories.mask.shape
    row = torch.arange(batch_size, device=memories.mask.device)[:, None]
    order = pack(memories.mask)[:, : max(counts)]
    return Front(
        row * width + order, None, None, memories.num_tokens.gather(1, order), memories.mask.sum(1),
        memories.num_pinned, memories.num_embedded, memories.is_token.gather(1, order), counts, batch_size * width,
        asked,
    )  # fmt: skip


def front_of_text(config: PreTrainedConfig, text: Text, memories: Memories, facts: Any) -> tuple[Front, torch.Tensor]:
    """Put all of a text up to its last slot before what follows, which is what may be compressed.

    Returns:
        The front, and 1 for the tokens after it, of shape `(B, T)`.
    """
    mask = text.mask()
    # An id of a slot in padding is padding.
    slots = (text.input_ids == config.memory_token_id) & mask.bool()  # (B, T)
    after = mask * (slots.flip(1).cumsum(1).flip(1) == 0)
    ahead = mask - after
    entries = _entries_of_slots(slots, memories)
    width = mask.shape[1] if facts is None else max(facts.num_ahead)
    order = pack(ahead)[:, :width]  # (B, F)
    row = torch.arange(len(mask), device=mask.device)[:, None]
    places = asked = None
    if config.window_positions:
        seen = find_markers(config, text.input_ids, ahead)
        words = (ahead * ~slots).cumsum(1) - 1
        told = tell_places(config, words, memories.mask.bool().any(1), seen.cumsum(1) > 0)
        places, asked = torch.where(slots, -1, told).gather(1, order), seen.any(1)
    num_embedded = (ahead * ~slots).sum(1)
    if config.max_memories is None:  # the limit is one of positions, which tokens take as memories do
        num_embedded = torch.zeros_like(num_embedded)
    front = Front(
        entries.gather(1, order), row * mask.shape[1] + order, places,
        _takes_of_slots(slots, memories, entries).gather(1, order), ahead.sum(1), ahead.sum(1), num_embedded,
        (~slots).long().gather(1, order), [width] * len(mask) if facts is None else facts.num_ahead,
        memories.mask.numel(), asked, (ahead.cumsum(1) - 1).clamp(min=0),
    )  # fmt: skip
    return front, after


def lay_front(
    config: PreTrainedConfig, text: Text, memories: Memories, facts: Any, rolling: bool, shared: bool, room: int | None
) -> Layout:
    """Lay out a text after memories in columns of their own: for embeddings, fixed positions and contexts that stay.

    Args:
        config ([`MemoryEncoderDecoderConfig`]): The model's.
        text ([`Text`]): B texts, in whose slots the memories stand, or embeddings after them.
        memories ([`Memories`]): Those of every text.
        facts ([`Facts`], *optional*): What was read of the data; `None` where nothing was.
        rolling (`bool`): Whether what follows is cut into windows, which are compressed.
        shared (`bool`): As in [`lay_windows`].
        room (`int`, *optional*): As in [`lay_windows`].
    """
    if text.input_ids is None or config.memory_token_id is None:
        width = memories.mask.shape[1]
        known = facts is not None and facts.num_memories is not None
        counts = facts.num_memories if known else [width] * memories.batch_size
        front, after = front_of_memories(memories, counts), text.mask()
        if facts is not None and facts.is_full:
            after = None
    else:
        front, after = front_of_text(config, text, memories, facts)
        # In padding a slot may stand, masked; its id need not be a row of the table.
        text = replace(text, input_ids=text.input_ids.masked_fill(text.input_ids == config.memory_token_id, 0))
    length = text.tokens.shape[1]
    counts = [length] * memories.batch_size if facts is None else facts.num_after
    lowest = None if facts is None else facts.lowest
    window = config.window_length if rolling else None
    # Only compiled code knows no better than this.
    end = max(counts) + front.num_tokens.shape[1] * config.chunk_length if facts is None else facts.end
    layout = lay_windows(config, text, after, front, counts, window, lowest, shared, room, end)
    if not rolling:  # embeddings have no column for the memories before them
        first = -memories.mask.shape[1] if front.back is None else 0
        layout.mark = ReadMark(True, first if memories.mask.shape[1] else None)
    return layout


def lay_windows(
    config: PreTrainedConfig,
    text: Text,
    mask: torch.Tensor | None,
    front: Front | None,
    counts: list[int],
    window_length: int | None,
    lowest: list[int] | None = None,
    shared: bool = True,
    room: int | None = None,
    end: int | None = None,
) -> Layout:
    """Lay out texts by windows, each after its row's front and the memories of all windows before it.

    What stands before the windows of a row does not depend on them, so it is laid out once, as the prefix. Rows do not
    share it (each then holds its own entries) where a policy chose, constant fillers differ by window, or activation
    checkpointing keeps no cache.

    Args:
        config ([`MemoryEncoderDecoderConfig`]): The model's.
        text ([`Text`]): B texts of T columns.
        mask (`torch.LongTensor` of shape `(B, T)`, *optional*): 1 for the tokens to cut; `None`: all.
        front ([`Front`], *optional*): What stands before each text.
        counts (`list` of `int`): Tokens to cut of each text.
        window_length (`int`, *optional*): W. `None`: one window of any length, of which nothing is compressed.
        lowest (`list` of `int`, *optional*): Rank of the lowest token of each text whose features are wanted, -1 for
            one in the front. Windows before it are not laid out. `None`: all are wanted.
        shared (`bool`): Whether rows may share the prefix.
        room (`int`, *optional*): How many memories fit where all do not, so that the oldest make room.
        end (`int`, *optional*): With source positions, the bound of those of all tokens. Default: a text with nothing
            in front has as many as tokens.
    """
    cut = _cut(text, mask, counts, window_length, lowest)
    if front is None:
        none = torch.zeros(len(counts), 0, dtype=torch.long, device=cut.row.device)
        zero = none.sum(1)
        front = Front(none, None, None, none, zero, zero, zero, none, [0] * len(counts), 0)
    per_window = cut.window_length // config.chunk_length * config.memories_per_chunk if window_length else 0
    prefix, own_position, takes = _lay_prefix(config, text, front, cut, per_window)
    assert prefix.entries is not None
    num_entries = prefix.entries.shape[1]
    fixed = config.memory_positions in ("fixed", "spread")
    offset = torch.arange(cut.window_length, device=cut.row.device)
    num_visible = front.num[cut.row] + cut.index * per_window  # (P,)
    layout = Layout(
        source=text, text=cut.columns, row=cut.row, prefix=prefix, last=cut.last,
        num_wanted=cut.window_length, shares_prefix=shared and room is None,
    )  # fmt: skip
    widths, lasts = [], []
    for before, num, first in zip(front.counts, cut.nums, cut.firsts, strict=True):
        widths += [before + index * per_window for index in range(first, num)]
        lasts.append(len(widths) - 1)
    layout.widths, layout.lasts = widths, lasts
    layout.compressed = None if cut.full is None else cut.full.view(-1, config.chunk_length)
    # Fillers stand where memories are missing, so that no two windows have the same entries before them.
    if config.absent_memories != "mask":
        layout.shares_prefix = False
    num_seen = num_visible if room is None else _fit(front, cut, num_visible, room)
    layout.sees_memories = num_seen > 0
    start = torch.full_like(num_seen, config.text_start) if fixed else num_seen
    if config.memory_positions == "source":  # a window starts after the tokens that stand before it in the source
        start = F.pad(takes.cumsum(1), (1, 0))[cut.row, num_visible]  # of (B, M + 1)
    positions = start[:, None] + offset  # (P, W)
    if config.memory_positions == "source":
        # Places after the last token of a text have no position; 0 is a row of every decoder's table.
        positions = positions * cut.mask
    if config.window_positions:
        layout.places = _places_in_windows(config, text, front, cut, num_visible)
    if layout.shares_prefix:
        number = torch.arange(num_entries, device=cut.row.device)
        layout.seen = (number < num_visible[:, None]).to(cut.mask)
        layout.mask = torch.cat([layout.seen, cut.mask], 1)
        layout.positions = positions
    else:
        _lay_own_entries(config, layout, front, cut, num_visible, num_seen, own_position, positions, room)
    present = (own_position >= 0).long()
    layout.memories = Memories(torch.empty(0), present, takes, front.num_pinned, front.num_embedded, prefix.is_token)
    if room is not None and num_entries:
        _keep(config, layout, front, own_position, cut, num_visible, num_seen, room)
    # Padding shows what stands before it; columns before the first wanted one show something else.
    layout.back = (cut.first_row[:, None] * cut.window_length + cut.rank.clamp(min=0)).clamp(min=0)
    if front.back is not None and num_entries and (lowest is None or min(lowest) < 0):
        layout.wants_prefix = True
        in_prefix = torch.arange(len(counts), device=cut.row.device)[:, None] * num_entries + front.back
        layout.back = torch.where(cut.rank < 0, in_prefix, len(counts) * num_entries + layout.back)
    _open_windows(config, layout, front, text, cut, start, window_length, num_entries)
    layout.end = num_entries + min(cut.window_length, max(counts))
    if fixed:
        layout.end = config.text_start + cut.window_length
    elif config.memory_positions == "source":
        layout.end = max(counts) if end is None else end
    return layout


def _fit(front: Front, cut: "_Cut", num_visible: torch.Tensor, room: int) -> torch.Tensor:
    """Return how many of the entries before it each window sees `(P,)` where not all of them have room."""
    pinned = front.num_pinned[cut.row]
    kept = (room - pinned + front.num_embedded[cut.row]).clamp(min=0)
    return pinned + torch.minimum(num_visible - pinned, kept)  # a context's stay, and of the others the newest


def _places_in_windows(
    config: PreTrainedConfig, text: Text, front: Front, cut: "_Cut", num_visible: torch.Tensor
) -> torch.Tensor:
    """Return the places that tokens of windows are given `(P, W)`, -1 for none."""
    asked = find_markers(config, text.input_ids, cut.mask_of_text).cumsum(1) > 0  # (B, T)
    asked = asked if front.asked is None else asked | front.asked[:, None]
    asked = asked.flatten()[cut.columns]  # (P, W)
    offset = torch.arange(cut.window_length, device=asked.device)
    return tell_places(config, offset.expand_as(asked), num_visible > 0, asked)


@dataclass
class _Cut:
    """Windows of a batch of texts: P of them, in row order.

    Attributes:
        columns (`torch.LongTensor` of shape `(P, W)`): Flat text columns.
        mask (`torch.LongTensor` of shape `(P, W)`): 1 for tokens.
        row, index (`torch.LongTensor` of shape `(P,)`): Each window's text, and its number in it.
        num (`torch.LongTensor` of shape `(B,)`): Windows of each text, those not laid out among them.
        last (`torch.LongTensor` of shape `(B,)`, *optional*): Each text's last window; `None`: window b of text b.
        first_row (`torch.LongTensor` of shape `(B,)`): Number of the window 0 of each text, were it laid out.
        rank (`torch.LongTensor` of shape `(B, T)`): Tokens before each column, of those to cut.
        order (`torch.LongTensor` of shape `(B, T)`, *optional*): Column of each rank; `None`: the same.
        counts, nums, firsts (`list` of `int`): Tokens, windows and first window laid out of each text, on the host.
        window_length (`int`): W, or less where every text is shorter.
        mask_of_text (`torch.LongTensor` of shape `(B, T)`): 1 for the tokens to cut.
        full (`torch.LongTensor` of shape `(n, W)`, *optional*): Flat text columns of all windows but each text's last.
        is_full (`bool`): Whether every window is known to be full.
    """

    columns: torch.Tensor
    mask: torch.Tensor
    row: torch.Tensor
    index: torch.Tensor
    num: torch.Tensor
    last: torch.Tensor | None
    first_row: torch.Tensor
    rank: torch.Tensor
    order: torch.Tensor | None
    counts: list[int]
    nums: list[int]
    firsts: list[int]
    window_length: int
    mask_of_text: torch.Tensor
    full: torch.Tensor | None
    is_full: bool


def _cut(
    text: Text, mask: torch.Tensor | None, counts: list[int], window_length: int | None, lowest: list[int] | None
) -> _Cut:
    """Cut each text into windows, skipping padding wherever it stands; what a short row lacks does not appear."""
    tokens = text.tokens
    (batch_size, length), device = tokens.shape[:2], tokens.device
    width = max(1, max(counts) if window_length is None else min(window_length, max(counts)))
    nums = [max(1, -(-count // width)) for count in counts]
    # Nobody asks for what stands before the first wanted token: those windows count as memories only.
    firsts = [0] * batch_size
    if lowest is not None:
        firsts = [min(max(rank, 0) // width, num - 1) for rank, num in zip(lowest, nums, strict=True)]
    laid = [num - first for num, first in zip(nums, firsts, strict=True)]
    num, first, num_laid = torch.tensor([nums, firsts, laid], device=device)
    row = torch.arange(batch_size, device=device).repeat_interleave(num_laid, output_size=sum(laid))
    ends = num_laid.cumsum(0)
    index = torch.arange(sum(laid), device=device) - (ends - num_laid - first)[row]
    rank = index[:, None] * width + torch.arange(width, device=device)  # (P, W)
    count = torch.tensor(counts, device=device)
    order = None
    mask_of_text = torch.ones(batch_size, length, dtype=torch.long, device=device) if mask is None else mask
    # The last window of a text may have more places than tokens are left: masked, but read all the same.
    column = rank.clamp(max=length - 1)
    if mask is not None:
        order = pack(mask)
        column = order[row[:, None], column]
    present = (rank < count[row][:, None]).long()
    chunks = None
    if max(nums) > 1:  # all windows but each text's last, those that are not laid out among them
        full = num - 1
        owner = torch.arange(batch_size, device=device).repeat_interleave(full, output_size=sum(nums) - batch_size)
        number = torch.arange(sum(nums) - batch_size, device=device) - (full.cumsum(0) - full)[owner]
        inside = number[:, None] * width + torch.arange(width, device=device)
        inside = inside if order is None else order[owner[:, None], inside]
        chunks = owner[:, None] * length + inside
    return _Cut(
        row[:, None] * length + column, present, row, index, num,
        None if sum(laid) == batch_size else ends - 1, ends - num_laid - first, mask_of_text.cumsum(1) - 1, order,
        counts, nums, firsts, width, mask_of_text, chunks, sum(counts) == sum(nums) * width,
    )  # fmt: skip


def _lay_prefix(
    config: PreTrainedConfig, source: Text, front: Front, cut: _Cut, per_window: int
) -> tuple[Layout, torch.Tensor, torch.Tensor]:
    """Lay out all that stands before a text's last window: its front, then the memories of its full windows.

    Returns:
        The layout of `(B, M)` entries, the position of each entry, and how many positions each takes, -1 and 0 for
        those that a row lacks.
    """
    device = cut.row.device
    batch_size, given = front.entries.shape
    new = (cut.num - 1) * per_window  # (B,)
    most = 0
    for number, windows in zip(front.counts, cut.nums, strict=True):
        most = max(most, number + (windows - 1) * per_window)
    number = torch.arange(most, device=device)
    in_front = number < front.num[:, None]  # (B, M)
    present = number < (front.num + new)[:, None]
    rank = (number - front.num[:, None]).clamp(min=0)  # among the new memories
    # New memories are counted after all given ones, those of text 0 first.
    first = front.num_given + (new.cumsum(0) - new)[:, None]
    # Absent entries are masked later; until then they must name some vector.
    entries = torch.where(present, first + rank, 0)
    takes, is_token = torch.ones_like(entries), torch.zeros_like(entries)
    text = places = None
    if config.memory_positions == "source":
        takes = tokens_of_memories(config, config.memories_per_chunk, device)[rank % config.memories_per_chunk]
    if given:
        place = number.clamp(max=given - 1).expand(batch_size, -1)
        entries = torch.where(in_front, front.entries.gather(1, place), entries)
        is_token = front.is_token.gather(1, place) * in_front
        if config.memory_positions == "source":
            takes = torch.where(in_front, front.num_tokens.gather(1, place), takes)
        if front.text is not None:
            text = front.text.gather(1, place)
        if front.places is not None:
            places = torch.where(in_front, front.places.gather(1, place), -1)
    takes = takes * present
    if config.memory_positions in ("fixed", "spread"):
        position = config.memory_span * number.expand(batch_size, -1)
    else:
        position = (takes.cumsum(1) - 1).clamp(min=0)
    # The entries of one row share one run, and absent ones stand at its end, where nothing present sees them.
    prefix = Layout(
        source, positions=position, text=text, entries=entries, places=places, sees_memories=True,
        memories=None, mask=present.long(), is_token=is_token,
    )  # fmt: skip
    return prefix, torch.where(present, position, -1), takes


def _lay_own_entries(
    config: PreTrainedConfig,
    layout: Layout,
    front: Front,
    cut: _Cut,
    num_visible: torch.Tensor,
    num_seen: torch.Tensor,
    own_position: torch.Tensor,
    positions: torch.Tensor,
    room: int | None,
) -> None:
    """Give each window a row of its own, with the entries that it sees and constant fillers in front."""
    num_entries, device = own_position.shape[1], cut.row.device
    width = num_entries if room is None else min(num_entries, room + front.entries.shape[1])
    layout.has_filler = config.absent_memories != "mask"
    width = config.max_memories if layout.has_filler else width
    number = torch.arange(width, device=device).expand(len(cut.row), -1)  # (P, width)
    place = _place_of(number, num_visible, num_seen, front.num_pinned[cut.row] if room is not None else None)
    seen = number < num_seen[:, None]
    entry = cut.row[:, None] * num_entries + place.clamp(max=max(0, num_entries - 1))
    if layout.has_filler:
        entry = torch.where(seen, entry, len(cut.nums) * num_entries)
    front_positions = number if config.memory_positions == "contiguous" else config.memory_span * number
    if config.memory_positions == "source" and num_entries:
        # What made room keeps its positions, so that the others stand where they would in the full text.
        front_positions = own_position[cut.row[:, None], place.clamp(max=num_entries - 1)].clamp(min=0)
    none = torch.full_like(cut.columns, -1)
    layout.entries = torch.cat([entry, none], 1)
    layout.text = torch.cat([torch.zeros_like(entry), cut.columns], 1)
    mask = torch.ones_like(seen) if layout.has_filler else seen
    layout.mask = torch.cat([mask.to(cut.mask), cut.mask], 1)
    layout.positions = torch.cat([front_positions, positions], 1)
    if layout.places is not None:
        layout.places = torch.cat([torch.full_like(entry, -1), layout.places], 1)


def _place_of(
    number: torch.Tensor, num_visible: torch.Tensor, num_seen: torch.Tensor, pinned: torch.Tensor | None
) -> torch.Tensor:
    """Return which entry of its text the n-th that a row sees is, `(P, n)`: the pinned ones, then the newest."""
    if pinned is None:
        return number
    return torch.where(number < pinned[:, None], number, number + (num_visible - num_seen)[:, None])


def _keep(
    config: PreTrainedConfig,
    layout: Layout,
    front: Front,
    own_position: torch.Tensor,
    cut: _Cut,
    num_visible: torch.Tensor,
    num_seen: torch.Tensor,
    room: int,
) -> None:
    """Say which entries each text's last window still sees: these are what a cache goes on with."""
    assert layout.prefix is not None and layout.prefix.is_token is not None
    batch_size, num_entries = own_position.shape
    last = torch.arange(batch_size, device=own_position.device) if cut.last is None else cut.last
    number = torch.arange(min(num_entries, room + front.entries.shape[1]), device=own_position.device)
    number = number.expand(batch_size, -1)
    place = _place_of(number, num_visible[last], num_seen[last], front.num_pinned).clamp(max=num_entries - 1)
    layout.kept = torch.arange(batch_size, device=own_position.device)[:, None] * num_entries + place
    mask = (number < num_seen[last][:, None]).long()
    # The tokens of what made room count to the one after it.
    position = own_position.gather(1, place)
    takes = torch.diff(position, dim=1, prepend=torch.full_like(position[:, :1], -1)) * mask
    is_token = layout.prefix.is_token.gather(1, place)
    layout.memories = Memories(torch.empty(0), mask, takes, front.num_pinned, front.num_embedded, is_token)


def _open_windows(
    config: PreTrainedConfig,
    layout: Layout,
    front: Front,
    text: Text,
    cut: _Cut,
    start: torch.Tensor,
    window_length: int | None,
    own_entries: int,
) -> None:
    """Say what a cache has to know of each text's last window."""
    last = torch.arange(len(cut.nums), device=cut.row.device) if cut.last is None else cut.last
    fill = cut.mask[last].sum(1)
    asked, marked = front.asked, front.asked
    if config.window_positions:
        found = find_markers(config, text.input_ids, cut.mask_of_text)
        own = found.flatten()[cut.columns[last]] & cut.mask[last].bool()
        before = found & (cut.rank < ((cut.num - 1) * cut.window_length)[:, None])
        # A marker in a window that was compressed asks for the windows after it, too.
        asked = before.any(1) if front.asked is None else before.any(1) | front.asked
        marked = asked | own.any(1)
    most = 0
    for count, num in zip(cut.counts, cut.nums, strict=True):
        most = max(most, count - (num - 1) * cut.window_length)
    # Where all texts end alike, what is empty in their last windows can be cut off.
    ends_alike = len({count - num * cut.window_length for count, num in zip(cut.counts, cut.nums, strict=True)}) == 1
    assert layout.widths is not None and layout.lasts is not None
    visible = {layout.widths[number] for number in layout.lasts}
    front_is_full = layout.has_filler or (layout.shares_prefix and visible == {own_entries})
    known = layout.shares_prefix and (min(visible) > 0) == (max(visible) > 0)
    assert isinstance(layout.sees_memories, torch.Tensor)
    # Only where no row masks an entry of the prefix may the mask be left out.
    layout.is_full = layout.shares_prefix and cut.is_full and max(layout.widths) == 0
    layout.opening = Opening(
        cut.columns[last][:, :most] if window_length is not None and text.input_ids is not None else None,
        fill, start[last] + fill, most, None, asked, marked,
        has_gaps=not (ends_alike and front_is_full),
        rolling=window_length is not None, sees_memories=min(visible) > 0 if known else layout.sees_memories[last],
    )  # fmt: skip


def text_of_window(text: Text, cache: MemoryCache) -> Text:
    """Return the tokens of open windows `(B, w)` and the next ones `(B, T)` as one text `(B, w + T)`."""
    mask, width = text.mask(), cache.window_input_ids.shape[1]
    filled = (torch.arange(width, device=mask.device) < cache.window_fill[:, None]).to(mask)
    ids = torch.cat([cache.window_input_ids, text.input_ids], 1)
    return Text(ids, torch.cat([filled, mask], 1), tokens=ids)


def lay_step(config: PreTrainedConfig, text: Text, cache: MemoryCache, has_holes: bool = False) -> Layout:
    """Lay out the next tokens of texts that a memory cache holds, in their open windows.

    Args:
        config ([`MemoryEncoderDecoderConfig`]): The model's.
        text ([`Text`]): B texts of T columns.
        cache ([`MemoryCache`]): Their cache.
        has_holes (`bool`): Whether padding stands between two of the tokens.
    """
    mask = text.mask()
    rank = mask.cumsum(1) - 1
    layout = Layout(text, sees_memories=cache.sees_memories, end=cache.end + mask.shape[1], continues=True)
    layout.positions = (cache.next_position[:, None] + rank).clamp(min=0)
    # Where every column counts the decoder needs no mask, and would look at all its values.
    if cache.has_gaps or text.attention_mask is not None:
        layout.mask = torch.cat([cache.column_mask, mask.to(cache.column_mask)], 1)
    if has_holes:
        layout.back = _back_across_holes(mask)
    marked = None
    if config.window_positions and text.input_ids is not None:
        asked = cache.marked[:, None] | (find_markers(config, text.input_ids, mask).cumsum(1) > 0)
        offsets = cache.window_fill[:, None] + rank
        layout.places = tell_places(config, offsets, cache.memories.mask.bool().any(1), asked)
        marked = asked[:, -1]
    layout.memories = cache.memories
    layout.opening = Opening(None, cache.window_fill, cache.next_position, cache.max_fill, marked=marked)
    return layout


@dataclass
class Context:
    """How the chunks of contexts become memories.

    Attributes:
        chunks (`torch.LongTensor` of shape `(N,)`, *optional*): Flat numbers of the chunks to encode; `None`: all.
        num_memories (`torch.LongTensor` of shape `(N,)`, *optional*): How many memories of each are asked for.
        place (`torch.LongTensor` of shape `(B, M)`): Flat number, among the N * K memories, of each that is given.
        mask (`torch.LongTensor` of shape `(B, M)`): 1 for present memories.
        num_tokens (`torch.LongTensor` of shape `(B, M)`): How many tokens each stands for, 0 for absent ones.
    """

    chunks: torch.Tensor | None
    num_memories: torch.Tensor | None
    place: torch.Tensor
    mask: torch.Tensor
    num_tokens: torch.Tensor


def lay_context(
    config: PreTrainedConfig,
    shape: tuple[int, int, int],
    mask: torch.Tensor | None,
    counts: torch.Tensor | None,
    present: list[int] | None,
    width: int | None,
    device: torch.device,
) -> Context:
    """Say where the memories of contexts come from and what they stand for.

    Args:
        config ([`MemoryEncoderDecoderConfig`]): The model's.
        shape (`tuple`): Texts, chunks, tokens of a chunk: (B, C, L).
        mask (`torch.LongTensor` of shape `(B, C, L)`, *optional*): 1 for tokens, 0 for padding.
        counts (`torch.LongTensor` of shape `(B, C)`, *optional*): How many memories of each chunk. Default: K.
        present (`list` of `int`, *optional*): 1 for each of the B * C chunks that holds a token; `None`: not known.
        width (`int`, *optional*): With a budget, the most memories that a text is given.
        device (`torch.device`): Where the chunks are.
    """
    batch_size, num_chunks, length = shape
    per_chunk = config.memories_per_chunk
    num_real = torch.full((batch_size, num_chunks), length, device=device)
    num_real = num_real if mask is None else (mask != 0).sum(2)  # (B, C)
    there = num_real > 0
    asked = torch.full_like(num_real, per_chunk) if counts is None else counts
    number = torch.arange(per_chunk, device=device)
    wanted = (number < asked[..., None]) & there[..., None]  # (B, C, K)
    num_tokens = tokens_of_groups(num_real, per_chunk, asked, filled_length(config)) * wanted
    chunks = None
    chunk = torch.arange(batch_size * num_chunks, device=device).view(batch_size, num_chunks)
    if present is not None and not all(present):  # only chunks that hold something are encoded
        chunks = torch.tensor([place for place, held in enumerate(present) if held], dtype=torch.long, device=device)
        # Absent chunks are not encoded, so the numbers of those after them move up.
        chunk = (there.flatten().cumsum(0) - 1).clamp(min=0).view(batch_size, num_chunks)
    place = (chunk[..., None] * per_chunk + number).flatten(1)  # (B, C * K)
    wanted, num_tokens = wanted.flatten(1).long(), num_tokens.flatten(1)
    if counts is not None:  # with a budget there are no columns that no row needs
        order = pack(wanted)[:, :width]
        place, wanted, num_tokens = place.gather(1, order), wanted.gather(1, order), num_tokens.gather(1, order)
        asked = asked.flatten()
        asked = asked if chunks is None else asked[chunks]
    return Context(chunks, None if counts is None else asked, place, wanted, num_tokens)
