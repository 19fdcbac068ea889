"""Chunks to memory states: poolings, and every kind of encoder read from position 0 whatever its padding."""

import importlib.util
import inspect
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BartConfig, BertConfig, GPT2Config, LlamaConfig

from modeling_memory.configuration_masked_mixer import MaskedMixerConfig
from modeling_memory.memory_encoder import build_encoder, build_pooling, encode_chunks
from modeling_memory.modeling_masked_mixer import MaskedMixerModel
from tests.reference.llama_loop import llama_loop

VOCAB = 40
SIZES = {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 2, "max_position_embeddings": 12}
ATTENTION = {**SIZES, "num_attention_heads": 2, "intermediate_size": 32, "initializer_range": 0.2}
CONFIGS = {
    "masked_mixer": MaskedMixerConfig(**SIZES, num_heads=2, initializer_range=0.2),
    "two-way mixer": MaskedMixerConfig(**SIZES, num_heads=0, causal=False, initializer_range=0.2),
    "llama": LlamaConfig(**ATTENTION),
    "two-way llama": LlamaConfig(**ATTENTION, is_causal=False),
    "bert": BertConfig(**ATTENTION),
    "gpt2": GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2, n_positions=12, initializer_range=0.2),
}


def encoder(kind: str):
    return build_encoder(CONFIGS[kind]).eval()


