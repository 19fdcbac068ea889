"""What a new stage takes over from earlier ones: token tables, and a projector that starts from known tokens."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from modeling_memory import MemoryEncoderDecoderForCausalLM
from modeling_memory.memory_encoder import encode_chunks

from ..recipes.recipe import WarmStartRecipe

FITTED_CHUNKS = 8192
READ_CHUNKS = 131_072
"""As many as [`make_readable`] reads in its steps: rare tokens must be met."""
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
) -> dict[int, float]:
    """Give a fresh projector the recipe's starting point.

    Args:
        model (`MemoryEncoderDecoderForCausalLM`): Just joined; its projector is drawn at the scale of the decoder's
            token table.
        warm_start (`WarmStartRecipe`): `projector` is `default` (its own draw), `identity`, `last_token`, see
            [`fit_projector`], or `readable`, see [`make_readable`]; `projector_scale` multiplies its weights.
        rows (sequence of `(number, tokens, ...)`): Rows of the training text, for `last_token` and `readable`.
        path (`str`): Where the recipe says so, for errors.

    Returns:
        `dict` of `int` to `float`: Of `readable` the shares that [`make_readable`] returns, else nothing.

    Raises:
        ValueError: If the projector cannot start so.
    """
    out = model.projector.out
    shares: dict[int, float] = {}
    if isinstance(out, torch.nn.Identity):  # nothing to start
        return shares
    if warm_start.projector == "identity":
        if out.in_features != out.out_features:
            raise ValueError(
                f"{path}.projector is identity, but the projector maps {out.in_features} to {out.out_features} "
                "values; use default"
            )
        out.weight.copy_(torch.eye(out.in_features))
    elif warm_start.projector in ("last_token", "readable"):
        chunk_length = model.config.chunk_length
        whole = [row[1][: len(row[1]) // chunk_length * chunk_length] for row in rows]
        chunks = torch.cat(whole).view(-1, chunk_length).to(out.weight.device)
        if warm_start.projector == "last_token":
            fit_projector(model, chunks)
        elif (model.config.pooling, model.config.projector_type) != ("concat", "linear"):
            raise ValueError(
                f"{path}.projector is readable, which needs the pooling concat and a linear projector; they are "
                f"{model.config.pooling} and {model.config.projector_type}"
            )
        else:
            shares = make_readable(model, chunks, steps=warm_start.projector_steps)
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
        states = encode_chunks(model.encoder, model.pooling, some)  # (n, K, E)
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


@torch.enable_grad()
def make_readable(
    model: MemoryEncoderDecoderForCausalLM, chunks: torch.LongTensor, *, steps: int = 1000, tokens: int = 2048
) -> dict[int, float]:
    """Let a linear projector of `concat` keep every token of a group: a linear autoencoder, without the decoder.

    States that lie over each other in one memory can only be told apart if the map keeps them apart. Drawn at random
    it does not, and in our trainings the decoder read no more than the best linear map of a memory could. So this map
    is trained first, with a linear readout for each place, to tell each token from others. The block of the last place
    stays as it is, so that the decoder still meets a token that it knows.

    Args:
        model (`MemoryEncoderDecoderForCausalLM`): With the pooling `concat` and a linear projector.
        chunks (`torch.LongTensor` of shape `(N, L)`): Chunks of text.
        steps (`int`): Optimizer steps, one group size each, in turn.
        tokens (`int`): Tokens a step.

    Returns:
        `dict` of `int` to `float`: For each group size the share of tokens that come back in its last steps.

    Raises:
        ValueError: If chunks cannot be cut into equal groups.
    """
    out, table = model.projector.out, _unit_table(model)
    places, length = model.pooling.max_group, chunks.shape[1]
    sizes = [
        size
        for size in range(2, places + 1)
        if not length % size and length // size <= model.pooling.memories_per_chunk
    ]
    if not sizes:
        raise ValueError(
            f"A chunk of {length} tokens has no groups of 2 to {places} that {model.pooling.memories_per_chunk} "
            "memories can hold; use another start."
        )
    weight = out.weight.detach().float().clone().requires_grad_()  # (D, R*E)
    last_place = weight.shape[1] // places
    readouts = {size: _first_readouts(model, weight, chunks, size).requires_grad_() for size in sizes}
    # Steps of Adam have the size of the rate: both are set by the size of the weights they move.
    rates = 0.03 * weight.detach()[:, :-last_place].std().item(), 0.05 / len(weight) ** 0.5
    optimizer = torch.optim.Adam(
        [{"params": [weight], "lr": rates[0]}, {"params": list(readouts.values()), "lr": rates[1]}], betas=(0.9, 0.98)
    )
    # Half of the steps at full rate, then down to nothing: what interferes last wants small steps.
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, 2 * (1 - step / steps)))
    random, scale = torch.Generator().manual_seed(0), _scale_of(model, weight, chunks)
    shares: dict[int, list[float]] = {size: [] for size in sizes}
    for step in range(steps):
        size = sizes[step % len(sizes)]
        some = chunks[torch.randint(len(chunks), (-(-tokens // length),), generator=random).to(chunks.device)]
        features = _group_features(model, some, size)  # (M, R*E)
        targets = some.reshape(-1, size)  # (M, r)
        candidates, places_of = torch.cat([targets.flatten(), _some_ids(table, random)]).unique(return_inverse=True)
        places_of = places_of[: targets.numel()]
        with torch.autocast(table.device.type, torch.bfloat16):
            memories = features @ weight.T / scale
            read = torch.einsum("md,rde->mre", memories, readouts[size])
            scores = read.flatten(0, 1) @ table[candidates].T * (10 / len(weight))
        loss = F.cross_entropy(scores.float(), places_of)
        optimizer.zero_grad()
        loss.backward()
        weight.grad[:, -last_place:] = 0
        optimizer.step()
        schedule.step()
        shares[size] = [*shares[size][-9:], (scores.argmax(1) == places_of).float().mean().item()]
    with torch.no_grad():
        out.weight.copy_(weight)
    return {size: sum(values) / len(values) for size, values in shares.items() if values}


@torch.no_grad()
def _unit_table(model: MemoryEncoderDecoderForCausalLM) -> torch.Tensor:
    """The decoder's token table, all rows of one length: a product with a readout then tells directions, not norms."""
    table = model.get_input_embeddings().weight.detach().float()
    return F.normalize(table, dim=1) * table.shape[1] ** 0.5


