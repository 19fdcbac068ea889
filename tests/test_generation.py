"""Generation equals the plain loop: with cache and without, through roll-overs, beams, unequal rows and contexts."""

import itertools

import pytest
import torch
from transformers import StaticCache, StoppingCriteriaList
from transformers.cache_utils import DynamicCache
from transformers.generation.streamers import BaseStreamer

from modeling_memory import MemoryCache
from tests.memory_models import BLANK, CHUNK, SLOT, WINDOW, build_model, ragged_batch, random_ids
from tests.reference import memory_loop

DECODERS = ("llama", "qwen3", "gpt_neox")
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
SPREAD = {"memory_positions": "spread"}
ROLLING = {"rolling_memory": True, **GREEDY}
ATOL = 1e-5


def left_padded(lengths: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(lengths)
    input_ids = random_ids(len(lengths), width)
    mask = (torch.arange(width) >= width - torch.tensor(lengths)[:, None]).long()
    return input_ids * mask, mask


@pytest.mark.parametrize("decoder", DECODERS)
class TestPlainText:
    @pytest.mark.parametrize("use_cache", [True, False])
    def test_greedy_equals_the_plain_loop_through_roll_overs(self, decoder, use_cache):
        model = build_model(decoder=decoder)
        lengths = (2, WINDOW, 13, 3 * WINDOW + 1)
        prompt, mask = left_padded(lengths)
        out = model.generate(prompt, attention_mask=mask, max_new_tokens=19, use_cache=use_cache, **GREEDY)
        for row, length in enumerate(lengths):
            expected = memory_loop.generate_greedily(model, prompt[row, -length:], 19)
            assert torch.equal(out[row, -length - 19 :], expected)

    def test_beams_with_cache_equal_beams_without(self, decoder):
        model = build_model(decoder=decoder)
        prompt, mask = left_padded((3, WINDOW, 14))
        runs = [
            model.generate(
                prompt,
                attention_mask=mask,
                max_new_tokens=18,
                num_beams=3,
                num_return_sequences=2,
                use_cache=use_cache,
                output_scores=True,
                return_dict_in_generate=True,
                **GREEDY,
            )
            for use_cache in (True, False)
        ]
        assert torch.equal(runs[0].sequences, runs[1].sequences)
        torch.testing.assert_close(runs[0].sequences_scores, runs[1].sequences_scores, atol=1e-4, rtol=0)
        assert len(runs[0].sequences) == 6

    def test_sampling_is_the_same_with_and_without_cache(self, decoder):
        model = build_model(decoder=decoder)
        prompt, mask = left_padded((3, WINDOW, 14))
        runs = []
        for use_cache in (True, False):
            torch.manual_seed(7)
            runs.append(
                model.generate(
                    prompt,
                    attention_mask=mask,
                    max_new_tokens=18,
                    use_cache=use_cache,
                    **{**GREEDY, "do_sample": True, "top_k": 20, "temperature": 0.8},
                )
            )
        assert torch.equal(*runs)

    @pytest.mark.parametrize("cut", [1, WINDOW - 1, WINDOW, WINDOW + 1, 2 * WINDOW, 20])
    @pytest.mark.parametrize("step", [1, 3, WINDOW, 20])
    def test_cached_steps_equal_the_uncached_call(self, decoder, cut, step):
        model = build_model(decoder=decoder)
        input_ids, mask = ragged_batch()
        mask[:, 0] = 1  # the first call sees a token of every row
        expected = model(input_ids, attention_mask=mask).logits
        out = model(input_ids[:, :cut], attention_mask=mask[:, :cut], use_cache=True)
        logits = [out.logits]
        for start in range(cut, input_ids.shape[1], step):
            end = min(start + step, input_ids.shape[1])
            out = model(input_ids[:, start:end], attention_mask=mask[:, :end], past_key_values=out.past_key_values)
            logits.append(out.logits)
            assert out.past_key_values.get_seq_length() == end
        got = torch.cat(logits, 1)
        # Padding columns repeat what predicts the next token only inside one call.
        torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], atol=ATOL, rtol=0)


