"""A Llama body as plain loops over tokens, heads and key positions, reading back only or both ways.

Reads the parameters of a `LlamaModel` and nothing else of it. What is rotated are the pairs (j, j + Q / 2) of a head
of width Q, by the angle t / θ^(2j / Q) at position t.
"""

import math

import torch

from tests.reference.mixer_loop import affine


def scale(x: torch.Tensor, norm) -> torch.Tensor:
    """Divide one vector by its root mean square."""
    return x / torch.sqrt((x * x).mean() + norm.variance_epsilon) * norm.weight


def rotate(x: torch.Tensor, position: int, theta: float) -> torch.Tensor:
    """Turn each pair of elements of one head by its angle."""
    half = len(x) // 2
    turned = [None] * len(x)
    for j in range(half):
        angle = position / theta ** (2 * j / len(x))
        turned[j] = x[j] * math.cos(angle) - x[j + half] * math.sin(angle)
        turned[j + half] = x[j + half] * math.cos(angle) + x[j] * math.sin(angle)
    return torch.stack(turned)


def attend(layer, states: list[torch.Tensor], config) -> list[torch.Tensor]:
    """Let every token of a text read itself and earlier tokens, or, with `is_causal=False`, all tokens."""
    num_heads, num_groups = config.num_attention_heads, config.num_key_value_heads
    width = config.hidden_size // num_heads
    theta = config.rope_parameters["rope_theta"]
    reads_ahead = not getattr(config, "is_causal", True)
    queries, keys, values = (
        [affine(x, linear) for x in states] for linear in (layer.q_proj, layer.k_proj, layer.v_proj)
    )
    mixed = []
    for t in range(len(states)):
        heads = []
        for head in range(num_heads):
            group = head * num_groups // num_heads
            own, shared = (slice(number * width, (number + 1) * width) for number in (head, group))
            query = rotate(queries[t][own], t, theta)
            sources = range(len(states)) if reads_ahead else range(t + 1)
            scores = [query @ rotate(keys[source][shared], source, theta) / math.sqrt(width) for source in sources]
            weights = [torch.exp(score) for score in scores]
            total = sum(weights)
            heads.append(sum(w / total * values[source][shared] for w, source in zip(weights, sources, strict=True)))
        mixed.append(affine(torch.cat(heads), layer.o_proj))
    return mixed


def llama_states(
    model, vectors: list[torch.Tensor], depth: int | None = None, norm: bool = True
) -> list[torch.Tensor]:
    """Run the first `depth` layers (default: all) on the vectors of one text, and the final norm."""
    states = list(vectors)
    for layer in list(model.layers)[:depth]:
        mixed = attend(layer.self_attn, [scale(x, layer.input_layernorm) for x in states], model.config)
        states = [x + y for x, y in zip(states, mixed, strict=True)]
        for t, x in enumerate(states):
            inner = scale(x, layer.post_attention_layernorm)
            gate = affine(inner, layer.mlp.gate_proj)
            states[t] = x + affine(gate * torch.sigmoid(gate) * affine(inner, layer.mlp.up_proj), layer.mlp.down_proj)
    return [scale(x, model.norm) for x in states] if norm else states


def llama_loop(model, texts: list[list[int]], depth: int | None = None, norm: bool = True) -> list[torch.Tensor]:
    """Return the states `(tokens, width)` of each text of token ids, texts one after the other."""
    table = model.embed_tokens.weight
    return [torch.stack(llama_states(model, [table[i] for i in text], depth, norm)) for text in texts]
