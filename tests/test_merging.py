"""Beyond `max_memories` neighbouring memories are merged by reading their text again: equal to the plain loop."""

import doctest
import itertools

import pytest
import torch

from modeling_memory import MemoryEncoderDecoderConfig, memory_merging
from modeling_memory.memory_merging import FOREVER, merge_plan, pieces_of
from tests.conftest import tiny_decoder_config, tiny_encoder_config
from tests.memory_models import CHUNK, COPY, SLOT, WINDOW, build_model, ragged_batch, random_ids
from tests.reference import memory_loop

GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
ATOL = 1e-5
MODELS = {
    "one_memory": {"encoder": "llama", "max_memories": 3},
    "bert": {"encoder": "bert", "max_memories": 4, "pooling": "mean"},
    "mixer": {"encoder": "masked_mixer", "max_memories": 5},
    "little_room": {"encoder": "llama", "max_memories": 1},
    "fewer_memories_of_a_chunk": {"encoder": "masked_mixer", "max_memories": 13, "memories_per_chunk": 4},
    "then_longer_chunks": {"encoder": "llama", "max_memories": 4, "memories_per_chunk": 2, "pooling": "mean"},
    "three_memories": {"encoder": "bert", "max_memories": 7, "memories_per_chunk": 3},
    "places": {"encoder": "llama", "max_memories": 3, "window_positions": True},
    "fixed": {"encoder": "llama", "max_memories": 3, "memory_positions": "fixed", "absent_memories": "zeros"},
}


def merging_model(kind: str = "one_memory", **fields):
    return build_model(**{**MODELS[kind], "memory_policy": "merge", **fields})


