"""What a new stage takes over from earlier ones: token tables, and a projector that starts from known tokens."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from modeling_memory import MemoryEncoderDecoderForCausalLM
from modeling_memory.memory_encoder import encode_chunks

from ..recipes.recipe import WarmStartRecipe
from .fitted_reading import fit_reading

FITTED_CHUNKS = 8192
RIDGE = 0.1
"""Of the mean variance of the inputs, divided by samples per input: noise averages out, and so does its remedy."""


@torch.no_grad()
def copy_tables(source: PreTrainedModel, target: PreTrainedModel, path: str) -> None:
    """Copy token table and output head from one model to another of the same width and vocabulary.

    Raises:
        ValueError: If shapes differ.
    """
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        old, new = getattr(source, getter)(), getattr(target, getter)()
        if old is None or new is None:
            continue
        if old.weight.shape != new.weight.shape:
            raise ValueError(
                f"{path}: the tables have shapes {tuple(old.weight.shape)} and {tuple(new.weight.shape)}; warm "
                "starting needs equal widths and vocabularies"
            )
        new.weight.copy_(old.weight)


@torch.no_grad()
def start_projector(
    model: MemoryEncoderDecoderForCausalLM, warm_start: WarmStartRecipe, rows: Sequence[tuple[Any, ...]], path: str
) -> dict[str, float]:
    """Give a fresh projector the recipe's starting point.

    Args:
        model (`MemoryEncoderDecoderForCausalLM`): Just joined; its projector is drawn at the scale of the decoder's
            token table.
        warm_start (`WarmStartRecipe`): `projector` is `default` (its own draw), `identity`, `last_token`, see
            [`fit_projector`], or `fitted`, see [`fit_reading`], which starts the adapters, too; `projector_scale`
            multiplies its weights.
        rows (sequence of `(number, tokens, ...)`): Rows of the training text, for `last_token` and `fitted`.
        path (`str`): Where the recipe says so, for errors.

    Returns:
        `dict` of `str` to `float`: Of `fitted` the shares that [`fit_reading`] returns, else nothing.

    Raises:
        ValueError: If the projector cannot start so.
    """
    out = model.projector.out
    shares: dict[str, float] = {}
    if isinstance(out, torch.nn.Identity):  # nothing to start
        return shares
    if warm_start.projector == "identity":
        if out.in_features != out.out_features:
            raise ValueError(
                f"{path}.projector is identity, but the projector maps {out.in_features} to {out.out_features} "
                "values; use default"
            )
        out.weight.copy_(torch.eye(out.in_features))
    elif warm_start.projector in ("last_token", "fitted"):
        chunk_length = model.config.chunk_length
        whole = [row[1][: len(row[1]) // chunk_length * chunk_length] for row in rows]
        if warm_start.projector == "last_token":
            fit_projector(model, torch.cat(whole).view(-1, chunk_length).to(out.weight.device))
        else:
            length = max(map(len, whole))
            full = torch.stack([row for row in whole if len(row) == length])
            shares = fit_reading(model, full.to(out.weight.device))
    out.weight.mul_(warm_start.projector_scale)
    return shares


@torch.no_grad()
def fit_projector(model: MemoryEncoderDecoderForCausalLM, chunks: torch.LongTensor, blend: float = 0.2) -> None:
    """Let each memory enter the decoder as the token that it stands for: the last one it has read.

    A decoder that was trained on text reads the token in front of its first one. Where that place is taken by a
    memory, the memory should look like that token: least squares from memory to the token's embedding, in closed form.
    Memory j of K stands for the last token of the j-th of K equal stretches of its chunk. What the fit leaves out, the
    chunk's other tokens, comes in through `blend` times the fresh draw.

    Args:
        model (`MemoryEncoderDecoderForCausalLM`): Just joined; encoder and decoder share a vocabulary.
        chunks (`torch.LongTensor` of shape `(N, chunk_length)`): Chunks of text.
        blend (`float`): How much of the projector's own draw is kept.

    Raises:
        ValueError: If there are fewer chunks than values in a memory.
    """
    projector, table = model.projector, model.get_input_embeddings()
    num_memories, length = model.config.memories_per_chunk, chunks.shape[1]
    ends = torch.arange(1, num_memories + 1) * length // num_memories - 1
    codes, targets = [], []
    for some in chunks.to(table.weight.device).split(512):
        states = encode_chunks(model.encoder, model.pooling, some, config=model.config)  # (n, K, E)
        codes.append(projector.features(states.to(table.weight.dtype)).flatten(0, 1))
        targets.append(table(some[:, ends]).flatten(0, 1))
    inputs, wanted = torch.cat(codes).double(), torch.cat(targets).double()
    if len(inputs) <= inputs.shape[1]:
        raise ValueError(
            f"A projector of {inputs.shape[1]} inputs cannot be fitted to {len(inputs)} memories; give more text."
        )
    center, mean = inputs.mean(0), wanted.mean(0)
    inputs, wanted = inputs - center, wanted - mean
    gram = inputs.T @ inputs
    gram.diagonal().add_(RIDGE * gram.diagonal().mean() * inputs.shape[1] / len(inputs))
    weight = torch.linalg.solve(gram, inputs.T @ wanted)  # (E, D)
    projector.out.weight.mul_(blend).add_(weight.T)
    projector.out.bias.copy_(mean - center @ weight)
