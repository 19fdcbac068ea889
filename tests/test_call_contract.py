"""What every call keeps to: the library's contracts, refusals that teach, gradients, few looks at a device."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    StaticCache,
)

from benchmarks.house import looks_of
from modeling_memory import MemoryCache, MemoryEncoderDecoderForCausalLM
from tests.memory_models import CHUNK, COPY, SLOT, WINDOW, build_model, ragged_batch, random_ids

ATOL = 1e-5
GREEDY: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
EVERY_LAYOUT: list[dict[str, Any]] = [
    {},
    {"window_positions": True},
    {"memory_positions": "fixed", "max_memories": 8},
    {"memory_positions": "source"},
]


def slotted(num_tokens: int = 5, rows: int = 1, per_chunk: int = 1) -> dict[str, torch.Tensor]:
    ids = torch.cat([torch.full((rows, 2 * per_chunk), SLOT), random_ids(rows, num_tokens)], 1)
    return {"input_ids": ids, "context_input_ids": random_ids(rows, 2, CHUNK)}


class TestEmbeddings:
    @pytest.mark.parametrize("fields", EVERY_LAYOUT)
    def test_generation_from_embeddings_is_that_from_ids(self, fields):
        model, ids = build_model(**fields), random_ids(2, 6)
        embeds = model.get_input_embeddings()(ids)
        written = model.generate(inputs_embeds=embeds, max_new_tokens=4, repetition_penalty=1.1, **GREEDY)
        if not fields.get("max_memories"):
            plain = model.decoder.generate(inputs_embeds=embeds, max_new_tokens=4, repetition_penalty=1.1, **GREEDY)
            assert torch.equal(written, plain)
        if fields.get("memory_positions") != "fixed":  # there the window would roll
            free = model.generate(ids, max_new_tokens=2, **GREEDY)[:, 6:]
            assert torch.equal(model.generate(inputs_embeds=embeds, max_new_tokens=2, **GREEDY), free)

    @pytest.mark.parametrize("fields", EVERY_LAYOUT)
    def test_with_memories_in_front_too(self, fields):
        model, given = build_model(**fields), slotted(6, rows=2)
        memory_embeds, memory_mask = model.encode_memories(given["context_input_ids"])
        written = model.generate(**given, max_new_tokens=12, **GREEDY)[:, 8:]
        embeds = model.get_input_embeddings()(given["input_ids"][:, 2:])
        again = model.generate(
            inputs_embeds=embeds, memory_embeds=memory_embeds, memory_mask=memory_mask, max_new_tokens=12, **GREEDY
        )
        assert torch.equal(again, written)

    def test_without_a_cache_later_steps_would_not_know_the_prompt(self):
        with pytest.raises(ValueError, match="use_cache"):
            build_model().generate(inputs_embeds=torch.zeros(1, 2, 32), use_cache=False, max_new_tokens=2)


class TestBody:
    def test_its_states_give_the_logits_through_the_head(self):
        model = build_model()
        ids, mask = ragged_batch()
        body = model.base_model
        assert body is not model and body.config is model.config and body.decoder is model.decoder
        states = body(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        expected = model(ids, attention_mask=mask).logits
        torch.testing.assert_close(model.get_output_embeddings()(states), expected, atol=ATOL, rtol=0)

    def test_it_trains_the_same_parameters(self):
        model = build_model().train()
        body = model.base_model
        assert body.training and [*body.state_dict()] == [*model.state_dict()]
        body(input_ids=random_ids(1, 20)).last_hidden_state.sum().backward()
        assert all(p.grad is not None for p in model.projector.parameters())
        assert not model.eval().base_model.training

    def test_a_wrapped_forward_is_not_taken_for_the_bodys(self):
        model = build_model()
        model.forward = lambda *args, **kwargs: None
        assert model.base_model(random_ids(1, 3)).last_hidden_state.shape == (1, 3, 32)


@pytest.mark.parametrize("cache", ["memory", "library", "slots"])
@torch.no_grad()
def test_padding_among_the_next_tokens_shows_what_a_single_call_shows(cache):
    """A hole between tokens has the logits of the token before it, with a cache as without one."""
    model = build_model(self_memory=cache == "memory")
    text, mask, given = random_ids(2, WINDOW), torch.ones(2, WINDOW, dtype=torch.long), {}
    mask[0, 5:7] = 0
    mask[1, 1] = 0
    if cache == "slots":
        text[:, 0] = SLOT
        given = {"context_input_ids": random_ids(2, 1, CHUNK)}
    whole = model(text, mask, **given).logits
    first = model(text[:, :3], mask[:, :3], use_cache=True, **given)
    assert isinstance(first.past_key_values, MemoryCache) is (cache == "memory")
    more = model(text[:, 3:], mask, past_key_values=first.past_key_values).logits
    torch.testing.assert_close(torch.cat([first.logits, more], 1), whole, atol=1e-5, rtol=0)
    assert torch.equal(more[0, 2], more[0, 1]) and torch.equal(more[0, 3], more[0, 1])


def caches_that_reset() -> list[Callable[[], Any]]:
    """Caches that hold nothing after `reset`: in transformers 5.17 a `DynamicCache` holds zeros instead."""
    library = DynamicCache()
    library.update(torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1), 0)
    library.reset()
    return [MemoryCache, lambda: MemoryCache(rolling=False), *([] if library.get_seq_length() else [DynamicCache])]


class TestResetCaches:
    @pytest.mark.parametrize("make", caches_that_reset())
    @pytest.mark.parametrize("before", ["slots", "rolling", "embeds", "windows", "front"])
    def test_a_reset_cache_does_what_a_fresh_one_does(self, make, before):
        decoder = MistralForCausalLM(
            MistralConfig(
                vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, sliding_window=24,
            )
        )  # fmt: skip
        model = MemoryEncoderDecoderForCausalLM.from_encoder_decoder_pretrained(
            build_model("llama").encoder, decoder, chunk_length=CHUNK, window_length=WINDOW, memory_token_id=SLOT
        )
        cache, fresh, given = make(), make(), slotted(8)
        first: dict[str, Any] = {
            "slots": given,
            "rolling": {**given, "rolling_memory": True},
            "embeds": {"inputs_embeds": torch.zeros(1, 3, 32)},
            "windows": {"input_ids": random_ids(1, 20)},
            "front": {"inputs_embeds": torch.ones(1, 3, 32), "memory_embeds": torch.ones(1, 2, 32)},
        }[before]
        try:
            model(**first, past_key_values=cache)
        except ValueError:  # not every cache can take every call
            assert type(cache) is DynamicCache and before in ("rolling", "windows", "front")
        for text in (random_ids(1, 60), random_ids(1, 7)):
            cache.reset()
            outcomes = []
            for one in (cache, fresh):
                try:
                    out = model(text, past_key_values=one, use_cache=True)
                    more = model(random_ids(1, 3), past_key_values=out.past_key_values)
                    outcomes.append((out.logits, more.logits))
                except ValueError as error:
                    outcomes.append(str(error))
            if isinstance(outcomes[0], str):
                assert outcomes[0] == outcomes[1]
            else:
                assert all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))
            fresh = make()

    def test_a_cache_of_another_batch_is_refused(self):
        model = build_model()
        cache = model(random_ids(2, 5), use_cache=True).past_key_values
        with pytest.raises(ValueError, match="holds 2 texts, but `input_ids` has 3 rows"):
            model(random_ids(3, 1), past_key_values=cache)
        plain = model.decoder(random_ids(2, 5), use_cache=True).past_key_values
        with pytest.raises(ValueError, match="holds 2 texts"):
            model(random_ids(1, 1), past_key_values=plain)
        with pytest.raises(ValueError, match="`past_key_values` is a list"):
            model(random_ids(1, 1), past_key_values=[])


class TestGradients:
    @pytest.mark.parametrize(
        "fields",
        [
            {},
            {"pooling": "queries", "memories_per_chunk": 2},
            {"window_positions": True, "projector_type": "mlp"},
            {"freeze_encoder": False},
            {"freeze_decoder": True, "memory_positions": "fixed", "max_memories": 4},
        ],
    )
    @pytest.mark.parametrize("batch", ["no context", "ready memories", "context"])
    def test_every_trainable_parameter_gets_one(self, fields, batch):
        model = build_model("llama", **fields).train()
        given = slotted(per_chunk=model.config.memories_per_chunk)
        inputs: dict[str, Any] = {"input_ids": random_ids(1, 5)}
        if batch == "ready memories":
            inputs = {"input_ids": slotted()["input_ids"], "memory_embeds": torch.ones(1, 2, 32)}
        elif batch == "context":
            inputs = given
        labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == SLOT, -100)
        model(**inputs, labels=labels).loss.backward()
        missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert not missing
        assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
        if batch == "no context":
            assert not any(p.grad.any() for p in model.projector.parameters())

    def test_adapters_too(self):
        model = build_model("llama")
        model.add_adapters(parts=["encoder", "decoder"], r=2)
        model.train()(random_ids(1, 5), labels=random_ids(1, 5)).loss.backward()
        assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]


def table_decoders() -> list[tuple[str, Callable[[], Any]]]:
    gpt2 = GPT2Config(vocab_size=96, n_positions=32, n_embd=32, n_layer=1, n_head=4)
    opt = OPTConfig(
        vocab_size=96, max_position_embeddings=32, hidden_size=32, word_embed_proj_dim=32, ffn_dim=64,
        num_hidden_layers=1, num_attention_heads=4,
    )  # fmt: skip
    return [("gpt2", lambda: GPT2LMHeadModel(gpt2)), ("opt", lambda: OPTForCausalLM(opt))]


class TestPositionTables:
    @pytest.fixture(params=table_decoders(), ids=lambda pair: pair[0])
    def model(self, request):
        return MemoryEncoderDecoderForCausalLM.from_encoder_decoder_pretrained(
            build_model("llama").encoder, request.param[1](), chunk_length=8, window_length=16, memory_token_id=SLOT
        )

    @pytest.mark.parametrize("rolling", [False, True])
    def test_generation_is_refused_before_the_first_token(self, model, rolling):
        given = {"input_ids": torch.tensor([[SLOT, 5, 6]]), "context_input_ids": random_ids(1, 1, 8)}
        calls = []
        model.decoder.register_forward_pre_hook(lambda *_: calls.append(1))
        with pytest.raises(ValueError, match="32|may become"):
            model.generate(**given, max_new_tokens=600, rolling_memory=rolling, **GREEDY)
        embeds = torch.zeros(1, 3, 32)
        for memories in ({}, {"memory_embeds": torch.zeros(1, 2, 32)}):
            with pytest.raises(ValueError, match="table of positions has 32"):
                model.generate(inputs_embeds=embeds, max_new_tokens=32, **memories, **GREEDY)
        with pytest.raises(ValueError, match="table of positions has 32"):
            model.generate(given["input_ids"][:, 1:], rolling_memory=False, max_new_tokens=32, **GREEDY)
        assert not calls
        out = model.generate(**given, max_new_tokens=30, **GREEDY)  # the last token is written and not read
        assert out.shape == (1, 33)

    def test_forward_refuses_with_cache_and_without(self, model):
        given = {"input_ids": torch.cat([torch.tensor([[SLOT]]), random_ids(1, 32)], 1)}
        with pytest.raises(ValueError, match="needs 33 positions.*table of positions has 32"):
            model(**given, context_input_ids=random_ids(1, 1, 8))
        cache = model(given["input_ids"][:, :32], context_input_ids=random_ids(1, 1, 8), use_cache=True)
        with pytest.raises(ValueError, match="needs 33 positions"):
            model(random_ids(1, 1), past_key_values=cache.past_key_values)
        with pytest.raises(ValueError, match="needs 33 positions"):
            model(inputs_embeds=torch.zeros(1, 31, 32), memory_embeds=torch.zeros(1, 2, 32))

    def test_positions_of_the_source_count(self, model):
        model.config.memory_positions = "source"
        with pytest.raises(ValueError, match="needs 41 positions"):
            model(
                torch.tensor([[SLOT, 5]]),
                memory_embeds=torch.zeros(1, 1, 32),
                memory_num_tokens=torch.tensor([[40]]),
            )


class TestTheLibrarysContracts:
    def test_the_configuration_asks_for_hidden_states(self):
        model, ids = build_model(), random_ids(1, 5)
        model.config.output_hidden_states = True
        assert len(model(ids).hidden_states) == 3 and len(model(random_ids(1, 20)).hidden_states) == 3
        assert model(ids, output_hidden_states=False).hidden_states is None

    @pytest.mark.parametrize("length", [5, 20])
    def test_a_list_of_layers_is_what_the_decoder_makes_of_it(self, length):
        model, ids = build_model(), random_ids(2, length)
        plain = model.decoder(ids[:, :5], output_hidden_states=[0, 2]).hidden_states
        whole = model(ids, output_hidden_states=True).hidden_states
        some = model(ids, output_hidden_states=[0, 2]).hidden_states
        # Which layers a list means, and whether what the first one reads is among them, the library has changed.
        assert [states is None for states in some] == [states is None for states in plain]
        skipped = len(whole) - len(some)
        for place, states in enumerate(some):
            if states is not None:
                torch.testing.assert_close(states, whole[place + skipped], atol=ATOL, rtol=0)

    @pytest.mark.parametrize("fields", EVERY_LAYOUT)
    def test_attentions_after_memories_cover_them(self, fields):
        model = build_model(**fields)
        model.set_attn_implementation("eager")
        out = model(inputs_embeds=torch.ones(2, 5, 32), memory_embeds=torch.ones(2, 3, 32), output_attentions=True)
        assert [layer.shape for layer in out.attentions] == [(2, 4, 5, 8)] * 2

    def test_continuous_batching_is_refused(self):
        with pytest.raises(ValueError, match="padded on the left"):
            build_model().generate_batch([[5, 6]])

    def test_encoding_with_a_mask_can_be_compiled_whole(self):
        model = build_model("llama")
        chunks, mask = random_ids(2, 3, CHUNK), torch.ones(2, 3, CHUNK, dtype=torch.long)
        mask[0, 2] = mask[1, 1, 2:] = 0
        expected = model.encode_memories(chunks, mask)
        compiled = torch.compile(model.encode_memories, backend="eager", fullgraph=True)
        got = compiled(chunks, mask)
        torch.testing.assert_close(got[0], expected[0], atol=ATOL, rtol=0)
        assert torch.equal(got[1], expected[1])

    @pytest.mark.parametrize(
        ("encoder", "fields"),
        [
            ("llama", {}),
            ("bert", {"pooling": "mean", "memories_per_chunk": 2}),
            ("masked_mixer", {"pooling": "concat"}),
        ],
    )
    @torch.no_grad()
    def test_an_exported_encoding_is_the_models_own_for_other_texts_too(self, encoder, fields, tmp_path):
        """For other numbers of texts and chunks, shorter chunks, other masks; after it was saved and loaded.

        The projector of `concat` is as wide as the chunks are long, so these keep their length.
        """
        model, size = build_model(encoder, **fields), torch.export.Dim.AUTO

        class Encode(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.model = model

            def forward(self, chunks, mask):
                return self.model.encode_memories(chunks, mask)

        def inputs(*shape):
            chunks, mask = random_ids(*shape), torch.ones(shape, dtype=torch.long)
            mask[0, -1, 1:] = 0
            mask[-1, 1:] = 0  # absent chunks
            return chunks, mask

        shorter = model.config.pooling != "concat"
        sizes = ({0: size, 1: size, **({2: size} if shorter else {})},) * 2
        torch.export.save(
            torch.export.export(Encode(), inputs(2, 3, CHUNK), dynamic_shapes=sizes), tmp_path / "it.pt2"
        )
        program = torch.export.load(tmp_path / "it.pt2").module()
        for shape in [(1, 1, CHUNK), (3, 5, CHUNK), (2, 1200, CHUNK), (5, 1, 3)][: 3 + shorter]:
            for got, expected in zip(program(*inputs(*shape)), model.encode_memories(*inputs(*shape)), strict=True):
                torch.testing.assert_close(got, expected, atol=ATOL, rtol=0)

    @pytest.mark.parametrize("given", [{"input_ids": random_ids(1, 6)}, slotted(6)])
    def test_generation_while_training_under_checkpointing(self, given):
        model = build_model()
        expected = model.generate(**given, max_new_tokens=20, **GREEDY)
        model.train()
        (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)()
        assert torch.equal(model.generate(**given, max_new_tokens=20, **GREEDY), expected)
        switched = [module for module in model.decoder.modules() if getattr(module, "gradient_checkpointing", False)]
        assert switched and model.training


class TestSenselessInput:
    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_memories_that_are_not_finite(self, value):
        model, memories = build_model(), torch.ones(1, 2, 32)
        memories[0, 1, 3] = value
        ids = torch.tensor([[SLOT, SLOT, 7]])
        for call in (model, model.generate):
            with pytest.raises(ValueError, match="Memory 1 of row 0 .*not finite"):
                call(input_ids=ids, memory_embeds=memories)
        mask = torch.tensor([[1, 0]])  # what is absent is not read
        out = model(ids[:, 1:], memory_embeds=memories, memory_mask=mask, rolling_memory=True).logits
        assert out.isfinite().all()

    @pytest.mark.parametrize("length", [5, 20])
    @pytest.mark.parametrize("value", [-1, 2, 0.5])
    def test_masks_of_other_values(self, length, value):
        model, ids = build_model(), random_ids(1, length)
        mask = torch.ones(1, length)
        mask[0, 2] = value
        with pytest.raises(ValueError, match="`attention_mask` holds .*; expected 1 for tokens and 0"):
            model(ids, attention_mask=mask)
        given, mask = slotted(), torch.ones(1, 2, CHUNK)
        mask[0, 0, 0] = value
        with pytest.raises(ValueError, match="`context_attention_mask` holds"):
            model(**given, context_attention_mask=mask)
        with pytest.raises(ValueError, match="`memory_mask` holds"):
            model(given["input_ids"], memory_embeds=torch.ones(1, 2, 32), memory_mask=torch.full((1, 2), value))

    def test_true_and_one_point_zero_are_one(self):
        model, (ids, mask) = build_model(), ragged_batch()
        expected = model(ids, attention_mask=mask).logits
        for kind in (torch.bool, torch.float32, torch.uint8):
            assert torch.equal(model(ids, attention_mask=mask.to(kind)).logits, expected)

    @pytest.mark.parametrize("keep", [-1, True, 1.5, torch.tensor([0.5]), torch.tensor([[1]])])
    def test_columns_to_keep(self, keep):
        with pytest.raises(ValueError, match="`logits_to_keep`"):
            build_model()(random_ids(1, 5), logits_to_keep=keep)

    @pytest.mark.parametrize(
        ("inputs", "message"),
        [
            ({"memory_embeds": torch.ones(1, 2, 32, dtype=torch.long)}, "`memory_embeds` has type torch.int64"),
            ({"memory_embeds": np.ones((1, 2, 32))}, "`memory_embeds` is a ndarray"),
            ({"input_ids": np.ones((1, 3), dtype=np.int64)}, "`input_ids` is a ndarray; expected a torch tensor"),
            ({"input_ids": [[5, 6]]}, "`input_ids` is a list; expected a torch tensor"),
            ({"input_ids": torch.ones(1, 3, dtype=torch.int16)}, "`input_ids` has type torch.int16"),
            ({"input_ids": torch.ones(1, 3, dtype=torch.uint8)}, "`input_ids` has type torch.uint8"),
            ({"attention_mask": np.ones((1, 3))}, "`attention_mask` is a ndarray"),
            ({"labels": np.ones((1, 3))}, "`labels` has shape ndarray"),
            ({"context_input_ids": np.ones((1, 1, 4))}, "`context_input_ids` has shape"),
            (
                {"context_input_ids": torch.ones(1, 2, 4, dtype=torch.uint8)},
                "`context_input_ids` has type torch.uint8",
            ),
            ({"inputs_embeds": np.ones((1, 2, 32)), "input_ids": None}, "`inputs_embeds` is a ndarray"),
            ({"inputs_embeds": torch.ones(1, 2, 32, dtype=torch.long), "input_ids": None}, "has type torch.int64"),
        ],
    )
    def test_other_kinds_of_values(self, inputs, message):
        with pytest.raises(ValueError, match=message):
            build_model()(**{"input_ids": torch.tensor([[SLOT, SLOT, 7]]), **inputs})

    def test_a_prompt_that_is_no_tensor(self):
        with pytest.raises(ValueError, match="`input_ids` is a ndarray"):
            build_model().generate(np.ones((1, 3), dtype=np.int64))

    def test_int32_is_read(self):
        model, ids = build_model(), random_ids(2, 20)
        assert torch.equal(model(ids.int(), labels=ids).logits, model(ids).logits)


class TestPrintedRemedies:
    """What a refusal advises is done, and works."""

    @pytest.mark.parametrize("option", [{"cache_implementation": "static"}, {"prompt_lookup_num_tokens": 2}])
    @pytest.mark.parametrize("fields", EVERY_LAYOUT)
    @pytest.mark.parametrize("context", [False, True])
    @pytest.mark.parametrize("length", [5, 2 * WINDOW])
    def test_options_that_need_another_cache(self, option, fields, context, length):
        model = build_model(**fields)
        given = slotted(length) if context else {"input_ids": random_ids(1, length)}
        options = {**GREEDY, "max_new_tokens": 9, "disable_compile": True, "eos_token_id": 2}
        with pytest.raises(ValueError) as refusal:
            model.generate(**given, **option, rolling_memory=True, **options)
        advice = str(refusal.value)
        assert "Leave it out" in advice
        model.generate(**given, rolling_memory=True, **options)
        if "rolling_memory=False" in advice:
            if "a prompt of one window" in advice:
                given = {"input_ids": random_ids(1, 5)}
            expected = model.generate(**given, rolling_memory=False, **options)
            assert torch.equal(model.generate(**given, **option, rolling_memory=False, **options), expected)

    def test_positions_and_views(self):
        with pytest.raises(ValueError, match="Put the slots in front"):
            build_model(memory_positions="fixed", max_memories=4)(
                torch.tensor([[7, SLOT]]), memory_embeds=torch.zeros(1, 1, 32)
            )

    def test_a_static_cache_of_ones_own(self):
        model, given = build_model(), slotted(6)
        cache = StaticCache(model.config.decoder, max_cache_len=64)
        out = model(**given, past_key_values=cache)
        torch.testing.assert_close(out.logits, model(**given).logits, atol=ATOL, rtol=0)


@pytest.mark.parametrize("fields", EVERY_LAYOUT)
class TestLooksAtTheDevice:
    @pytest.mark.parametrize("encoder", ["bert", "llama"])
    def test_one_for_a_text_and_none_for_a_step(self, encoder, fields):
        model, text = build_model(encoder, **fields), random_ids(2, 20)
        masked = {"attention_mask": torch.ones_like(text), "labels": text}
        assert len(looks_of(lambda: model(text))) <= 1
        assert len(looks_of(lambda: model(text, **masked))) <= 1
        assert len(looks_of(lambda: model(text[:, :WINDOW]))) <= 1
        assert len(looks_of(lambda: model(**slotted()))) <= 1
        for start in (
            {"input_ids": text[:1]},
            {"input_ids": text[:1, :5]},
            slotted(),
            {**slotted(), "rolling_memory": True},
        ):
            cache = model(**start, use_cache=True).past_key_values
            step = random_ids(1, 1)
            assert not looks_of(lambda cache=cache, step=step: model(step, past_key_values=cache))


def test_arguments_are_left_as_they_were():
    model, given = build_model(window_positions=True), {**slotted(20), "rolling_memory": True}
    copies = copy.deepcopy(given)
    model(**given, labels=given["input_ids"].masked_fill(given["input_ids"] == SLOT, -100))
    assert all(torch.equal(given[name], copies[name]) for name in ("input_ids", "context_input_ids"))
    assert COPY not in given["input_ids"]