class TestSlots:
    @pytest.mark.parametrize(
        ("decoder", "use_cache", "num_beams"), list(itertools.product(DECODERS, (True, False), (1, 3)))
    )
    def test_batches_of_unequal_contexts_and_prompts_equal_single_calls(self, decoder, use_cache, num_beams):
        model = build_model("llama", decoder)
        chunks, chunk_mask = random_ids(3, 4, CHUNK), torch.ones(3, 4, CHUNK, dtype=torch.long)
        chunk_mask[0, 2:] = 0
        chunk_mask[1, 3, 1:] = 0
        chunk_mask[2, 1:] = 0
        prompts = [torch.cat([torch.full((n,), SLOT), random_ids(m, seed=m)]) for n, m in ((2, 3), (4, 7), (1, 1))]
        width = max(map(len, prompts))
        prompt = torch.stack([torch.cat([torch.zeros(width - len(p), dtype=torch.long), p]) for p in prompts])
        options = {"max_new_tokens": 12, "num_beams": num_beams, "use_cache": use_cache, **GREEDY}
        mask = (prompt != 0).long()
        out = model.generate(
            prompt, attention_mask=mask, context_input_ids=chunks, context_attention_mask=chunk_mask, **options
        )
        for row, text in enumerate(prompts):
            single = model.generate(
                text[None],
                context_input_ids=chunks[row : row + 1],
                context_attention_mask=chunk_mask[row : row + 1],
                **options,
            )
            assert torch.equal(out[row, -len(text) - 12 :], single[0])

    def test_greedy_equals_the_argmax_loop(self):
        model = build_model("llama")
        chunks = random_ids(1, 3, CHUNK)
        text = torch.tensor([7, SLOT, SLOT, 8, SLOT, 9])
        out = model.generate(text[None], context_input_ids=chunks, max_new_tokens=14, **GREEDY)
        for _ in range(14):
            logits = memory_loop.read_slots(model, list(chunks[0]), text)
            text = torch.cat([text, logits[-1:].argmax(-1)])
        assert torch.equal(out[0], text)

    def test_ready_memories_equal_the_context_and_serve_many_prompts(self):
        model = build_model()
        chunks = random_ids(1, 2, CHUNK)
        prompts = torch.cat([torch.full((3, 2), SLOT), random_ids(3, 5)], 1)
        memory_embeds, memory_mask = model.encode_memories(chunks)
        ready = model.generate(
            prompts, memory_embeds=memory_embeds, memory_mask=memory_mask, max_new_tokens=9, **GREEDY
        )
        repeated = chunks.expand(3, -1, -1)
        assert torch.equal(ready, model.generate(prompts, context_input_ids=repeated, max_new_tokens=9, **GREEDY))

    def test_static_cache_equals_dynamic(self):
        model = build_model()
        prompt = torch.cat([torch.full((2, 2), SLOT), random_ids(2, 5)], 1)
        options = {"context_input_ids": random_ids(2, 2, CHUNK), "max_new_tokens": 9, **GREEDY}
        static = model.generate(prompt, cache_implementation="static", disable_compile=True, **options)
        assert torch.equal(static, model.generate(prompt, **options))

    @pytest.mark.parametrize("slot", [SLOT, 50])
    def test_slots_are_neither_written_nor_seen_by_processors(self, slot):
        model = build_model(memory_token_id=slot)
        with torch.no_grad():
            model.get_output_embeddings().weight[min(slot, 95)] *= 40  # would win without suppression
        prompt = torch.tensor([[slot, slot, 7, 8, 9]])
        out = model.generate(
            prompt,
            context_input_ids=random_ids(1, 2, CHUNK),
            max_new_tokens=9,
            repetition_penalty=1.3,
            no_repeat_ngram_size=2,
            **GREEDY,
        )
        assert not (out[:, 5:] == slot).any()

    def test_prompt_lookup_in_slots_equals_greedy(self):
        model = build_model()
        prompt = torch.tensor([[SLOT, SLOT, 7, 8, 9, 7, 8]])
        options = {"context_input_ids": random_ids(1, 2, CHUNK), "max_new_tokens": 9, **GREEDY}
        options["eos_token_id"] = BLANK  # early releases of transformers 5 look prompts up only if text has an end
        assert torch.equal(
            model.generate(prompt, prompt_lookup_num_tokens=2, **options),
            model.generate(prompt, **options),
        )
        with pytest.raises(ValueError, match="`prompt_lookup_num_tokens` is 2.*rolling_memory=False"):
            model.generate(prompt, prompt_lookup_num_tokens=2, rolling_memory=True, **options)


