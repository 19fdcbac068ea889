"""The batched model equals the plain loop; padding, order and later tokens change nothing they must not change."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_memory import MemoryEncoderDecoderForCausalLM, MemoryEncoderDecoderModel
from tests.memory_models import BLANK, CHUNK, COPY, FAMILIES, SLOT, WINDOW, build_model, ragged_batch, random_ids
from tests.reference import memory_loop

# Measured worst case over all families and tests of this file: 3.6e-6 on logits of up to 12.
ATOL = 1e-5
FIXED = {"memory_positions": "fixed", "max_memories": 9}
SPREAD = {"memory_positions": "spread", "max_memories": 9}
SOURCE = {"memory_positions": "source"}
MARKERS = {"copy_token_id": 30, "blank_token_id": 31}  # which random texts hold here and there
LAYOUTS = {
    "contiguous": {},
    "fixed": FIXED,
    "spread": SPREAD,
    "source": SOURCE,
    "source, three memories a chunk": {**SOURCE, "memories_per_chunk": 3},
    "spread, two memories a chunk": {**SPREAD, "max_memories": 18, "memories_per_chunk": 2},
    "spread, ones": {**SPREAD, "absent_memories": "ones"},
    "ones": {**FIXED, "absent_memories": "ones"},
    "zeros": {**FIXED, "absent_memories": "zeros"},
    "two memories a chunk": {"memories_per_chunk": 2},
    "mean of groups": {"memories_per_chunk": 3, "pooling": "mean"},
    "mlp": {"projector_type": "mlp"},
    "bottleneck": {"projector_type": "bottleneck", "projector_norm": True},
    "identity": {"projector_type": "identity"},
    "window positions": {"window_positions": True, **MARKERS},
    "fixed, window positions": {**FIXED, "window_positions": True, **MARKERS},
    "spread, window positions": {**SPREAD, "window_positions": True, **MARKERS},
}


def assert_rows_equal(logits, expected_rows, attention_mask=None):
    for number, expected in enumerate(expected_rows):
        keep = slice(None) if attention_mask is None else attention_mask[number].bool()
        torch.testing.assert_close(logits[number][keep], expected, atol=ATOL, rtol=0)


def enable_checkpointing(model):
    """The method was renamed in transformers 5.23."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()


