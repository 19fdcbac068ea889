"""Where everything stands before the decoder, said slowly: texts, windows and columns one at a time, in plain lists.

It is the truth that the functions of `memory_layout` must equal. No model runs here.
"""

from types import SimpleNamespace

from tests.reference.memory_loop import positions_after


def rank_of(mask: list[int], column: int) -> int:
    """Return how many tokens of a text stand up to a column, less one."""
    return sum(mask[: column + 1]) - 1


def predictor_of(mask: list[int], column: int) -> int:
    """Return the last column up to this one that holds a token; the first where there is none."""
    return max((other for other in range(column + 1) if mask[other]), default=0)


def windows_of(config, mask: list[int], front: int = 0, room: int | None = None) -> list[dict]:
    """Cut one text into windows.

    Args:
        config: The model's.
        mask: 1 for the tokens to cut.
        front: Memories that stand before the text, whatever is compressed.
        room: How many memories there is room for, those of the front among them, if not for all.

    Returns:
        For each window its `columns`, the numbers of the `memories` that it sees, those of the front first, and the
        positions of both.
    """
    tokens = [column for column, real in enumerate(mask) if real]
    per_window = config.window_length // config.chunk_length * config.memories_per_chunk
    found = []
    for number, start in enumerate(range(0, max(1, len(tokens)), config.window_length)):
        columns = tokens[start : start + config.window_length]
        memories = list(range(front + number * per_window))
        before, after = positions_after(SimpleNamespace(config=config), len(memories), len(columns))
        if room is not None and len(memories) > room:
            newest = memories[len(memories) - (room - front) :]
            memories = [*range(front), *newest]
            if config.memory_positions == "source":  # what made room keeps its positions
                before = [before[memory] for memory in memories]
            else:
                before, after = positions_after(SimpleNamespace(config=config), len(memories), len(columns))
        found.append({"columns": columns, "memories": memories, "before": before, "after": after})
    return found


def chunks_of(config, masks: list[list[int]]) -> list[list[tuple[int, int]]]:
    """Return the tokens, as row and column, of every chunk that is compressed, text after text."""
    chunks = []
    for row, mask in enumerate(masks):
        for window in windows_of(config, mask)[:-1]:
            for start in range(0, config.window_length, config.chunk_length):
                chunks.append([(row, column) for column in window["columns"][start : start + config.chunk_length]])
    return chunks


def slots_of(mask: list[int], is_slot: list[bool], takes: list[int] | None) -> tuple[list[int], list[int]]:
    """Return which memory stands in each column of one text, -1 for a token, and the position of each column.

    Args:
        mask: 1 for tokens and slots.
        is_slot: Whether a column holds a slot.
        takes: How many positions each memory takes; `None`: one, as a token.
    """
    entries, positions, following, number = [], [], 0, 0
    for real, slot in zip(mask, is_slot, strict=True):
        entries.append(number if slot else -1)
        if real:
            following += takes[number] if slot and takes is not None else 1
        number += slot
        positions.append(max(0, following - 1))
    return entries, positions
