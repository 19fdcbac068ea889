"""A start from which a pretrained decoder reads memories before any training: projector and adapters by least squares.

A head of the decoder finds what it looks for by keys and passes on values. In the full text each token has its own; a
memory has one key and one value a head for a whole group of tokens. So each head is given one token of the group: its
keys and values at memories are fitted to those that it has at that token in the full text, layer by layer, by low-rank
maps beside the decoder's own that act where memories stand. The projector keeps of the states of a group what all
these keys and values can be told from.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from modeling_memory import MemoryEncoderDecoderForCausalLM
from modeling_memory.memory_adapters import adapters_off, adapters_on
from modeling_memory.memory_encoder import encode_chunks

ROWS = 32
"""Rows that the decoder reads at once."""
COPIED_LAYERS = 0.45
"""Heads above this share of the layers are told apart by how much they copy."""
COPY_WEIGHT = 10.0
"""How much more a head counts that copies with all of its attention."""
CONSTANT = 8.0
"""Keys have large means: one number of a memory is constant, so many times the deviation of the others."""
LOUDNESS = 3.0
"""Norm of a memory, in norms of a text's states half-way up: what layers write beside it must not drown it."""
RIDGE = 1e-3


@dataclass
class FullText:
    """What the attention of the decoder has at each token of rows of text.

    Attributes:
        keys (`torch.Tensor` of shape `(layers, N, S, heads, head_dim)`): Before their rotation by position.
        values (`torch.Tensor` of the same shape): Values.
    """

    keys: torch.Tensor
    values: torch.Tensor


@torch.no_grad()
def fit_reading(model: MemoryEncoderDecoderForCausalLM, tokens: torch.LongTensor) -> dict[str, float]:
    """Fit projector and memory adapters of a fresh pair to what the decoder's heads find in the full text.

    Args:
        model (`MemoryEncoderDecoderForCausalLM`): With pooling `concat`, a linear projector, `memory_positions` of
            `source`, one vocabulary, a decoder of the Llama family, and fresh adapters whose `memory_modules` hold
            `k_proj` and `v_proj`.
        tokens (`torch.LongTensor` of shape `(N, S)`): Rows of text, S a multiple of the chunk length.

    Returns:
        `dict` of `str` to `float`: Share of the variance of keys and values at held-out memories that the maps
        explain, their mean over layers.

    Raises:
        ValueError: If the model is of another kind, or there are too few rows.
    """
    _check(model, tokens)
    layers, group = model.decoder.model.layers, model.config.memory_span
    begin = tokens.new_full((len(tokens), 1), model.config.bos_token_id)
    full, loudness = _read_full_text(model, torch.cat([begin, tokens], 1))
    places, weights = _share_out(copying(model, tokens[:ROWS]), group)
    features = torch.cat([_features(model, some) for some in tokens.split(ROWS)]).float()  # (N, M, P*E)
    positions = torch.arange(features.shape[1], device=tokens.device) * group + group
    targets = partial(_targets, model, full, group, positions)
    _fit_projector(model, features.flatten(0, 1), targets, weights, LOUDNESS * loudness)

    states = torch.cat([model.get_input_embeddings()(begin), model.projector.out(features.to(model.dtype))], 1)
    positions = torch.cat([positions.new_zeros(1), positions])[None]
    explained = {"keys": 0.0, "values": 0.0}
    for number, layer in enumerate(layers):
        normed = torch.cat([layer.input_layernorm(some) for some in states.split(ROWS)])[:, 1:].flatten(0, 1)
        keys, values = targets(number, places[number])
        for name, wanted in (("k_proj", keys), ("v_proj", values)):
            module = getattr(layer.self_attn, name)
            share = _fit_adapter(module, normed.float(), wanted.flatten(1))
            explained["keys" if name == "k_proj" else "values"] += share / len(layers)
        states = torch.cat([_through(model, layer, some, positions) for some in states.split(ROWS)])
    return explained


