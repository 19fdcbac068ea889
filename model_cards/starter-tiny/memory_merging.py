"""Merging old memories: the text of neighbours is read again, into as many memories as one of them had.

B rows, M memories of a row, F folded tokens of a row, K memories per chunk, L chunk length, D decoder width.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence

from .configuration_memory import allot_memories
from .memory_decoding import MemoryDecodingMixin
from .memory_windows import Windows, pack_present, scatter_present

FOREVER = 2**62


class Segment(NamedTuple):
    """Neighbouring chunks that K memories stand for.

    Attributes:
        start (`int`): Number of the first chunk in the text that folds.
        size (`int`): Chunks.
        born (`int`): First window that sees these memories; 0 also for those that stand before the call's text.
        died (`int`): First window that does not any more.
    """

    start: int
    size: int
    born: int
    died: int = FOREVER


def merge_plan(
    sizes: Sequence[int], num_windows: int, chunks_per_window: int, room: int, longest: int | None
) -> list[Segment]:
    """Plan which neighbours merge while a text folds window by window.

    When there is no room, those two merge that stand for equally much text: of such pairs the one of least text, and
    of these the oldest. Where no two that may merge are equal, the oldest two that may. So old text is held ever more
    coarsely, and new text as finely as the room allows.

    Args:
        sizes (sequence of `int`): Chunks that the segments before the text stand for.
        num_windows (`int`): Windows of the text; all but the last one fold.
        chunks_per_window (`int`): Chunks of a window.
        room (`int`): Most segments.
        longest (`int`, *optional*): Most chunks of a segment; `None`: any number.

    Returns:
        `list` of [`Segment`]: All that some window sees, by their place in the text.

    Raises:
        ValueError: If there is no room and no two may merge.

    >>> plan = merge_plan([], 5, 1, 3, None)
    >>> [[segment.size for segment in plan if segment.born <= window < segment.died] for window in range(5)]
    [[], [1], [1, 1], [1, 1, 1], [2, 1, 1]]
    """
    alive, gone, end = [], list[Segment](), 0
    for size in sizes:
        alive.append(Segment(end, size, 0))
        end += size
    for window in range(1, num_windows):
        alive += [Segment(end + number, 1, window) for number in range(chunks_per_window)]
        end += chunks_per_window
        while len(alive) > room:
            place = _next_to_merge(alive, longest)
            if place is None:
                num_chunks = sum(sizes) + chunks_per_window * (num_windows - 1)
                raise ValueError(
                    f"The text folds into {num_chunks} chunks, but `memory_policy='merge'` has room for the memories "
                    f"of {room}, and these stand for at most {longest} chunk{'s' * (longest != 1)} each: as many as "
                    "the encoder takes at once, times the memories of a chunk. Raise `max_memories`, shorten the "
                    "text, or let the oldest make room (`memory_policy='drop_oldest'`)."
                )
            older, newer = alive[place : place + 2]
            gone += [older._replace(died=window), newer._replace(died=window)]
            alive[place : place + 2] = [Segment(older.start, older.size + newer.size, window)]
    return sorted(segment for segment in gone + alive if segment.born < segment.died)


def _next_to_merge(segments: list[Segment], longest: int | None) -> int | None:
    """Return the place of the older of the two neighbours to merge; `None` if no two may."""
    best = None
    for place, (older, newer) in enumerate(zip(segments, segments[1:], strict=False)):
        if longest is None or older.size + newer.size <= longest:
            key = (0, older.size) if older.size == newer.size else (1, 0)
            if best is None or key < best[0]:
                best = key, place
    return None if best is None else best[1]


def pieces_of(size: int, memories_per_chunk: int) -> list[tuple[int, int, int]]:
    """Cut a segment into what the encoder reads at once: first chunk, number of chunks, memories.

    Up to K chunks are read one by one, with fewer memories than K each; more than K become K longer ones.

    >>> pieces_of(2, 4), pieces_of(4, 2), pieces_of(2, 1)
    ([(0, 1, 2), (1, 1, 2)], [(0, 2, 1), (2, 2, 1)], [(0, 2, 1)])
    """
    if size <= memories_per_chunk:
        shares = allot_memories(memories_per_chunk, size, memories_per_chunk)
        return [(chunk, 1, share) for chunk, share in enumerate(shares)]
    borders = [number * size // memories_per_chunk for number in range(memories_per_chunk + 1)]
    return [(start, end - start, 1) for start, end in zip(borders, borders[1:], strict=False)]


class MemoryMergingMixin(MemoryDecodingMixin):
    """How the memories of a text that outgrows its room become fewer."""

    def _folded_text(self, windows: Windows, prior: dict[str, torch.Tensor] | None) -> dict[str, torch.Tensor]:
        """Return what a cache keeps of a text for merging, as if nothing merged while it folds.

        Args:
            windows ([`Windows`]): All windows of the text.
            prior (`dict`, *optional*): What stands before it, as in `_read_windows`.
        """
        full = windows.index < windows.counts[windows.row] - 1
        number = torch.arange(windows.num_windows - 1, device=full.device)
        present = number < windows.counts[:, None] - 1  # (B, N-1)
        folded = scatter_present(windows.input_ids[full], present).flatten(1)
        sizes = present.long().repeat_interleave(self.config.window_length // self.config.chunk_length, dim=1)
        if prior is not None:
            before, sizes_before = prior["folded_input_ids"], prior["segment_sizes"]
            segments = (prior["memory_mask"].sum(1) - prior["num_pinned"]) // self.config.memories_per_chunk
            if ((sizes_before > 0).sum(1) != segments).any():
                raise ValueError(
                    "The cache holds memories but not the tokens that they stand for: it was filled under another "
                    "policy than `memory_policy='merge'`. Start again with `past_key_values=None`."
                )
            num_tokens = sizes_before.sum(1, keepdim=True) * self.config.chunk_length
            held = torch.arange(before.shape[1], device=full.device) < num_tokens
            mask = torch.cat([held, present.repeat_interleave(windows.input_ids.shape[1], dim=1)], 1)
            folded = pack_present(torch.cat([before, folded], 1)[..., None], mask.long())[0][..., 0]
            sizes = torch.cat([sizes_before, sizes], 1)
            sizes = pack_present(sizes[..., None], (sizes > 0).long())[0][..., 0]
        return {"folded_input_ids": folded, "segment_sizes": sizes}

    def _merge(
        self,
        memory_embeds: torch.Tensor,
        prior: dict[str, torch.Tensor] | None,
        room: int,
        counts: torch.Tensor,
        folded_input_ids: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Merge neighbours as each row's text folds, window by window.

        Args:
            memory_embeds (`torch.FloatTensor` of shape `(B, M, D)`): Of each row pinned memories, those of the
                segments before the text, and those of the chunks that it folds into.
            prior (`dict`, *optional*): What stands before the text, as in `_read_windows`.
            room (`int`): For how many memories there is room.
            counts (`torch.LongTensor` of shape `(B,)`): Windows of each text.
            folded_input_ids (`torch.LongTensor` of shape `(B, F)`): What the memories but the pinned stand for.

        Returns:
            All memories that some window sees `(B, M', D)` by their place in the text, the first window that sees each
            and the first that does not any more, both `(B, M')`, and the segments that the last window sees `(B, S')`.
        """
        per_chunk, device = self.config.memories_per_chunk, memory_embeds.device
        batch_size, num_columns = memory_embeds.shape[:2]
        befores: list[list[int]] = [[]] * batch_size
        pinned_of = clear_of = [0] * batch_size
        if prior is not None:
            befores, pinned_of, clear_of = (
                prior[name].tolist() for name in ("segment_sizes", "num_pinned", "num_clear")
            )
        first_merged = batch_size * num_columns  # all memories in one table: as they are, then merged
        merged: list[tuple[int, int, int]] = []  # row, first chunk, chunks
        columns: list[torch.Tensor] = []
        born: list[torch.Tensor] = []
        died: list[torch.Tensor] = []
        sizes: list[torch.Tensor] = []
        for row, (num_windows, before, pinned, clear) in enumerate(
            zip(counts.tolist(), befores, pinned_of, clear_of, strict=True)
        ):
            before = [size for size in before if size]
            plan = merge_plan(
                before,
                num_windows,
                self.config.window_length // self.config.chunk_length,
                (room - pinned + clear) // per_chunk,
                self.config.mergeable_chunks,
            )
            start_of_row, num_old = row * num_columns + pinned, 0
            starts = []
            for segment in plan:
                if segment.born == 0:
                    starts.append(start_of_row + num_old * per_chunk)
                    num_old += 1
                elif segment.size == 1:
                    starts.append(start_of_row + (len(before) + segment.start - sum(before)) * per_chunk)
                else:
                    starts.append(first_merged + len(merged) * per_chunk)
                    merged.append((row, segment.start, segment.size))
            own = [start + number for start in starts for number in range(per_chunk)]
            columns.append(torch.tensor([*range(row * num_columns, start_of_row), *own], dtype=torch.long))
            for lives, values, always in (
                (born, [segment.born for segment in plan], 0),
                (died, [segment.died for segment in plan], FOREVER),
            ):
                life = torch.tensor(values, dtype=torch.long).repeat_interleave(per_chunk)
                lives.append(torch.cat([torch.full((pinned,), always), life]))
            sizes.append(torch.tensor([segment.size for segment in plan if segment.died == FOREVER]).long())
        table = torch.cat(
            [memory_embeds.flatten(0, 1), self._encode_merged(merged, folded_input_ids, memory_embeds.dtype)]
        )
        born, died, sizes, columns = (
            pad_sequence(rows, batch_first=True).to(device) for rows in (born, died, sizes, columns)
        )
        return table[columns], born, died, sizes

    def _encode_merged(
        self, merged: list[tuple[int, int, int]], folded_input_ids: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor:
        """Encode segments, each given by row, first chunk and number of chunks; K memories of each, `(n * K, D)`."""
        per_chunk, length = self.config.memories_per_chunk, self.config.chunk_length
        pieces = defaultdict(list)  # by length: row, first token, memories, place of the first memory
        for number, (row, start, size) in enumerate(merged):
            place = number * per_chunk
            for first, chunks, share in pieces_of(size, per_chunk):
                pieces[chunks * length].append((row, (start + first) * length, share, place))
                place += share
        device, width = folded_input_ids.device, self.config.decoder.hidden_size
        memories = torch.zeros(len(merged) * per_chunk, width, dtype=dtype, device=device)
        for num_tokens, rows in pieces.items():
            row, first, share, place = torch.tensor(rows, device=device).T[..., None]  # (pieces, 1) each
            text = folded_input_ids[row, first + torch.arange(num_tokens, device=device)]
            encoded = self._encode(text, None, share[:, 0] if per_chunk > 1 else None)  # (pieces, K, D)
            number = torch.arange(per_chunk, device=device)
            asked = number < share
            memories = memories.index_put(((place + number)[asked],), encoded[asked].to(memories))
        return memories
