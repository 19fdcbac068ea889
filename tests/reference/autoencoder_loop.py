"""The memory autoencoder, mixers on both sides, as plain loops over rows, memories, positions and window elements.

Source: Badger 2026, arXiv 2602.13466, information-retention autoencoder.
"""

import math

import torch

from tests.reference.mixer_loop import affine, mixer_loop, mixer_states


def pool(states: torch.Tensor, num_memories: int, pooling: str) -> list[torch.Tensor]:
    """Read K vectors out of the states `(tokens, width)` of one text."""
    vectors = []
    for group in range(num_memories):
        first = math.floor(group * len(states) / num_memories)
        last = math.ceil((group + 1) * len(states) / num_memories) - 1
        if pooling == "last":
            vectors.append(states[last])
        else:
            vectors.append(sum(states[t] for t in range(first, last + 1)) / (last + 1 - first))
    return vectors


def unroll(vector: torch.Tensor, position: int, projection: torch.nn.Linear) -> torch.Tensor:
    """Project the window of half the vector that starts at a position and wraps around."""
    width = len(vector)
    window = [vector[(position % width + offset) % width] for offset in range(width // 2)]
    return affine(torch.stack(window), projection)


def expand(model, vectors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Give each position of the chunk what the decoder reads there."""
    config, inputs, start = model.config, [], 0
    for position in range(config.chunk_length):
        memory = position * config.memories_per_chunk // config.chunk_length
        if position and memory != (position - 1) * config.memories_per_chunk // config.chunk_length:
            start = position
        if config.expansion == "unroll":
            inputs.append(unroll(vectors[memory], position - start, model.expansion.projection))
        else:
            inputs.append(vectors[memory])
    return inputs


def autoencoder_loop(model, texts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return memories `(texts, K, width)` and logits `(texts, chunk length, vocabulary)`; no noise."""
    config, memories, logits = model.config, [], []
    for states in mixer_loop(model.encoder, texts):
        vectors = pool(states, config.memories_per_chunk, config.pooling)
        if config.bottleneck_size is not None:
            vectors = [affine(affine(x, model.bottleneck.down), model.bottleneck.up) for x in vectors]
        memories.append(torch.stack(vectors))
        if config.encoder.hidden_size != config.decoder.hidden_size:
            vectors = [affine(x, model.bridge) for x in vectors]
        written = mixer_states(model.decoder, expand(model, vectors))
        logits.append(torch.stack([affine(x, model.lm_head) for x in written]))
    return torch.stack(memories), torch.stack(logits)