@pytest.mark.parametrize("positions", ["fixed", "spread"])
@pytest.mark.parametrize("absent", ["mask", "ones", "zeros"])
def test_fixed_positions_generate_as_the_plain_loop(absent, positions):
    model = build_model(memory_positions=positions, max_memories=12, absent_memories=absent)
    prompt = random_ids(2, 5)
    out = model.generate(prompt, max_new_tokens=19, **GREEDY)
    for row in range(2):
        assert torch.equal(out[row], memory_loop.generate_greedily(model, prompt[row], 19))
    chunks = random_ids(2, 2, CHUNK)
    text = torch.cat([torch.full((2, 2), SLOT), prompt], 1)
    runs = [
        model.generate(text, context_input_ids=chunks, max_new_tokens=12, use_cache=cached, **GREEDY)
        for cached in (True, False)
    ]
    assert torch.equal(*runs)


class TestWindowPositions:
    def test_plain_text_equals_the_plain_loop_through_roll_overs(self):
        model = build_model(window_positions=True, copy_token_id=7)
        lengths = (2, WINDOW, 13)
        prompt, mask = left_padded(lengths)
        prompt[1, -3] = prompt[2, 3] = 7
        for options in ({}, {"use_cache": False}):
            out = model.generate(prompt, attention_mask=mask, max_new_tokens=19, **options, **GREEDY)
            for row, length in enumerate(lengths):
                expected = memory_loop.generate_greedily(model, prompt[row, -length:], 19)
                assert torch.equal(out[row, -length - 19 :], expected)

    @pytest.mark.parametrize("num_beams", [1, 3])
    def test_slots_with_cache_equal_slots_without(self, num_beams):
        model = build_model("llama", window_positions=True, copy_token_id=8, blank_token_id=11)
        prompt = torch.tensor([[0, 0, 7, SLOT, 8, SLOT, 9], [SLOT, SLOT, SLOT, 10, 11, 12, 13]])
        chunks, chunk_mask = random_ids(2, 3, CHUNK), torch.ones(2, 3, CHUNK, dtype=torch.long)
        chunk_mask[0, 2] = 0
        runs = [
            model.generate(
                prompt,
                attention_mask=(prompt != 0).long(),
                context_input_ids=chunks,
                context_attention_mask=chunk_mask,
                max_new_tokens=14,
                num_beams=num_beams,
                use_cache=cached,
                **GREEDY,
            )
            for cached in (True, False)
        ]
        assert torch.equal(*runs)
        if num_beams == 1:
            text = prompt[1]
            for _ in range(14):
                text = torch.cat([text, memory_loop.read_slots(model, list(chunks[1]), text)[-1:].argmax(-1)])
            assert torch.equal(runs[0][1], text)

    def test_text_without_memories_is_the_plain_decoder(self):
        model = build_model(window_positions=True)
        input_ids = random_ids(2, WINDOW)
        assert torch.equal(model(input_ids).logits, model.decoder(input_ids).logits)

    def test_a_cache_that_cannot_know_the_places_is_refused(self):
        model = build_model(window_positions=True)
        prompt = torch.tensor([[SLOT, 7]])
        with pytest.raises(ValueError, match="must know which columns are memories"):
            model(prompt, memory_embeds=torch.zeros(1, 1, 32), past_key_values=DynamicCache())
        with pytest.raises(ValueError, match="cache_implementation"):
            model.generate(prompt, memory_embeds=torch.zeros(1, 1, 32), cache_implementation="static", **GREEDY)