def _check(model: MemoryEncoderDecoderForCausalLM, tokens: torch.LongTensor) -> None:
    config, body = model.config, getattr(model.decoder, "model", None)
    layers = list(getattr(body, "layers", []))
    attention = getattr(layers[0], "self_attn", None) if layers else None
    like_llama = hasattr(attention, "k_proj") and hasattr(body, "rotary_emb") and not hasattr(attention, "k_norm")
    adapter: dict[str, Any] = next(iter(config.adapters.values()), {})
    kind = config.pooling, config.projector_type, config.memory_positions
    needs = {
        "a decoder of the Llama family, whose keys are rotated as they are": like_llama,
        "pooling concat, a linear projector and memory_positions source": kind == ("concat", "linear", "source"),
        "chunks that their memories divide": config.chunk_length % config.memories_per_chunk == 0,
        "adapters with memory_modules k_proj and v_proj": {"k_proj", "v_proj"}
        <= set(adapter.get("memory_modules", ())),
        "a begin and a COPY token": None not in (config.bos_token_id, config.copy_token_id),
        f"rows of whole chunks of {config.chunk_length} tokens": tokens.shape[1] % config.chunk_length == 0,
    }
    missing = [need for need, met in needs.items() if not met]
    if not missing:
        num, least = tokens.numel() // config.memory_span, 2 * model.projector.out.in_features
        missing = [f"{least} memories of text, not {num}"] if num < least else []
    if missing:
        raise ValueError(f"A fitted start needs {missing[0]}. Use another `warm_start.projector`.")


