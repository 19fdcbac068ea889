"""Every public entry of the memory model refuses what it cannot read, and says what was given, expected and to do."""

import pytest
import torch
from transformers import BartConfig, BartModel, LlamaModel, MistralConfig

from modeling_memory import (
    MemoryEncoderDecoderConfig,
    MemoryEncoderDecoderForCausalLM,
    MemoryEncoderDecoderModel,
)
from tests.conftest import tiny_decoder_config, tiny_encoder_config
from tests.memory_models import CHUNK, SLOT, WINDOW, build_model, random_ids


def config(**fields):
    fields = {
        "encoder": tiny_encoder_config("llama"),
        "decoder": tiny_decoder_config(),
        "chunk_length": CHUNK,
        **fields,
    }
    return MemoryEncoderDecoderConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"chunk_length": 0}, "`chunk_length` is 0"),
        ({"chunk_length": 2.5}, "`chunk_length` is 2.5"),
        ({"chunk_length": True}, "`chunk_length` is True"),
        ({"window_length": 6}, "6 and `chunk_length` is 4.*multiple"),
        ({"memories_per_chunk": 5}, "more than the 4 tokens"),
        ({"pooling": "max"}, "'max'; expected one of 'last', 'mean'"),
        ({"projector_type": "conv"}, "'conv'; expected one of 'identity'"),
        ({"memory_positions": "random"}, "expected one of 'contiguous', 'fixed', 'spread'"),
        ({"absent_memories": "twos"}, "expected one of 'mask'"),
        ({"absent_memories": "ones"}, "memory_positions='fixed'"),
        ({"memory_positions": "fixed"}, "`max_memories`, which is not set"),
        ({"memory_positions": "spread"}, "`max_memories`, which is not set"),
        (
            {"memory_positions": "spread", "max_memories": 6, "memories_per_chunk": 3},
            "`chunk_length` 4 is no multiple",
        ),
        ({"memory_positions": "spread", "max_memories": 100}, "100, of 4 positions each.*need 404 positions"),
        ({"max_memories": -1}, "`max_memories` is -1"),
        ({"max_memories": 125}, "need 129 positions.*see 128"),
        ({"chunk_length": 256, "window_length": 256}, "need 256 positions"),
        ({"projector_noise": -0.5}, "`projector_noise` is -0.5"),
        ({"projector_noise": 0.5}, "'linear' projector adds none"),
        ({"encoder": tiny_encoder_config("llama", hidden_size=16), "projector_type": "identity"}, "has 16 and .* 32"),
        (
            {"encoder": tiny_encoder_config("llama", vocab_size=50)},
            "knows 50 ids and the decoder 96.*self_memory=False",
        ),
        ({"encoder": tiny_encoder_config("llama", max_position_embeddings=3)}, "takes 3 tokens"),
        (
            {"encoder": {"model_type": "vit_msn", "vocab_size": 96}, "decoder": {"model_type": "encodec"}},
            "vocab_size",
        ),
        ({"copy_token_id": 96}, "table has 96 rows"),
        ({"blank_token_id": -1}, "0 or more"),
        ({"copy_token_id": 3, "blank_token_id": 3}, "are both 3"),
        ({"copy_token_id": 2}, "`copy_token_id` and `eos_token_id` are both 2"),
        ({"memory_token_id": 0}, "`memory_token_id` and `pad_token_id` are both 0"),
        (
            {"decoder": MistralConfig(vocab_size=96, hidden_size=32, sliding_window=16), "max_memories": 13},
            "need 17 positions.*see 16.*attention window 16",
        ),
    ],
)
def test_configs_that_do_not_fit(fields, message):
    with pytest.raises(ValueError, match=message):
        config(**fields)