class TestCaches:
    def test_the_cache_of_many_windows_is_that_of_the_last(self):
        model = build_model()
        out = model(random_ids(2, 29), use_cache=True)
        cache = out.past_key_values
        assert isinstance(cache, MemoryCache)
        memories = 29 // WINDOW * WINDOW // CHUNK
        assert cache.memories.embeds.shape == (2, memories, 32)
        assert cache.layers[0].keys.shape[2] == memories + 29 % WINDOW  # no padding is kept
        assert cache.column_mask.sum(1).tolist() == [memories + 29 % WINDOW] * 2

    def test_rows_that_fold_at_different_moments_keep_the_cache_small(self):
        model = build_model()
        prompt, mask = left_padded((1, 3, 6))
        out = model.generate(
            prompt, attention_mask=mask, max_new_tokens=60, return_dict_in_generate=True, **GREEDY
        ).past_key_values
        assert out.memories.embeds.shape[1] == (6 + 59) // WINDOW * 2
        assert out.layers[0].keys.shape[2] <= out.memories.embeds.shape[1] + 2 * WINDOW

    def test_a_full_window_is_encoded_once(self):
        model = build_model()
        calls = []
        model.encoder.register_forward_hook(lambda module, args, kwargs, out: calls.append(1), with_kwargs=True)
        model.generate(random_ids(2, 3), max_new_tokens=5 * WINDOW, **GREEDY)
        assert len(calls) == 5

    def test_conversation_goes_on_from_a_returned_cache(self):
        model = build_model()
        prompt = random_ids(1, 6)
        first = model.generate(prompt, max_new_tokens=9, return_dict_in_generate=True, **GREEDY)
        longer = torch.cat([first.sequences, random_ids(1, 7, seed=3)], 1)
        with_cache = model.generate(longer, past_key_values=first.past_key_values, max_new_tokens=9, **GREEDY)
        assert torch.equal(with_cache, model.generate(longer, max_new_tokens=9, **GREEDY))

    def test_without_rolling_the_last_window_grows(self):
        model = build_model()
        prompt = random_ids(1, 2 * WINDOW + 3)
        memory_embeds, memory_mask = model.encode_memories(prompt[:, : 2 * WINDOW].reshape(1, -1, CHUNK))
        slots = torch.cat([torch.full((1, 4), SLOT), prompt[:, 2 * WINDOW :]], 1)
        expected = model.generate(slots, memory_embeds=memory_embeds, max_new_tokens=20, **GREEDY)[:, -20:]
        out = model.generate(prompt, rolling_memory=False, max_new_tokens=20, **GREEDY)
        assert torch.equal(out[:, -20:], expected)

    @pytest.mark.parametrize("make", [DynamicCache, lambda: StaticCache(build_model().config.decoder, 64)])
    def test_a_plain_cache_for_text_that_folds_is_refused(self, make):
        model = build_model()
        with pytest.raises(ValueError, match="past_key_values=None"):
            model(random_ids(1, WINDOW + 1), past_key_values=make())

    def test_a_plain_cache_may_not_outgrow_its_window_unnoticed(self):
        model = build_model()
        cache = DynamicCache()
        model(random_ids(1, WINDOW), past_key_values=cache)
        with pytest.raises(ValueError, match="cannot hold what compressing needs"):
            model(random_ids(1, 1), past_key_values=cache)

    def test_memory_cache_refuses_to_shrink_and_can_be_emptied(self):
        model = build_model()
        cache = model(random_ids(1, 20), use_cache=True).past_key_values
        with pytest.raises(ValueError, match="cannot be taken"):
            cache.crop(3)
        cache.reset()
        again = model(random_ids(1, 20), past_key_values=cache)
        torch.testing.assert_close(again.logits, model(random_ids(1, 20)).logits)

    def test_rows_can_be_repeated_and_selected(self):
        model = build_model()
        input_ids = random_ids(2, 13)
        cache = model(input_ids, use_cache=True).past_key_values
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([3, 0]))
        following = random_ids(2, 6, seed=9)
        logits = model(following, past_key_values=cache).logits
        expected = model(torch.cat([input_ids.flip(0), following], 1)).logits[:, 13:]
        torch.testing.assert_close(logits, expected, atol=ATOL, rtol=0)