def left_padded(lengths: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(lengths)
    mask = (torch.arange(width) >= width - torch.tensor(lengths)[:, None]).long()
    return random_ids(len(lengths), width) * mask, mask


@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_one_call_and_cached_steps_equal_the_plain_loop(kind):
    model = merging_model(kind)
    input_ids, mask = ragged_batch(6 * WINDOW + 3)
    mask[:, 0] = 1
    input_ids[0, 3] = COPY
    whole = model(input_ids, attention_mask=mask, use_cache=True)
    logits, out, stepped = whole.logits, None, []
    for start in range(0, input_ids.shape[1], 3):
        cache = None if out is None else out.past_key_values
        step, seen = input_ids[:, start : start + 3], mask[:, : start + 3]
        out = model(step, attention_mask=seen, past_key_values=cache, use_cache=True)
        stepped.append(out.logits)
    more = random_ids(4, WINDOW + 1, seed=5)
    following = model(more, past_key_values=whole.past_key_values).logits
    for row in range(4):
        keep = mask[row].bool()
        expected = memory_loop.read_with_room(model, torch.cat([input_ids[row, keep], more[row]]))
        torch.testing.assert_close(logits[row, keep], expected[: -len(more[row])], atol=ATOL, rtol=0)
        torch.testing.assert_close(torch.cat(stepped, 1)[row, keep], expected[: -len(more[row])], atol=ATOL, rtol=0)
        torch.testing.assert_close(following[row], expected[-len(more[row]) :], atol=ATOL, rtol=0)
    assert (whole.memory_mask.sum(1) <= model.config.max_memories).all()
    torch.testing.assert_close(
        out.memory_embeds, model(input_ids, attention_mask=mask).memory_embeds, atol=ATOL, rtol=0
    )


@pytest.mark.parametrize("kind", ["one_memory", "fewer_memories_of_a_chunk", "then_longer_chunks"])
def test_writing_equals_the_plain_loop_token_by_token(kind):
    model, lengths = merging_model(kind), (2, 13, 3 * WINDOW + 1)
    prompt, mask = left_padded(lengths)
    out = model.generate(prompt, attention_mask=mask, max_new_tokens=2 * WINDOW + 2, **GREEDY)
    with torch.no_grad():
        for row, length in enumerate(lengths):
            text = prompt[row, -length:]
            for _ in range(2 * WINDOW + 2):
                text = torch.cat([text, memory_loop.read_with_room(model, text)[-1:].argmax(-1)])
            assert torch.equal(out[row, -len(text) :], text)


def test_beams_with_cache_equal_beams_without():
    model = merging_model()
    prompt, mask = left_padded((3, 13))
    options = {"attention_mask": mask, "max_new_tokens": 5 * WINDOW, "num_beams": 3, **GREEDY}
    assert torch.equal(*(model.generate(prompt, use_cache=cached, **options) for cached in (True, False)))


def test_a_context_in_slots_stays_and_what_follows_it_merges():
    model = merging_model(max_memories=5)
    chunks, prompts = random_ids(2, 2, CHUNK), []
    for row, length in enumerate((3, 2 * WINDOW + 3)):
        prompts.append(torch.cat([random_ids(row, seed=7), torch.full((2,), SLOT), random_ids(length, seed=row)]))
    width = max(map(len, prompts))
    prompt = torch.stack([torch.cat([torch.zeros(width - len(p), dtype=torch.long), p]) for p in prompts])
    options = {"context_input_ids": chunks, "rolling_memory": True, **GREEDY}
    out = model.generate(prompt, attention_mask=(prompt != 0).long(), max_new_tokens=4 * WINDOW, **options)
    with torch.no_grad():
        for row, text in enumerate(prompts):
            for _ in range(4 * WINDOW):
                logits = memory_loop.read_behind_context(model, list(chunks[row]), text)
                text = torch.cat([text, logits[-1:].argmax(-1)])
            assert torch.equal(out[row, -len(text) :], text)


@pytest.mark.parametrize("kind", ["one_memory", "then_longer_chunks"])
def test_gradients_equal_the_plain_loop(kind):
    fields = {"freeze_encoder": False}
    model, slow, text = merging_model(kind, **fields), merging_model(kind, **fields), random_ids(5 * WINDOW)
    weights = torch.randn(len(text), 96, generator=torch.Generator().manual_seed(0))
    (model(text[None]).logits[0] * weights).sum().backward()
    (memory_loop.read_with_room(slow, text) * weights).sum().backward()
    for (name, fast), plain in zip(model.named_parameters(), slow.parameters(), strict=True):
        if plain.grad is not None:
            torch.testing.assert_close(fast.grad, plain.grad, atol=2e-4, rtol=1e-4, msg=name)


def test_it_trains_under_autocast():
    model, text = merging_model(), random_ids(2, 6 * WINDOW)
    exact = model(text, labels=text).loss
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(text, labels=text).loss
    loss.backward()
    torch.testing.assert_close(loss.detach(), exact.detach(), atol=0.05, rtol=0)
    assert model.projector.out.weight.grad.isfinite().all()


def test_writing_encodes_no_text_twice_but_what_is_merged():
    model, prompt, read = merging_model(max_memories=4), random_ids(1, 3), []
    model.encoder.register_forward_pre_hook(
        lambda _module, _args, kwargs: read.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    model.generate(prompt, max_new_tokens=4 * WINDOW, **GREEDY)
    assert [shape for shape in read if shape[1] == CHUNK] == [(2, CHUNK)] * 4  # four windows of two chunks
    assert [shape for shape in read if shape[1] > CHUNK] == [(2, 2 * CHUNK), (2, 2 * CHUNK)]


def test_what_cannot_be_merged_is_refused_before_the_first_token():
    parts = {"decoder": tiny_decoder_config(), "chunk_length": CHUNK, "memory_policy": "merge"}
    fixed = tiny_encoder_config("masked_mixer", max_position_embeddings=CHUNK)
    with pytest.raises(ValueError, match="takes 4 tokens.*longer chunks.*memories_per_chunk.*drop_oldest"):
        MemoryEncoderDecoderConfig(encoder=fixed, max_memories=3, **parts)
    with pytest.raises(ValueError, match="`max_memories` is 1.*2"):
        MemoryEncoderDecoderConfig(encoder=tiny_encoder_config("llama"), memories_per_chunk=2, max_memories=1, **parts)

    def never(*_args, **_kwargs):
        raise AssertionError("a token was read")

    model = build_model("masked_mixer", max_memories=3)
    model.config.encoder.max_position_embeddings, model.config.memory_policy = CHUNK, "merge"
    hook = model.decoder.register_forward_pre_hook(never)
    with pytest.raises(ValueError, match="at most 1 chunk each.*drop_oldest"):
        model.generate(random_ids(1, 3), max_new_tokens=4 * WINDOW, **GREEDY)
    hook.remove()
    assert model.generate(random_ids(1, 3), max_new_tokens=WINDOW, **GREEDY).shape == (1, 3 + WINDOW)
    with pytest.raises(ValueError, match="at most 1 chunk"):
        model(random_ids(1, 4 * WINDOW))


@torch.no_grad()
def test_a_text_is_read_as_far_as_the_config_says_and_no_further():
    model = build_model(max_memories=2, memory_policy="merge")  # a mixer that takes 8 chunks at once
    limit = model.config.max_position_embeddings
    assert limit == 9 * WINDOW
    assert (
        build_model(max_memories=2, memory_policy="merge", window_length=12).config.max_position_embeddings == 3 * 12
    )
    assert model(random_ids(1, limit)).logits.shape[1] == limit
    with pytest.raises(ValueError, match="folds into 18 chunks.*memories of 2.*at most 8 chunks"):
        model(random_ids(1, limit + 1))
    with pytest.raises(ValueError, match="folds into 18 chunks"):
        model.generate(random_ids(1, 5), max_new_tokens=limit, **GREEDY)


@torch.no_grad()
def test_a_cache_that_another_policy_filled_is_refused():
    model = merging_model()
    model.config.memory_policy = "drop_oldest"
    cache = model(random_ids(1, 3 * WINDOW), use_cache=True).past_key_values
    model.config.memory_policy = "merge"
    with pytest.raises(ValueError, match="another policy"):
        model(random_ids(1, WINDOW), past_key_values=cache)


@pytest.mark.parametrize("chunks", [1, 2, 3])
def test_plans_keep_all_text_in_order_and_use_all_room(chunks):
    for room, longest in itertools.product(range(1, 7), (1, 2, 4, 8)):
        most = (room if chunks < 3 else max(1, room - 1)) * longest // chunks  # as the config says
        plan = merge_plan((), most + 1, chunks, room, longest)
        for window in range(most + 1):
            seen = [segment for segment in plan if segment.born <= window < segment.died]
            starts = [sum(segment.size for segment in seen[:n]) for n in range(len(seen))]
            assert [segment.start for segment in seen] == starts
            assert sum(segment.size for segment in seen) == window * chunks
            assert len(seen) <= room and all(segment.size <= longest for segment in seen)
            if window * chunks <= room:
                assert all(segment.size == 1 for segment in seen)
            continued = merge_plan([segment.size for segment in seen], most + 1 - window, chunks, room, longest)
            last = [s.size for s in plan if s.died == FOREVER]
            assert [s.size for s in continued if s.died == FOREVER] == last
        with pytest.raises(ValueError, match="at most"):
            merge_plan((), room * longest // chunks + 2, chunks, room, longest)


def test_pieces_cover_a_merged_text_and_share_its_memories():
    for size, per_chunk in itertools.product(range(1, 20), range(1, 6)):
        pieces = pieces_of(size, per_chunk)
        assert sum(num_memories for _, _, num_memories in pieces) == per_chunk
        assert [first for first, _, _ in pieces] == [
            sum(length for _, length, _ in pieces[:n]) for n in range(len(pieces))
        ]
        assert sum(length for _, length, _ in pieces) == size
        assert max(length for _, length, _ in pieces) == -(-size // per_chunk)


def test_examples_in_docstrings_are_true():
    assert doctest.testmod(memory_merging).failed == 0
