"""The masked mixer: equal to the plain loop, causal, indifferent to padding, cached as uncached."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, GenerationConfig, StaticCache

from modeling_memory.configuration_masked_mixer import MaskedMixerConfig
from modeling_memory.modeling_masked_mixer import MaskedMixerForCausalLM, MaskedMixerModel, check_token_ids
from tests.memory_models import assert_equal_gradients
from tests.reference.mixer_loop import mixer_loop

VOCAB = 50
LENGTH = 9


def config(**overrides) -> MaskedMixerConfig:
    fields = {
        "vocab_size": VOCAB,
        "hidden_size": 8,
        "num_hidden_layers": 2,
        "num_heads": 2,
        "max_position_embeddings": LENGTH,
        "intermediate_size": 16,
        "initializer_range": 0.3,  # wide enough that every weight visibly matters
        "pad_token_id": 0,
    }
    return MaskedMixerConfig(**{**fields, **overrides})


def body(**overrides) -> MaskedMixerModel:
    """A float64 body whose biases and norms are not at their neutral values."""
    model = MaskedMixerModel(config(**overrides)).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def causal_lm(**overrides) -> MaskedMixerForCausalLM:
    return MaskedMixerForCausalLM(config(**{"hidden_size": 16, "max_position_embeddings": 40, **overrides})).eval()


def ids(*shape: int) -> torch.Tensor:
    return torch.randint(1, VOCAB, shape)


def padded(texts: list[list[int]], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Lay texts into rows padded on a side, or with holes between their tokens."""
    length = max(map(len, texts)) + (2 if side == "holes" else 0)
    input_ids = torch.zeros(len(texts), length, dtype=torch.long)
    mask = torch.zeros_like(input_ids)
    for row, text in enumerate(texts):
        columns = {
            "right": range(len(text)),
            "left": range(length - len(text), length),
            "holes": sorted(torch.randperm(length)[: len(text)].tolist()),
        }[side]
        input_ids[row, list(columns)] = torch.tensor(text)
        mask[row, list(columns)] = 1
    return input_ids, mask


TEXTS = [[5, 6, 7, 8, 9, 10, 11], [12, 13, 14], [15, 16, 17, 18, 19]]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("num_heads", "kernel_size"), [(0, 1), (0, 2), (0, 3), (0, 4), (1, 1), (2, 1), (2, 2), (4, 4)]
)
def test_outputs_and_gradients_equal_the_plain_loop(num_heads, kernel_size, causal):
    model = body(num_heads=num_heads, kernel_size=kernel_size, causal=causal, num_hidden_layers=2)
    texts = [[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]]
    fast = model(torch.tensor(texts)).last_hidden_state
    slow = torch.stack(mixer_loop(model, texts))
    torch.testing.assert_close(fast, slow, atol=1e-12, rtol=0)

    gradients = assert_equal_gradients(model, fast, slow, atol=1e-11)
    assert all(gradients[name].abs().sum() > 0 for name, _ in model.named_parameters())


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("side", ["right", "left", "holes"])
@pytest.mark.parametrize(("num_heads", "kernel_size"), [(0, 1), (2, 2)])
def test_padded_batch_equals_the_plain_loop_over_bare_texts(num_heads, kernel_size, side, causal):
    model = body(num_heads=num_heads, kernel_size=kernel_size, causal=causal)
    input_ids, mask = padded(TEXTS, side)
    states = model(input_ids, attention_mask=mask).last_hidden_state
    for row, slow in enumerate(mixer_loop(model, TEXTS)):
        torch.testing.assert_close(states[row, mask[row].bool()], slow, atol=1e-12, rtol=0)
    gradients = assert_equal_gradients(model, states[mask.bool()], torch.cat(mixer_loop(model, TEXTS)), atol=1e-10)
    assert len(gradients) == len(list(model.parameters()))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("side", ["right", "left", "holes"])
