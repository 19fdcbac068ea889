"""Chunks to memory states: poolings, and every kind of encoder read from position 0 whatever its padding."""

import importlib.util
import inspect
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BartConfig, BertConfig, GPT2Config, LlamaConfig, LlamaForCausalLM

from modeling_memory import MemoryEncoderDecoderConfig, MemoryEncoderDecoderForCausalLM
from modeling_memory.configuration_masked_mixer import MaskedMixerConfig
from modeling_memory.memory_encoder import build_encoder, build_pooling, encode_chunks
from modeling_memory.memory_parts import first_layers
from modeling_memory.modeling_masked_mixer import MaskedMixerModel
from tests.memory_models import assert_equal_gradients, build_model
from tests.reference.concat_loop import concat_loop
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
        gradients = assert_equal_gradients(model, fast, slow, atol=2e-5, rtol=1e-3)
        assert len(gradients) == len(list(model.parameters()))
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


def concat_model(max_group: int | None = None, encoder_layers: int | None = 0, **fields):
    """A decoder whose own table is the encoder; K = 2, chunks of 8."""
    torch.manual_seed(0)
    decoder = LlamaForCausalLM(LlamaConfig(**ATTENTION))
    fields = {"chunk_length": 8, "memories_per_chunk": 2, "pooling": "concat", "max_group": max_group, **fields}
    return MemoryEncoderDecoderForCausalLM.from_encoder_decoder_pretrained(
        decoder, decoder, encoder_layers=encoder_layers, **fields
    )


@settings(max_examples=40, deadline=None)
@given(
    masks=st.lists(st.lists(st.booleans(), min_size=8, max_size=8), min_size=1, max_size=4),
    budget=st.sampled_from([None, 1, 2]),
    lookback=st.integers(0, 2),
    begins=st.booleans(),
)
def test_concat_and_its_projector_equal_the_plain_loop(masks, budget, lookback, begins):
    """Padding anywhere, short chunks, budgets, outputs and gradients of states and weights."""
    projector = concat_model(max_group=8, lookback=lookback).projector.double()
    weight, bias = (value.detach().clone().requires_grad_() for value in (projector.out.weight, projector.out.bias))
    mask = torch.tensor(masks)
    states = torch.randn(*mask.shape, 16, dtype=torch.float64, requires_grad=True)
    counts = None if budget is None else torch.full((len(masks),), budget)
    groups = budget or 2
    bos = torch.randn(len(masks), 16, dtype=torch.float64) if begins else None
    pooled = build_pooling("concat", 2, max_group=8, lookback=lookback)(states, mask, counts, bos)
    assert pooled.shape[-1] == ((4 if budget is None else 8) + lookback) * 16, (
        "places that no group can fill are left out"
    )
    found = projector(pooled)[:, :groups]
    expected = concat_loop(states, mask, groups, weight, bias, lookback, bos)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-10)
    probe = torch.randn_like(expected)
    one = torch.autograd.grad((found * probe).sum(), (states, projector.out.weight, projector.out.bias))
    other = torch.autograd.grad((expected * probe).sum(), (states, weight, bias), materialize_grads=True)
    for fast, slow in zip(one, other, strict=True):
        torch.testing.assert_close(fast, slow, atol=1e-12, rtol=1e-10)


def test_concat_takes_nothing_from_padding_and_no_token_twice():
    states = torch.arange(1.0, 8.0)[None, :, None].repeat(2, 1, 1)
    states[1, 5:] = float("nan")
    mask = torch.ones(2, 7)
    mask[1, 5:] = 0
    pooled = build_pooling("concat", 3, max_group=3)(states, mask)
    assert pooled[0].tolist() == [[1, 2, 3], [0, 4, 5], [0, 6, 7]]
    assert pooled[1].tolist() == [[0, 1, 2], [0, 3, 4], [0, 0, 5]]
    back = build_pooling("concat", 3, max_group=3, lookback=1)(states, mask)
    assert back[0].tolist() == [[0, 1, 2, 3], [0, 3, 4, 5], [0, 5, 6, 7]]
    assert back[1].tolist() == [[0, 0, 1, 2], [0, 2, 3, 4], [0, 0, 4, 5]]