def test_a_sliding_window_bounds_what_a_text_may_need():
    decoder = MistralConfig(
        vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=7,
    )  # fmt: skip
    model = MemoryEncoderDecoderForCausalLM(config(decoder=decoder)).eval()
    assert model.config.memory_capacity == 3
    model(random_ids(1, 16))
    with pytest.raises(ValueError, match="needs 4 memories.*takes 3"):
        model(random_ids(1, 17))


CHUNKS = random_ids(2, 3, CHUNK)
SLOTTED = torch.cat([torch.full((2, 3), SLOT), random_ids(2, 4)], 1)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "neither were given"),
        ({"input_ids": random_ids(1, 3), "inputs_embeds": torch.zeros(1, 3, 32)}, "both were given"),
        ({"input_ids": torch.zeros(0, 3, dtype=torch.long)}, r"shape \(0, 3\)"),
        ({"input_ids": torch.zeros(2, 0, dtype=torch.long)}, r"shape \(2, 0\)"),
        ({"input_ids": random_ids(5)}, r"shape \(5,\); expected 2 dimensions"),
        ({"input_ids": torch.tensor([[5, 97]])}, "0 to 95.*holds 97"),
        ({"input_ids": torch.tensor([[5, -1]])}, "0 to 95.*holds -1"),
        ({"input_ids": random_ids(2, 3), "attention_mask": torch.ones(2, 4)}, r"\(2, 4\).*3 columns"),
        (
            {"input_ids": random_ids(2, 3), "attention_mask": torch.tensor([[1, 1, 1], [0, 0, 0]])},
            "Row 1 .*0 everywhere",
        ),
        ({"input_ids": random_ids(2, 3), "labels": random_ids(2, 4)}, r"`labels` has shape \(2, 4\).*\(2, 3\)"),
        ({"input_ids": random_ids(2, 3), "shift_labels": random_ids(1, 3)}, "`shift_labels` has shape"),
        ({"input_ids": random_ids(2, 3), "labels": random_ids(2, 3), "logits_to_keep": 1}, "logits of all columns"),
        ({"input_ids": SLOTTED}, "Row 0 .* 3 memory slots.*but 0 memories"),
        ({"input_ids": SLOTTED, "context_input_ids": CHUNKS[:, :2]}, "Row 0 .* 3 memory slots.*2 memories"),
        (
            {
                "input_ids": SLOTTED,
                "context_input_ids": CHUNKS,
                "context_attention_mask": torch.tensor([[1, 1, 1], [1, 0, 1]])[..., None].expand(2, 3, CHUNK),
            },
            "Row 1 .* 3 memory slots.*2 memories",
        ),
        (
            {"input_ids": SLOTTED, "context_input_ids": CHUNKS, "labels": SLOTTED.clamp(max=95)},
            "is a memory slot, but its label",
        ),
        (
            {"input_ids": SLOTTED, "context_input_ids": CHUNKS, "memory_embeds": torch.zeros(2, 3, 32)},
            "Both `context_input_ids`",
        ),
        ({"input_ids": SLOTTED, "context_input_ids": CHUNKS[0]}, "expected .batch, chunks, chunk tokens."),
        ({"input_ids": SLOTTED, "context_input_ids": CHUNKS + 90}, "encoder knows ids 0 to 95"),
        (
            {"input_ids": SLOTTED, "context_input_ids": random_ids(2, 3, 129)},
            "has 129 tokens, but the encoder takes 128",
        ),
        (
            {"input_ids": SLOTTED, "context_input_ids": CHUNKS, "context_attention_mask": torch.ones(2, 3)},
            "`context_attention_mask` has shape",
        ),
        ({"input_ids": SLOTTED, "memory_embeds": torch.zeros(2, 3, 31)}, "decoder's width"),
        ({"input_ids": SLOTTED, "memory_embeds": torch.zeros(3, 3, 32)}, "3 rows and the text 2"),
        (
            {"input_ids": SLOTTED, "memory_embeds": torch.zeros(2, 3, 32), "memory_mask": torch.ones(2, 2)},
            "one mask value",
        ),
        ({"inputs_embeds": torch.zeros(1, WINDOW + 1, 32)}, "embeddings cannot be compressed"),
        ({"input_ids": random_ids(1, 9), "position_ids": torch.arange(9)[None]}, "`position_ids` were given"),
        ({"input_ids": random_ids(1, 9), "output_attentions": True}, "`output_attentions` was asked"),
    ],
)
def test_calls_that_do_not_fit(inputs, message):
    with pytest.raises(ValueError, match=message):
        build_model("llama")(**inputs)


