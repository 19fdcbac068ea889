"""Layouts are values made of values: no model runs, and a loop over texts, windows and columns says the same."""

from typing import Any

import pytest
import torch

from modeling_memory import MemoryCache, MemoryEncoderDecoderConfig
from modeling_memory.memory_cache import Memories, Opening
from modeling_memory.memory_checks import Facts
from modeling_memory.memory_layout import (
    Layout,
    Text,
    lay_front,
    lay_plain,
    lay_slots,
    lay_step,
    lay_windows,
    tokens_of_memories,
)
from tests.conftest import tiny_decoder_config, tiny_encoder_config
from tests.memory_models import CHUNK, COPY, SLOT, WINDOW, ragged_batch, random_ids
from tests.reference import layout_loop

POSITIONS: list[dict[str, Any]] = [
    {},
    {"memory_positions": "source"},
    {"memory_positions": "source", "memories_per_chunk": 3},
    {"memory_positions": "spread", "max_memories": 20, "memories_per_chunk": 2},
    {"memory_positions": "fixed", "max_memories": 9},
]
NAMES = ["contiguous", "source", "source_of_three", "spread", "fixed"]


def config_of(**fields: Any) -> MemoryEncoderDecoderConfig:
    """Chunks of 4 tokens, windows of 8."""
    return MemoryEncoderDecoderConfig(
        encoder=tiny_encoder_config(), decoder=tiny_decoder_config(), chunk_length=CHUNK, window_length=WINDOW,
        memory_token_id=SLOT, copy_token_id=COPY, **fields,
    )  # fmt: skip


def facts_of(mask: torch.Tensor, **fields: Any) -> Facts:
    """What one look at a batch would say."""
    holes = [(torch.diff(row.nonzero().flatten()) > 1).any() for row in mask]
    return Facts(mask.sum(1).tolist(), bool(mask.all()), has_holes=bool(torch.stack(holes).any()), **fields)


def memories_of(config: MemoryEncoderDecoderConfig, mask: torch.Tensor) -> Memories:
    """Memories of full chunks, without vectors."""
    none = torch.zeros(len(mask), dtype=torch.long)
    takes = tokens_of_memories(config, mask.shape[1], mask.device).expand_as(mask)
    return Memories(torch.empty(*mask.shape, 0), mask, takes, mask.sum(1), none, torch.zeros_like(mask))


