"""The masked mixer as plain loops over rows, heads, positions, kernel taps and hidden elements: slow, obviously right.

Reads the parameters of a `MaskedMixerModel` and nothing else of it.
Source: Badger 2026, arXiv 2602.13466, masked mixer.
"""

import math

import torch


def normalise(x: torch.Tensor, norm: torch.nn.LayerNorm) -> torch.Tensor:
    """Layer-normalise one vector."""
    centred = x - x.mean()
    return centred / torch.sqrt((centred * centred).mean() + norm.eps) * norm.weight + norm.bias


def gelu(x: torch.Tensor) -> torch.Tensor:
    """Apply the exact GELU."""
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def affine(x: torch.Tensor, linear: torch.nn.Linear) -> torch.Tensor:
    """Apply a linear map to one vector."""
    y = linear.weight @ x
    return y if linear.bias is None else y + linear.bias


def convolve(weight: torch.Tensor, bias: torch.Tensor, states: list[torch.Tensor], causal: bool) -> list[torch.Tensor]:
    """Mix the vectors of one head: `weight` (taps, positions, positions), `bias` (positions)."""
    num_taps, width, mixed = weight.shape[0], len(states[0]), []
    offset = (num_taps - 1) // 2
    for t in range(len(states)):
        elements = []
        for j in range(width):
            total = bias[t]
            for source in range(t + 1 if causal else len(states)):
                for tap in range(num_taps):
                    if 0 <= j + tap - offset < width:
                        total = total + weight[tap, t, source] * states[source][j + tap - offset]
            elements.append(total)
        mixed.append(torch.stack(elements))
    return mixed


def mix(layer, states: list[torch.Tensor], num_heads: int, causal: bool) -> list[torch.Tensor]:
    """Mix the vectors of one text, flat (0 heads) or head by head."""
    if num_heads == 0:
        return convolve(layer.weight[0], layer.bias[0], states, causal)
    width = len(states[0]) // num_heads
    heads = []
    for head in range(num_heads):
        rows = slice(head * width, (head + 1) * width)
        projected = [layer.in_proj.weight[rows] @ state + layer.in_proj.bias[rows] for state in states]
        heads.append(convolve(layer.weight[head], layer.bias[head], projected, causal))
    return [affine(torch.cat([head[t] for head in heads]), layer.out_proj) for t in range(len(states))]


def mixer_states(model, vectors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Run all layers on the vectors of one text without padding."""
    config = model.config
    states = list(vectors)
    for layer in model.layers:
        mixed = mix(layer.mixing, [normalise(x, layer.mixing_norm) for x in states], config.num_heads, config.causal)
        states = [x + y for x, y in zip(states, mixed, strict=True)]
        for t, x in enumerate(states):
            inner = gelu(affine(normalise(x, layer.mlp_norm), layer.mlp.up_proj))
            states[t] = x + affine(inner, layer.mlp.down_proj)
    return states


def mixer_loop(model, texts: list[list[int]]) -> list[torch.Tensor]:
    """Return the states `(tokens, width)` of each text of token ids, texts one after the other."""
    return [torch.stack(mixer_states(model, [model.embed_tokens.weight[i] for i in text])) for text in texts]
