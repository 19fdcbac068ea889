"""The paper's loop, written slowly and obviously: rows, windows, chunks and memories one at a time, no cache.

It is the truth that the batched model must equal, in outputs and in gradients.
"""

import torch


def encode_chunk(model, chunk_ids: torch.Tensor, num_memories: int | None = None) -> list[torch.Tensor]:
    """Encode one chunk of real tokens `(n,)` into its K memories, or so many, each `(D,)`."""
    body = model.encoder(input_ids=chunk_ids[None], attention_mask=torch.ones_like(chunk_ids)[None])
    states = body.last_hidden_state[0]  # (n, E)
    num_tokens, num_memories = len(chunk_ids), num_memories or model.config.memories_per_chunk
    memories = []
    for number in range(num_memories):
        start = number * num_tokens // num_memories
        end = -(-(number + 1) * num_tokens // num_memories)
        group = states[start:end]
        state = group[-1] if model.config.pooling == "last" else group.sum(0) / len(group)
        if model.config.freeze_encoder:
            state = state.detach()
        memories.append(model.projector(state))
    return memories


def encode_context(model, chunks: list[torch.Tensor]) -> list[torch.Tensor]:
    """Encode the chunks of one context one by one."""
    return [memory for chunk in chunks for memory in encode_chunk(model, chunk)]


def is_marker(model, token: torch.Tensor) -> bool:
    """Whether a token is COPY or BLANK."""
    return int(token) in (model.config.copy_token_id, model.config.blank_token_id)


def decode_after(model, memories: list[torch.Tensor], token_ids: torch.Tensor, asked: bool = False) -> torch.Tensor:
    """Logits `(n, V)` of one window of tokens `(n,)` after its memories; `asked`: a marker was read before."""
    config = model.config
    embeds = model.get_input_embeddings()(token_ids)  # (n, D)
    if config.window_positions and memories:
        told = []
        num_places = config.chunk_length if config.memory_positions == "spread" else config.window_length
        for place, embed in enumerate(embeds):
            asked = asked or is_marker(model, token_ids[place])
            told.append(embed + model.window_positions.weight[place % num_places] if asked else embed)
        embeds = torch.stack(told)
    front = list(memories)
    if config.absent_memories != "mask":
        filler = torch.full_like(embeds[0], 1.0 if config.absent_memories == "ones" else 0.0)
        while len(front) < config.max_memories:
            front.append(filler)
    positions = sum(positions_after(model, len(front), len(token_ids)), [])
    sequence = torch.stack(front + list(embeds))[None]
    # Positions that jump would be taken for packed texts without a mask.
    inputs = {"inputs_embeds": sequence, "use_cache": False, "position_ids": torch.tensor([positions])}
    inputs["attention_mask"] = torch.ones_like(inputs["position_ids"])
    return model.decoder(**inputs).logits[0, len(front) :]


def positions_after(model, num_memories: int, num_tokens: int) -> tuple[list[int], list[int]]:
    """Return the positions of the memories before a window, and of its tokens."""
    config = model.config
    start, span = num_memories, 1
    if config.memory_positions in ("fixed", "spread"):
        span = config.chunk_length // config.memories_per_chunk if config.memory_positions == "spread" else 1
        start = config.max_memories * span
    before = [span * rank for rank in range(num_memories)]
    if config.memory_positions == "source":
        before, start = positions_in_source(model, num_memories)
    return before, [start + offset for offset in range(num_tokens)]


def last_of_group(model, number: int, num_tokens: int) -> int:
    """Return how many of a chunk's tokens stand up to the end of the group that its memory of a number stands for."""
    per_chunk = model.config.memories_per_chunk
    return -(-(number + 1) * num_tokens // per_chunk)


def positions_in_source(model, num_memories: int) -> tuple[list[int], int]:
    """Return where the last tokens of the groups of full chunks stand in the full text, and where it goes on."""
    per_chunk, length = model.config.memories_per_chunk, model.config.chunk_length
    positions = [
        number // per_chunk * length + last_of_group(model, number % per_chunk, length) - 1
        for number in range(num_memories)
    ]
    return positions, positions[-1] + 1 if positions else 0


def read_slots_in_source(model, contexts: list[list[torch.Tensor]], token_ids: torch.Tensor) -> torch.Tensor:
    """Logits `(n, V)` of one prompt whose slots, context after context, hold memories where their text would stand.

    Args:
        model: The model.
        contexts: For each context its chunks; their slots follow each other wherever they stand.
        token_ids: Tokens and slots `(n,)`.
    """
    memories, takes = [], []
    for chunk in (chunk for chunks in contexts for chunk in chunks):
        taken = 0
        for number, memory in enumerate(encode_chunk(model, chunk)):
            memories.append(memory)
            end = last_of_group(model, number, len(chunk))
            takes.append(end - taken)
            taken = end
    sequence, positions, following = [], [], 0
    for token in token_ids:
        if token == model.config.memory_token_id:
            sequence.append(memories.pop(0))
            following += takes.pop(0)
        else:
            sequence.append(model.get_input_embeddings()(token))
            following += 1
        positions.append(following - 1)
    inputs = {"inputs_embeds": torch.stack(sequence)[None], "position_ids": torch.tensor([positions])}
    mask = torch.ones(1, len(positions), dtype=torch.long)  # positions that jump are no packed texts
    return model.decoder(**inputs, attention_mask=mask, use_cache=False).logits[0]


def read_tokens(model, token_ids: torch.Tensor) -> torch.Tensor:
    """Logits `(n, V)` of one text of real tokens `(n,)`: window after window, each after all earlier memories."""
    window_length, chunk_length = model.config.window_length, model.config.chunk_length
    memories: list[torch.Tensor] = []
    logits, asked = [], False
    for start in range(0, len(token_ids), window_length):
        window = token_ids[start : start + window_length]
        logits.append(decode_after(model, memories, window, asked))
        asked = asked or any(is_marker(model, token) for token in window)
        if start + window_length < len(token_ids):
            for offset in range(0, window_length, chunk_length):
                memories.extend(encode_chunk(model, window[offset : offset + chunk_length]))
    return torch.cat(logits)


def read_texts(model, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> list[torch.Tensor]:
    """Logits of each row's real tokens, row by row."""
    rows = []
    for number, row in enumerate(input_ids):
        keep = torch.ones_like(row) if attention_mask is None else attention_mask[number]
        rows.append(read_tokens(model, row[keep.bool()]))
    return rows


def causal_loss(model, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
    """Mean next-token loss over all real tokens but each row's first."""
    losses = []
    for number, logits in enumerate(read_texts(model, input_ids, attention_mask)):
        row = input_ids[number]
        tokens = row if attention_mask is None else row[attention_mask[number].bool()]
        for position in range(len(tokens) - 1):
            losses.append(-torch.log_softmax(logits[position].float(), -1)[tokens[position + 1]])
    return torch.stack(losses).mean()


@torch.no_grad()
def generate_greedily(model, token_ids: torch.Tensor, num_new_tokens: int) -> torch.Tensor:
    """Extend one text of real tokens by argmax, reading it anew for every token."""
    for _ in range(num_new_tokens):
        token_ids = torch.cat([token_ids, read_tokens(model, token_ids)[-1:].argmax(-1)])
    return token_ids


def read_slots(model, chunks: list[torch.Tensor], token_ids: torch.Tensor) -> torch.Tensor:
    """Logits `(n, V)` of one prompt in which the memories of some chunks stand in the slots."""
    memories = encode_context(model, chunks)
    sequence, rank, asked = [], 0, False
    for token in token_ids:
        if token == model.config.memory_token_id:
            sequence.append(memories.pop(0))
        else:
            embed = model.get_input_embeddings()(token)
            asked = asked or is_marker(model, token)
            if model.config.window_positions and asked:
                embed = embed + model.window_positions.weight[rank % model.config.window_length]
            sequence.append(embed)
            rank += 1
    assert not memories
    return model.decoder(inputs_embeds=torch.stack(sequence)[None], use_cache=False).logits[0]


def read_after_context(model, chunks: list[torch.Tensor], token_ids: torch.Tensor) -> torch.Tensor:
    """Logits `(n, V)` of one prompt with slots whose tokens after the last slot fold, window after window.

    With `memory_policy="drop_oldest"` the oldest memories of compressed windows make room; those of the slots stay.
    """
    config, table = model.config, model.get_input_embeddings()
    last = max(place for place, token in enumerate(token_ids) if token == config.memory_token_id)
    memories, front, num_clear, asked = encode_context(model, chunks), [], 0, False
    for token in token_ids[: last + 1]:
        if token == config.memory_token_id:
            front.append(memories.pop(0))
            continue
        asked = asked or is_marker(model, token)
        embed = table(token)
        if config.window_positions and asked:
            embed = embed + model.window_positions.weight[num_clear % config.window_length]
        front.append(embed)
        num_clear += 1
    assert not memories
    logits = [model.decoder(inputs_embeds=torch.stack(front)[None], use_cache=False).logits[0]]
    folded: list[torch.Tensor] = []
    after = token_ids[last + 1 :]
    for start in range(0, len(after), config.window_length):
        window = after[start : start + config.window_length]
        if config.memory_policy == "drop_oldest":
            room = config.max_memories - (len(front) - num_clear)
            folded = folded[max(0, len(folded) - room) :]
        logits.append(decode_after(model, front + folded, window, asked))
        asked = asked or any(is_marker(model, token) for token in window)
        if start + config.window_length < len(after):
            for offset in range(0, config.window_length, config.chunk_length):
                folded.extend(encode_chunk(model, window[offset : offset + config.chunk_length]))
    return torch.cat(logits)


def read_with_room(model, token_ids: torch.Tensor) -> torch.Tensor:
    """Logits `(n, V)` of plain text whose memories are more than there is room for: the oldest make room."""
    config = model.config
    logits, folded, asked = [], [], False
    for start in range(0, len(token_ids), config.window_length):
        window = token_ids[start : start + config.window_length]
        seen = folded[max(0, len(folded) - config.max_memories) :]
        logits.append(decode_after(model, seen, window, asked))
        asked = asked or any(is_marker(model, token) for token in window)
        for offset in range(0, config.window_length, config.chunk_length):
            if start + config.window_length < len(token_ids):
                folded.extend(encode_chunk(model, window[offset : offset + config.chunk_length]))
    return torch.cat(logits)
