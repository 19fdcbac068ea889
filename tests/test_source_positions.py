"""Memories at the places of the text that they stand for: tokens keep the positions of the full text."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from modeling_memory import MemoryEncoderDecoderForCausalLM
from tests.memory_models import CHUNK, SLOT, WINDOW, build_model, random_ids
from tests.reference import memory_loop

ATOL = 1e-5
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def source_model(**fields) -> MemoryEncoderDecoderForCausalLM:
    return build_model("llama", memory_positions="source", **fields)


def several_contexts() -> tuple[torch.Tensor, torch.Tensor, list[list[torch.Tensor]]]:
    """Two rows of chunks `(2, 3, L)`: a full, a short and a full one; a short and an absent one."""
    chunks, mask = random_ids(2, 3, CHUNK), torch.ones(2, 3, CHUNK, dtype=torch.long)
    mask[0, 1, 3:] = 0
    mask[1, 0, 1:] = 0
    mask[1, 2] = 0
    real = [
        [chunk[keep.bool()] for chunk, keep in zip(chunks[row], mask[row], strict=True) if keep.any()]
        for row in range(2)
    ]
    return chunks, mask, real


def prompts(per_chunk: int) -> list[torch.Tensor]:
    """Slots after tokens and between them, the contexts of a row apart from each other."""
    slots = torch.full((per_chunk,), SLOT)
    first = [torch.tensor([7, 8]), slots, slots, torch.tensor([9]), slots, torch.tensor([10, 11, 12])]
    second = [slots, torch.tensor([13, 14]), slots, torch.tensor([15])]
    return [torch.cat(first), torch.cat(second)]


@pytest.mark.parametrize("per_chunk", [1, 2, 3])
@pytest.mark.parametrize("side", ["left", "right"])
def test_slots_anywhere_stand_where_their_tokens_would(per_chunk, side):
    model = source_model(memories_per_chunk=per_chunk)
    chunks, chunk_mask, real = several_contexts()
    texts = prompts(per_chunk)
    width = max(map(len, texts)) + 1
    rows, masks = [], []
    for text in texts:
        gap = torch.zeros(width - len(text), dtype=torch.long)
        parts = [gap, text] if side == "left" else [text, gap]
        rows.append(torch.cat(parts))
        masks.append(torch.cat([torch.ones_like(part) * (part is text) for part in parts]))
    ids, mask = torch.stack(rows), torch.stack(masks)
    out = model(ids, attention_mask=mask, context_input_ids=chunks, context_attention_mask=chunk_mask)
    embeds, memory_mask, num_tokens = model.encode_memories(chunks, chunk_mask, return_num_tokens=True)
    ready = model(
        ids, attention_mask=mask, memory_embeds=embeds, memory_mask=memory_mask, memory_num_tokens=num_tokens
    )
    for row, text in enumerate(texts):
        expected = memory_loop.read_slots_in_source(model, [real[row]], text)
        torch.testing.assert_close(out.logits[row, mask[row].bool()], expected, atol=ATOL, rtol=0)
        torch.testing.assert_close(ready.logits[row, mask[row].bool()], expected, atol=ATOL, rtol=0)


def test_memories_stand_for_all_tokens_of_their_chunks():
    model = source_model(memories_per_chunk=3)
    chunks, mask, real = several_contexts()
    _, memory_mask, num_tokens = model.encode_memories(chunks, mask, return_num_tokens=True)
    assert (num_tokens * memory_mask).sum(1).tolist() == [sum(map(len, row)) for row in real]
    _, memory_mask, num_tokens = model.encode_memories(chunks, mask, torch.tensor([[2, 1, 3], [1, 2, 0]]), True)
    assert num_tokens.sum(1).tolist() == [sum(map(len, row)) for row in real]
    assert num_tokens[0].tolist() == [2, 2, 3, 2, 1, 1]


@pytest.mark.parametrize("num_beams", [1, 2])
@pytest.mark.parametrize("window_positions", [False, True])
def test_generation_with_cache_equals_generation_without(num_beams, window_positions):
    model = source_model(memories_per_chunk=2, window_positions=window_positions, copy_token_id=12)
    chunks, chunk_mask, real = several_contexts()
    texts = prompts(2)
    width = max(map(len, texts))
    ids = torch.stack([torch.cat([torch.zeros(width - len(text), dtype=torch.long), text]) for text in texts])
    options = {"context_input_ids": chunks, "context_attention_mask": chunk_mask, "num_beams": num_beams, **GREEDY}
    mask = (ids != 0).long()
    cached = model.generate(ids, attention_mask=mask, max_new_tokens=9, **options)
    assert torch.equal(cached, model.generate(ids, attention_mask=mask, max_new_tokens=9, use_cache=False, **options))
    if num_beams == 1 and not window_positions:
        for row, text in enumerate(texts):
            for _ in range(9):
                logits = memory_loop.read_slots_in_source(model, [real[row]], text)
                text = torch.cat([text, logits[-1:].argmax(-1)])
            assert torch.equal(cached[row, -len(text) :], text)


@pytest.mark.parametrize("fields", [{}, {"max_memories": 5, "memory_policy": "drop_oldest"}])
def test_plain_text_goes_on_where_the_full_text_would(fields):
    """Windows start at c * W, in one call and through cached roll-overs, also where old memories have made room."""
    model = source_model(**fields)
    text = random_ids(2, 4 * WINDOW + 3)
    seen: list[torch.Tensor] = []

    def note(_module, _args, kwargs):
        if kwargs["position_ids"] is not None:  # the decoder counts a text of one window itself
            seen.append(kwargs["position_ids"][:, -1])

    model.decoder.model.register_forward_pre_hook(note, with_kwargs=True)
    with torch.no_grad():
        logits = model(text).logits
        assert max(int(positions.max()) for positions in seen) >= 4 * WINDOW
        out = model(text[:, :5], use_cache=True)
        steps = [out.logits]
        for column in range(5, text.shape[1]):
            seen.clear()
            out = model(text[:, column : column + 1], past_key_values=out.past_key_values)
            steps.append(out.logits)
            last = seen[-1].tolist()
            # A window that opens holds one token; its other columns are not real, and their positions do not matter.
            assert last == [column] * 2 or column % WINDOW == 0
    torch.testing.assert_close(torch.cat(steps, 1), logits, atol=ATOL, rtol=0)


def test_a_context_that_stays_rolls_on_in_the_same_positions():
    model = source_model(memories_per_chunk=2)
    chunks = random_ids(1, 2, CHUNK)
    prompt = torch.cat([torch.tensor([7, 8]), torch.full((4,), SLOT), random_ids(2 * WINDOW + 3)])[None]
    options = {"context_input_ids": chunks, "rolling_memory": True, "max_new_tokens": 20, **GREEDY}
    cached = model.generate(prompt, **options)
    assert torch.equal(cached, model.generate(prompt, use_cache=False, **options))


def test_embeddings_after_memories_equal_slots():
    model = source_model()
    chunks = random_ids(2, 2, CHUNK)
    memory_embeds, memory_mask, num_tokens = model.encode_memories(chunks, return_num_tokens=True)
    num_tokens = num_tokens + 3
    given = {"memory_embeds": memory_embeds, "memory_mask": memory_mask, "memory_num_tokens": num_tokens}
    ids = random_ids(2, 5)
    slotted = torch.cat([torch.full((2, 2), SLOT), ids], 1)
    expected = model(slotted, **given).logits[:, 2:]
    got = model(inputs_embeds=model.get_input_embeddings()(ids), **given).logits
    torch.testing.assert_close(got, expected, atol=ATOL, rtol=0)
    written = model.generate(slotted, max_new_tokens=7, **given, **GREEDY)[:, 7:]
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(model.generate(inputs_embeds=embeds, max_new_tokens=7, **given, **GREEDY), written)


def table_model(positions: int = 16, **fields) -> MemoryEncoderDecoderForCausalLM:
    """A model whose decoder has so many rows of positions, no more; K does not divide L."""
    torch.manual_seed(0)
    decoder = GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=32, n_layer=1, n_head=2, n_positions=positions))
    return MemoryEncoderDecoderForCausalLM.from_encoder_decoder_pretrained(
        build_model("llama").encoder, decoder, chunk_length=CHUNK, memories_per_chunk=3, memory_positions="source",
        **fields,
    )  # fmt: skip


def largest_memories(rows: int = 1) -> dict[str, torch.Tensor]:
    """Of three chunks the memories that stand for two tokens each; the others, for one token each, are absent."""
    memory_mask = torch.tensor([[1, 0, 0] * 3]).expand(rows, -1)
    return {"memory_embeds": torch.ones(rows, 9, 32), "memory_mask": memory_mask}


@pytest.mark.parametrize("kind", ["slots", "embeds"])
@torch.no_grad()
def test_positions_beyond_a_table_are_refused_and_none_before(kind):
    """Three memories take six positions, so ten tokens are the last that 16 rows hold."""
    model, table = table_model(), 16
    for num_tokens in (10, 11):
        text = random_ids(1, num_tokens)
        given = {"input_ids": torch.cat([torch.full((1, 3), SLOT), text], 1)}
        if kind == "embeds":
            given = {"inputs_embeds": model.get_input_embeddings()(text)}
        if num_tokens == 10:
            assert torch.isfinite(model(**given, **largest_memories()).logits).all()
            continue
        with pytest.raises(ValueError, match=f"needs 17 positions.* has {table}"):
            model(**given, **largest_memories())


@pytest.mark.parametrize("kind", ["slots", "embeds", "unequal"])
def test_generate_refuses_before_the_first_token_what_a_table_cannot_hold(kind):
    model = table_model()
    rows = 2 if kind == "unequal" else 1
    text, given = random_ids(rows, 4), largest_memories(rows)
    slots = torch.full((rows, 3), SLOT)
    if kind == "unequal":  # the row with fewer memories has the longer way: one memory, of a long passage
        given["memory_mask"] = torch.tensor([[1, 1, 1, 0, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0, 0]])
        given["memory_num_tokens"] = torch.tensor([[1] * 9, [4] + [1] * 8])
        slots[1, :2] = 5
    inputs = {"inputs": torch.cat([slots, text], 1)}
    if kind == "embeds":
        inputs = {"inputs_embeds": model.get_input_embeddings()(text)}
    taken = 4 + 2 if kind == "unequal" else 6
    room = 16 - taken - 4 + 1  # the last token is written and not read
    model.generate(**inputs, **given, **GREEDY, max_new_tokens=room)
    model.decoder.register_forward_pre_hook(lambda *_: pytest.fail("a token was read"))
    with pytest.raises(ValueError, match="needs 17 positions"):
        model.generate(**inputs, **given, **GREEDY, max_new_tokens=room + 1)


@torch.no_grad()
def test_places_after_the_last_token_take_no_position_beyond_the_table():
    model = table_model(20, window_length=2 * CHUNK, self_memory=True, memory_policy="drop_oldest")
    text = random_ids(1, 18)  # the third window has places for 24
    whole = model(text).logits
    out = model(text[:, :5], use_cache=True)
    for column in range(5, 18):
        out = model(text[:, column : column + 1], past_key_values=out.past_key_values)
        torch.testing.assert_close(out.logits[:, -1], whole[:, column], atol=ATOL, rtol=0)


@torch.no_grad()
def test_special_tokens_of_an_encoder_count_wherever_memories_come_from():
    """A chunk that an encoder frames is longer than `chunk_length`: positions and their bound count all of it."""
    model = source_model()
    framed = random_ids(1, 2, CHUNK + 2)
    slots = torch.tensor([[SLOT, SLOT, 7, 8]])
    embeds, memory_mask, num_tokens = model.encode_memories(framed, return_num_tokens=True)
    assert num_tokens.tolist() == [[CHUNK + 2] * 2]
    ready = {"memory_embeds": embeds, "memory_mask": memory_mask, "memory_num_tokens": num_tokens}
    expected = memory_loop.read_slots_in_source(model, [list(framed[0])], slots[0])
    ends = []
    for given in ({"context_input_ids": framed}, ready):
        for rolling in (False, True):
            out = model(slots, **given, rolling_memory=rolling, use_cache=True)
            torch.testing.assert_close(out.logits[0], expected, atol=ATOL, rtol=0)
            ends.append((out.past_key_values.end, int(out.past_key_values.next_position)))
    assert ends == [(2 * CHUNK + 6, 2 * CHUNK + 6)] * 4


def test_numbers_of_tokens_that_do_not_fit_are_refused():
    model = source_model()
    given = {"memory_embeds": torch.zeros(1, 1, 32), "input_ids": torch.tensor([[SLOT, 7]])}
    with pytest.raises(ValueError, match="`memory_num_tokens` holds negative numbers"):
        model(**given, memory_num_tokens=torch.tensor([[-1]]))
    with pytest.raises(ValueError, match=r"`memory_num_tokens` has shape \(1, 2\)"):
        model(**given, memory_num_tokens=torch.tensor([[1, 2]]))
    with pytest.raises(ValueError, match="without `memory_embeds`"):
        model(torch.tensor([[7]]), memory_num_tokens=torch.tensor([[1]]))
