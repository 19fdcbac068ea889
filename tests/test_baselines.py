"""Baselines equal their plain loops, gradients too, and what they leave out is left out."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from modeling_memory import (
    MemoryAutoencoder,
    MemoryAutoencoderConfig,
    MemoryEncoderDecoderConfig,
    MemoryEncoderDecoderForCausalLM,
)
from modeling_memory.memory_encoder import build_encoder
from modeling_memory.modeling_memory_autoencoder import Bottleneck
from tests.conftest import DECODERS, VOCAB_SIZE, tiny_decoder_config, tiny_encoder_config
from tests.memory_models import assert_equal_gradients, random_ids
from tests.reference import memory_loop
from tests.reference.autoencoder_loop import expand
from tests.reference.baseline_loop import last_logits, oracle_loop, recurrent_loop
from tests.reference.llama_loop import llama_loop
from tests.reference.mixer_loop import affine, mixer_loop, mixer_states
from training.data.objectives import IGNORED, BatchSpec, SpecialTokens
from training.data.rows import ObjectiveCollator
from training.measure.baselines import (
    QUANTISATIONS,
    OracleMemory,
    RecurrentMemory,
    next_token_loss,
    quantise,
    quantised,
    score_next_tokens,
)
from training.train.build import child_config

KINDS = ("token", "embedding", "projection")


def decoder(kind: str = "llama", **overrides: Any) -> Any:
    return AutoModelForCausalLM.from_config(tiny_decoder_config(kind, **overrides)).eval()


def oracle(kind: str, encoder: str = "masked_mixer", narrow: bool = True, **fields: Any) -> OracleMemory:
    body = build_encoder(tiny_encoder_config(encoder, hidden_size=16))
    bottleneck = Bottleneck(16, 4, noise=0.1) if narrow else None
    width = 32 + ((4 if narrow else 16) if kind == "embedding" else 0)
    overrides = {"num_attention_heads": 2, "num_key_value_heads": 1} if kind == "embedding" else {}
    return OracleMemory(body, decoder(hidden_size=width, **overrides), kind, bottleneck, **fields).eval()  # type: ignore[arg-type]


def check_equal_with_gradients(model: Any, loop: Any, tokens: torch.Tensor) -> None:
    fast = model(tokens)
    slow = torch.stack([loop(model, text) for text in tokens])
    torch.testing.assert_close(fast, slow, atol=2e-5, rtol=1e-4)
    losses = [next_token_loss(logits, tokens) for logits in (fast, slow)]
    gradients = assert_equal_gradients(model, *losses, atol=2e-5, rtol=1e-3)
    assert sum(bool(gradient.abs().max() > 1e-7) for gradient in gradients.values()) > 10


@pytest.mark.parametrize("kind", DECODERS)
@pytest.mark.parametrize("start", [1.0, 0.0])
def test_recurrent_memory_equals_the_plain_loop(kind: str, start: float):
    check_equal_with_gradients(RecurrentMemory(decoder(kind), 4, start), recurrent_loop, random_ids(2, 11))


@torch.no_grad()
def test_every_token_enters_the_recurrence_and_only_later_ones_notice():
    """In the original the last token of a window is overwritten and lost."""
    model, tokens = RecurrentMemory(decoder(), 4), random_ids(1, 12)
    logits = model(tokens)
    for place in range(11):
        other = tokens.clone()
        other[0, place] = 5 + (other[0, place] - 4) % 90
        difference = (model(other) - logits)[0].abs().amax(1)
        assert (difference[:place] == 0).all() and (difference[place:] > 0).all(), place


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("encoder, narrow, frozen", [("masked_mixer", True, False), ("llama", False, True)])
def test_oracle_memory_equals_the_plain_loop(kind: str, encoder: str, narrow: bool, frozen: bool):
    model = oracle(kind, encoder, narrow, freeze_encoder=frozen)
    check_equal_with_gradients(model, oracle_loop, random_ids(2, 7))


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_an_oracle_sees_what_is_to_come_and_only_through_its_vector(kind: str):
    model, tokens = oracle(kind), random_ids(1, 8)
    other = tokens.clone()
    other[0, -1] = 5 + (other[0, -1] - 4) % 90
    assert (model(other) - model(tokens))[0, :-1].abs().amax(1).min() > 0
    vector = model.encode(tokens)
    assert torch.equal(model(other, vector)[0, :-1], model(tokens, vector)[0, :-1])
    assert torch.equal(model(tokens, vector), model(tokens))


def test_a_frozen_oracle_encoder_stays_in_evaluation_and_noise_is_for_training():
    model, tokens = oracle("token", freeze_encoder=True), random_ids(1, 8)
    assert torch.equal(model(tokens), model(tokens))
    model.train()
    assert not model.encoder.training and not torch.equal(model(tokens), model(tokens))


@torch.no_grad()
def test_scores_are_those_of_the_loss():
    model, tokens = RecurrentMemory(decoder(), 4), random_ids(5, 8)
    scores = score_next_tokens(model, tokens, batch_size=2)
    assert scores.losses.shape == (5, 7)
    torch.testing.assert_close(scores.losses.mean(), next_token_loss(model(tokens), tokens))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=8))
def test_int8_is_off_by_half_a_step_at_most(values: list[float]):
    vector = torch.tensor([values])
    step = vector.abs().max() / 127
    rounded = quantise(vector, "int8")
    assert ((rounded - vector).abs() <= step * 0.5001 + 1e-30).all()
    assert len((rounded / step.clamp(min=1e-38)).round().unique()) <= 255
    slow = [round(float(value / step)) * float(step) if step > 1e-38 else 0.0 for value in vector[0]]
    assert rounded[0].tolist() == pytest.approx(slow, rel=1e-4, abs=float(step) * 1e-3 + 1e-30)


@pytest.mark.parametrize("kind, bits", [("float8_e4m3fn", 3), ("float8_e5m2", 2)])
def test_float8_keeps_its_bits_of_mantissa(kind: str, bits: int):
    values = torch.tensor([1.0, 1 + 2.0**-bits, -3.0, 0.3, 1e9])
    rounded = quantise(values, kind)
    assert rounded[:3].tolist() == values[:3].tolist()
    assert abs(rounded[3] - 0.3) <= 0.3 * 2.0 ** -(bits + 1) and rounded[4] == torch.finfo(getattr(torch, kind)).max


@torch.no_grad()
def test_a_bottleneck_is_quantised_inside_the_block_only():
    bottleneck, vectors = Bottleneck(8, 4, noise=0.0).eval(), torch.randn(3, 8)
    plain = bottleneck(vectors)
    with quantised(bottleneck, "float8_e5m2"):
        assert torch.equal(bottleneck(vectors), bottleneck.up(quantise(bottleneck.down(vectors), "float8_e5m2")))
        assert not torch.equal(bottleneck(vectors), plain)
    assert torch.equal(bottleneck(vectors), plain)
    with pytest.raises(ValueError, match="quantisation 'int4' is unknown"), quantised(bottleneck, "int4"):
        pass


@pytest.mark.parametrize("kind", QUANTISATIONS)
def test_a_quantised_autoencoder_equals_the_plain_loop_with_gradients(kind: str):
    """Rounded forwards, and backwards as if the rounded vectors were what the bottleneck gives."""
    body = tiny_encoder_config("masked_mixer", num_hidden_layers=1)
    config = MemoryAutoencoderConfig(encoder=body, decoder=body, chunk_length=4, bottleneck_size=4)
    model, tokens = MemoryAutoencoder(config).eval(), random_ids(2, 4)
    with quantised(model.bottleneck, kind):
        fast = model(tokens).logits
    state = torch.stack([text[-1] for text in mixer_loop(model.encoder, tokens.tolist())])
    exact = torch.stack([affine(vector, model.bottleneck.down) for vector in state])
    shift = torch.tensor([round_slowly(vector, kind) for vector in exact.tolist()]) - exact.detach()
    narrow = exact + shift
    slow = []
    for vector in narrow:
        columns = expand(model, [affine(vector, model.bottleneck.up)])
        slow.append(torch.stack([affine(x, model.lm_head) for x in mixer_states(model.decoder, columns)]))
    logits = torch.stack(slow)
    torch.testing.assert_close(fast, logits, atol=1e-5, rtol=1e-4)
    assert len(assert_equal_gradients(model, fast, logits, atol=2e-5, rtol=1e-3)) == len(list(model.parameters()))
    assert not torch.equal(model(tokens).logits, fast)


def round_slowly(vector: list[float], kind: str) -> list[float]:
    """One number at a time: to 127 steps each way, or to the nearest of all numbers of a float8."""
    if kind == "int8":
        step = max(abs(x) for x in vector) / 127
        return [round(x / step) * step for x in vector]
    every = torch.arange(256, dtype=torch.uint8).view(getattr(torch, kind)).float()
    known = every[every.isfinite()].tolist()
    return [min(known, key=lambda number: abs(number - x)) for x in vector]


@pytest.mark.parametrize("split", [True, False])
def test_no_memory_and_full_context_equal_the_plain_loop_with_gradients(split: bool):
    """Both baselines are asked for the same tokens: of no memory a window sees itself only."""
    model, rows, window = decoder(), random_ids(2, 12), 4
    special = SpecialTokens(pad=0, bos=1, eos=2, copy=3, blank=4, memory=99)
    collate = ObjectiveCollator(
        ["causal"], BatchSpec(special, chunk_length=4, window_length=window, split_windows=split)
    )
    batch = collate.collate("causal", rows)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    targets = batch["shift_labels"]
    assert int((targets != IGNORED).sum()) == 2 * 11
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
    table, nats = model.get_input_embeddings().weight, []
    for row in rows:
        for place in range(11):
            first = place // window * window if split else 0
            predicted = last_logits(model, [table[token] for token in row[first : place + 1]])
            nats.append(-predicted.log_softmax(-1)[row[place + 1]])
    slow = torch.stack(nats).mean()
    torch.testing.assert_close(loss, slow, atol=1e-5, rtol=1e-5)
    assert len(assert_equal_gradients(model, loss, slow, atol=1e-5, rtol=1e-3)) == len(list(model.parameters()))


def test_a_memory_model_whose_llama_encoder_reads_both_ways_equals_the_plain_loop():
    fields = {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes = {"num_key_value_heads": 2, "intermediate_size": 64, "initializer_range": 0.1}
    encoder = child_config({**fields, **sizes, "is_causal": False}, {"vocab_size": VOCAB_SIZE}, "encoder")
    config = MemoryEncoderDecoderConfig(
        encoder=encoder, decoder=tiny_decoder_config(), chunk_length=4, pooling="mean", initializer_range=0.3
    )
    model, tokens = MemoryEncoderDecoderForCausalLM(config).eval(), random_ids(2, 11)
    model.encoder.requires_grad_(True)
    model.config.freeze_encoder = False
    slow = memory_loop.causal_loss(model, tokens)
    states = torch.stack(llama_loop(model.encoder, tokens[:, :4].tolist())).mean(1)
    torch.testing.assert_close(model.encode_memories(tokens[:, None, :4])[0][:, 0], model.projector(states))
    loss = model(tokens, labels=tokens).loss
    torch.testing.assert_close(loss, slow, atol=1e-5, rtol=1e-4)
    gradients = assert_equal_gradients(model, loss, slow, atol=2e-5, rtol=1e-3)
    assert gradients.keys() == {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_wrong_sizes_are_refused():
    with pytest.raises(ValueError, match="need 202 positions"):
        RecurrentMemory(decoder(), 200)
    with pytest.raises(ValueError, match="leaves nothing for tokens"):
        OracleMemory(build_encoder(tiny_encoder_config("llama")), decoder(), "embedding")
    with pytest.raises(ValueError, match="known: token"):
        OracleMemory(build_encoder(tiny_encoder_config("llama")), decoder(), "sum")  # type: ignore[arg-type]