@pytest.mark.parametrize("pooling", ["mean", "concat"])
def test_what_stands_before_each_chunk_is_read_by_the_encoder_alone(pooling):
    """Padding on either side; the token before a chunk is no token of a group, and has a place only by `lookback`."""
    options = {"lookback": 1} if pooling == "concat" else {}
    model = build_model("llama", "llama", pooling=pooling, memories_per_chunk=2, encoder_bos_token_id=1, **options)
    input_ids, mask = torch.tensor([[5, 6, 7, 8], [0, 9, 4, 3], [9, 4, 3, 0]]), torch.ones(3, 4, dtype=torch.long)
    mask[1, 0] = mask[2, 3] = 0
    found = encode_chunks(model.encoder, model.pooling, input_ids, mask, config=model.config)
    for row, text in enumerate(([5, 6, 7, 8], [9, 4, 3], [9, 4, 3])):
        states = model.encoder(torch.tensor([[1, *text]])).last_hidden_state[0]
        bos, states = states[:1], states[1:]
        groups = [states[:2], states[2 if pooling == "concat" else len(text) // 2 :]]
        if pooling == "mean":
            expected = torch.stack([group.mean(0) for group in groups])
        else:
            second = torch.cat(
                [torch.zeros_like(states[: 4 - len(text)]), states[1:]]
            )  # it looks back at the second token
            expected = torch.stack([torch.cat([bos, groups[0]]).flatten(), second.flatten()])
        torch.testing.assert_close(found[row], expected, atol=1e-6, rtol=1e-5)


def test_a_group_without_places_is_refused():
    pool, ids = build_pooling("concat", 2, max_group=2), torch.arange(12).reshape(2, 6)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 0]])
    states = ids[..., None].float()
    assert pool(states, mask).shape == (2, 2, 2), "columns of padding take no place"
    with pytest.raises(ValueError, match="chunk of 6 tokens .* 2 memories.*more than the 2 tokens.*`max_group`"):
        pool(states, torch.ones(2, 6))
    with pytest.raises(ValueError, match="chunk of 4 tokens was asked for 1 memories"):
        pool(states, mask, torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="give `max_group`"):
        build_pooling("concat", 2)


def test_an_identity_start_is_the_embedding_of_the_last_token():
    model = concat_model(projector_start="identity_on_last", max_group=8)
    table = model.get_input_embeddings()
    weight = model.projector.out.weight.unflatten(1, (8, 16))
    assert torch.equal(weight[:, -1], torch.eye(16)) and not model.projector.out.bias.any()
    for place in range(7):
        square = weight[:, place] @ weight[:, place].T
        torch.testing.assert_close(square, 0.3**2 * torch.eye(16), atol=1e-6, rtol=1e-5)
    chunks = torch.tensor([[[5, 0, 0, 0], [6, 7, 0, 0]]])
    with torch.no_grad():
        memories, _ = model.encode_memories(chunks, chunks != 0)
        assert torch.equal(memories[0, 0], table(torch.tensor(5))), "a group of one token"
        assert torch.equal(memories[0, 2:], table(torch.tensor([6, 7])))
    # An encoder of short chunks, whose own limit is below what would be read at once.
    short = build_encoder(MaskedMixerConfig(**{**SIZES, "max_position_embeddings": 4}, initializer_range=0.2))
    fields = {"chunk_length": 4, "projector_start": "identity_on_last"}
    MemoryEncoderDecoderForCausalLM.from_encoder_decoder_pretrained(short, model.decoder, **fields)
    # States of another scale come out as large as the decoder's embeddings.
    model = concat_model(projector_start="identity_on_last", encoder_layers=None)
    scale = model.projector.out.weight[:, -16:].diagonal()
    states = model.encoder(torch.arange(1, 9)[None]).last_hidden_state
    assert 0.5 < (states * scale[0]).std() / model.get_input_embeddings().weight.std() < 2 and scale[0] < 0.5


