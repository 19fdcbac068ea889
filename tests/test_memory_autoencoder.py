"""The memory autoencoder: equal to the plain loop, padding-proof, exactly saved, and able to learn."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModel, BertConfig, LlamaConfig
from transformers.trainer_utils import set_seed

from modeling_memory.configuration_memory_autoencoder import MemoryAutoencoderConfig
from modeling_memory.memory_encoder import build_encoder
from modeling_memory.modeling_memory_autoencoder import MemoryAutoencoder, RepeatExpansion, UnrollExpansion
from tests.reference.autoencoder_loop import autoencoder_loop, expand
from tests.reference.mixer_loop import affine, mixer_loop, mixer_states

VOCAB = 40
LENGTH = 6


def mixer(width: int = 8, **overrides) -> dict:
    fields = {
        "model_type": "masked_mixer",
        "vocab_size": VOCAB,
        "hidden_size": width,
        "num_hidden_layers": 1,
        "num_heads": 2,
        "max_position_embeddings": LENGTH,
        "intermediate_size": 16,
        "initializer_range": 0.3,
        "pad_token_id": 0,
    }
    return {**fields, **overrides}


def attention(kind: str, width: int = 8, **overrides):
    fields = {
        "vocab_size": VOCAB,
        "hidden_size": width,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "max_position_embeddings": 16,
        "pad_token_id": 0,
        "initializer_range": 0.3,
    }
    return {"llama": LlamaConfig, "bert": BertConfig}[kind](**{**fields, **overrides})


def autoencoder(encoder=None, decoder=None, **fields) -> MemoryAutoencoder:
    defaults = {"chunk_length": LENGTH, "initializer_range": 0.3}
    config = MemoryAutoencoderConfig(
        encoder=mixer() if encoder is None else encoder,
        decoder=mixer() if decoder is None else decoder,
        **{**defaults, **fields},
    )
    return MemoryAutoencoder(config).eval()


def ids(*shape: int) -> torch.Tensor:
    return torch.randint(1, VOCAB, shape)


def padded(texts: list[list[int]], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    length = max(map(len, texts))
    pads = [[0] * (length - len(text)) for text in texts]
    rows = [pad + text if side == "left" else text + pad for text, pad in zip(texts, pads, strict=True)]
    input_ids = torch.tensor(rows)
    return input_ids, (input_ids > 0).long()


TEXTS = [[5, 6, 7, 8, 9, 10], [12, 13, 14], [15, 16, 17, 18, 19]]

VARIANTS = {
    "plain": {},
    "repeat": {"expansion": "repeat"},
    "readout without layers": {"decoder": mixer(num_hidden_layers=0)},
    "wider decoder": {"decoder": mixer(12)},
    "narrower decoder, longer than wide": {"decoder": mixer(4)},
    "two memories": {"memories_per_chunk": 2},
    "memories that do not divide the chunk": {"memories_per_chunk": 4},
    "as many memories as tokens": {"memories_per_chunk": 6},
    "mean of two": {"memories_per_chunk": 2, "pooling": "mean"},
    "repeat four": {"expansion": "repeat", "memories_per_chunk": 4},
    "bottleneck and bridge": {"bottleneck_size": 3, "bottleneck_noise": 0.5, "decoder": mixer(10)},
    "not causal, flat, taps": {"encoder": mixer(num_heads=0, kernel_size=2), "decoder": mixer(causal=False)},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs_and_gradients_equal_the_plain_loop(variant):
    model = autoencoder(**VARIANTS[variant]).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.add_(0.1 * torch.randn_like(parameter))
    input_ids, mask = padded(TEXTS, "right")
    outputs = model(input_ids, attention_mask=mask, labels=input_ids)
    memories, logits = autoencoder_loop(model, TEXTS)
    torch.testing.assert_close(outputs.memories, memories, atol=1e-11, rtol=0)
    torch.testing.assert_close(model.decode(outputs.memories), logits, atol=1e-11, rtol=0)

    nats = [-logits[b, i].log_softmax(-1)[token] for b, text in enumerate(TEXTS) for i, token in enumerate(text)]
    loss = torch.stack(nats).mean()
    torch.testing.assert_close(outputs.loss, loss.float(), atol=1e-6, rtol=0)  # the library's loss is in float32
    probes = torch.randn_like(logits)
    parameters = list(model.parameters())
    fast = torch.autograd.grad((model.decode(model.encode(input_ids, mask)) * probes).sum(), parameters)
    slow = torch.autograd.grad((logits * probes).sum(), parameters)
    for (name, _), one, other in zip(model.named_parameters(), fast, slow, strict=True):
        torch.testing.assert_close(one, other, atol=1e-9, rtol=1e-9, msg=lambda text, name=name: f"{name}: {text}")
        assert one.abs().sum() > 0, name


@settings(max_examples=60, deadline=None)
@given(length=st.integers(1, 30), width=st.integers(2, 9), num_memories=st.integers(1, 30), stride=st.integers(1, 11))
def test_expansions_follow_the_rule_for_any_sizes(length, width, num_memories, stride):
    num_memories = min(num_memories, length)
    vectors = torch.randn(2, num_memories, width)
    unroll, repeat = UnrollExpansion(num_memories, length, width, stride), RepeatExpansion(num_memories, length)
    unrolled, repeated = unroll(vectors), repeat(vectors)
    assert unrolled.shape == repeated.shape == (2, length, width)
    starts = {}
    for position in range(length):
        memory = position * num_memories // length
        local = position - starts.setdefault(memory, position)
        elements = [(local * stride + offset) % width for offset in range(width // 2)]
        torch.testing.assert_close(unrolled[:, position], unroll.projection(vectors[:, memory, elements]))
        assert torch.equal(repeated[:, position], vectors[:, memory])
    assert len(starts) == num_memories


def test_positions_a_whole_width_apart_read_the_same():
    unroll = UnrollExpansion(1, 11, 4)
    read = unroll(torch.randn(1, 1, 4))[0]
    torch.testing.assert_close(read[:7], read[4:])
    assert len({tuple(row.tolist()) for row in read[:4].detach().round(decimals=4)}) == 4


def test_the_stride_spreads_positions_over_the_whole_vector():
    vector = torch.ones(1, 1, 12, requires_grad=True)
    for stride, reached in ((1, 6 + 4 - 1), (3, 12)):
        model = autoencoder(chunk_length=4, unroll_stride=stride, decoder=mixer(hidden_size=12, num_hidden_layers=0))
        assert model.expansion.stride == stride
        read = model.expansion(vector)
        (gradient,) = torch.autograd.grad(read.pow(2).sum(), vector)
        assert int((gradient != 0).sum()) == reached


BODIES = {
    "mixer to mixer": (mixer(), mixer()),
    "mixer to llama": (mixer(), attention("llama")),
    "llama to mixer": (attention("llama", 16), mixer()),
    "bert to llama": (attention("bert", 16), attention("llama")),
}


@pytest.mark.parametrize("bodies", BODIES)
def test_left_padding_right_padding_and_bare_texts_agree(bodies):
    model = autoencoder(*BODIES[bodies])
    right, right_mask = padded(TEXTS, "right")
    left, left_mask = padded(TEXTS, "left")
    one = model(right, attention_mask=right_mask, labels=right)
    other = model(left, attention_mask=left_mask, labels=left)
    torch.testing.assert_close(one.memories, other.memories, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(one.loss, other.loss)
    torch.testing.assert_close(one.logits[right_mask.bool()], other.logits[left_mask.bool()], atol=1e-4, rtol=1e-4)
    for row, text in enumerate(TEXTS):
        bare = model(torch.tensor([text]))
        torch.testing.assert_close(bare.logits[0], one.logits[row, : len(text)], atol=1e-4, rtol=1e-4)
        assert bare.logits.shape == (1, len(text), VOCAB)
    changed = right.masked_fill(right_mask == 0, 33)
    assert torch.equal(model.encode(changed, right_mask), one.memories)


def test_encode_gives_the_memories_and_reconstruct_reads_them():
    model = autoencoder(memories_per_chunk=2, bottleneck_size=4)
    input_ids = ids(3, LENGTH)
    outputs = model(input_ids, labels=input_ids)
    memories = model.encode(input_ids)
    assert torch.equal(outputs.memories, memories)
    assert memories.shape == (3, 2, 8)
    assert outputs.logits.shape == (3, LENGTH, VOCAB)
    written = model.reconstruct(memories=memories)
    assert torch.equal(written, model.reconstruct(input_ids))
    assert torch.equal(written, outputs.logits.argmax(-1))
    from_memories = model(memories=memories, labels=input_ids)
    assert torch.equal(from_memories.loss, outputs.loss)
    assert torch.equal(from_memories.logits, outputs.logits)
    assert model(memories=memories).logits.shape == (3, LENGTH, VOCAB)
    assert model.reconstruct(input_ids[:, :2]).shape == (3, LENGTH)
    assert torch.equal(model(input_ids, return_dict=False)[0], outputs.logits)


def test_loss_is_unshifted_ignores_padding_and_honours_the_batch_count():
    model = autoencoder()
    input_ids, mask = padded(TEXTS, "left")
    outputs = model(input_ids, attention_mask=mask, labels=input_ids)
    scores = outputs.logits.log_softmax(-1)
    expected = -scores.gather(2, input_ids[:, :, None])[:, :, 0][mask.bool()]
    torch.testing.assert_close(outputs.loss, expected.mean())
    marked = model(input_ids, attention_mask=mask, labels=input_ids.masked_fill(mask == 0, -100))
    assert torch.equal(marked.loss, outputs.loss)
    counted = model(input_ids, attention_mask=mask, labels=input_ids, num_items_in_batch=torch.tensor(28))
    torch.testing.assert_close(counted.loss, expected.sum() / 28)
    some = input_ids.clone()
    some[:, 3:] = -100
    torch.testing.assert_close(
        model(input_ids, attention_mask=mask, labels=some).loss, expected.new_tensor(0)
        + (-scores.gather(2, input_ids[:, :, None])[:, :3, 0][mask[:, :3].bool()]).mean()
    )  # fmt: skip


def test_noise_is_symmetric_bounded_and_absent_in_evaluation():
    model = autoencoder(bottleneck_size=64, bottleneck_noise=0.25)
    vectors = torch.randn(500, 8)
    exact = model.bottleneck.down(vectors)
    seen = []
    model.bottleneck.up.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    model.bottleneck(vectors)
    model.train()
    model.bottleneck(vectors)
    assert torch.equal(seen[0], exact)
    noise = seen[1] - exact
    assert 0.249 < noise.max() <= 0.2501 and -0.249 > noise.min() >= -0.2501
    assert noise.mean().abs() < 0.005
    assert not torch.equal(model.encode(ids(2, 4)), model.encode(ids(2, 4)))


def test_noise_enters_outputs_and_gradients_as_in_the_plain_loop():
    model, text = autoencoder(bottleneck_size=3, bottleneck_noise=0.5, decoder=mixer(10)).double().train(), TEXTS[0]
    drawn = []
    model.bottleneck.up.register_forward_pre_hook(lambda module, inputs: drawn.append(inputs[0].detach()))
    fast = model(torch.tensor([text])).logits[0]
    narrow = affine(mixer_loop(model.encoder, [text])[0][-1], model.bottleneck.down)
    noise = drawn[0][0, 0] - narrow.detach()
    assert 0 < noise.abs().max() <= 0.5
    vector = affine(affine(narrow + noise, model.bottleneck.up), model.bridge)
    slow = torch.stack([affine(x, model.lm_head) for x in mixer_states(model.decoder, expand(model, [vector]))])
    torch.testing.assert_close(fast, slow, atol=1e-11, rtol=0)
    probes, parameters = torch.randn_like(slow), list(model.parameters())
    for one, other in zip(*(torch.autograd.grad((x * probes).sum(), parameters) for x in (fast, slow)), strict=True):
        torch.testing.assert_close(one, other, atol=1e-9, rtol=1e-9)


def test_a_frozen_encoder_stays_frozen_and_in_evaluation(tmp_path):
    fields = {"encoder": attention("bert", 16), "freeze_encoder": True, "bottleneck_size": 3}
    model = autoencoder(**fields)
    model.save_pretrained(tmp_path)
    for probe in (model, MemoryAutoencoder.from_pretrained(tmp_path)):
        probe.train()
        trains = {name for name, _ in probe.named_parameters() if not name.startswith("encoder.")}
        assert probe.training and probe.decoder.training
        assert not any(module.training for module in probe.encoder.modules())
        assert not any(parameter.requires_grad for parameter in probe.encoder.parameters())
        before = {name: value.clone() for name, value in probe.state_dict().items()}
        optimizer = torch.optim.AdamW(probe.parameters(), lr=0.1)
        input_ids = ids(2, LENGTH)
        probe(input_ids, labels=input_ids).loss.backward()
        optimizer.step()
        changed = {name for name, value in probe.state_dict().items() if not torch.equal(value, before[name])}
        assert changed and changed <= trains
        assert {name for name, p in probe.named_parameters() if p.grad is not None} == trains


def test_freezing_survives_activation_checkpointing():
    model = autoencoder(encoder=attention("llama"), freeze_encoder=True).train()
    # The name before transformers 5.23 is the second one.
    (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)()
    model.enable_input_require_grads()
    assert not model.encode(ids(1, LENGTH)).requires_grad


def test_every_trainable_parameter_is_trained():
    model = autoencoder(attention("llama"), attention("llama"), memories_per_chunk=2, bottleneck_size=3).train()
    input_ids = ids(4, LENGTH)
    model(input_ids, labels=input_ids).loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert not [name for name, _ in model.named_parameters() if name.startswith("decoder.embed")]


def test_a_ready_encoder_is_taken_as_it_is():
    encoder = build_encoder(attention("llama", 16)).eval()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    config = MemoryAutoencoderConfig(encoder=encoder.config, decoder=mixer(), chunk_length=LENGTH, freeze_encoder=True)
    model = MemoryAutoencoder(config, encoder=encoder)
    assert model.encoder is encoder
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, before[name]), name
    input_ids = ids(2, LENGTH)
    torch.testing.assert_close(model.encode(input_ids)[:, 0], encoder(input_ids).last_hidden_state[:, -1])


@pytest.mark.parametrize("bodies", BODIES)
@pytest.mark.parametrize("expansion", ["unroll", "repeat"])
def test_save_and_load_bit_identical(tmp_path, bodies, expansion):
    encoder, decoder = BODIES[bodies]
    model = autoencoder(
        encoder, decoder, expansion=expansion, memories_per_chunk=2, bottleneck_size=3, bottleneck_noise=0.1
    )
    model.save_pretrained(tmp_path)
    loaded, report = MemoryAutoencoder.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert model.state_dict().keys() == loaded.state_dict().keys()
    for tensors in ("named_parameters", "named_buffers"):
        for (name, value), (other_name, other) in zip(
            getattr(model, tensors)(), getattr(loaded, tensors)(), strict=True
        ):
            assert name == other_name and torch.equal(value, other), name
    input_ids = ids(2, LENGTH)
    assert torch.equal(model(input_ids).logits, loaded(input_ids).logits)
    assert loaded.config.expansion == expansion and loaded.config.bottleneck_noise == 0.1
    assert loaded.config.encoder.model_type == model.config.encoder.model_type


def test_bfloat16_is_finite_and_trains():
    model = autoencoder(memories_per_chunk=2, pooling="mean", bottleneck_size=3, initializer_range=0.05).train()
    input_ids, mask = padded(TEXTS, "left")
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(input_ids, attention_mask=mask, labels=input_ids)
    mixed.loss.backward()
    assert mixed.loss.isfinite() and all(p.grad.isfinite().all() for p in model.parameters())
    exact = model.eval()(input_ids, attention_mask=mask, labels=input_ids).loss
    low = model.to(torch.bfloat16)(input_ids, attention_mask=mask, labels=input_ids)
    assert low.logits.isfinite().all() and low.memories.dtype == torch.bfloat16
    for loss in (mixed.loss, low.loss):
        torch.testing.assert_close(loss, exact, atol=0.05, rtol=0.02)


@pytest.mark.parametrize("side", ["right", "left"])
def test_compiled_equals_plain(side):
    torch._dynamo.reset()
    model = autoencoder(memories_per_chunk=4)
    input_ids, mask = padded(TEXTS, side)
    plain = model(input_ids, attention_mask=mask, labels=input_ids)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    outputs = compiled(input_ids, attention_mask=mask, labels=input_ids)
    torch.testing.assert_close(outputs.loss, plain.loss)
    torch.testing.assert_close(outputs.memories, plain.memories)
    real = mask.bool()
    torch.testing.assert_close(outputs.logits[real], plain.logits[real])


def test_gradient_checkpointing_changes_nothing():
    model = autoencoder(mixer(num_hidden_layers=2), attention("llama", num_hidden_layers=2)).train()
    input_ids, mask = padded(TEXTS, "left")

    def step():
        model.zero_grad()
        loss = model(input_ids, attention_mask=mask, labels=input_ids).loss
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters())]

    plain = step()
    # The name before transformers 5.23 is the second one.
    (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)()
    assert model.encoder.layers[0].gradient_checkpointing and model.decoder.layers[0].gradient_checkpointing
    for one, other in zip(plain, step(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("fields", [{}, {"memories_per_chunk": 2, "expansion": "repeat"}])
def test_a_few_chunks_are_learnt_by_heart(fields):
    set_seed(0)
    sizes = {"intermediate_size": 64, "initializer_range": 0.02, "num_hidden_layers": 2}
    model = autoencoder(mixer(32, **sizes), mixer(32, **sizes), initializer_range=0.02, **fields).train()
    input_ids = ids(8, LENGTH)
    start = (model.eval().reconstruct(input_ids) == input_ids).float().mean()
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        model(input_ids, labels=input_ids).loss.backward()
        optimizer.step()
    model.eval()
    assert start < 0.2
    assert (model.reconstruct(input_ids) == input_ids).float().mean() > 0.98
    wrong = model.reconstruct(memories=model.encode(input_ids).roll(1, 0))
    assert (wrong == input_ids).float().mean() < 0.2


def test_resized_vocabulary_saves_and_loads(tmp_path):
    model = autoencoder()
    model.resize_token_embeddings(VOCAB + 3)
    input_ids = ids(1, LENGTH) + 3
    input_ids[0, 0] = VOCAB + 2
    logits = model(input_ids).logits
    assert logits.shape[2] == VOCAB + 3
    model.save_pretrained(tmp_path)
    assert torch.equal(MemoryAutoencoder.from_pretrained(tmp_path)(input_ids).logits, logits)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"chunk_length": 0}, "`chunk_length` is 0"),
        ({"memories_per_chunk": 7}, "`memories_per_chunk` is 7, more than the 6 tokens"),
        ({"pooling": "max"}, "`pooling` is 'max'; expected one of 'last'"),
        ({"expansion": "repeat", "unroll_stride": 2}, "has no windows to move"),
        ({"unroll_stride": 0}, "`unroll_stride` is 0; expected a positive integer"),
        ({"expansion": "unfold"}, "`expansion` is 'unfold'; expected one of 'unroll', 'repeat'"),
        ({"bottleneck_size": 0}, "`bottleneck_size` is 0"),
        ({"bottleneck_noise": -0.1, "bottleneck_size": 2}, "`bottleneck_noise` is -0.1"),
        ({"bottleneck_noise": 0.1}, "`bottleneck_noise` is 0.1, but there is no bottleneck"),
        ({"chunk_length": 7}, "`chunk_length` is 7, but the encoder takes 6"),
        ({"decoder": mixer(max_position_embeddings=5)}, "`chunk_length` is 6, but the decoder takes 5"),
        ({"decoder": mixer(1, num_heads=0)}, "`hidden_size` is 1"),
        ({"vocab_size": -1}, "`vocab_size` is -1"),
        ({"encoder": {"model_type": "bart", "vocab_size": 8}}, "'bart' model has an encoder and a decoder"),
    ],
)
def test_wrong_configs_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        autoencoder(**fields)


def test_wrong_inputs_are_refused():
    model = autoencoder()
    memories = torch.randn(2, 1, 8)
    half = torch.tensor([[1, 1], [0, 0]])
    for arguments, message in [
        ({}, "either `input_ids` or `memories`"),
        ({"input_ids": ids(2, 3), "memories": memories}, "either `input_ids` or `memories`"),
        ({"input_ids": ids(1, 7)}, "7 tokens, but this autoencoder writes chunks of 6"),
        ({"memories": memories, "labels": ids(2, 7)}, "7 tokens, but this autoencoder writes chunks of 6"),
        ({"input_ids": ids(0, 3)}, r"shape \(0, 3\)"),
        ({"input_ids": ids(3)}, r"shape \(3,\)"),
        ({"input_ids": torch.tensor([[VOCAB]])}, "holds the id 40"),
        ({"input_ids": ids(2, 2), "attention_mask": half}, "Row 1 has padding only"),
        ({"input_ids": ids(2, 2), "attention_mask": half[:1]}, r"shape \(1, 2\); expected \(2, 2\)"),
        ({"input_ids": ids(2, 3), "labels": ids(2, 2)}, r"`labels` has shape \(2, 2\); expected \(2, 3\)"),
        ({"memories": torch.randn(2, 2, 8)}, r"shape \(2, 2, 8\); expected \(batch, 1, 8\)"),
        ({"memories": torch.randn(0, 1, 8)}, r"shape \(0, 1, 8\)"),
        ({"memories": torch.randn(2, 8)}, r"shape \(2, 8\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            model(**arguments)
        if "labels" not in arguments and "7 tokens" not in message:
            with pytest.raises(ValueError, match=message):
                model.reconstruct(**arguments)


def test_the_saved_config_names_no_place_of_this_machine(tmp_path):
    build_encoder(attention("bert")).save_pretrained(tmp_path / "encoder")
    encoder = AutoModel.from_pretrained(tmp_path / "encoder")
    config = MemoryAutoencoderConfig(encoder=encoder.config, decoder=mixer(), chunk_length=LENGTH)
    MemoryAutoencoder(config, encoder=encoder).save_pretrained(tmp_path / "probe")
    assert str(tmp_path) not in (tmp_path / "probe" / "config.json").read_text()


def test_no_chunk_is_reconstructed_in_part():
    model = MemoryAutoencoder(
        MemoryAutoencoderConfig(encoder=attention("llama"), decoder=mixer(), chunk_length=LENGTH)
    )
    with pytest.raises(ValueError, match=f"has {LENGTH + 1} tokens.*chunks of {LENGTH}"):
        model.reconstruct(torch.ones(1, LENGTH + 1, dtype=torch.long))


def test_hidden_states_stand_in_the_columns_of_the_logits():
    model = autoencoder()
    input_ids, mask = ids(2, LENGTH - 1), torch.ones(2, LENGTH - 1, dtype=torch.long)
    mask[0, :2] = 0
    for outputs in (
        model(input_ids, mask, output_hidden_states=True),
        (setattr(model.config, "output_hidden_states", True), model(input_ids, mask))[1],
    ):
        assert all(states.shape[:2] == outputs.logits.shape[:2] for states in outputs.hidden_states)
        torch.testing.assert_close(model.lm_head(outputs.hidden_states[-1]), outputs.logits)
    model.config.output_hidden_states = False
    assert model(input_ids, mask).hidden_states is None


def test_plans_for_parallel_runs_name_what_there_is():
    llama = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    model = MemoryAutoencoder(MemoryAutoencoderConfig(encoder=llama, decoder=llama, chunk_length=4))
    names = {re.sub(r"\.\d+", ".*", name) for name, _ in model.named_modules()}
    assert model._tp_plan and model._tp_plan.keys() <= names and model._pp_plan.keys() <= names
    assert "encoder.layers.*.mlp.up_proj" in model._tp_plan and "decoder.embed_tokens" not in model._tp_plan


def test_senseless_configurations_of_concat_are_refused():
    with pytest.raises(ValueError, match="`pooling` is 'concat'; expected one of 'last'"):
        autoencoder(pooling="concat")


def test_attentions_and_single_states_of_the_decoder_are_returned_when_asked():
    torch.manual_seed(0)
    config = MemoryAutoencoderConfig(encoder=attention("llama"), decoder=attention("llama"), chunk_length=LENGTH)
    model = MemoryAutoencoder._from_config(config, attn_implementation="eager").eval()
    input_ids = torch.randint(3, VOCAB, (2, LENGTH))
    asked = model(input_ids, output_attentions=True, output_hidden_states=[0])
    # The first is what the layer reads, or in transformers 5.17, which leaves that out of a list, what it writes.
    assert [state is None for state in asked.hidden_states] in ([False, True], [False])
    assert [tuple(one.shape) for one in asked.attentions] == [(2, 2, LENGTH, LENGTH)]
    assert torch.allclose(asked.attentions[0].sum(-1), torch.ones(2, 2, LENGTH))
    plain = model(input_ids)
    assert plain.attentions is None and torch.equal(plain.logits, asked.logits)
    model.config.decoder.output_attentions = False
    model.config.output_attentions = True
    assert model(input_ids).attentions is not None