@pytest.mark.parametrize(("encoder", "decoder"), FAMILIES)
class TestFamilies:
    def test_logits_equal_the_plain_loop(self, encoder, decoder):
        model = build_model(encoder, decoder)
        input_ids = random_ids(3, 29)
        logits = model(input_ids).logits
        assert logits.shape == (3, 29, 96)
        assert_rows_equal(logits, memory_loop.read_texts(model, input_ids))

    def test_ragged_logits_equal_the_plain_loop(self, encoder, decoder):
        model = build_model(encoder, decoder)
        input_ids, mask = ragged_batch()
        assert_rows_equal(
            model(input_ids, attention_mask=mask).logits, memory_loop.read_texts(model, input_ids, mask), mask
        )

    def test_loss_and_gradients_equal_the_plain_loop(self, encoder, decoder):
        model = build_model(encoder, decoder, freeze_encoder=False)
        input_ids, mask = ragged_batch()
        expected = memory_loop.causal_loss(model, input_ids, mask)
        expected.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad(set_to_none=True)
        loss = model(input_ids, attention_mask=mask, labels=input_ids.masked_fill(mask == 0, -100)).loss
        loss.backward()
        torch.testing.assert_close(loss, expected, atol=1e-5, rtol=0)
        assert any(name.startswith("encoder") for name in gradients)
        for name, parameter in model.named_parameters():
            if name in gradients:
                torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-5, rtol=1e-4, msg=name)
            else:
                assert parameter.grad is None or not parameter.grad.any(), name

    def test_slots_equal_the_plain_loop(self, encoder, decoder):
        model = build_model(encoder, decoder)
        chunks = random_ids(2, 3, CHUNK, seed=1)
        chunk_mask = torch.ones_like(chunks)
        chunk_mask[0, 1, 3:] = 0  # a short chunk
        chunk_mask[1, 2] = 0  # an absent chunk
        prompt = random_ids(2, 12, seed=2)
        prompt[0, [0, 5, 11]] = SLOT
        prompt[1, [3, 4]] = SLOT
        out = model(prompt, context_input_ids=chunks, context_attention_mask=chunk_mask)
        for row in range(2):
            real = [c[m.bool()] for c, m in zip(chunks[row], chunk_mask[row], strict=True) if m.any()]
            expected = memory_loop.read_slots(model, real, prompt[row])
            torch.testing.assert_close(out.logits[row], expected, atol=ATOL, rtol=0)

    def test_a_text_of_one_window_is_the_plain_decoder(self, encoder, decoder):
        model = build_model(encoder, decoder)
        input_ids = random_ids(3, WINDOW)
        torch.testing.assert_close(model(input_ids).logits, model.decoder(input_ids).logits, atol=0, rtol=0)

    def test_bfloat16_is_finite_and_near_float32(self, encoder, decoder):
        model = build_model(encoder, decoder)
        input_ids, mask = ragged_batch()
        expected = model(input_ids, attention_mask=mask).logits[mask.bool()]
        logits = copy.deepcopy(model).bfloat16()(input_ids, attention_mask=mask).logits[mask.bool()]
        assert logits.dtype == torch.bfloat16
        # Measured worst relative distance over all families: 0.03.
        assert (logits.float() - expected).norm() < 0.1 * expected.norm()

    def test_sdpa_equals_eager(self, encoder, decoder):
        model = build_model(encoder, decoder)
        input_ids, mask = ragged_batch()
        sdpa = model(input_ids, attention_mask=mask).logits[mask.bool()]
        model.set_attn_implementation("eager")
        assert model.decoder.config._attn_implementation == "eager"
        torch.testing.assert_close(model(input_ids, attention_mask=mask).logits[mask.bool()], sdpa, atol=ATOL, rtol=0)

    def test_activation_checkpointing_changes_nothing(self, encoder, decoder):
        model = build_model(encoder, decoder, freeze_encoder=False).train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        input_ids, mask = ragged_batch()
        labels = input_ids.masked_fill(mask == 0, -100)

        def gradients():
            model.zero_grad(set_to_none=True)
            loss = model(input_ids, attention_mask=mask, labels=labels).loss
            loss.backward()
            return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

        loss, expected = gradients()
        enable_checkpointing(model)
        checkpointed_loss, got = gradients()
        torch.testing.assert_close(checkpointed_loss, loss, atol=1e-6, rtol=0)
        for name, gradient in expected.items():
            torch.testing.assert_close(got[name], gradient, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("layout", LAYOUTS)
class TestLayouts:
    def test_logits_equal_the_plain_loop(self, layout):
        model = build_model(**LAYOUTS[layout])
        input_ids, mask = ragged_batch()
        assert_rows_equal(
            model(input_ids, attention_mask=mask).logits, memory_loop.read_texts(model, input_ids, mask), mask
        )
        assert_rows_equal(model(input_ids).logits, memory_loop.read_texts(model, input_ids))

    def test_a_window_equals_the_same_memories_in_slots(self, layout):
        """The batched prefix and the single row differ by kernel shapes only: measured at most 1.4e-6."""
        model = build_model(**LAYOUTS[layout])
        input_ids = random_ids(3, 3 * WINDOW)
        memory_embeds, memory_mask = model.encode_memories(input_ids[:, : 2 * WINDOW].reshape(3, -1, CHUNK))
        num_memories = memory_embeds.shape[1]
        slots = torch.full((3, num_memories), SLOT)
        prompt = torch.cat([slots, input_ids[:, 2 * WINDOW :]], 1)
        out = model(prompt, memory_embeds=memory_embeds, memory_mask=memory_mask)
        expected = model(input_ids).logits[:, 2 * WINDOW :]
        torch.testing.assert_close(out.logits[:, num_memories:], expected, atol=ATOL, rtol=0)

    def test_gradients_equal_the_plain_loop(self, layout):
        model = build_model(**LAYOUTS[layout], freeze_encoder=False)
        input_ids = random_ids(2, 21)
        memory_loop.causal_loss(model, input_ids).backward()
        expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad(set_to_none=True)
        model(input_ids, labels=input_ids).loss.backward()
        for name, gradient in expected.items():
            torch.testing.assert_close(model.get_parameter(name).grad, gradient, atol=1e-5, rtol=1e-4, msg=name)


def test_the_shared_prefix_equals_one_row_for_each_window():
    """Memories run once and shared by the windows, or once for each window: same logits and gradients."""
    model = build_model("llama", freeze_encoder=False).train()
    input_ids, mask = ragged_batch(60)
    results = []
    for checkpointing in (False, True):  # activation checkpointing takes the path without a cache
        if checkpointing:
            enable_checkpointing(model)
        model.zero_grad(set_to_none=True)
        out = model(input_ids, attention_mask=mask, labels=input_ids.masked_fill(mask == 0, -100))
        out.loss.backward()
        results.append((out.logits.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (logits, gradients), (row_logits, row_gradients) = results
    torch.testing.assert_close(logits[mask.bool()], row_logits[mask.bool()], atol=ATOL, rtol=0)
    for name, gradient in gradients.items():
        torch.testing.assert_close(row_gradients[name], gradient, atol=1e-5, rtol=1e-4, msg=name)


@settings(max_examples=25, deadline=None)
@given(data=st.data(), num_rows=st.integers(1, 4), num_columns=st.integers(1, 40))
def test_any_mask_equals_the_plain_loop(data, num_rows, num_columns):
    model = build_model()
    bits = st.lists(st.booleans(), min_size=num_columns, max_size=num_columns).filter(any)
    mask = torch.tensor([data.draw(bits) for _ in range(num_rows)]).long()
    input_ids = random_ids(num_rows, num_columns)
    logits = model(input_ids, attention_mask=mask).logits
    assert_rows_equal(logits, memory_loop.read_texts(model, input_ids, mask), mask)


class TestPadding:
    def test_left_equals_right(self):
        model = build_model()
        for length in (5, WINDOW, 21):
            text = random_ids(1, length)
            padding = torch.zeros(1, 6, dtype=torch.long)
            left, right = torch.cat([padding, text], 1), torch.cat([text, padding], 1)
            expected = model(text).logits
            got_left = model(left, attention_mask=(left != 0).long()).logits[:, 6:]
            got_right = model(right, attention_mask=(right != 0).long()).logits[:, :length]
            torch.testing.assert_close(got_left, expected, atol=ATOL, rtol=0)
            torch.testing.assert_close(got_right, expected, atol=ATOL, rtol=0)

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_loss_of_padded_texts_is_the_loss_of_the_texts(self, side):
        """The first token of a left-padded text is no target: nothing before it could predict it."""
        model = build_model()
        texts = [random_ids(1, length, seed=length) for length in (6, 11, 23)]
        total = sum(model(text, labels=text).loss * (text.shape[1] - 1) for text in texts)
        width = max(text.shape[1] for text in texts)
        rows, masks = [], []
        for text in texts:
            gap = torch.zeros(1, width - text.shape[1], dtype=torch.long)
            ones = torch.ones_like(text)
            order = (lambda a, b: torch.cat([a, b], 1)) if side == "left" else (lambda a, b: torch.cat([b, a], 1))
            rows.append(order(gap, text))
            masks.append(order(gap, ones))
        input_ids, mask = torch.cat(rows), torch.cat(masks)
        loss = model(input_ids, attention_mask=mask, labels=input_ids.masked_fill(mask == 0, -100)).loss
        torch.testing.assert_close(loss, total / sum(text.shape[1] - 1 for text in texts), atol=1e-5, rtol=0)

    def test_what_stands_in_padding_does_not_matter(self):
        model = build_model()
        input_ids, mask = ragged_batch()
        other = torch.where(mask.bool(), input_ids, random_ids(*input_ids.shape, seed=5))
        first, second = (model(ids, attention_mask=mask).logits[mask.bool()] for ids in (input_ids, other))
        assert torch.equal(first, second)

    def test_context_padding_does_not_matter(self):
        model = build_model("llama")
        chunks, chunk_mask = random_ids(2, 3, CHUNK), torch.ones(2, 3, CHUNK, dtype=torch.long)
        chunk_mask[0, 2, 2:] = 0
        chunk_mask[1, 1] = 0
        other = torch.where(chunk_mask.bool(), chunks, 7)
        first, second = model.encode_memories(chunks, chunk_mask), model.encode_memories(other, chunk_mask)
        assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
        assert first[1].tolist() == [[1, 1, 1], [1, 0, 1]]
        assert not first[0][1, 1].any()
        left = torch.cat([chunks[:1, 2:, 2:] * 0, chunks[:1, 2:, :2]], 2)
        moved = model.encode_memories(left, torch.tensor([[[0, 0, 1, 1]]]))[0]
        torch.testing.assert_close(moved[0, 0], first[0][0, 2], atol=1e-5, rtol=0)

    def test_batched_equals_single(self):
        model = build_model()
        input_ids, mask = ragged_batch()
        logits = model(input_ids, attention_mask=mask).logits
        for row in range(len(input_ids)):
            text = input_ids[row][mask[row].bool()][None]
            torch.testing.assert_close(logits[row][mask[row].bool()], model(text).logits[0], atol=ATOL, rtol=0)


class TestCausality:
    @pytest.mark.parametrize("position", [0, 3, 8, 11, 15, 16, 27])
    def test_a_token_changes_nothing_before_it(self, position):
        model = build_model()
        input_ids = random_ids(1, 29)
        changed = input_ids.clone()
        changed[0, position] = (input_ids[0, position] - 5 + 1) % 91 + 5
        before, after = model(input_ids).logits, model(changed).logits
        assert torch.equal(before[:, :position], after[:, :position])
        assert not torch.equal(before[:, position:], after[:, position:])

    def test_a_chunk_reaches_later_windows_through_its_memory_only(self):
        model = build_model()
        first, second = random_ids(1, 2 * WINDOW), random_ids(1, 2 * WINDOW, seed=3)
        second[:, WINDOW:] = first[:, WINDOW:]
        first_memory, memory_mask = model.encode_memories(first[:, :WINDOW].reshape(1, -1, CHUNK))
        prompt = torch.cat([torch.full((1, 2), SLOT), second[:, WINDOW:]], 1)
        with_first = model(prompt, memory_embeds=first_memory, memory_mask=memory_mask).logits[:, 2:]
        expected = model(first).logits[:, WINDOW:]
        torch.testing.assert_close(with_first, expected, atol=ATOL, rtol=0)
        assert (model(second).logits[:, WINDOW:] - expected).abs().max() > 1e-3

    def test_absent_memories_are_no_memories(self):
        model = build_model()
        prompt = random_ids(2, 6)
        memory_embeds = torch.randn(2, 5, 32)
        out = model(prompt, memory_embeds=memory_embeds, memory_mask=torch.zeros(2, 5, dtype=torch.long))
        torch.testing.assert_close(out.logits, model(prompt).logits, atol=ATOL, rtol=0)

    def test_memories_can_stand_anywhere_and_order_matters(self):
        model = build_model()
        memory_embeds, memory_mask = model.encode_memories(random_ids(1, 2, CHUNK))
        prompt = torch.tensor([[7, SLOT, 8, SLOT, 9]])
        out = model(prompt, memory_embeds=memory_embeds, memory_mask=memory_mask).logits
        swapped = model(prompt, memory_embeds=memory_embeds.flip(1), memory_mask=memory_mask).logits
        assert torch.equal(out[:, 0], swapped[:, 0])
        assert (out[:, 1:] - swapped[:, 1:]).abs().max() > 1e-3


class TestFreezing:
    def test_a_training_step_moves_what_is_not_frozen_and_nothing_else(self):
        model = build_model("bert").train()
        assert not model.encoder.training and model.decoder.training
        before = copy.deepcopy(model.state_dict())
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        model(random_ids(2, 20), labels=random_ids(2, 20)).loss.backward()
        assert all(p.grad is None for p in model.encoder.parameters())
        assert all(p.grad is not None for p in model.projector.parameters())
        optimizer.step()
        for name, value in model.state_dict().items():
            moved = not torch.equal(value, before[name])
            assert moved != name.startswith("encoder."), name

    def test_freezing_survives_loading(self, tmp_path):
        model = build_model(freeze_decoder=True)
        model.save_pretrained(tmp_path)
        loaded, report = MemoryEncoderDecoderForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"]
        trainable = {name.split(".")[0] for name, p in loaded.named_parameters() if p.requires_grad}
        assert trainable == {"projector"}
        loaded.train()
        assert loaded.training and not loaded.encoder.training and not loaded.decoder.training

    def test_a_frozen_decoder_still_carries_gradients_to_the_projector(self):
        model = build_model(freeze_decoder=True).train()
        model(random_ids(2, 20), labels=random_ids(2, 20)).loss.backward()
        assert all(p.grad is not None and p.grad.any() for p in model.projector.parameters())
        assert all(p.grad is None for p in model.decoder.parameters())


class TestLoss:
    def test_shift_labels_are_targets_of_each_column(self):
        model = build_model()
        input_ids = random_ids(2, 20)
        targets = torch.full_like(input_ids, -100)
        targets[:, 9:] = random_ids(2, 11, seed=4)
        out = model(input_ids, shift_labels=targets)
        expected = torch.nn.functional.cross_entropy(out.logits[:, 9:].flatten(0, 1), targets[:, 9:].flatten())
        torch.testing.assert_close(out.loss, expected)

    def test_the_first_token_of_a_window_is_trained(self):
        model = build_model()
        input_ids = random_ids(1, 2 * WINDOW)
        labels = torch.full_like(input_ids, -100)
        labels[0, WINDOW] = input_ids[0, WINDOW]
        out = model(input_ids, labels=labels)
        expected = -out.logits[0, WINDOW - 1].log_softmax(-1)[input_ids[0, WINDOW]]
        torch.testing.assert_close(out.loss, expected)

    def test_num_items_in_batch_is_what_the_sum_is_divided_by(self):
        model = build_model()
        input_ids = random_ids(2, 20)
        mean = model(input_ids, labels=input_ids).loss
        torch.testing.assert_close(model(input_ids, labels=input_ids, num_items_in_batch=76).loss, mean / 2)

    def test_arguments_are_not_changed(self):
        model = build_model()
        input_ids, mask = ragged_batch()
        labels = input_ids.masked_fill(mask == 0, -100)
        copies = [t.clone() for t in (input_ids, mask, labels)]
        model(input_ids, attention_mask=mask, labels=labels)
        assert all(torch.equal(a, b) for a, b in zip((input_ids, mask, labels), copies, strict=True))


class TestOutputs:
    def test_logits_to_keep(self):
        model = build_model()
        for length in (6, 29):
            input_ids = random_ids(2, length)
            full = model(input_ids).logits
            for kept in (1, 3, 40):
                torch.testing.assert_close(
                    model(input_ids, logits_to_keep=kept).logits, full[:, -kept:], atol=ATOL, rtol=0
                )
            columns = torch.tensor([0, length - 2])
            torch.testing.assert_close(
                model(input_ids, logits_to_keep=columns).logits, full[:, columns], atol=ATOL, rtol=0
            )

    def test_hidden_states_have_the_layout_of_the_text(self):
        model = build_model()
        input_ids, mask = ragged_batch()
        out = model(input_ids, attention_mask=mask, output_hidden_states=True)
        assert len(out.hidden_states) == 3
        assert all(states.shape == (*input_ids.shape, 32) for states in out.hidden_states)
        head = model.get_output_embeddings()
        torch.testing.assert_close(
            head(out.hidden_states[-1])[mask.bool()], out.logits[mask.bool()], atol=ATOL, rtol=0
        )

    def test_the_bare_model_returns_the_states_under_the_head(self, tmp_path):
        model = build_model()
        model.save_pretrained(tmp_path)
        bare, report = MemoryEncoderDecoderModel.from_pretrained(tmp_path, output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"]
        input_ids, mask = ragged_batch()
        states = bare(input_ids, attention_mask=mask).last_hidden_state
        expected = model(input_ids, attention_mask=mask).logits
        torch.testing.assert_close(bare.get_output_embeddings()(states), expected, atol=ATOL, rtol=0)

    def test_tuples_and_embeddings(self):
        model = build_model()
        input_ids = random_ids(2, 6)
        expected = model(input_ids).logits
        assert torch.equal(model(input_ids, return_dict=False, use_cache=False)[0], expected)
        embeds = model.get_input_embeddings()(input_ids)
        torch.testing.assert_close(model(inputs_embeds=embeds).logits, expected, atol=ATOL, rtol=0)
        memory_embeds, memory_mask = model.encode_memories(random_ids(2, 3, CHUNK))
        prompt = torch.cat([torch.full((2, 3), SLOT), input_ids], 1)
        with_slots = model(prompt, memory_embeds=memory_embeds, memory_mask=memory_mask).logits[:, 3:]
        in_front = model(inputs_embeds=embeds, memory_embeds=memory_embeds, memory_mask=memory_mask).logits
        torch.testing.assert_close(in_front, with_slots, atol=ATOL, rtol=0)

    def test_one_context_serves_many_prompts(self):
        model = build_model()
        memory_embeds, memory_mask = model.encode_memories(random_ids(1, 2, CHUNK))
        prompts = torch.cat([torch.full((3, 2), SLOT), random_ids(3, 5)], 1)
        one = model(prompts, memory_embeds=memory_embeds).logits
        many = model(
            prompts, memory_embeds=memory_embeds.expand(3, -1, -1), memory_mask=memory_mask.expand(3, -1)
        ).logits
        assert torch.equal(one, many)


@pytest.mark.parametrize("length", [6, 29])
def test_compiled_equals_eager(length):
    model = build_model("llama")
    input_ids = random_ids(2, length)
    expected = model(input_ids, use_cache=False).logits
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(input_ids, use_cache=False).logits, expected, atol=ATOL, rtol=0)


def test_markers_are_ordinary_tokens_of_both_tables():
    model = build_model("llama")
    text = torch.tensor([[7, 8, 9, 10, 11, 12, 13, 14, COPY, *([BLANK] * 7), 15]])
    assert_rows_equal(model(text).logits, memory_loop.read_texts(model, text))


@pytest.mark.parametrize("fields", [{}, {"window_positions": True}, {"memory_positions": "fixed", "max_memories": 8}])
def test_activation_checkpointing_keeps_no_cache(fields):
    model = build_model(**fields).train()
    (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)()
    slotted = torch.cat([torch.full((2, 2), SLOT), random_ids(2, 5)], 1)
    for inputs in (
        {"input_ids": random_ids(2, 2 * WINDOW + 3)},
        {"input_ids": slotted, "context_input_ids": random_ids(2, 2, CHUNK)},
    ):
        out = model(**inputs, use_cache=True)
        assert out.past_key_values is None
        assert torch.equal(out.logits, model(**inputs).logits)
    cache = model.eval()(random_ids(2, 3), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="keeps none"):
        model.train()(random_ids(2, 1), past_key_values=cache)
