"""The memory autoencoder as research code writes it: rows batched, loops over layers, heads and unroll positions.

Every head multiplies by a dense T x T matrix that is masked anew in each call. This is what training speed is compared
with; what the model computes is defined by the slower loops of `autoencoder_loop.py`.
"""

import torch
from torch.nn import functional as F


def mix(layer, states: torch.Tensor, num_heads: int, causal: bool) -> torch.Tensor:
    """Mix the positions of `(B, T, D)`, head by head; 0 heads mix the whole width."""
    length = states.shape[1]
    mask = torch.ones(length, length)
    if causal:
        mask = torch.tril(mask)
    width = states.shape[2] // max(1, num_heads)
    heads = []
    for head in range(max(1, num_heads)):
        projected = states
        if num_heads:
            rows = slice(head * width, (head + 1) * width)
            projected = F.linear(states, layer.in_proj.weight[rows], layer.in_proj.bias[rows])  # (B, T, Q)
        matrix = layer.weight[head, 0, :length, :length] * mask  # (T, T)
        heads.append(torch.matmul(matrix, projected) + layer.bias[head, :length, None])
    mixed = torch.cat(heads, dim=-1)
    return layer.out_proj(mixed) if num_heads else mixed


def run_mixer(model, states: torch.Tensor) -> torch.Tensor:
    """Run the layers of a mixer on `(B, T, D)`."""
    for layer in model.layers:
        states = states + mix(layer.mixing, layer.mixing_norm(states), model.config.num_heads, model.config.causal)
        states = states + layer.mlp.down_proj(F.gelu(layer.mlp.up_proj(layer.mlp_norm(states))))
    return states


def unroll(vectors: torch.Tensor, length: int, projection: torch.nn.Linear) -> torch.Tensor:
    """Project at each position the half of `(B, D)` that starts there and wraps around: `(B, length, D)`."""
    width = vectors.shape[1]
    inputs = []
    for position in range(length):
        start, end = position % width, position % width + width // 2
        window = vectors[:, start:end]
        if end > width:
            window = torch.cat([window, vectors[:, : end - width]], dim=1)
        inputs.append(projection(window))
    return torch.stack(inputs, dim=1)


def plain_autoencoder(model, input_ids: torch.Tensor) -> torch.Tensor:
    """Logits `(B, L, V)` of full chunks `(B, L)`, from the parameters of a `MemoryAutoencoder`.

    Covers what the paper trains: mixers on both sides, one vector a chunk, read at its last token, kernel 1, no
    bottleneck.

    Raises:
        ValueError: If the model is another, or the chunks are not full.
    """
    config = model.config
    mixers = [part for part in (config.encoder, config.decoder) if part.model_type == "masked_mixer"]
    fits = (
        len(mixers) == 2
        and all(part.kernel_size == 1 for part in mixers)
        and (config.memories_per_chunk, config.pooling, config.bottleneck_size) == (1, "last", None)
    )
    if not fits:
        raise ValueError(
            "the plain autoencoder covers mixers of kernel 1 on both sides, one vector a chunk, pooling last and no "
            "bottleneck; give such a model, or extend tests/reference/plain_autoencoder.py"
        )
    if input_ids.shape[1] != config.chunk_length:
        raise ValueError(f"chunks have {input_ids.shape[1]} tokens, expected {config.chunk_length}: they must be full")
    vectors = model.bridge(run_mixer(model.encoder, model.encoder.embed_tokens(input_ids))[:, -1])  # (B, D)
    if config.expansion == "unroll":
        inputs = unroll(vectors, config.chunk_length, model.expansion.projection)
    else:
        inputs = torch.stack([vectors for _ in range(config.chunk_length)], dim=1)
    return model.lm_head(run_mixer(model.decoder, inputs))