class TestRefusals:
    def test_right_padding(self):
        model = build_model()
        prompt = random_ids(2, 6)
        mask = torch.ones_like(prompt)
        mask[1, 4:] = 0
        with pytest.raises(ValueError, match="Row 1 .*Pad on the left"):
            model.generate(prompt, attention_mask=mask, max_new_tokens=2, **GREEDY)
        prompt[0, -1] = model.config.pad_token_id
        with pytest.raises(ValueError, match="Row 0 .*Pad on the left"):
            model.generate(prompt, max_new_tokens=2, **GREEDY)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"prefill_chunk_size": 4}, "prefill_chunk_size"),
            ({"prompt_lookup_num_tokens": 2}, "prompt_lookup_num_tokens"),
            ({"cache_implementation": "static"}, "cache_implementation"),
            ({"assistant_model": "itself"}, "assistant_model"),
            ({"assistant_early_exit": 1}, "assistant_early_exit"),
            ({"rolling_memory": True, "inputs_embeds": torch.zeros(1, 1, 32)}, "embeddings were given"),
        ],
    )
    def test_options_that_cannot_be_right(self, options, message):
        model = build_model()
        if "assistant_model" in options:
            options = {"assistant_model": model}
        with pytest.raises(ValueError, match=message):
            model.generate(random_ids(1, 5), max_new_tokens=3, **options, **GREEDY)

    def test_more_text_than_memories_allow(self):
        model = build_model(max_memories=4)
        with pytest.raises(ValueError, match="may become 8 memories.*takes 4.*drop_oldest"):
            model.generate(random_ids(1, 5), max_new_tokens=30, **GREEDY)
        fits = 3 * WINDOW + 1 - 5  # the last token is written and not read
        assert model.generate(random_ids(1, 5), max_new_tokens=fits, **GREEDY).shape == (1, 3 * WINDOW + 1)
        with pytest.raises(ValueError, match="may become 6 memories"):
            model.generate(random_ids(1, 5), max_new_tokens=fits + 1, **GREEDY)
        with pytest.raises(ValueError, match="needs 6 memories.*takes 4"):
            model(random_ids(1, 3 * WINDOW + 1))

    def test_empty_prompt(self):
        with pytest.raises(ValueError, match="one row and one token"):
            build_model().generate(torch.zeros(1, 0, dtype=torch.long))


def test_padding_that_looks_like_a_marker_tells_no_places():
    model = build_model(window_positions=True, blank_token_id=0, pad_token_id=7)
    prompt, mask = left_padded((6, 9))  # padding has the id 0, as a cache's room for the open window has
    following = random_ids(2, 2 * WINDOW, seed=1)
    text, text_mask = torch.cat([prompt, following], 1), torch.cat([mask, torch.ones_like(following)], 1)
    expected = model(text, attention_mask=text_mask).logits[:, 9:]
    cache, logits = model(prompt, attention_mask=mask).past_key_values, []
    for column in range(following.shape[1]):
        out = model(following[:, column : column + 1], past_key_values=cache)
        cache, logits = out.past_key_values, [*logits, out.logits]
    torch.testing.assert_close(torch.cat(logits, 1), expected, atol=ATOL, rtol=0)
    slotted = torch.tensor([[0, 0, SLOT, SLOT, 8, 9]])
    chunks = random_ids(1, 2, CHUNK)
    padded = model(slotted, attention_mask=(slotted != 0).long(), context_input_ids=chunks).logits[:, 2:]
    torch.testing.assert_close(padded, model(slotted[:, 2:], context_input_ids=chunks).logits, atol=ATOL, rtol=0)


def test_a_static_cache_reads_slots_after_padding():
    model = build_model()
    prompt = torch.tensor([[0, 0, SLOT, SLOT, 8, 9], [SLOT, SLOT, 7, 8, 9, 10]])
    options = {"attention_mask": (prompt != 0).long(), "context_input_ids": random_ids(2, 2, CHUNK), **GREEDY}
    static = model.generate(prompt, cache_implementation="static", disable_compile=True, max_new_tokens=9, **options)
    assert torch.equal(static, model.generate(prompt, max_new_tokens=9, **options))


def test_a_window_that_grows_on_needs_a_cache():
    with pytest.raises(ValueError, match="`rolling_memory` is False.*no cache"):
        build_model().generate(random_ids(1, 6), rolling_memory=False, use_cache=False, max_new_tokens=9, **GREEDY)


def a_prompt_for_each_row(front: bool) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """Prompts of unequal contexts and lengths, some after tokens of text; chunks and their mask."""
    chunks, chunk_mask = random_ids(3, 3, CHUNK), torch.ones(3, 3, CHUNK, dtype=torch.long)
    chunk_mask[0, 2:] = 0
    chunk_mask[2, 1:] = 0
    head = {0: [], 1: [7, 8, 9], 2: [5]} if front else {0: [], 1: [], 2: []}
    prompts = [
        torch.cat([torch.tensor(head[row], dtype=torch.long), torch.full((n,), SLOT), random_ids(m, seed=m)])
        for row, (n, m) in enumerate(((2, 3), (3, WINDOW), (1, 2 * WINDOW + 3)))
    ]
    return prompts, chunks, chunk_mask