def padded(texts: list[list[int]], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    length = max(map(len, texts)) + 1
    pads = [[0] * (length - len(text)) for text in texts]
    rows = [pad + text if side == "left" else text + pad for text, pad in zip(texts, pads, strict=True)]
    input_ids = torch.tensor(rows)
    return input_ids, (input_ids > 0).long()


TEXTS = [[5, 6, 7, 8, 9, 10], [12, 13], [15, 16, 17, 18, 19]]


@settings(max_examples=60, deadline=None)
@given(
    masks=st.lists(st.lists(st.booleans(), min_size=7, max_size=7), min_size=1, max_size=4),
    num_memories=st.integers(1, 5),
    name=st.sampled_from(["last", "mean", "first", "queries", "pooled_queries"]),
    budget=st.data(),
)
def test_poolings_equal_their_definition(masks, num_memories, name, budget):
    mask = torch.tensor(masks)
    states = torch.randn(*mask.shape, 3, dtype=torch.float64)
    most = budget.draw(st.integers(num_memories, 5))  # a budget below K is as if it were K
    counts = torch.full((len(masks),), num_memories)
    pooling = build_pooling(name, most, 3).double()
    pooled = pooling(states, mask.long(), counts)
    assert pooled.shape == (len(masks), most, 3)
    assert pooled.isfinite().all()
    for row in range(len(masks)):
        real = states[row, mask[row]]
        count = len(real)
        for group in range(num_memories if count else 0):
            first, last = math.floor(group * count / num_memories), math.ceil((group + 1) * count / num_memories) - 1
            mean = real[first : last + 1].mean(0)
            if name == "queries":
                scores = pooling.key(real) @ pooling.queries[group]
                expected = (scores / 3**0.5).softmax(0) @ real
            elif name == "pooled_queries":
                scores = pooling.key(real) @ pooling.query(mean)
                expected = mean + (scores / 3**0.5).softmax(0) @ real
            else:
                expected = {"last": real[last], "first": real[first], "mean": mean}[name]
            torch.testing.assert_close(pooled[row, group], expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["last", "mean", "first", "queries", "pooled_queries"])
def test_pooling_takes_nothing_from_padding(name):
    states = torch.randn(2, 4, 3)
    states[0, 0] = states[1, 3] = float("nan")
    pooled = build_pooling(name, 2, 3)(states, torch.tensor([[0, 1, 1, 1], [1, 1, 1, 0]]))
    assert pooled.isfinite().all()


def test_mean_in_low_precision_is_the_mean():
    states = torch.ones(1, 7, 2, dtype=torch.bfloat16) * 3
    assert (build_pooling("mean", 1)(states, torch.ones(1, 7)) == 3).all()


def test_gradients_reach_exactly_the_pooled_tokens():
    states = torch.randn(1, 6, 2, requires_grad=True)
    mask = torch.tensor([[0, 1, 1, 1, 1, 0]])
    build_pooling("last", 2)(states, mask).sum().backward()
    assert states.grad[0, :, 0].tolist() == [0, 0, 1, 0, 1, 0]
    states.grad = None
    build_pooling("mean", 2)(states, mask).sum().backward()
    assert states.grad[0, :, 0].tolist() == [0, 0.5, 0.5, 0.5, 0.5, 0]


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize(("pooling", "num_memories"), [("last", 1), ("mean", 2)])
def test_padded_chunks_equal_bare_ones(kind, pooling, num_memories):
    model, pool = encoder(kind), build_pooling(pooling, num_memories)
    bare = torch.cat([encode_chunks(model, pool, torch.tensor([text])) for text in TEXTS])
    assert bare.shape == (3, num_memories, 16)
    assert (bare[0] - bare[1]).abs().max() > 1e-3
    for side in ("right", "left"):
        input_ids, mask = padded(TEXTS, side)
        torch.testing.assert_close(encode_chunks(model, pool, input_ids, mask), bare, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "two-way llama"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("side", [None, "left", "right"])
def test_a_llama_that_reads_both_ways_equals_the_plain_loop(kind, attention, side, tmp_path):
    """`is_causal=False` makes an encoder of a causal body; the library skips the mask where nothing is padded."""
    encoder(kind).save_pretrained(tmp_path)
    model = type(encoder(kind)).from_pretrained(tmp_path, attn_implementation=attention)
    texts = TEXTS if side else [text[:2] for text in TEXTS]
    input_ids, mask = padded(texts, side) if side else (torch.tensor(texts), None)
    for pooling, pick in (("last", lambda states: states[-1]), ("first", lambda states: states[0])):
        fast = encode_chunks(model, build_pooling(pooling, 1), input_ids, mask)[:, 0]
        slow = torch.stack([pick(states) for states in llama_loop(model, texts)])
        torch.testing.assert_close(fast, slow, atol=1e-5, rtol=1e-4)
        probes, parameters = torch.randn_like(slow), list(model.parameters())
        for (name, _), one, other in zip(
            model.named_parameters(),
            *(torch.autograd.grad((found * probes).sum(), parameters) for found in (fast, slow)),
            strict=True,
        ):
            torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}")
    # The first token's state tells the two apart: only one of them has seen the last token.
    other = [[*text[:-1], 30] for text in texts]
    moved = (llama_loop(model, other)[0][0] - llama_loop(model, texts)[0][0]).abs().max()
    assert (moved > 1e-3) == (kind == "two-way llama")


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_chunk_of_padding_is_finite_and_leaves_the_others_alone(kind, attention):
    model = encoder(kind)
    model.set_attn_implementation(attention)
    input_ids, mask = padded(TEXTS, "left")
    mask[1] = 0
    pool = build_pooling("last", 2)
    states = encode_chunks(model, pool, input_ids, mask)
    assert states.isfinite().all()
    whole = encode_chunks(model, pool, *padded(TEXTS, "left"))
    torch.testing.assert_close(states[[0, 2]], whole[[0, 2]], atol=1e-6, rtol=1e-5)


def test_last_pooling_is_the_state_of_the_last_real_token():
    model = encoder("llama")
    states = model(torch.tensor([TEXTS[0]])).last_hidden_state
    input_ids, mask = padded(TEXTS[:1], "left")
    torch.testing.assert_close(
        encode_chunks(model, build_pooling("last", 1), input_ids, mask)[:, 0], states[:, -1], atol=1e-6, rtol=1e-5
    )


def test_encoding_keeps_no_cache():
    seen = []
    model = encoder("llama")
    model.register_forward_hook(lambda module, inputs, output: seen.append(output.past_key_values))
    encode_chunks(model, build_pooling("last", 1), torch.tensor([TEXTS[0]]))
    assert seen == [None]


def test_build_encoder_dispatches_on_the_model_type():
    # As `trust_remote_code` does with a folder: the same file imported again under another name.
    spec = importlib.util.spec_from_file_location("modeling_memory.another_copy", inspect.getfile(MaskedMixerConfig))
    another_copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(another_copy)
    config = another_copy.MaskedMixerConfig(**SIZES)
    assert not isinstance(config, MaskedMixerConfig)
    assert type(build_encoder(config)) is MaskedMixerModel
    assert type(encoder("bert")).__name__ == "BertModel"


def test_wrong_uses_are_refused():
    model, pool = encoder("masked_mixer"), build_pooling("last", 1)
    ids = torch.tensor([[1, 2, 3]])
    with pytest.raises(ValueError, match="pooling 'max' is unknown; expected one of 'last', 'mean'"):
        build_pooling("max", 1)
    with pytest.raises(ValueError, match="`memories_per_chunk` is 0"):
        build_pooling("last", 0)
    with pytest.raises(ValueError, match="'bart' model has an encoder and a decoder"):
        build_encoder(BartConfig())
    for bad, mask, message in [
        (torch.ones(1, 13, dtype=torch.long), None, "13 tokens, but the encoder takes 12"),
        (torch.tensor([[1, VOCAB]]), None, "the id 40, but the token table of the encoder has the ids 0 to 39"),
        (torch.zeros(0, 3, dtype=torch.long), None, r"shape \(0, 3\)"),
        (ids, torch.ones(1, 4), r"shape \(1, 4\); expected \(1, 3\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            encode_chunks(model, pool, bad, mask)