@torch.no_grad()
def _scale_of(model: MemoryEncoderDecoderForCausalLM, weight: torch.Tensor, chunks: torch.LongTensor) -> torch.Tensor:
    """Root mean square of the first memories."""
    return (_group_features(model, chunks[:FITTED_CHUNKS], 2) @ weight.T).square().mean().sqrt()


def _some_ids(table: torch.Tensor, random: torch.Generator) -> torch.LongTensor:
    """Other tokens to be told apart from: those of the batch alone are mostly frequent ones."""
    return torch.randint(len(table), (min(1024, len(table)),), generator=random).to(table.device)


@torch.no_grad()
def _group_features(model: MemoryEncoderDecoderForCausalLM, chunks: torch.LongTensor, size: int) -> torch.Tensor:
    """What the projector's linear map reads of each group of so many tokens, `(M, R*E)`."""
    number = chunks.shape[1] // size
    budget = torch.full((len(chunks),), number, device=chunks.device)
    states = encode_chunks(model.encoder, model.pooling, chunks, num_memories=budget)  # (N, K, R*E)
    return model.projector.features(states[:, :number]).flatten(0, 1).float()


@torch.no_grad()
def _first_readouts(
    model: MemoryEncoderDecoderForCausalLM, weight: torch.Tensor, chunks: torch.LongTensor, size: int
) -> torch.Tensor:
    """Least squares from memories to the embeddings of each of their tokens, `(r, D, D)`."""
    some = chunks[: -(-FITTED_CHUNKS // (chunks.shape[1] // size))]
    memories = _group_features(model, some, size) @ weight.T / _scale_of(model, weight, chunks)  # (M, D)
    wanted = _unit_table(model)[some.reshape(-1, size)]  # (M, r, D)
    gram = memories.T @ memories
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    return torch.linalg.solve(gram, torch.einsum("md,mre->rde", memories, wanted))