def test_padding_touches_nothing(side, causal):
    model = body(causal=causal)
    input_ids, mask = padded(TEXTS, side)
    embeds = model.embed_tokens(input_ids).detach()
    garbage = torch.where(mask[:, :, None].bool(), embeds, torch.full_like(embeds, 1e3))
    one = model(inputs_embeds=embeds, attention_mask=mask).last_hidden_state
    other = model(inputs_embeds=garbage, attention_mask=mask).last_hidden_state
    assert torch.equal(one[mask.bool()], other[mask.bool()])


def test_more_columns_than_positions_are_fine_when_padding_fills_them():
    model = body()
    text = [5, 6, 7, 8]
    input_ids = torch.tensor([[0] * LENGTH + text])
    mask = (input_ids > 0).long()
    states = model(input_ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(states[0, -4:], mixer_loop(model, [text])[0], atol=1e-12, rtol=0)


@pytest.mark.parametrize("mask", [None, [[1, 1, 1], [0, 0, 0]]])
def test_a_row_of_padding_gives_finite_states(mask):
    model = body()
    states = model(ids(2, 3), attention_mask=None if mask is None else torch.tensor(mask)).last_hidden_state
    assert states.isfinite().all()


@settings(max_examples=25, deadline=None)
@given(
    length=st.integers(2, LENGTH),
    place=st.integers(0, LENGTH),
    num_heads=st.sampled_from([0, 1, 2, 4]),
    kernel_size=st.sampled_from([1, 2, 3, 4, 8]),
)
def test_a_token_changes_nothing_before_it_and_everything_after(length, place, num_heads, kernel_size):
    place = place % length
    model = body(num_heads=num_heads, kernel_size=kernel_size)
    one = ids(1, length)
    other = one.clone()
    other[0, place] = one[0, place] % (VOCAB - 1) + 1
    before, after = model(one).last_hidden_state, model(other).last_hidden_state
    assert torch.equal(before[:, :place], after[:, :place])
    assert (before[:, place:] != after[:, place:]).any(-1).all()


def test_without_the_mask_the_first_token_reads_the_last():
    model = body(causal=False)
    one = ids(1, 6)
    other = one.clone()
    other[0, -1] = one[0, -1] % (VOCAB - 1) + 1
    assert (model(one).last_hidden_state[0, 0] != model(other).last_hidden_state[0, 0]).any()


def test_a_prefix_has_the_states_of_the_whole_text():
    model = body(num_heads=0, kernel_size=2)
    input_ids = ids(2, LENGTH)
    whole = model(input_ids).last_hidden_state
    for length in range(1, LENGTH):
        torch.testing.assert_close(
            model(input_ids[:, :length]).last_hidden_state, whole[:, :length], atol=1e-12, rtol=0
        )


def test_forward_writes_no_parameter_and_the_future_is_never_trained():
    model = MaskedMixerModel(config(kernel_size=2)).train()
    before = copy.deepcopy(model.state_dict())
    future = torch.ones(LENGTH, LENGTH).triu(1).bool()
    assert before["layers.0.mixing.weight"][..., future].abs().min() > 0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss = model(ids(3, LENGTH)).last_hidden_state.square().mean()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    loss.backward()
    optimizer.step()
    for layer in model.layers:
        gradient = layer.mixing.weight.grad
        assert (gradient[..., future] == 0).all()
        assert (gradient[..., ~future] != 0).all()
    for index in range(2):
        name = f"layers.{index}.mixing.weight"
        assert torch.equal(model.state_dict()[name][..., future], before[name][..., future])
        assert (model.state_dict()[name][..., ~future] != before[name][..., ~future]).any()


@pytest.mark.parametrize(("num_heads", "kernel_size"), [(0, 1), (0, 3), (2, 1), (2, 2)])
@pytest.mark.parametrize("side", ["plain", "right", "left", "holes"])
def test_cached_steps_equal_one_forward(num_heads, kernel_size, side):
    model = body(num_heads=num_heads, kernel_size=kernel_size)
    if side == "plain":
        input_ids, mask = ids(3, 7), torch.ones(3, 7, dtype=torch.long)
    else:
        input_ids, mask = padded(TEXTS, side)
    whole = model(input_ids, attention_mask=mask).last_hidden_state
    for pieces in ([3, 1, 1, 2], [1, 1, 1, 1, 1, 1, 1], [2, 4, 1]):
        if sum(pieces) < input_ids.shape[1]:
            pieces = [*pieces, input_ids.shape[1] - sum(pieces)]
        cache, done, states = None, 0, []
        for piece in pieces:
            outputs = model(
                input_ids[:, done : done + piece],
                attention_mask=mask[:, : done + piece],
                past_key_values=cache,
                use_cache=True,
            )
            cache, done = outputs.past_key_values, done + piece
            states.append(outputs.last_hidden_state)
        assert cache.get_seq_length() == input_ids.shape[1]
        real = mask.bool()
        torch.testing.assert_close(torch.cat(states, 1)[real], whole[real], atol=1e-12, rtol=0)


def test_cached_steps_without_a_mask_go_on_where_the_text_ended():
    model = body()
    input_ids, mask = padded(TEXTS, "left")
    new = ids(3, 2)
    cache = model(input_ids, attention_mask=mask, use_cache=True).past_key_values
    steps = [model(new[:, i : i + 1], past_key_values=cache).last_hidden_state for i in range(2)]
    whole = model(torch.cat([input_ids, new], 1), attention_mask=torch.cat([mask, torch.ones_like(new)], 1))
    torch.testing.assert_close(torch.cat(steps, 1), whole.last_hidden_state[:, -2:], atol=1e-12, rtol=0)


def test_a_mask_may_hide_cached_tokens():
    model = body()
    prefix, new = ids(1, 4), ids(1, 2)
    cache = model(prefix, use_cache=True).past_key_values
    mask = torch.tensor([[1, 1, 0, 0, 1, 1]])
    states = model(new, attention_mask=mask, past_key_values=cache).last_hidden_state
    bare = model(torch.cat([prefix[:, :2], new], 1)).last_hidden_state[:, -2:]
    torch.testing.assert_close(states, bare, atol=1e-12, rtol=0)


def test_position_ids_place_tokens():
    model = body()
    input_ids = ids(1, 3)
    places = torch.tensor([[1, 4, 6]])
    states = model(input_ids, position_ids=places).last_hidden_state
    embeds = torch.zeros(1, 7, 8, dtype=torch.float64)
    embeds[:, places[0]] = model.embed_tokens(input_ids)
    mask = torch.tensor([[0, 1, 0, 0, 1, 0, 1]])
    columns = torch.arange(7)[None]
    spread = model(inputs_embeds=embeds, attention_mask=mask, position_ids=columns).last_hidden_state
    torch.testing.assert_close(states, spread[:, places[0]], atol=1e-12, rtol=0)
    assert (states != model(input_ids).last_hidden_state).any()
    cache = model(input_ids[:, :2], position_ids=places[:, :2], use_cache=True).past_key_values
    step = model(input_ids[:, 2:], position_ids=places[:, 2:], past_key_values=cache).last_hidden_state
    torch.testing.assert_close(step, states[:, 2:], atol=1e-12, rtol=0)


@pytest.mark.parametrize(("num_heads", "kernel_size"), [(0, 1), (2, 2)])
@pytest.mark.parametrize("options", [{"do_sample": False}, {"num_beams": 3, "do_sample": False}])
def test_generation_of_a_padded_batch_equals_one_by_one_with_and_without_cache(num_heads, kernel_size, options):
    model = causal_lm(num_heads=num_heads, kernel_size=kernel_size)
    input_ids, mask = padded(TEXTS, "left")
    options = {**options, "max_new_tokens": 12}
    batch = model.generate(input_ids, attention_mask=mask, **options)
    uncached = model.generate(input_ids, attention_mask=mask, use_cache=False, **options)
    assert torch.equal(batch, uncached)
    for row, text in enumerate(TEXTS):
        single = model.generate(torch.tensor([text]), **options)
        assert torch.equal(batch[row, -12:], single[0, -12:])
    assert len({tuple(row[-12:].tolist()) for row in batch}) == 3


def test_greedy_generation_equals_repeated_forward():
    model = causal_lm()
    text = ids(1, 4)
    written = text
    for _ in range(10):
        written = torch.cat([written, model(written, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(model.generate(text, max_new_tokens=10, do_sample=False), written)


def test_sampling_repeats_under_a_seed_with_and_without_cache():
    model, text = causal_lm(), ids(2, 4)
    options = {"max_new_tokens": 8, "do_sample": True, "temperature": 0.8, "num_return_sequences": 3}
    torch.manual_seed(1)
    one = model.generate(text, **options)
    torch.manual_seed(1)
    assert torch.equal(one, model.generate(text, use_cache=False, **options))


def test_generation_of_right_padded_prompts_is_refused():
    input_ids, mask = padded(TEXTS, "right")
    with pytest.raises(ValueError, match="Row 1 .* left"):
        causal_lm().generate(input_ids, attention_mask=mask, max_new_tokens=2)


def test_loss_is_the_shifted_cross_entropy_and_honours_the_batch_count():
    model = causal_lm()
    input_ids, mask = padded(TEXTS, "right")
    labels = input_ids.masked_fill(mask == 0, -100)
    outputs = model(input_ids, attention_mask=mask, labels=labels)
    scores = outputs.logits[:, :-1].log_softmax(-1)
    targets = labels[:, 1:]
    nats = [-scores[b, t, targets[b, t]] for b in range(3) for t in range(targets.shape[1]) if targets[b, t] >= 0]
    torch.testing.assert_close(outputs.loss, torch.stack(nats).mean())
    halved = model(input_ids, attention_mask=mask, labels=labels, num_items_in_batch=torch.tensor(2 * len(nats)))
    torch.testing.assert_close(halved.loss, outputs.loss / 2)
    shifted = torch.nn.functional.pad(targets, (0, 1), value=-100)
    torch.testing.assert_close(model(input_ids, shift_labels=shifted).loss, outputs.loss)


def test_logits_to_keep():
    model, input_ids = causal_lm(), ids(2, 6)
    whole = model(input_ids).logits
    torch.testing.assert_close(model(input_ids, logits_to_keep=2).logits, whole[:, -2:])
    torch.testing.assert_close(model(input_ids, logits_to_keep=torch.tensor([0, 3])).logits, whole[:, [0, 3]])


def test_hidden_states_and_tuples():
    model, input_ids = body(), ids(2, 4)
    outputs = model(input_ids, output_hidden_states=True)
    assert len(outputs.hidden_states) == 3
    assert torch.equal(outputs.hidden_states[0], model.embed_tokens(input_ids))
    assert torch.equal(outputs.hidden_states[-1], outputs.last_hidden_state)
    assert torch.equal(model(input_ids, return_dict=False)[0], outputs.last_hidden_state)


@pytest.mark.parametrize("tied", [False, True])
def test_save_and_load_bit_identical(tmp_path, tied):
    model = causal_lm(num_heads=0, kernel_size=3, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    loaded, report = MaskedMixerForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    for (name, value), (other_name, other) in zip(
        model.state_dict().items(), loaded.state_dict().items(), strict=True
    ):
        assert name == other_name
        assert torch.equal(value, other), name
    assert not list(model.buffers())
    input_ids = ids(2, 5)
    assert torch.equal(model(input_ids).logits, loaded(input_ids).logits)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert {**loaded.config.to_dict(), "_name_or_path": ""} == model.config.to_dict()


def test_a_weight_missing_from_the_folder_is_freshly_drawn(tmp_path):
    from safetensors.torch import load_file, save_file

    model = causal_lm()
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mixing.weight"], weights["model.layers.1.mixing.bias"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = MaskedMixerForCausalLM.from_pretrained(tmp_path)
    weight = loaded.model.layers[1].mixing.weight
    rows = torch.arange(1, 41).rsqrt()[:, None]
    assert (weight.abs() <= rows).all() and 0.4 < (weight.abs() / rows).mean() < 0.6
    assert (loaded.model.layers[1].mixing.bias == 0).all()
    kept = model.model.layers[0].mixing.weight
    assert torch.equal(loaded.model.layers[0].mixing.weight, kept)


@pytest.mark.parametrize(("num_heads", "kernel_size"), [(0, 1), (2, 2)])
def test_bfloat16_is_finite_and_close(num_heads, kernel_size):
    model = causal_lm(num_heads=num_heads, kernel_size=kernel_size, initializer_range=0.05)
    input_ids, mask = padded(TEXTS, "left")
    exact = model(input_ids, attention_mask=mask).logits[mask.bool()]
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(input_ids, attention_mask=mask, labels=input_ids)
    mixed.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    low = model.to(torch.bfloat16)
    outputs = low(input_ids, attention_mask=mask)
    for logits in (mixed.logits, outputs.logits):
        assert (logits[mask.bool()].float() - exact).abs().max() < 0.05 * exact.abs().max() + 0.02
    assert low.generate(input_ids, attention_mask=mask, max_new_tokens=3, do_sample=False).shape == (3, 10)


@pytest.mark.parametrize("side", ["right", "left"])
def test_compiled_equals_plain(side):
    torch._dynamo.reset()
    model = body()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    input_ids, mask = padded(TEXTS, side)
    real = mask.bool()
    plain = model(input_ids, attention_mask=mask, use_cache=False).last_hidden_state[real]
    torch.testing.assert_close(
        compiled(input_ids, attention_mask=mask, use_cache=False).last_hidden_state[real], plain, atol=1e-12, rtol=0
    )
    bare = model(input_ids, use_cache=False).last_hidden_state
    torch.testing.assert_close(compiled(input_ids, use_cache=False).last_hidden_state, bare, atol=1e-12, rtol=0)


@pytest.mark.parametrize("side", ["right", "left"])
def test_gradient_checkpointing_changes_nothing(side):
    model = causal_lm().train()
    input_ids, mask = padded(TEXTS, side)

    def step():
        model.zero_grad()
        loss = model(input_ids, attention_mask=mask, labels=input_ids, use_cache=True).loss
        loss.backward()
        return loss.detach(), [p.grad.clone() for p in model.parameters()]

    plain = step()
    # The name before transformers 5.23 is the second one.
    (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)()
    assert all(layer.gradient_checkpointing for layer in model.model.layers)
    checkpointed = step()
    assert torch.equal(plain[0], checkpointed[0])
    for one, other in zip(plain[1], checkpointed[1], strict=True):
        assert torch.equal(one, other)


def test_training_keeps_no_cache():
    model = causal_lm()
    assert model(ids(1, 3)).past_key_values is not None
    assert model(ids(1, 3), use_cache=False).past_key_values is None
    assert model.train()(ids(1, 3)).past_key_values is None


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"hidden_size": 10, "num_heads": 4}, "`hidden_size` is 10 and `num_heads` is 4"),
        ({"num_heads": -1}, "`num_heads` is -1"),
        ({"kernel_size": 0}, "`kernel_size` is 0"),
        ({"max_position_embeddings": 0}, "`max_position_embeddings` is 0"),
        ({"hidden_size": 8.0}, "`hidden_size` is 8.0"),
        ({"vocab_size": True}, "`vocab_size` is True"),
        ({"causal": "no"}, "`causal` is 'no'"),
    ],
)
def test_wrong_configs_are_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        config(**overrides)


def test_wrong_inputs_are_refused():
    model = body()
    static = StaticCache(config=config(num_attention_heads=2), max_cache_len=LENGTH)
    cases = [
        ({}, "either `input_ids` or `inputs_embeds`"),
        ({"input_ids": ids(1, 2), "inputs_embeds": torch.zeros(1, 2, 8)}, "either `input_ids` or `inputs_embeds`"),
        ({"input_ids": ids(1, LENGTH + 1)}, "needs 10 positions, but this masked mixer has 9"),
        ({"input_ids": ids(0, 3)}, r"shape \(0, 3\)"),
        ({"input_ids": ids(3, 0)}, r"shape \(3, 0\)"),
        ({"input_ids": ids(3)}, r"shape \(3,\)"),
        ({"input_ids": torch.zeros(1, 3)}, "float32"),
        ({"input_ids": torch.tensor([[1, VOCAB]])}, "holds the id 50, but .* the ids 0 to 49"),
        ({"input_ids": torch.tensor([[-1, 3]])}, "holds the id -1"),
        ({"inputs_embeds": torch.zeros(1, 2, 9)}, r"shape \(1, 2, 9\); expected \(batch, tokens, 8\)"),
        ({"input_ids": ids(2, 3), "attention_mask": torch.ones(2, 4)}, r"shape \(2, 4\); expected \(2, 3\)"),
        ({"input_ids": ids(2, 3), "attention_mask": torch.ones(2, 1, 3, 3)}, r"expected \(2, 3\)"),
        ({"input_ids": ids(2, 3), "position_ids": torch.arange(4)[None]}, r"shape \(1, 4\); expected \(2, 3\)"),
        ({"input_ids": ids(1, 4), "position_ids": torch.tensor([[0, 1, 0, 1]])}, "token 2 in row 0 does not follow"),
        ({"input_ids": ids(1, 2), "position_ids": torch.tensor([[-1, 0]])}, "negative position"),
        ({"input_ids": ids(1, 2), "position_ids": torch.tensor([[0, LENGTH]])}, "needs 10 positions"),
        ({"input_ids": ids(1, 2), "past_key_values": static}, "StaticCache"),
        ({"input_ids": ids(1, 2), "past_key_values": ((), ())}, "tuple"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            model(**arguments)


def test_wrong_uses_of_the_cache_are_refused():
    model = body()
    cache = model(ids(1, LENGTH), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="needs 10 positions"):
        model(ids(1, 1), past_key_values=cache)
    with pytest.raises(ValueError, match="`use_cache` is False"):
        model(ids(1, 1), past_key_values=cache, use_cache=False)
    two_way = body(causal=False)
    for arguments in ({"use_cache": True}, {"past_key_values": DynamicCache()}):
        with pytest.raises(ValueError, match="causal=False"):
            two_way(ids(1, 2), **arguments)
    assert two_way(ids(1, 2)).past_key_values is None


def test_a_causal_language_model_must_be_causal():
    with pytest.raises(ValueError, match="causal=True"):
        MaskedMixerForCausalLM(config(causal=False))


def test_wrong_labels_are_refused():
    model = causal_lm()
    with pytest.raises(ValueError, match=r"shape \(2, 4\), but the logits are of \(2, 3\)"):
        model(ids(2, 3), labels=ids(2, 4))
    with pytest.raises(ValueError, match="logits_to_keep"):
        model(ids(2, 3), labels=ids(2, 3), logits_to_keep=1)


def test_generation_stops_at_the_last_position_with_a_clear_error():
    model = causal_lm(max_position_embeddings=6)
    with pytest.raises(ValueError, match="needs 7 positions"):
        model.generate(
            ids(1, 3), generation_config=GenerationConfig(max_new_tokens=5, pad_token_id=0, do_sample=False)
        )


def test_arguments_are_not_changed():
    model = body()
    input_ids, mask = padded(TEXTS, "left")
    copies = input_ids.clone(), mask.clone()
    model(input_ids, attention_mask=mask)
    assert torch.equal(input_ids, copies[0]) and torch.equal(mask, copies[1])


def test_token_check_names_the_argument_and_the_owner():
    with pytest.raises(ValueError, match="`context` holds the id 7, but the token table of the reader"):
        check_token_ids("context", torch.tensor([[7]]), 7, "the reader")
    check_token_ids("context", torch.tensor([[7]]), None)