def padded_on_the_left(prompts: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, prompts))
    mask = torch.stack([(torch.arange(width) >= width - len(p)).long() for p in prompts])
    rows = [torch.cat([torch.zeros(width - len(p), dtype=torch.long), p]) for p in prompts]
    return torch.stack(rows), mask


class TestRollingAfterAContext:
    @pytest.mark.parametrize("front", [False, True])
    @pytest.mark.parametrize("decoder", DECODERS)
    @pytest.mark.parametrize("fields", [{}, {"window_positions": True, "copy_token_id": 8, "memories_per_chunk": 2}])
    def test_greedy_equals_the_plain_loop(self, decoder, front, fields):
        model = build_model(decoder=decoder, **fields)
        prompts, chunks, chunk_mask = a_prompt_for_each_row(front)
        per_chunk = model.config.memories_per_chunk
        prompts = [torch.cat([p.repeat_interleave(torch.where(p == SLOT, per_chunk, 1))]) for p in prompts]
        prompt, mask = padded_on_the_left(prompts)
        options = {"context_input_ids": chunks, "context_attention_mask": chunk_mask, "max_new_tokens": 19, **ROLLING}
        cached = model.generate(prompt, attention_mask=mask, **options)
        assert torch.equal(cached, model.generate(prompt, attention_mask=mask, use_cache=False, **options))
        for row, text in enumerate(prompts):
            own = [chunk[keep.bool()] for chunk, keep in zip(chunks[row], chunk_mask[row], strict=True) if keep.any()]
            for _ in range(19):
                logits = memory_loop.read_after_context(model, own, text)
                text = torch.cat([text, logits[-1:].argmax(-1)])
            assert torch.equal(cached[row, -len(text) :], text)

    @pytest.mark.parametrize("front", [False, True])
    @pytest.mark.parametrize("length", [5, 2 * WINDOW + 3])
    def test_forward_equals_the_plain_loop_in_all_columns(self, front, length):
        model = build_model(window_positions=True, copy_token_id=8)
        chunks = random_ids(2, 2, CHUNK)
        rows = [[7, SLOT, 8, SLOT] if front else [SLOT, SLOT], [SLOT, SLOT]]
        texts = [torch.cat([torch.tensor(row), random_ids(length - n, seed=n)]) for n, row in enumerate(rows)]
        prompt, mask = padded_on_the_left(texts)
        out = model(
            prompt,
            attention_mask=mask,
            context_input_ids=chunks,
            rolling_memory=True,
            use_cache=True,
            output_hidden_states=True,
        )
        part = model(
            prompt, attention_mask=mask, context_input_ids=chunks, rolling_memory=True, logits_to_keep=length + 1
        )
        torch.testing.assert_close(part.logits, out.logits[:, -length - 1 :], atol=ATOL, rtol=0)
        states = model.decoder.lm_head(out.hidden_states[-1])
        for row, text in enumerate(texts):
            expected = memory_loop.read_after_context(model, list(chunks[row]), text)
            torch.testing.assert_close(out.logits[row, -len(text) :], expected, atol=ATOL, rtol=0)
            torch.testing.assert_close(states[row, -len(text) :], expected, atol=ATOL, rtol=0)
        more = random_ids(2, WINDOW + 3, seed=9)  # and on from the cache, over the next border
        got = model(more, past_key_values=out.past_key_values).logits
        for row, text in enumerate(texts):
            expected = memory_loop.read_after_context(model, list(chunks[row]), torch.cat([text, more[row]]))
            torch.testing.assert_close(got[row], expected[len(text) :], atol=ATOL, rtol=0)

    def test_gradients_equal_the_plain_loop(self):
        model, slow = build_model(), build_model()
        chunks, text = random_ids(1, 2, CHUNK), torch.cat([torch.full((2,), SLOT), random_ids(2 * WINDOW + 3)])
        weights = torch.randn(len(text), 96, generator=torch.Generator().manual_seed(0))
        logits = model(text[None], context_input_ids=chunks, rolling_memory=True).logits[0]
        (logits * weights).sum().backward()
        (memory_loop.read_after_context(slow, list(chunks[0]), text) * weights).sum().backward()
        for (name, fast), plain in zip(model.named_parameters(), slow.parameters(), strict=True):
            if plain.grad is not None:
                torch.testing.assert_close(fast.grad, plain.grad, atol=1e-4, rtol=1e-4, msg=name)

    @pytest.mark.parametrize("options", [{"num_beams": 3}, {"do_sample": True, "top_k": 20}])
    def test_beams_and_samples_with_cache_equal_those_without(self, options):
        model = build_model()
        prompts, chunks, chunk_mask = a_prompt_for_each_row(front=True)
        prompt, mask = padded_on_the_left(prompts)
        runs = []
        for use_cache in (True, False):
            torch.manual_seed(3)
            runs.append(
                model.generate(
                    prompt,
                    attention_mask=mask,
                    context_input_ids=chunks,
                    context_attention_mask=chunk_mask,
                    max_new_tokens=18,
                    use_cache=use_cache,
                    repetition_penalty=1.2,
                    **{**ROLLING, **options},
                )
            )
        assert torch.equal(*runs)

    @pytest.mark.parametrize("positions", ["fixed", "spread"])
    def test_fixed_positions_roll_too(self, positions):
        model = build_model(memory_positions=positions, absent_memories="ones", max_memories=9)
        prompt = torch.cat([torch.full((2, 2), SLOT), random_ids(2, 5)], 1)
        options = {"context_input_ids": random_ids(2, 2, CHUNK), "max_new_tokens": 19, **ROLLING}
        cached = model.generate(prompt, **options)
        assert torch.equal(cached, model.generate(prompt, use_cache=False, **options))
        with pytest.raises(ValueError, match="Put the slots in front"):
            model.generate(torch.cat([random_ids(2, 1), prompt], 1), **options)

    def test_what_cannot_roll_is_refused(self):
        model, chunks = build_model(), random_ids(2, 1, CHUNK)
        uneven, mask = padded_on_the_left([torch.tensor([SLOT]), torch.cat([torch.tensor([SLOT]), random_ids(20)])])
        other = build_model(self_memory=False)
        with pytest.raises(ValueError, match="`config.self_memory` is False"):
            other(uneven[1:], context_input_ids=chunks[1:], attention_mask=mask[1:], rolling_memory=True)
        only = torch.full((1, 1), SLOT)
        assert model.generate(only, context_input_ids=chunks[:1], max_new_tokens=20, **ROLLING).shape == (1, 21)

    def test_a_row_that_ends_in_its_memory_beside_one_of_several_windows(self):
        model, chunks = build_model(), random_ids(2, 1, CHUNK)
        texts = [torch.tensor([5, SLOT]), torch.cat([torch.tensor([SLOT]), random_ids(20)])]
        uneven, mask = padded_on_the_left(texts)
        options = {"context_input_ids": chunks, "rolling_memory": True}
        out = model(uneven, attention_mask=mask, use_cache=True, **options)
        more = random_ids(2, WINDOW + 3, seed=9)
        following = model(more, past_key_values=out.past_key_values).logits
        for row, text in enumerate(texts):
            text = torch.cat([text, more[row]])
            expected = memory_loop.read_after_context(model, [chunks[row, 0]], text)
            got = torch.cat([out.logits[row, mask[row].bool()], following[row]])
            torch.testing.assert_close(got, expected, atol=ATOL, rtol=0)


