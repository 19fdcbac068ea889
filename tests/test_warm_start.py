"""Where a fresh projector starts: fitted to the last token of each stretch, the identity, or its own draw."""

import pytest
import torch
from torch.nn import functional as F

from modeling_memory.memory_encoder import encode_chunks
from tests.memory_models import CHUNK, build_model, random_ids
from training.data.rows import TokenRows
from training.recipes.recipe import WarmStartRecipe
from training.train.warm_start import RIDGE, fit_projector, start_projector


@pytest.mark.parametrize(
    ("encoder", "projector_type", "per_chunk"),
    [
        ("masked_mixer", "linear", 1),
        ("llama", "linear", 2),
        ("memory_autoencoder", "mlp", 1),
        ("bert", "bottleneck", 1),
    ],
)
def test_fit_equals_ridge_regression_on_the_last_tokens(encoder, projector_type, per_chunk):
    model = build_model(
        encoder, memories_per_chunk=per_chunk, projector_type=projector_type, projector_norm=True, pooling="last"
    )
    chunks = random_ids(500, CHUNK)
    drawn = model.projector.out.weight.detach().clone()
    fit_projector(model, chunks, blend=0.5)
    with torch.no_grad():
        states = encode_chunks(model.encoder, model.pooling, chunks)
        inputs = model.projector.features(states).flatten(0, 1).double()
        ends = {1: [3], 2: [1, 3]}[per_chunk]
        targets = model.get_input_embeddings()(chunks[:, ends]).flatten(0, 1).double()
    # The plain way: as many more rows as there are inputs, asking each weight to be small; the intercept is free.
    centered = inputs - inputs.mean(0)
    penalty = (RIDGE * centered.square().sum(0).mean() * inputs.shape[1] / len(inputs)).sqrt()
    rows = torch.cat([centered, penalty * torch.eye(inputs.shape[1]).double()])
    wanted = torch.cat([targets - targets.mean(0), torch.zeros(inputs.shape[1], targets.shape[1]).double()])
    weight = torch.linalg.lstsq(rows, wanted).solution
    torch.testing.assert_close(
        model.projector.out.weight.detach(), 0.5 * drawn + weight.T.float(), atol=1e-5, rtol=1e-4
    )
    bias = targets.mean(0) - inputs.mean(0) @ weight
    torch.testing.assert_close(model.projector.out.bias.detach(), bias.float(), atol=1e-5, rtol=1e-4)


def test_memories_enter_as_the_last_token():
    """An encoder that tells its last token lets the fitted memory be taken for that token, and for no other."""
    model = build_model("llama", projector_type="linear")
    with torch.no_grad():  # layers that add little to the token they stand at
        for name, parameter in model.encoder.named_parameters():
            if "proj" in name:
                parameter.mul_(0.1)
    fit_projector(model, random_ids(2000, CHUNK), blend=0.0)
    chunks = random_ids(300, CHUNK, seed=1)
    with torch.no_grad():
        memories, _ = model.encode_memories(chunks[:, None])
    table = model.get_input_embeddings().weight.detach()
    nearest = (F.normalize(memories[:, 0], dim=-1) @ F.normalize(table, dim=-1).T).argmax(-1)
    right = {j: (nearest == chunks[:, j]).float().mean().item() for j in range(CHUNK)}
    assert right[CHUNK - 1] > 0.6 and max(right[j] for j in range(CHUNK - 1)) < 0.1, right  # of 96 tokens


@pytest.mark.parametrize("length", [CHUNK, 3 * CHUNK])
def test_recipe_fits_the_projector_to_the_training_rows(length):
    model, other = build_model(projector_type="linear"), build_model(projector_type="linear")
    tokens = random_ids(50 * 3 * CHUNK)
    text = TokenRows(tokens, row_length=length, num_items=len(tokens) // length, seed=3)
    rows = [text[i] for i in range(len(text))]
    start_projector(model, WarmStartRecipe(projector="last_token", projector_scale=2.0), rows, "here")
    fit_projector(other, torch.cat([row[1].view(-1, CHUNK) for row in rows]))
    assert torch.equal(model.projector.out.weight, 2 * other.projector.out.weight)


def test_what_cannot_be_fitted_is_refused():
    model = build_model(projector_type="linear")
    with pytest.raises(ValueError, match=r"32 inputs cannot be fitted to 20 memories; give more text"):
        fit_projector(model, random_ids(20, CHUNK))
    rows = [(0, random_ids(CHUNK))]
    wide = build_model("bert", projector_type="linear", decoder="llama")
    start_projector(wide, WarmStartRecipe(), rows, "here")  # its own draw needs no text
    identity = build_model(projector_type="identity")
    start_projector(identity, WarmStartRecipe(projector="last_token"), rows, "here")  # nothing to start