def test_memories_without_a_slot_id():
    model = build_model(memory_token_id=None)
    with pytest.raises(ValueError, match="`config.memory_token_id` is not set"):
        model(random_ids(1, 3), memory_embeds=torch.zeros(1, 1, 32))


def test_more_memories_than_positions():
    with pytest.raises(ValueError, match="needs 200 memories"):
        build_model()(random_ids(1, 3), memory_embeds=torch.zeros(1, 200, 32))
    with pytest.raises(ValueError, match="takes 120"):
        build_model()(random_ids(1, 600))


def test_fixed_positions_want_their_slots_in_front():
    model = build_model(memory_positions="fixed", max_memories=4)
    with pytest.raises(ValueError, match="all memories stand before the text"):
        model(torch.tensor([[7, SLOT]]), memory_embeds=torch.zeros(1, 1, 32))


def test_a_decoder_without_a_head_or_a_cache():
    body = LlamaModel(tiny_decoder_config())
    with pytest.raises(ValueError, match="without a language modelling head"):
        MemoryEncoderDecoderForCausalLM.from_encoder_decoder_pretrained(body, body, chunk_length=4)


def test_an_encoder_with_a_decoder_of_its_own():
    bart = BartModel(
        BartConfig(
            vocab_size=96, d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=8, decoder_ffn_dim=8,
            encoder_attention_heads=2, decoder_attention_heads=2,
        )
    )  # fmt: skip
    with pytest.raises(ValueError, match="'bart' model has an encoder and a decoder of its own"):
        MemoryEncoderDecoderForCausalLM.from_encoder_decoder_pretrained(bart, build_model().decoder, chunk_length=4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"freeze_encoder": "no"}, "`freeze_encoder` is 'no'; expected True or False"),
        ({"self_memory": 1}, "`self_memory` is 1; expected True or False"),
        ({"max_memories": "8"}, "`max_memories` is '8'; expected an integer"),
        ({"memory_token_id": 1.5}, "`memory_token_id` is 1.5; expected an integer"),
        ({"copy_token_id": True}, "`copy_token_id` is True; expected an integer"),
        ({"projector_type": "mlp", "projector_hidden_size": -3}, "`projector_hidden_size` is -3"),
        ({"projector_noise": "1e-4"}, "`projector_noise` is '1e-4'; expected a number"),
        ({"initializer_range": -1.0}, "`initializer_range` is -1.0"),
    ],
)
def test_fields_of_another_type(fields, message):
    with pytest.raises(ValueError, match=message):
        config(**fields)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (
            {"context_attention_mask": torch.ones(2, 1, CHUNK)},
            "`context_attention_mask` .*without `context_input_ids`",
        ),
        ({"memory_mask": torch.ones(2, 1)}, "`memory_mask` .*without `memory_embeds`"),
        ({"labels": torch.full((2, 3), 96)}, "0 to 95.*`labels` holds 96"),
        ({"shift_labels": torch.full((2, 3), -1)}, "0 to 95.*`shift_labels` holds -1"),
    ],
)
def test_inputs_that_nothing_would_read(inputs, message):
    with pytest.raises(ValueError, match=message):
        build_model("llama")(random_ids(2, 3), **inputs)