def _read_full_text(model: MemoryEncoderDecoderForCausalLM, rows: torch.LongTensor) -> tuple[FullText, float]:
    """Read rows `(N, 1 + S)` as text; returns keys and values of the last S, and the usual norm of a state."""
    layers, size = model.decoder.model.layers, model.decoder.config.head_dim
    shape = (len(layers), len(rows), rows.shape[1] - 1, model.decoder.config.num_key_value_heads, size)
    full = FullText(*(torch.empty(shape, dtype=model.dtype, device=rows.device) for _ in range(2)))
    part = slice(0, 0)

    def keep(number: int, name: str, states: torch.Tensor) -> None:
        (full.keys if name == "k_proj" else full.values)[number, part] = states[:, 1:]

    with adapters_off(model), _heard(model, ("k_proj", "v_proj"), keep):
        for first in range(0, len(rows), ROWS):
            part = slice(first, first + ROWS)
            some = model.decoder.model(input_ids=rows[part], use_cache=False, output_hidden_states=not first)
            if not first:
                norms = some.hidden_states[len(layers) // 2].float().norm(dim=-1)
    return full, norms.median().item()  # not the mean: the first token's state may be a thousand times as long


@contextmanager
def _heard(
    model: MemoryEncoderDecoderForCausalLM, names: tuple[str, ...], keep: Callable[[int, str, torch.Tensor], None]
) -> Iterator[None]:
    """Hand what maps of the attention give, by heads `(N, S, heads, head_dim)`, to a function of layer and name."""
    hooks = []

    def hear(number: int, name: str, module: Any, inputs: Any, output: torch.Tensor) -> None:
        keep(number, name, output.unflatten(2, (-1, model.decoder.config.head_dim)))

    for number, layer in enumerate(model.decoder.model.layers):
        for name in names:
            hooks.append(getattr(layer.self_attn, name).register_forward_hook(partial(hear, number, name)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _rotated(model: MemoryEncoderDecoderForCausalLM, states: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Rotate keys or queries `(N, S, heads, head_dim)` by positions `(S,)`, which may be negative."""
    cos, sin = (value.float()[0, :, None] for value in model.decoder.model.rotary_emb(states, positions[None]))
    length = (cos.square() + sin.square()).sqrt()  # some families scale here, too
    first, second = states.float().chunk(2, dim=-1)
    return (states.float() * cos + torch.cat([-second, first], -1) * sin) / length


def copying(model: MemoryEncoderDecoderForCausalLM, tokens: torch.LongTensor) -> torch.Tensor:
    """Measure how much each head of keys and values `(layers, heads)` copies: text, COPY, and the text again.

    It is the attention, summed over the queries that share the head, from each token of the copy to the one after its
    first occurrence, which is what comes next (Olsson et al. 2022, arXiv 2209.11895).
    """
    config, length = model.decoder.config, tokens.shape[1]
    frame = [
        tokens.new_full((len(tokens), 1), number) for number in (model.config.bos_token_id, model.config.copy_token_id)
    ]
    rows = torch.cat([frame[0], tokens, frame[1], tokens[:, :-1]], 1)
    found: dict[tuple[int, str], torch.Tensor] = {}

    def keep(number: int, name: str, states: torch.Tensor) -> None:
        found[number, name] = states

    with adapters_off(model), _heard(model, ("q_proj", "k_proj"), keep):
        model.decoder.model(input_ids=rows, use_cache=False)
    positions = torch.arange(rows.shape[1], device=rows.device)
    after = torch.full((len(positions),) * 2, float("-inf"), device=rows.device).triu(1)
    columns = torch.arange(length, device=rows.device)
    scores = []
    for number in range(config.num_hidden_layers):
        queries, keys = (_rotated(model, found[number, name], positions) for name in ("q_proj", "k_proj"))
        queries = queries.unflatten(2, (config.num_key_value_heads, -1))  # (N, T, heads, shared, head_dim)
        logits = torch.einsum("nqhgd,nkhd->nhgqk", queries, keys) * config.head_dim**-0.5
        attention = (logits + after).softmax(-1)
        scores.append(attention[..., length + 1 + columns, 1 + columns].mean((0, 3)).sum(1))
    return torch.stack(scores)


def _share_out(copying: torch.Tensor, group: int) -> tuple[list[list[int]], torch.Tensor]:
    """Give each head a place of the group: in turn, and those that copy so that no place is left with weak ones.

    Returns:
        The place of each head of each layer, and the weight of each `(layers, heads)` in the projector's fit.
    """
    num_layers, num_heads = copying.shape
    places = [[(layer * num_heads + head) % group for head in range(num_heads)] for layer in range(num_layers)]
    first = int(COPIED_LAYERS * num_layers)
    strongest = copying[first:].flatten().argsort(descending=True).tolist()
    loads = [0.0] * group
    for layer, head in ((first + index // num_heads, index % num_heads) for index in strongest):
        place = min(range(group), key=loads.__getitem__)
        places[layer][head] = place
        loads[place] += copying[layer, head].item()
    return places, 1 + COPY_WEIGHT * copying


def _features(model: MemoryEncoderDecoderForCausalLM, tokens: torch.LongTensor) -> torch.Tensor:
    """What the projector's linear map reads of rows of text: `(N, M, P*E)`."""
    chunks = tokens.reshape(-1, model.config.chunk_length)
    states = encode_chunks(model.encoder, model.pooling, chunks, config=model.config)
    return model.projector.features(states.to(model.dtype)).unflatten(0, (len(tokens), -1)).flatten(1, 2)


def _targets(
    model: MemoryEncoderDecoderForCausalLM,
    full: FullText,
    group: int,
    positions: torch.Tensor,
    layer: int,
    places: list[int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values `(N * M, heads, head_dim)` of the token in each head's place of each group.

    A key is turned to where its memory stands, so that queries find it as far away as its token was.
    """
    keys, values = [], []
    for head, place in enumerate(places):
        own = torch.arange(len(positions), device=positions.device) * group + place
        some = full.keys[layer][:, own, head : head + 1]
        keys.append(_rotated(model, some, own + 1 - positions))
        values.append(full.values[layer][:, own, head : head + 1].float())
    return torch.cat(keys, 2).flatten(0, 1), torch.cat(values, 2).flatten(0, 1)


def _fit_projector(
    model: MemoryEncoderDecoderForCausalLM,
    features: torch.Tensor,
    targets: Any,
    weights: torch.Tensor,
    norm: float,
) -> None:
    """Keep of the features `(n, P*E)` the directions that keys, values and token embeddings can be told from.

    Reduced-rank regression (Izenman 1975) on all keys and values of all places at once, each of unit variance, in
    whitened features; all directions kept count alike, and one number of a memory is constant.
    """
    out, group = model.projector.out, model.config.memory_span
    mean, number = features.mean(0), len(features)
    centred = features - mean
    cover = centred.T @ centred / number
    cover.diagonal().add_(RIDGE / 10 * cover.diagonal().mean())
    values, vectors = torch.linalg.eigh(cover)
    whiten = (vectors * values.rsqrt()) @ vectors.T
    white = centred @ whiten
    told = torch.zeros_like(cover)

    def tell(wanted: torch.Tensor, weight: torch.Tensor | float) -> None:
        wanted = (wanted - wanted.mean(0)) / wanted.std(0).clamp(min=1e-6)
        shared = white.T @ (wanted * weight) / number
        told.addmm_(shared, shared.T)

    num_layers, num_heads = weights.shape
    for place in range(group):
        for layer in range(num_layers):
            weight = (weights[layer].sqrt() / num_layers**0.5).repeat_interleave(model.decoder.config.head_dim)
            for wanted in targets(layer, [place] * num_heads):
                tell(wanted.flatten(1), weight)
    # As much as all layers together: to be quoted, a token must be told from every other. So must the one before a
    # group, by which the first of the group is found.
    weight = (2 * num_heads * model.decoder.config.head_dim / len(mean)) ** 0.5
    size = model.projector.encoder_size
    for states in features[:, -(group + model.config.lookback) * size :].split(size, dim=1):
        tell(states, weight)
    kept = torch.linalg.eigh(told).eigenvectors[:, 1 - len(out.weight) :]  # (P*E, D - 1)
    weight = nn.functional.pad((whiten @ kept).T, (0, 0, 0, 1))  # (D, P*E), its last row for the constant
    bias = -weight @ mean
    bias[-1] = CONSTANT
    scale = norm / (len(bias) - 1 + CONSTANT**2) ** 0.5
    out.weight.copy_(weight * scale)
    out.bias.copy_(bias * scale)


def _fit_adapter(module: Any, inputs: torch.Tensor, wanted: torch.Tensor) -> float:
    """Fit a module with its adapter `(n, D) -> (n, X)` by least squares; returns the share explained, held out.

    Of the difference to the module's own map the directions are kept that matter most for these inputs.
    """
    fitted = len(inputs) * 4 // 5
    some, rest = inputs[:fitted], inputs[fitted:]
    gram = some.T @ some
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    change = torch.linalg.solve(gram, some.T @ wanted[:fitted]).T - module.base_layer.weight.float()  # (X, D)
    values, vectors = torch.linalg.eigh(gram)
    root, back = ((vectors * values.clamp(min=0) ** power) @ vectors.T for power in (0.5, -0.5))
    left, strength, right = torch.linalg.svd(change @ root, full_matrices=False)
    name = next(iter(module.lora_A))
    down, up, scaling = module.lora_A[name].weight, module.lora_B[name].weight, module.scaling[name]
    rank = min(len(down), len(strength))
    down.zero_()[:rank] = (strength[:rank, None].sqrt() * right[:rank] @ back).to(down.dtype)
    up.zero_()[:, :rank] = (left[:, :rank] * strength[:rank].sqrt() / scaling).to(up.dtype)
    left_out = wanted[fitted:] - rest @ (module.base_layer.weight.float() + scaling * up.float() @ down.float()).T
    spread = wanted[fitted:] - wanted[fitted:].mean(0)
    return 1 - (left_out.square().sum() / spread.square().sum()).item()


def _through(
    model: MemoryEncoderDecoderForCausalLM, layer: Any, states: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """Take BOS and memories `(N, 1 + M, D)` through one layer of the decoder."""
    columns = torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
    columns[:, 0] = False
    mask = torch.full((states.shape[1],) * 2, float("-inf"), dtype=states.dtype, device=states.device).triu(1)
    with adapters_on(model.decoder, True, columns):
        rotations = model.decoder.model.rotary_emb(states, positions)
        options = {"attention_mask": mask[None, None], "position_ids": positions, "position_embeddings": rotations}
        output = layer(states, use_cache=False, **options)
    return output[0] if isinstance(output, tuple) else output