def read(layout: Layout, number: int, length: int) -> dict[str, Any]:
    """Say in lists what row `number` of a layout holds: entries as numbers of the prefix, columns of its text."""
    assert layout.text is not None and layout.mask is not None and layout.row is not None
    assert layout.positions is not None and layout.prefix is not None and layout.num_wanted is not None
    assert layout.prefix.positions is not None and layout.prefix.entries is not None
    text, row = int(layout.row[number]), layout.num_wanted
    real = layout.mask[number, -row:].bool()
    columns = layout.text[number, -row:][real]
    assert (columns // length == text).all()
    front = layout.mask[number, :-row].bool().nonzero().flatten()
    if layout.shares_prefix:
        entries, before = front, layout.prefix.positions[text, front]
    else:
        assert layout.entries is not None
        width = layout.prefix.entries.shape[1]
        entries, before = layout.entries[number, front] - text * width, layout.positions[number, front]
    return {
        "columns": (columns % length).tolist(),
        "memories": entries.tolist(),
        "before": before.tolist(),
        "after": layout.positions[number, -row:][real].tolist(),
    }


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own"])
@pytest.mark.parametrize("fields", POSITIONS, ids=NAMES)
def test_windows_stand_where_the_loop_puts_them(fields, shared):
    config = config_of(**fields)
    ids, mask = ragged_batch()
    layout = lay_windows(config, Text(ids, mask, tokens=ids), mask, None, mask.sum(1).tolist(), WINDOW, shared=shared)
    expected = [layout_loop.windows_of(config, row) for row in mask.tolist()]
    rows = [(number, window) for number, windows in enumerate(expected) for window in windows]
    assert layout.row.tolist() == [number for number, _ in rows]
    for number, (_, window) in enumerate(rows):
        assert read(layout, number, ids.shape[1]) == window
    # Full windows are compressed, chunk after chunk, and their memories are the entries of the prefix in that order.
    chunks = [[divmod(column, ids.shape[1]) for column in chunk] for chunk in layout.compressed.tolist()]
    assert chunks == layout_loop.chunks_of(config, mask.tolist())
    present = layout.prefix.entries[layout.prefix.mask.bool()]
    assert present.tolist() == list(range(len(chunks) * config.memories_per_chunk))
    assert layout.end > max(position for _, window in rows for position in window["after"])
    # Every column is laid back to the one that predicts what follows it, across windows and padding.
    for row, real in enumerate(mask.tolist()):
        for column in range(len(real)):
            place = max(0, layout_loop.rank_of(real, column))
            before = sum(len(windows) for windows in expected[:row]) * WINDOW
            assert layout.back[row, column] == before + place


@pytest.mark.parametrize("fields", [{}, {"memory_positions": "source"}], ids=["contiguous", "source"])
def test_the_oldest_memories_make_room(fields):
    config = config_of(max_memories=3, memory_policy="drop_oldest", **fields)
    ids, mask = ragged_batch()
    layout = lay_windows(config, Text(ids, mask, tokens=ids), mask, None, mask.sum(1).tolist(), WINDOW, room=3)
    rows = [window for row in mask.tolist() for window in layout_loop.windows_of(config, row, room=3)]
    assert [read(layout, number, ids.shape[1]) for number in range(len(rows))] == rows
    last = [layout_loop.windows_of(config, row, room=3)[-1]["memories"] for row in mask.tolist()]
    width = layout.prefix.entries.shape[1]
    kept = [
        [int(entry) - row * width for entry, held in zip(*values, strict=True) if held]
        for row, values in enumerate(zip(layout.kept, layout.memories.mask, strict=True))
    ]
    assert kept == last  # a cache goes on with what the last window sees


def test_windows_before_the_first_wanted_column_are_memories_only():
    config = config_of()
    ids, mask = ragged_batch()
    counts = mask.sum(1).tolist()
    lowest = [count - 1 for count in counts]
    layout = lay_windows(config, Text(ids, mask, tokens=ids), mask, None, counts, WINDOW, lowest)
    last = [layout_loop.windows_of(config, row)[-1] for row in mask.tolist()]
    assert [read(layout, number, ids.shape[1]) for number in range(len(last))] == last
    assert len(layout.row) == len(mask) and len(layout.compressed) == len(layout_loop.chunks_of(config, mask.tolist()))


def test_a_plain_text_counts_its_tokens_and_reads_across_holes():
    ids, mask = ragged_batch(7 + WINDOW)
    layout = lay_plain(config_of(), Text(ids, mask, tokens=ids), facts_of(mask))
    for row, real in enumerate(mask.tolist()):
        columns = range(len(real))
        assert layout.positions[row].tolist() == [max(0, layout_loop.rank_of(real, column)) for column in columns]
        back = [row * len(real) + layout_loop.predictor_of(real, column) for column in columns]
        assert layout.back[row].tolist() == back
    full = torch.ones_like(mask)
    layout = lay_plain(config_of(), Text(ids, full, tokens=ids), facts_of(full))
    assert layout.mask is None and layout.positions is None and layout.back is None  # the plain decoder's own


@pytest.mark.parametrize("fields", POSITIONS[:3], ids=NAMES[:3])
def test_memories_stand_in_the_slots_of_their_row(fields):
    config = config_of(**fields)
    ids, mask = random_ids(2, 11), torch.ones(2, 11, dtype=torch.long)
    ids[0, [1, 2, 6]], ids[1, [3, 9]] = SLOT, SLOT
    mask[1, [0, 1, 5]] = 0
    held = torch.tensor([[1, 1, 0, 1], [0, 1, 1, 0]])  # absent memories stand between present ones
    memories = memories_of(config, held)
    takes = [row[own.bool()].tolist() for row, own in zip(memories.num_tokens, held, strict=True)]
    source = config.memory_positions == "source"
    end = max(int(mask[row].sum()) - len(takes[row]) + sum(takes[row]) for row in range(2))
    layout = lay_slots(config, Text(ids, mask, tokens=ids), memories, facts_of(mask, sees_memories=True, end=end))
    for row in range(2):
        entries, positions = layout_loop.slots_of(
            mask[row].tolist(), (ids[row] == SLOT).tolist(), takes[row] if source else None
        )
        present = held[row].nonzero().flatten().tolist()
        expected = [row * 4 + present[entry] if entry >= 0 else -1 for entry in entries]
        assert layout.entries[row].tolist() == expected
        assert layout.positions[row].tolist() == positions
        assert layout.opening.next_position[row] == positions[-1] + 1
    assert layout.end >= int(layout.positions.max()) + 1
    assert layout.needs_own_cache is source and layout.sees_memories is True


@pytest.mark.parametrize("fields", POSITIONS[:3], ids=NAMES[:3])
def test_a_context_stays_before_the_windows_that_follow_it(fields):
    config = config_of(**fields)
    per_chunk = config.memories_per_chunk
    ids = random_ids(2, per_chunk + 19)
    ids[:, :per_chunk] = SLOT
    mask = torch.ones_like(ids)
    mask[1, [per_chunk, per_chunk + 4, per_chunk + 18]] = 0
    memories = memories_of(config, torch.ones(2, per_chunk, dtype=torch.long))
    after = mask.clone()
    after[:, :per_chunk] = 0
    facts = facts_of(mask, num_memories=[per_chunk] * 2, num_ahead=[per_chunk] * 2, num_after=after.sum(1).tolist())
    facts.end = per_chunk + 19 + CHUNK
    layout = lay_front(config, Text(ids, mask, tokens=ids), memories, facts, True, True, None)
    rows = [window for row in after.tolist() for window in layout_loop.windows_of(config, row, front=per_chunk)]
    assert [read(layout, number, ids.shape[1]) for number in range(len(rows))] == rows
    in_slots = (layout.prefix.entries < memories.mask.numel()) & layout.prefix.mask.bool()
    assert in_slots.sum(1).tolist() == [per_chunk] * 2  # the given memories, then those of compressed windows
    assert layout.prefix.entries[0, :per_chunk].tolist() == list(range(per_chunk))
    assert layout.prefix.entries[1, :per_chunk].tolist() == list(range(per_chunk, 2 * per_chunk))
    assert layout.wants_prefix  # slots are columns of the text, and show what they predict


def test_memories_before_embeddings_are_the_prefix_of_one_window():
    config = config_of()
    embeds, mask = torch.zeros(2, 20, 32), torch.ones(2, 20, dtype=torch.long)
    mask[1, :3] = 0
    held = torch.tensor([[1, 0, 1], [0, 1, 0]])
    facts = facts_of(mask, num_memories=[2, 1], num_after=[20, 17], num_ahead=[0, 0])
    layout = lay_front(
        config, Text(None, mask, embeds, tokens=embeds), memories_of(config, held), facts, False, True, None
    )
    assert layout.compressed is None and layout.opening.rolling is False
    assert layout.prefix.entries[layout.prefix.mask.bool()].tolist() == [0, 2, 4]
    for row, (number, gap) in enumerate(((2, 0), (1, 3))):
        found = read(layout, row, 20)
        assert found["columns"] == list(range(gap, 20)) and found["memories"] == list(range(number))
        assert found["after"] == [number + place for place in range(20 - gap)]


@pytest.mark.parametrize("holes", [False, True])
def test_the_next_tokens_go_on_in_the_open_window(holes):
    config = config_of(window_positions=True)
    memories = memories_of(config, torch.tensor([[1, 1], [1, 0]]))
    fill, position = torch.tensor([3, 1]), torch.tensor([5, 2])
    held = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 1, 0, 0]])
    cache = MemoryCache().open(
        MemoryCache(), memories, held, Opening(None, fill, position, 3, marked=torch.tensor([False, True])),
        num_columns=3, end=5,
    )  # fmt: skip
    ids, mask = random_ids(2, 4), torch.ones(2, 4, dtype=torch.long)
    ids[0, 2] = COPY
    if holes:
        mask[1, 1:3] = 0
    layout = lay_step(config, Text(ids, mask, tokens=ids), cache, holes)
    assert torch.equal(layout.mask, torch.cat([held, mask], 1))
    for row, real in enumerate(mask.tolist()):
        ranks = [layout_loop.rank_of(real, column) for column in range(4)]
        assert layout.positions[row].tolist() == [int(position[row]) + rank for rank in ranks]
        asked = [row == 1 or column >= 2 for column in range(4)]  # from the first marker on
        places = [(int(fill[row]) + rank) % WINDOW if ask else -1 for rank, ask in zip(ranks, asked, strict=True)]
        assert layout.places[row].tolist() == places
        if holes:
            back = [row * 4 + layout_loop.predictor_of(real, column) for column in range(4)]
            assert layout.back[row].tolist() == back
    assert holes or layout.back is None
    assert layout.opening.marked.tolist() == [True, True] and layout.end == 9