class TestDropOldest:
    @pytest.mark.parametrize("fields", [{}, SPREAD, {"memory_positions": "fixed", "absent_memories": "zeros"}])
    @pytest.mark.parametrize("max_memories", [0, 1, 4])
    def test_plain_text_equals_the_plain_loop_whatever_its_length(self, max_memories, fields):
        model = build_model(max_memories=max_memories, memory_policy="drop_oldest", **fields)
        input_ids, mask = ragged_batch(6 * WINDOW + 3)
        out = model(input_ids, attention_mask=mask, use_cache=True)
        more = random_ids(4, 1, seed=5)
        following = model(more, past_key_values=out.past_key_values).logits
        for row in range(4):
            text = input_ids[row, mask[row].bool()]
            expected = memory_loop.read_with_room(model, torch.cat([text, more[row]]))
            got = out.logits[row, mask[row].bool()]
            torch.testing.assert_close(got, expected[:-1], atol=ATOL, rtol=0)
            torch.testing.assert_close(following[row, 0], expected[-1], atol=ATOL, rtol=0)
        assert out.past_key_values.memories.embeds.shape[1] <= max_memories
        assert model.config.max_position_embeddings is None

    def test_writing_after_a_context_keeps_the_context(self):
        model = build_model(max_memories=5, memory_policy="drop_oldest")
        prompts, chunks, chunk_mask = a_prompt_for_each_row(front=True)
        prompt, mask = padded_on_the_left(prompts)
        options = {"context_input_ids": chunks, "context_attention_mask": chunk_mask, **ROLLING}
        cached = model.generate(prompt, attention_mask=mask, max_new_tokens=5 * WINDOW, **options)
        for row, text in enumerate(prompts):
            own = [chunk[keep.bool()] for chunk, keep in zip(chunks[row], chunk_mask[row], strict=True) if keep.any()]
            for _ in range(5 * WINDOW):
                text = torch.cat([text, memory_loop.read_after_context(model, own, text)[-1:].argmax(-1)])
            assert torch.equal(cached[row, -len(text) :], text)

    def test_gradients_equal_the_plain_loop(self):
        fields = {"max_memories": 3, "memory_policy": "drop_oldest"}
        model, slow, text = build_model(**fields), build_model(**fields), random_ids(5 * WINDOW)
        weights = torch.randn(len(text), 96, generator=torch.Generator().manual_seed(0))
        (model(text[None]).logits[0] * weights).sum().backward()
        (memory_loop.read_with_room(slow, text) * weights).sum().backward()
        for (name, fast), plain in zip(model.named_parameters(), slow.parameters(), strict=True):
            if plain.grad is not None:
                torch.testing.assert_close(fast.grad, plain.grad, atol=1e-4, rtol=1e-4, msg=name)