def test_ids_and_masks_of_other_kinds_are_refused():
    model, input_ids = build_model(), random_ids(2, 2 * WINDOW)
    with pytest.raises(ValueError, match="`input_ids` has type torch.float32; expected integers"):
        model(input_ids.float())
    with pytest.raises(ValueError, match="`attention_mask` is a dict; expected"):
        model(input_ids, attention_mask={"full_attention": None})
    with pytest.raises(ValueError, match=r"`attention_mask` has shape \(2, 1, 16, 16\), but a text that is cut"):
        model(input_ids, attention_mask=torch.ones(2, 1, 16, 16))
    with pytest.raises(ValueError, match=r"`attention_mask` has shape \(16,\); expected"):
        model(input_ids, attention_mask=torch.ones(16))


def test_a_cached_step_wants_the_mask_of_all_that_a_cache_of_the_librarys_holds():
    model, text = build_model(), torch.cat([torch.full((1, 2), SLOT), random_ids(1, 4)], 1)
    mask = torch.tensor([[1, 1, 0, 1, 1, 1]])
    full = model(text, mask, context_input_ids=random_ids(1, 2, CHUNK)).logits
    cache = model(text[:, :4], mask[:, :4], context_input_ids=random_ids(1, 2, CHUNK), use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"`attention_mask` has shape \(1, 2\).* the cache 4. Expected \(1, 6\)"):
        model(text[:, 4:], mask[:, 4:], past_key_values=cache)
    torch.testing.assert_close(model(text[:, 4:], mask, past_key_values=cache).logits, full[:, 4:])


@pytest.mark.parametrize(
    ("mask", "given"),
    [
        ([[1, 1, 1]], "a list"),
        (torch.ones(3), r"\(3,\)"),
        (torch.ones(1, 1, 3, 3), r"\(1, 1, 3, 3\)"),
        (torch.ones(1, 2), r"\(1, 2\)"),
    ],
)
def test_generate_refuses_masks_that_tell_no_token_from_padding(mask, given):
    with pytest.raises(ValueError, match=rf"`attention_mask` .*{given}.*[Ee]xpected.*\(1, 3\)"):
        build_model().generate(random_ids(1, 3), attention_mask=mask, max_new_tokens=1)


@pytest.mark.parametrize("call", ["forward", "generate"])
@pytest.mark.parametrize(
    ("mask", "given"), [([[1, 1, 1]], "list"), (torch.ones(1, 2), r"\(1, 2\)"), (torch.ones(3), r"\(3,\)")]
)
def test_a_mask_of_memories_has_one_value_for_each_and_the_message_says_how_many(call, mask, given):
    model, memories = build_model(), torch.ones(1, 3, 32)
    prompt = torch.cat([torch.full((1, 3), SLOT), random_ids(1, 2)], 1)
    options = {"max_new_tokens": 1} if call == "generate" else {}
    with pytest.raises(ValueError, match=rf"`memory_mask` has shape {given}.*Expected \(1, 3\): one mask value"):
        getattr(model, call)(prompt, memory_embeds=memories, memory_mask=mask, **options)


def test_a_misspelt_keyword_is_named_and_the_librarys_own_pass():
    model, input_ids = build_model(), random_ids(1, 5)
    with pytest.raises(ValueError, match="Unexpected keyword argument `memory_embed`. Did you mean `memory_embeds`"):
        model(input_ids, memory_embed=torch.ones(1, 1, 32))
    with pytest.raises(ValueError, match="Unexpected keyword argument `atention_mask`"):
        MemoryEncoderDecoderModel(model.config)(input_ids, atention_mask=torch.ones_like(input_ids))
    with pytest.raises(ValueError, match="Unexpected keyword argument `num_item_in_batch`"):
        model(input_ids, labels=input_ids, num_item_in_batch=3)
    tokens = {"input_ids": input_ids, "token_type_ids": torch.zeros_like(input_ids)}  # as tokenizers give them
    assert torch.equal(model(**tokens, cache_position=torch.arange(5)).logits, model(input_ids).logits)
