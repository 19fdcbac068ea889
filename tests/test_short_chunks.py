"""Chunks that are not full are filled as the configuration says: equal to chunks that were written out in full."""

import pytest
import torch

from modeling_memory import MemoryAutoencoder, MemoryAutoencoderConfig, MemoryEncoderDecoderConfig
from tests.conftest import tiny_encoder_config
from tests.memory_models import CHUNK, FAMILIES, build_model, random_ids
from training.data.objectives import BatchSpec, SpecialTokens
from training.data.rows import ObjectiveCollator

END = 2
LENGTHS = (1, 2, 3, CHUNK)


def written_out(ids: list[int], how: str) -> list[int]:
    """The plain loop: one chunk, token by token."""
    filled = list(ids)
    while len(filled) < CHUNK:
        filled.append(ids[len(filled) % len(ids)] if how == "repeat" else END)
    return filled


def ragged(seed: int = 0) -> tuple[list[list[int]], torch.Tensor, torch.Tensor]:
    """Chunks of all lengths, padded on either side, and an absent one: `(1, 2n + 1, L)`."""
    rows = [random_ids(length, seed=seed + length).tolist() for length in LENGTHS]
    ids, mask = torch.zeros(1, 2 * len(rows) + 1, CHUNK, dtype=torch.long), None
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        for place, start in ((i, 0), (len(rows) + i, CHUNK - len(row))):
            ids[0, place, start : start + len(row)] = torch.tensor(row)
            mask[0, place, start : start + len(row)] = 1
    return rows, ids, mask


@pytest.mark.parametrize("how", ["repeat", "end"])
@pytest.mark.parametrize("encoder, decoder", FAMILIES[:: len(FAMILIES) // 6])
def test_a_short_chunk_is_read_as_the_full_one_that_it_is_filled_to(encoder, decoder, how):
    model = build_model(
        encoder, decoder, short_chunks=how, eos_token_id=END, memories_per_chunk=2, freeze_encoder=False
    )
    rows, ids, mask = ragged()
    full = torch.tensor([[written_out(row, how) for row in rows] * 2])
    memories, present = model.encode_memories(ids, mask)
    assert present.tolist() == [[1] * 4 * len(rows) + [0, 0]]
    expected, _ = model.encode_memories(full)
    torch.testing.assert_close(memories[:, :-2], expected, atol=1e-6, rtol=1e-5)
    assert torch.equal(memories[:, -2:], torch.zeros_like(memories[:, -2:]))
    grads = []
    for found in (memories[:, :-2], expected):
        model.zero_grad()
        found.square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("how", ["repeat", "end"])
def test_the_autoencoder_fills_short_chunks_too(how):
    body = tiny_encoder_config("masked_mixer")
    body.eos_token_id = END
    config = MemoryAutoencoderConfig(encoder=body, decoder=body, chunk_length=CHUNK, short_chunks=how)
    model = MemoryAutoencoder(config).eval()
    rows, ids, mask = ragged()
    expected = model.encode(torch.tensor([written_out(row, how) for row in rows] * 2))
    torch.testing.assert_close(model.encode(ids[0, :-1], mask[0, :-1]), expected, atol=1e-6, rtol=1e-5)
    # Fewer columns than a chunk has, and no mask.
    alone = model.encode(torch.tensor([rows[1]]))
    torch.testing.assert_close(alone, expected[1:2], atol=1e-6, rtol=1e-5)
    assert MemoryAutoencoderConfig.from_dict(config.to_dict()).short_chunks == how


def test_memories_of_a_filled_chunk_stand_where_those_of_a_full_one_do_up_to_its_end():
    """Of 5 tokens in a chunk of 8 the third of four memories holds one, and the fourth none: text goes on after 5."""
    model = build_model("llama", "llama", chunk_length=8, memories_per_chunk=4, memory_positions="source",
                        short_chunks="end", eos_token_id=END)  # fmt: skip
    ids, text = random_ids(1, 1, 8), random_ids(1, 3, seed=1)
    mask = (torch.arange(8) < 5).long()[None, None]
    filled = torch.where(mask == 1, ids, END)
    with torch.no_grad():
        prompt = torch.cat([torch.full((1, 4), model.config.memory_token_id), text], 1)
        found = model(prompt, context_input_ids=ids, context_attention_mask=mask).logits[:, 4:]
        embeds = torch.cat([model.encode_memories(filled)[0], model.get_input_embeddings()(text)], 1)
        positions = torch.tensor([[1, 3, 4, 4, 5, 6, 7]])
        plain = model.decoder(inputs_embeds=embeds, position_ids=positions, attention_mask=torch.ones_like(positions))
    torch.testing.assert_close(found, plain.logits[:, 4:], atol=1e-5, rtol=1e-5)


def test_full_chunks_and_plain_padding_are_as_before():
    rows, ids, mask = ragged()
    full = random_ids(2, 3, CHUNK)
    plain = build_model()
    for how in ("repeat", "end"):
        model = build_model(short_chunks=how, eos_token_id=END)
        model.load_state_dict(plain.state_dict())
        assert torch.equal(model.encode_memories(full)[0], plain.encode_memories(full)[0])
        changed = (model.encode_memories(ids, mask)[0] != plain.encode_memories(ids, mask)[0]).any(-1)[0]
        assert changed.tolist() == [length < CHUNK for length in LENGTHS] * 2 + [False]
    assert MemoryEncoderDecoderConfig().short_chunks == "pad"


def test_what_cannot_be_filled_is_refused():
    with pytest.raises(ValueError, match="fills chunks with the end token, but `eos_token_id` is not set"):
        MemoryAutoencoderConfig(short_chunks="end")
    with pytest.raises(ValueError, match="one of 'pad', 'repeat', 'end'"):
        build_model(short_chunks="repeated")


def test_random_tokens_change_a_share_of_the_rows_and_no_special_token_is_among_them():
    special = SpecialTokens(pad=0, bos=1, eos=2, copy=3, blank=4, memory=50)
    spec = BatchSpec(special, chunk_length=8, window_length=8, layout="slots", random_tokens=0.5, vocab_size=51)
    collator = ObjectiveCollator(["reconstruction"], spec)
    items = [(number, torch.full((8,), 7)) for number in range(600)]
    tokens = collator(items)["reconstruction"]["input_ids"]
    changed = (tokens != 7).any(1)
    assert 0.35 < changed.float().mean() < 0.55
    assert set(tokens.flatten().tolist()) == set(range(5, 50))
    assert torch.equal(collator(items[300:])["reconstruction"]["input_ids"], tokens[300:])  # by number, not by batch
    again = collator.for_evaluation()(items)["reconstruction"]["input_ids"]
    assert (again == 7).all()