class Heard(BaseStreamer):
    """Keeps what a streamer is given."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


class TestTheLibrarysOptionsThroughRollOvers:
    @pytest.mark.parametrize("context", [False, True])
    def test_a_streamer_hears_every_token_once_and_scores_are_those_of_forward(self, context):
        model = build_model()
        prompt = random_ids(1, 6)
        given = {"context_input_ids": random_ids(1, 2, CHUNK), "rolling_memory": True} if context else {}
        if context:
            prompt = torch.cat([torch.full((1, 2), SLOT), prompt], 1)
        heard = Heard()
        out = model.generate(
            prompt,
            max_new_tokens=2 * WINDOW + 3,
            streamer=heard,
            output_scores=True,
            return_dict_in_generate=True,
            **given,
            **GREEDY,
        )
        assert heard.ended and heard.tokens == out.sequences[0].tolist()
        logits = model(out.sequences, **given).logits[:, prompt.shape[1] - 1 : -1]
        torch.testing.assert_close(torch.stack(out.scores, 1), logits, atol=ATOL, rtol=0)

    def test_stopping_criteria_stop_after_a_roll_over(self):
        model, prompt = build_model(), random_ids(1, WINDOW)
        free = model.generate(prompt, max_new_tokens=20, **GREEDY)[0]
        wanted = free[2 * WINDOW + 2]
        stop = StoppingCriteriaList([lambda ids, scores, **_: ids[:, -1] == wanted])
        out = model.generate(prompt, max_new_tokens=20, stopping_criteria=stop, **GREEDY)[0]
        first = WINDOW + int((free[WINDOW:] == wanted).nonzero()[0])
        assert torch.equal(out, free[: first + 1])

    def test_a_repetition_penalty_reaches_tokens_that_folded_long_ago(self):
        model, prompt = build_model(), random_ids(1, 5)
        out = model.generate(prompt, max_new_tokens=3 * WINDOW, repetition_penalty=1e6, **GREEDY)
        # Scores of tokens that were there shrink to nothing or grow to minus millions: none is written again
        # as long as some other token has a positive score.
        assert len(set(out[0].tolist())) == out.shape[1]