@pytest.mark.parametrize("projector_type", ["mlp", "bottleneck", "linear"])
def test_every_projector_reads_all_states_of_a_group(projector_type):
    model = concat_model(projector_type=projector_type, projector_norm=True)
    states = torch.randn(1, 2, 4 * 16, requires_grad=True)
    model.projector(states)[0, 0].square().sum().backward()
    reached = states.grad.unflatten(2, (4, 16)).abs().sum(-1)
    assert (reached[0, 0] > 0).all() and (reached[0, 1] == 0).all()


@torch.no_grad()
def check_states(cut, body, ids, norm):
    """The states are those of the body at that depth; after a layer, and not before the first, with its last norm."""
    found = cut(ids).last_hidden_state
    expected = body(ids, output_hidden_states=True).hidden_states[cut.config.num_hidden_layers]
    torch.testing.assert_close(found, expected if norm is None else body.get_submodule(norm)(expected))


@pytest.mark.parametrize("kind", ["llama", "bert", "gpt2", "masked_mixer"])
@pytest.mark.parametrize("layers", [0, 1, 2])
def test_the_first_layers_of_a_body(kind, layers):
    body, ids = encoder(kind), torch.tensor([TEXTS[0]])
    before = {name: value.clone() for name, value in body.state_dict().items()}
    cut = first_layers(body, layers)
    assert (cut is body) == (layers == 2)
    if kind != "masked_mixer" and layers < 2:
        check_states(cut, body, ids, {"llama": "norm", "gpt2": "ln_f"}.get(kind) if layers else None)
    assert cut.config.num_hidden_layers == layers and body.config.num_hidden_layers == 2
    assert cut.get_input_embeddings().weight is body.get_input_embeddings().weight
    for name, value in body.state_dict().items():
        assert torch.equal(value, before[name]), name
    rebuilt = build_encoder(cut.config, layers)
    assert {n: v.shape for n, v in rebuilt.state_dict().items()} == {n: v.shape for n, v in cut.state_dict().items()}


def test_a_table_of_its_own():
    """Encoder and decoder of one model: freezing or training one must not touch the other."""
    model = concat_model()
    encoder_table, table = model.encoder.get_input_embeddings().weight, model.get_input_embeddings().weight
    assert torch.equal(encoder_table, table) and encoder_table is not table
    assert not encoder_table.requires_grad and table.requires_grad
    assert [name for name, _ in model.encoder.named_parameters()] == ["embed_tokens.weight"]
    for layers in (-1, 3, True, 1.5):
        with pytest.raises(ValueError, match="`encoder_layers` is .*has 2 layers; expected 0 to 2"):
            concat_model(encoder_layers=layers)


def test_fresh_weights_follow_the_rule_of_the_model():
    config = {"encoder": LlamaConfig(**ATTENTION), "decoder": LlamaConfig(**ATTENTION), "chunk_length": 8}
    concat: dict[str, Any] = {"pooling": "concat", "memories_per_chunk": 2, "max_group": 8}
    for fields in ({}, concat):
        weights = []
        for scale in (0.02, 3.0):
            torch.manual_seed(0)
            projector = MemoryEncoderDecoderForCausalLM(
                MemoryEncoderDecoderConfig(**config, initializer_range=scale, **fields)
            ).projector
            assert not projector.out.bias.any()
            weights.append(projector.out.weight)
            # A full chunk's states, of unit scale, come out at the scale asked for.
            states = torch.randn(4000, (4 if fields else 1) * 16)
            assert 0.7 < projector(states).std() / scale < 1.3
        torch.testing.assert_close(weights[1] / weights[0], torch.full_like(weights[0], 150.0))
    mlp = MemoryEncoderDecoderConfig(**config, projector_type="mlp", pooling="pooled_queries", initializer_range=3.0)
    model = MemoryEncoderDecoderForCausalLM(mlp)
    assert 0.7 < model.projector.hidden[0].weight.std() * 4 < 1.3 and not model.projector.hidden[0].bias.any()
    assert 0.7 < model.pooling.query.weight.std() * 4 < 1.3
    assert (model.projector.norm.weight == 1).all()
