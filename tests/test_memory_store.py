"""A store gives back what was put in: memories, texts, places; of one model only, whatever is done in between."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

from modeling_memory import (
    Chunk,
    MemoryEncoderDecoderForCausalLM,
    MemoryProcessor,
    MemoryStore,
    MemoryStoreError,
    StoredText,
    quantization_report,
)
from modeling_memory.store import database
from modeling_memory.store.codec import DTYPES, decode_vectors, encode_vectors
from modeling_memory.store.fingerprint import fingerprint
from modeling_memory.store.texts import text_digest
from tests.conftest import build_tiny_encoder_tokenizer, build_tiny_tokenizer
from tests.memory_models import CHUNK, WINDOW, build_model

TEXTS = {
    "cat": "the cat sat on the mat, and there it stayed.",
    "dog": "a dog",
    "sea": "over the hills and over the sea, in the end he saw the ring.",
}


@pytest.fixture(scope="module")
def model():
    return build_model(memories_per_chunk=2, pooling="last")


@pytest.fixture(scope="module")
def processor():
    return MemoryProcessor(build_tiny_tokenizer(), chunk_length=CHUNK, window_length=WINDOW, memories_per_chunk=2)


@pytest.fixture
def store(model, processor, tmp_path):
    store = MemoryStore.open(tmp_path / "store", model, processor, create=True, dtype="float32", keep_text=True)
    store.append(TEXTS)
    return store


def coded(memories: torch.Tensor, dtype: str) -> torch.Tensor:
    """What a number format makes of memories `(n, K, D)`."""
    return decode_vectors(encode_vectors(memories, dtype), dtype, *memories.shape[1:])


def encoded(model, processor, text: str) -> torch.Tensor:
    """Memories of a text by the model alone, `(n, K, D)`."""
    inputs = processor(context=text, return_tensors="pt")
    memories, _ = model.encode_memories(inputs["context_input_ids"], inputs["context_attention_mask"])
    return memories.detach().unflatten(1, (-1, 2))[0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_memories_come_back_as_the_model_made_them(model, processor, tmp_path, dtype):
    """In full precision the model's own, one by one; in other formats exactly what the codec makes of them."""
    MemoryStore.open(tmp_path, model, processor, create=True, dtype=dtype).append(TEXTS, batch_size=3)
    store = MemoryStore.open(tmp_path, model, processor)
    for text_id, text in TEXTS.items():
        alone = encoded(model, processor, text)
        found = store.memories(store.chunks(text_id))
        torch.testing.assert_close(found, coded(alone, dtype), rtol=2e-2, atol=0.2)
        if dtype == "float32":
            torch.testing.assert_close(found, alone, rtol=1e-5, atol=1e-5)
    scattered = store.chunks()[::-2]
    assert torch.equal(store.memories(scattered), torch.cat([store.memories([chunk]) for chunk in scattered]))


@pytest.mark.parametrize("width", [64, 40])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_format_errs_by_no_more_than_its_step(dtype, width):
    sizes = torch.logspace(-6, 3, 50)[:, None, None]
    memories = torch.randn(50, 2, width, generator=torch.Generator().manual_seed(0)) * sizes
    error = (coded(memories, dtype) - memories).abs()
    steps = {"int8": 2 * 127, "int4": 2 * 7}
    if dtype in steps:
        bound = memories.abs().amax(-1, keepdim=True) / steps[dtype] * 1.001
    else:
        bound = {"float32": 0, "float16": 2**-11, "bfloat16": 2**-8}[dtype] * memories.abs() + 6e-8
    assert (error <= bound).all()


def test_a_scale_of_int4_is_shared_by_32_numbers_only():
    memories = torch.cat([torch.full((1, 1, 32), 1e-3), torch.full((1, 1, 32), 1e3)], -1)
    torch.testing.assert_close(coded(memories, "int4"), memories, rtol=1e-5, atol=0)


def test_extremes_of_the_codec():
    zero = torch.zeros(1, 1, 4)
    for dtype in DTYPES:
        assert torch.equal(coded(zero, dtype), zero) and coded(zero[:0], dtype).shape == (0, 1, 4)
    with pytest.raises(ValueError, match="more than float16 holds"):
        encode_vectors(torch.full((1, 1, 4), 1e6), "float16")
    with pytest.raises(ValueError, match="not finite"):
        encode_vectors(torch.tensor([[[float("nan")]]]), "int8")
    with pytest.raises(ValueError, match="expected one of 'float32'"):
        encode_vectors(zero, "int3")


def test_chunks_say_where_they_stand_and_expand_to_their_text(store, processor):
    for text_id, text in TEXTS.items():
        chunks = store.chunks(text_id)
        assert store.text(text_id) == text and "".join(store.expand(chunks)) == text
        assert [chunk.number for chunk in chunks] == list(range(len(processor.split_context(text))))
        assert [chunk.num_tokens for chunk in chunks] == list(map(len, processor.split_context(text)))
        for chunk, ids in zip(chunks, processor.split_context(text), strict=True):
            assert text[chunk.start : chunk.end] == processor.tokenizer.decode(ids)
    assert store.num_chunks == len(store.chunks()) and store.num_tokens == sum(c.num_tokens for c in store.chunks())


def test_two_tokenizers_cut_with_the_encoders_own(tmp_path):
    model = build_model("bert")
    processor = MemoryProcessor(
        build_tiny_tokenizer(), build_tiny_encoder_tokenizer(), chunk_length=CHUNK, window_length=WINDOW
    )
    store = MemoryStore.open(tmp_path, model, processor, create=True, dtype="float32", keep_text=True)
    store.append(TEXTS)
    assert [chunk.num_tokens for chunk in store.chunks("dog")] == [4, 1]  # [CLS] and [SEP] do not count
    assert store.expand(store.chunks("dog")) == ["a do", "g"]
    inputs = processor(context=TEXTS["dog"], return_tensors="pt")
    alone, _ = model.encode_memories(**{k: inputs[k] for k in ("context_input_ids", "context_attention_mask")})
    torch.testing.assert_close(store.load("dog")["memory_embeds"], alone.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("filled", ["pad", "end"])
@pytest.mark.parametrize("encoder", ["masked_mixer", "bert"])
def test_short_chunks_from_the_store_stand_where_they_do_from_the_context(encoder, filled, tmp_path):
    model = build_model(encoder, memories_per_chunk=2, memory_positions="source", short_chunks=filled, eos_token_id=2)
    own = build_tiny_encoder_tokenizer() if encoder == "bert" else None
    lengths = {"chunk_length": CHUNK, "window_length": WINDOW, "memories_per_chunk": 2}
    processor = MemoryProcessor(build_tiny_tokenizer(), own, **lengths)
    store = MemoryStore.open(tmp_path, model, processor, create=True, dtype="float32")
    store.append(TEXTS)
    inputs = processor(text="<memory>in <memory>the end", context=[[TEXTS["dog"], TEXTS["cat"]]], return_tensors="pt")
    loaded = store.load(["dog", "cat"])
    with torch.no_grad():
        stored = model(inputs["input_ids"], **loaded).logits
        torch.testing.assert_close(stored, model(**inputs).logits, rtol=1e-4, atol=1e-4)


def test_a_prompt_from_the_store_is_the_prompt_from_the_context(store, model, processor):
    text = "<memory>in the end"
    with torch.no_grad():
        direct = model(**processor(text=text, context=TEXTS["cat"], return_tensors="pt")).logits
        stored = model(**store.prepare(text, "cat")).logits
    torch.testing.assert_close(stored, direct, rtol=1e-4, atol=1e-4)
    written = model.generate(**store.prepare(text, "cat"), max_new_tokens=4, do_sample=False)
    expected = processor(text=text, context=TEXTS["cat"], return_tensors="pt")
    assert torch.equal(written, model.generate(**expected, max_new_tokens=4, do_sample=False))


def test_expanded_chunks_stand_as_text_in_their_place(store, processor):
    chunks = store.chunks("cat")
    inputs = store.prepare("he <memory> it", chunks, expand=chunks[1:3])
    slot = processor.memory_token_id
    shown = processor.tokenizer.decode(inputs["input_ids"][0].tolist()).replace("<memory>", "_")
    assert shown == "he __" + "".join(store.expand(chunks[1:3])) + "__" * (len(chunks) - 3) + " it"
    assert int((inputs["input_ids"] == slot).sum()) == inputs["memory_embeds"].shape[1] == 2 * (len(chunks) - 2)
    clear = store.prepare("he <memory> it", "dog", expand=store.chunks("dog"))
    assert "memory_embeds" not in clear
    assert processor.tokenizer.decode(clear["input_ids"][0].tolist()) == "he a dog it"
    with pytest.raises(ValueError, match="not among the chunks"):
        store.prepare("he", "cat", expand=store.chunks("dog"))


def test_nearest_is_the_plain_search(store, model, processor):
    queries = torch.cat([encoded(model, processor, "the mat")[0], torch.randn(3, 32)])
    chunks = store.chunks()
    stored = store.memories(chunks)
    cosines = torch.nn.functional.cosine_similarity(queries[:, None, None], stored[None], dim=-1).amax(-1)  # (Q, n)
    for block_size in (3, 1000):
        found = store.nearest(queries, 5, block_size=block_size)
        for row, scores in zip(found, cosines, strict=True):
            best = scores.topk(5)
            torch.testing.assert_close(torch.tensor([score for _, score in row]), best.values, rtol=1e-4, atol=1e-5)
            own = torch.stack([scores[chunks.index(chunk)] for chunk, _ in row])  # equal chunks may change places
            torch.testing.assert_close(own, best.values, rtol=1e-4, atol=1e-5)
    only = store.nearest(queries, 100, text_ids=["sea", "dog"])[0]
    assert {chunk.text_id for chunk, _ in only} == {"sea", "dog"}
    assert len(only) == len(store.chunks(["sea", "dog"]))


def test_a_chunk_is_nearest_to_itself(store):
    for chunk in store.chunks():
        (found,) = store.nearest(store.memories([chunk])[0, :1], 1)
        assert found[0][1] == pytest.approx(1.0, abs=1e-5)


def test_append_replace_skip_and_delete(store):
    with pytest.raises(MemoryStoreError, match="already holds the text 'dog'"):
        store.append({"dog": "another dog"})
    assert store.append({"dog": "another dog", "new": "in"}, on_duplicate="skip") == 1
    assert store.text("dog") == "a dog" and store.text_ids == [*TEXTS, "new"]
    assert store.append({"dog": "another dog"}, on_duplicate="replace") == 1
    assert store.text("dog") == "another dog" and store.digest("dog") == text_digest("another dog")
    assert store.delete(["cat", "new"]) == 2 and store.text_ids == ["sea", "dog"]
    with pytest.raises(MemoryStoreError, match="no text 'cat'"):
        store.chunks("cat")


def test_a_vacuum_takes_a_deleted_text_off_the_disk(store):
    def on_disk(word):
        return any(word in path.read_bytes() for path in store.folder.iterdir())

    store.delete("cat")
    assert on_disk(b"cat sat")
    assert store.vacuum() > 0 and store.verify() == []
    assert not on_disk(b"cat sat") and not on_disk(b"stay"), "neither the text nor its words in the index"


def test_merged_texts_are_found_again_beside_those_that_were_there(store, model, processor, tmp_path):
    store.delete("cat")
    before = {text_id: store.memories(store.chunks(text_id)) for text_id in store.text_ids}
    other = MemoryStore.open(tmp_path / "other", model, processor, create=True, dtype="int8")
    other.append({"far": TEXTS["sea"]})
    assert store.merge(other) == 1
    assert torch.equal(store.memories(store.chunks("far")), other.memories(other.chunks("far")))
    with pytest.raises(MemoryStoreError, match="'far' was not kept"):
        store.text("far")
    again = MemoryStore(store.folder)
    assert sorted(again.text_ids) == ["dog", "far", "sea"] and not again.verify()
    for text_id, memories in before.items():
        assert torch.equal(again.memories(again.chunks(text_id)), memories)
    assert [chunk for chunks, _ in again.iterate(batch_size=2) for chunk in chunks] == again.chunks()
    assert torch.equal(torch.cat([memories for _, memories in again.iterate(batch_size=2)]),
                       again.memories(again.chunks()))  # fmt: skip


def test_what_is_stored_is_only_what_was_asked_for(model, processor, tmp_path):
    """Without `keep_text` no text is on the disk, neither appended nor merged."""
    kept = MemoryStore.open(tmp_path / "kept", model, processor, create=True, keep_text=True)
    kept.append({"cat": TEXTS["cat"]})
    bare = MemoryStore.open(tmp_path / "bare", model, processor, create=True)
    bare.append({"dog": "the cat sat"})
    bare.merge(kept)
    assert not any(b"cat sat" in path.read_bytes() for path in bare.folder.iterdir())
    with pytest.raises(MemoryStoreError, match="not kept"):
        bare.expand(bare.chunks("cat"))


def test_a_store_names_its_model_and_refuses_another(store, model, processor):
    print_ = fingerprint(model, processor)
    assert store.fingerprint == print_ and json.loads(json.dumps(print_)) == print_
    assert set(store.created_with) == {"modeling_memory", "torch", "transformers"}
    others = {
        "encoder": build_model(memories_per_chunk=2),
        "projector": build_model(memories_per_chunk=2),
        "cut": build_model(memories_per_chunk=2, pooling="mean"),
    }
    with torch.no_grad():
        next(others["encoder"].encoder.parameters()).flatten()[0].add_(1e-3)
        others["projector"].projector.out.bias[0] += 1e-3
    for part, other in others.items():
        with pytest.raises(ValueError, match=f"{'the ' + part if part != 'cut' else 'cut into chunks'}"):
            MemoryStore(store.folder, other, processor)
    with pytest.raises(ValueError, match="dtype"):
        MemoryStore(store.folder, build_model(memories_per_chunk=2).bfloat16(), processor)
    tokenizer = build_tiny_tokenizer()
    tokenizer.add_tokens(["dog"])
    with pytest.raises(ValueError, match="tokenizer"):
        MemoryStore(
            store.folder,
            model,
            MemoryProcessor(tokenizer, chunk_length=CHUNK, window_length=WINDOW, memories_per_chunk=2),
        )
    assert MemoryStore(store.folder, build_model(memories_per_chunk=2), processor).text_ids == store.text_ids


def test_padding_of_an_earlier_call_is_no_other_tokenizer(store, model, processor):
    processor.tokenizer(["a", "the cat"], padding=True)
    MemoryStore(store.folder, model, processor)


def test_memories_of_a_store_of_another_model_are_not_merged(store, processor, tmp_path):
    other = build_model(memories_per_chunk=2)
    with torch.no_grad():
        other.projector.out.bias[0] += 1e-3
    foreign = MemoryStore.open(tmp_path / "foreign", other, processor, create=True)
    with pytest.raises(ValueError, match="not those of the store foreign"):
        store.merge(foreign)


def test_user_mistakes_are_explained(store, model, processor, tmp_path):
    with pytest.raises(ValueError, match="is no memory store"):
        MemoryStore(tmp_path / "nothing")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds letter.txt"):
        MemoryStore.open(tmp_path / "full", model, processor, create=True)
    with pytest.raises(ValueError, match="Give `model` and `processor`"):
        MemoryStore.open(tmp_path / "new", create=True)
    with pytest.raises(ValueError, match="opened without a model"):
        MemoryStore(store.folder).append({"x": "y"})
    with pytest.raises(ValueError, match="belong together"):
        MemoryStore(store.folder, model)
    with pytest.raises(ValueError, match="`chunk_length` is 8 and the model's 4"):
        MemoryStore(store.folder, model, MemoryProcessor(processor.tokenizer, chunk_length=8, memories_per_chunk=2))
    with pytest.raises(ValueError, match="expected 'error', 'skip' or 'replace'"):
        store.append({"x": "y"}, on_duplicate="ignore")
    with pytest.raises(ValueError, match="expected a string of one character"):
        store.append({"": "y"})
    with pytest.raises(ValueError, match="The text .x. cannot be remembered. A context is empty"):
        store.append({"x": ""})
    with pytest.raises(ValueError, match=r"expected a tensor \(queries, 32\)"):
        store.nearest(torch.zeros(1, 3), 1)
    with pytest.raises(ValueError, match="`k` is 0"):
        store.nearest(torch.zeros(1, 32), 0)
    with pytest.raises(ValueError, match="has 2 chunks, but chunk 7"):
        store.memories([Chunk("dog", 7, None, None, 1)])
    model.train()
    try:
        with pytest.raises(ValueError, match="training mode"):
            store.append({"x": "y"})
    finally:
        model.eval()
    assert store.text_ids == list(TEXTS)


def test_readers_see_the_store_as_it_was_until_they_reload(store, model, processor):
    reader = MemoryStore(store.folder)
    store.append({"new": "in"})
    store.delete("cat")
    assert reader.text_ids == list(TEXTS) and reader.text("cat") == TEXTS["cat"]
    reader.reload()
    assert reader.text_ids == ["dog", "sea", "new"]


def test_a_store_is_in_int8_unless_a_format_is_named_and_tells_once_where_that_costs(
    model, processor, tmp_path, caplog
):
    store = MemoryStore.open(tmp_path / "default", model, processor, create=True)
    assert store.dtype == "int8" and store.chunk_bytes == 2 * (32 + 4)
    store.append(TEXTS)
    assert not caplog.text
    uneven = torch.randn(2, 2, 32, generator=torch.Generator().manual_seed(0))
    uneven[..., 3] = 50  # as hidden states of pretrained models have them
    for text_id in "ab":
        store.append_memories([dataclasses.replace(GOOD, text_id=text_id, memories=uneven, text=None)])
    assert caplog.text.count("int8 rounds the numbers of these memories by") == 1
    caplog.clear()
    named = MemoryStore.open(tmp_path / "named", model, processor, create=True, dtype="float16")
    named.append_memories([dataclasses.replace(GOOD, memories=uneven, text=None)])
    assert not caplog.text


def test_the_report_says_what_a_format_costs(model, processor):
    inputs = processor(text="the cat sat", context=TEXTS["sea"], return_tensors="pt")
    memories, mask = model.encode_memories(inputs.pop("context_input_ids"), inputs.pop("context_attention_mask"))
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == processor.memory_token_id, -100)
    report = quantization_report(model, memories.detach(), mask, labels=labels, **inputs)
    with torch.no_grad():
        plain = model(memory_embeds=memories, memory_mask=mask, labels=labels, **inputs)
    assert report["encoded"]["loss"] == pytest.approx(plain.loss.item(), rel=1e-5)
    assert report["float32"]["loss_increase"] == 0 and set(report) == {"encoded", *DTYPES}
    assert report["int8"]["bytes_per_memory"] == 32 + 4 and report["float16"]["bytes_per_memory"] == 64
    assert report["int4"]["bytes_per_memory"] == 16 + 4
    assert abs(report["int8"]["loss_increase"]) < abs(report["int4"]["loss_increase"]) + 0.05
    with pytest.raises(ValueError, match="No target"):
        quantization_report(model, memories, mask, **inputs)


def test_documents_are_data(model, processor, tmp_path):
    """What looks like a marker is stored as its letters, comes back exactly, and marks nothing in a prompt."""
    texts = {"marked": "the <memory> sat<copy> on <eos> the mat", "plain": "a dog"}
    store = MemoryStore.open(tmp_path, model, processor, create=True, dtype="float32", keep_text=True)
    assert store.append(texts) == 2
    chunks = store.chunks("marked")
    assert store.text("marked") == "".join(store.expand(chunks)) == texts["marked"]
    letters = processor.tokenizer("<memory>", add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert len(letters) > 1 and sum(chunk.num_tokens for chunk in chunks) > len(letters)
    inputs = store.prepare("he <memory> it", ["marked", "plain"], expand=chunks)
    ids = inputs["input_ids"][0].tolist()
    assert ids.count(processor.memory_token_id) == inputs["memory_embeds"].shape[1] == 2 * len(store.chunks("plain"))
    controls = set(processor.tokenizer.all_special_ids) - {processor.memory_token_id}
    shown = store.prepare("it", "marked", expand=chunks, add_special_tokens=False)["input_ids"][0].tolist()
    assert not controls & set(shown) and processor.tokenizer.decode(shown) == texts["marked"] + "it"


def test_ordinary_text_is_cut_as_the_processor_cuts_it(model, processor, store):
    for text_id, text in TEXTS.items():
        own = [chunk.num_tokens for chunk in store.chunks(text_id)]
        assert own == list(map(len, processor.split_context(text)))


def pair(slot, **fields):
    """A pair of two Llamas, the encoder with further fields."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=97)
    encoder, decoder = LlamaModel(LlamaConfig(**sizes, **fields)), LlamaForCausalLM(LlamaConfig(**sizes))
    return MemoryEncoderDecoderForCausalLM.from_encoder_decoder_pretrained(
        encoder, decoder, chunk_length=CHUNK, window_length=WINDOW, memory_token_id=slot
    ).eval()


def test_the_fingerprint_holds_what_changes_memories_without_a_weight(processor, store):
    own = MemoryProcessor(processor.tokenizer, chunk_length=CHUNK, window_length=WINDOW)
    folder = store.folder.parent / "llama"
    opened = MemoryStore.open(folder, pair(processor.memory_token_id), own, create=True)
    opened.append({"a": "the cat"})
    for field, value in {
        "rope_parameters": {"rope_type": "default", "rope_theta": 50.0},
        "rms_norm_eps": 0.5,
        "hidden_act": "gelu",
        "attention_bias": False,
    }.items():
        other = pair(processor.memory_token_id, **{field: value})
        if field == "attention_bias":  # the default, said aloud
            assert MemoryStore(folder, other, own).text_ids == ["a"]
            continue
        with pytest.raises(MemoryStoreError, match=rf"encoder.config.{field}.*remember the texts again"):
            MemoryStore(folder, other, own)
    filled = pair(processor.memory_token_id)
    filled.config.short_chunks = "repeat"
    with pytest.raises(MemoryStoreError, match=r"short_chunks.*remember the texts again"):
        MemoryStore(folder, filled, own)
    saved = store.folder.parent / "saved"
    pair(processor.memory_token_id).save_pretrained(saved)
    again = MemoryEncoderDecoderForCausalLM.from_pretrained(saved).eval()
    assert MemoryStore(folder, again, own).append({"b": "the cat"}) == 1


def test_a_model_that_changed_since_the_store_was_opened_is_refused(processor, tmp_path):
    own = MemoryProcessor(processor.tokenizer, chunk_length=CHUNK, window_length=WINDOW)
    MemoryStore.open(tmp_path / "llama", pair(processor.memory_token_id), own, create=True).append({"a": "the cat"})
    for part, name in {"projector": "projector.weights", "encoder": "encoder.weights"}.items():
        changed = pair(processor.memory_token_id)
        used = MemoryStore(tmp_path / "llama", changed, own)
        next(getattr(changed, part).parameters()).data.add_(1e-3)  # in place, unseen by autograd's versions too
        with pytest.raises(MemoryStoreError, match=f"which has changed since the store was opened.*{name}"):
            used.append({"c": "the cat"})
        assert len(used) == 1

    adapted = pair(processor.memory_token_id)
    adapted.add_adapters(["encoder"], r=2, lora_alpha=4)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    kept = MemoryStore.open(tmp_path / "adapted", adapted.eval(), own, create=True)
    with adapted.adapters_off(), pytest.raises(MemoryStoreError, match="encoder.adapters.*on again"):
        kept.append({"a": "the cat"})
    adapted.merge_adapters()
    with pytest.raises(MemoryStoreError, match="unmerge_adapters"):
        kept.append({"a": "the cat"})
    adapted.unmerge_adapters()
    for _, module in adapted.named_modules():
        if hasattr(module, "base_layer"):
            module.scaling["default"] = 32.0
    with pytest.raises(MemoryStoreError, match="encoder.adapters"):
        kept.append({"a": "the cat"})


def test_what_a_reader_gets_is_its_own(store, model, processor):
    was = store.memories(store.chunks("cat")).clone()
    for _, memories in store.iterate("cat"):
        memories /= memories.norm(dim=-1, keepdim=True)
    store.memories(store.chunks("cat")).zero_()
    store.load("cat")["memory_embeds"].zero_()
    store.chunks("cat").clear()
    store.delete("dog")
    store.vacuum()
    assert torch.equal(was, store.memories(store.chunks("cat"))) and store.verify() == []


GOOD = StoredText("b", torch.zeros(2, 2, 32), [1, 1], spans=[(0, 1), (1, 2)], text="cd")


def each(field, *values):
    return [(field, value) for value in values]


@pytest.mark.parametrize(
    "field, value",
    [
        *each("text_id", "", 3, None, b"b", "a\ud800b"),
        ("memories", torch.zeros(2, 1, 32)),
        ("memories", torch.zeros(2, 2, 31)),
        ("memories", torch.zeros(0, 2, 32)),
        ("memories", torch.zeros(2, 64)),
        ("memories", torch.zeros(2, 2, 32, dtype=torch.long)),
        ("memories", torch.full((2, 2, 32), float("nan"))),
        ("memories", torch.full((2, 2, 32), 1e6)),
        ("memories", [[1.0]]),
        *each("counts", [1], [1, 0], [1, -1], [1, 1.0], [1, True], [1, 9], None, "11", [1, 1, 1]),
        *each("spans", [(0, 1)], [(0, 1), (1, 3)], [(1, 2), (0, 1)], [(0, 1), (1,)], [0, 1], "ab"),
        *each("spans", [(-1, 1), (1, 2)], [(0, 2), (1, 2)], [(0, 1.0), (1, 2)], 7, []),
        *each("text", b"cd", 3, "c\ud800", "c"),
        *each("digest", 3, b"x", "", text_digest("another text")),
        *each("num_unknown", -1, 3, 0.5, None),
    ],
)
def test_every_field_of_a_stored_text_is_checked_and_nothing_of_the_call_is_stored(
    model, processor, tmp_path, field, value
):
    store = MemoryStore.open(tmp_path, model, processor, create=True, dtype="float16", keep_text=True)
    with pytest.raises(ValueError) as caught:
        store.append_memories([dataclasses.replace(GOOD, text_id="a"), dataclasses.replace(GOOD, **{field: value})])
    named = "spans" if (field, value) == ("text", "c") else field
    assert field == "text_id" or re.search(f"(?s)(?=.*'b').*{named}", str(caught.value))
    assert (len(store), store.chunks(), store.append_memories([GOOD])) == (0, [], 1)
    assert (store.text("b"), store.digest("b")) == ("cd", text_digest("cd"))


def test_arrow_round_trip_is_equal_bit_by_bit(model, processor, tmp_path):
    import pyarrow
    import pyarrow.parquet

    for dtype in DTYPES:
        first = MemoryStore.open(tmp_path / dtype, model, processor, create=True, dtype=dtype, keep_text=True)
        first.append({**TEXTS, "ümlaut": "the end"})
        first.append_memories([StoredText("tokens", torch.randn(3, 2, 32), [4, 4, 1], num_unknown=2)])
        pyarrow.parquet.write_table(first.to_arrow().read_all(), tmp_path / "table.parquet")
        table = pyarrow.parquet.read_table(tmp_path / "table.parquet")
        for number, source in enumerate((table, first.to_arrow(), table.to_reader(max_chunksize=2))):
            second = MemoryStore.open(tmp_path / f"{dtype}{number}", model, processor, create=True, dtype=dtype,
                                      keep_text=True)  # fmt: skip
            assert second.merge(source) == 5
            check_equal_stores(second, first)
            assert second.merge(first.to_arrow(), on_duplicate="skip") == 0
            with pytest.raises(MemoryStoreError, match="already holds"):
                second.merge(first.to_arrow())
    other = MemoryStore.open(tmp_path / "other", model, processor, create=True, dtype="int8")
    assert other.merge(first.to_arrow()) == 5 and other.verify() == []
    with pytest.raises(MemoryStoreError, match="not kept"):
        other.text("cat")


def check_equal_stores(second, first):
    assert second._read("SELECT memory FROM chunks") == first._read("SELECT memory FROM chunks")
    assert second.chunks() == first.chunks() and second.num_unknown == first.num_unknown == 2
    kept = [text_id for text_id in first.text_ids if text_id != "tokens"]
    assert [second.text(one) for one in kept] == [first.text(one) for one in kept]
    assert [second.digest(one) for one in kept] == [first.digest(one) for one in kept]


def test_what_arrow_brings_is_checked(store, model, processor, tmp_path):
    import pyarrow

    table = store.to_arrow().read_all()
    target = MemoryStore.open(tmp_path / "target", model, processor, create=True, dtype="float32", keep_text=True)
    wrong = {
        "does not say which model": table.replace_schema_metadata(None),
        "`num_tokens` is missing": table.drop_columns(["num_tokens"]),
        "`number` is int64": table.set_column(1, "number", table["number"].cast(pyarrow.int64())),
        "or not in order": table.take(list(range(table.num_rows))[::-1]),
        "are .* of": table.slice(1),
        "comes twice": pyarrow.concat_tables([table, table]),
        "expected a MemoryStore, or Arrow data": "a/path",
    }
    for message, given in wrong.items():
        with pytest.raises(MemoryStoreError, match=message):
            target.merge(given)
        assert len(target) == 0
    with pytest.raises(MemoryStoreError, match="into itself"):
        store.merge(MemoryStore(store.folder))
    assert target.merge(table) == 3


def test_search_text_finds_by_words(store, processor):
    (passage, score), *_ = store.search_text("Over which hills, and over which SEA?", 2)
    assert passage.text_id == "sea" and passage.text == TEXTS["sea"] and score > 0
    assert passage.chunks == tuple(store.chunks("sea"))
    assert int((store.prepare("x", [passage])["input_ids"] == processor.memory_token_id).sum()) == 2 * len(
        passage.chunks
    )
    assert store.search_text("dog", 5, text_ids=["cat", "sea"]) == []
    store.delete("sea")
    assert store.search_text("hills") == []
    store.vacuum()
    assert store.search_text("hills") == [] and store.search_text("dog")[0][0].text_id == "dog"


def test_search_text_takes_a_question_as_data(store):
    hostile = ['"', 'cat"', "cat OR", "NEAR(cat, 2)", "content: cat", "cat*", "^cat", "cat AND NOT cat", "- cat",
               "(cat", "words", "'; DROP TABLE texts; --", "cat\x00", "\ud800 cat", "c\u0301at", "cat " * 5000,
               " ".join(f"w{i}" for i in range(5000)) + " cat", "", "?!", "{cat}:", "rank"]  # fmt: skip
    for query in hostile:
        found = store.search_text(query, 5)
        if re.search(r"\bcat\b", query):
            assert found and found[0][0].text_id == "cat", query
    assert store.search_text("cat NOT mat", 1)[0][0].text_id == "cat"  # no operator
    assert len(store) == 3 and store.verify() == []
    for wrong in (None, 3, ["cat"]):
        with pytest.raises(ValueError, match="expected a string"):
            store.search_text(wrong)


def test_a_sentence_encoder_orders_anew_what_was_found_by_words(store):
    store.append({"hill": "the hills, the sea and the end of it all", "ring": "he saw the ring in the end"})
    asked = "the end of the ring"
    by_words = [passage.text_id for passage, _ in store.search_text(asked, 10)]
    calls = []

    def embed(texts: list[str]) -> torch.Tensor:
        calls.append(texts)
        return torch.tensor([[1.0, 0.1 * ("dog" in text)] for text in texts])  # all alike: the order by words stays

    found = store.search(asked, 3, embed=embed)
    assert [passage.text_id for passage, _ in found] == by_words[:3] and calls[0][0] == asked
    assert [score for _, score in found] == pytest.approx([2 / (61 + place) for place in range(3)])

    def prefers_the_last(texts: list[str]) -> torch.Tensor:
        places = torch.arange(len(texts)) / 10
        return torch.stack([torch.cos(places.flip(0)), torch.sin(places.flip(0))], 1)[[-1, *range(1, len(texts))]]

    last = store.search(asked, 10, embed=prefers_the_last)
    assert {passage.text_id for passage, _ in last} == set(by_words) and last[0][1] >= last[-1][1]
    assert store.search("xylophone", embed=embed) == []


def test_words_of_deleted_texts_are_on_the_disk_no_more_after_a_vacuum(store):
    """Taken out at once where few are deleted and SQLite can, else marked until the index is written anew."""
    store.append({f"many {place}": f"walnut{place} here and there" for place in range(12)})
    store.append({"one": "a hazelnut here"})

    def on_disk(word: str) -> bool:
        # An index shares the beginnings of words that follow each other, so the end is looked for.
        return any(word.encode() in path.read_bytes() for path in store.folder.iterdir())

    assert on_disk("hazelnut")
    store.delete("one")
    assert store._database.state["marked"] == (0 if database.WORDS_CAN_LEAVE else 1)
    store.delete([f"many {place}" for place in range(12)])
    assert store._database.state["marked"] >= 12 and store.search_text("walnut3 hazelnut") == []
    store.vacuum()
    assert store._database.state["marked"] == 0 and not on_disk("hazelnut") and not on_disk("alnut11")
    assert store.verify() == []


def test_a_long_text_is_cut_into_passages_without_a_scrap(model, processor, tmp_path):
    store = MemoryStore.open(tmp_path, model, processor, create=True, keep_text=True)
    text = "the cat sat on the mat, and there it stayed. " * 40 + "a zebra"
    store.append({"long": text, "other": "the cat"})
    (found, _), *_ = store.search_text("zebra")
    assert sum(chunk.num_tokens for chunk in found.chunks) > 100 and found.text.endswith("a zebra")
    key, entry = store._find("long")
    passages = store._passages(key, entry)
    assert len(passages) > 2 and "".join(content for _, content in passages) == text == store.text("long")
    assert found.text == "".join(store.expand(found)) and store.search("zebra")[0][0] == found


def test_without_text_a_search_is_by_memories(model, processor, tmp_path):
    bare = MemoryStore.open(tmp_path, model, processor, create=True)
    bare.append(TEXTS)
    (passage, score), *_ = bare.search("a dog", 2)
    assert passage.text_id == "dog" and score == pytest.approx(1.0, abs=1e-2)
    with pytest.raises(MemoryStoreError, match="keeps no texts"):
        bare.search_text("dog")


def test_a_search_by_memories_finds_scraps_only_for_what_is_as_short(model, processor, tmp_path):
    """The last chunks of query and texts are one letter, and equal; so their memories are, whatever is asked."""
    bare = MemoryStore.open(tmp_path, model, processor, create=True)
    bare.append({word: f"over the {word}s" for word in ("cat", "sea", "mat", "dog", "ring")})
    query = "over the hats"
    assert processor.cut_context(query).num_tokens == [CHUNK, CHUNK, 1]
    assert {chunk.num_tokens for chunk in bare.chunks()} == {CHUNK, 1}
    end = bare.memories(bare.chunks("cat")[-1:])[0]
    assert all(chunk.num_tokens == 1 for chunk, _ in bare.nearest(end, 4)[0])
    found = bare.search(query, 4)
    assert len(found) == 4 and all(passage.chunks[0].num_tokens == CHUNK for passage, _ in found)
    (passage, score), *_ = bare.search("s", 4)
    assert passage.chunks[0].num_tokens == 1 and score == pytest.approx(1.0, abs=1e-2)


def test_unknown_tokens_are_counted_and_told(tmp_path, caplog):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"[UNK]": 0, "the": 1, "cat": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")
    model = build_model("bert")
    processor = MemoryProcessor(build_tiny_tokenizer(), tokenizer, chunk_length=CHUNK, window_length=WINDOW)
    text, unknown = "the 漢字 the dog", 2
    store = MemoryStore.open(tmp_path, model, processor, create=True)
    store.append({"plain": "the cat"})
    assert not caplog.text and store.num_unknown == 0
    store.append({"foreign": text})
    assert store.num_unknown == unknown and "does not know 2 tokens" in caplog.text and "'foreign'" in caplog.text
    store.delete("foreign")
    assert store.num_unknown == 0


def test_senseless_arguments_are_refused(store, model, processor):
    query = torch.randn(1, 32)
    bad = torch.full((1, 32), float("nan"))
    for call in (
        lambda: store.nearest(bad, 1), lambda: store.nearest(-bad, 1), lambda: store.nearest(query * float("inf"), 1),
        lambda: store.nearest(query, 0), lambda: store.nearest(query, -1), lambda: store.nearest(query, 1.5),
        lambda: store.nearest(query, True), lambda: store.nearest(query, 1, block_size=0),
        lambda: store.nearest(query, 1, block_size=-1), lambda: store.nearest([1.0], 1),
        lambda: store.nearest(None, 1),
        lambda: store.search_text("cat", 0), lambda: store.quote("z"), lambda: store.regenerate("cat2"),
        lambda: list(store.iterate(batch_size=0)), lambda: store.append([]), lambda: store.append("cat"),
        lambda: store.append({"x": None}), lambda: store.append({"x": b"y"}), lambda: store.append({"x": "a\ud800b"}),
        lambda: store.append({3: "y"}), lambda: store.append({"x": "y"}, batch_size=0),
        lambda: store.append_memories("text"), lambda: store.append_memories([3]), lambda: store.append_memories(GOOD),
        lambda: store.append_memories([GOOD, GOOD]), lambda: store.merge("path"), lambda: store.merge(None),
        lambda: store.delete(3), lambda: store.delete("z"), lambda: store.delete(["cat", "z"]),
        lambda: store.delete([3]), lambda: store.chunks(3), lambda: store.chunks([None]), lambda: store.text("z"),
        lambda: store.memories(["cat"]), lambda: store.digest("z"), lambda: MemoryStore(store.folder, 3, 4),
        lambda: MemoryStore.open(store.folder.parent / "n", model, processor, create=True, dtype="int3"),
        lambda: MemoryStore.create(store.folder.parent / "n", {}), lambda: store.append({"x": "a\ud800b", "y": "b"}),
    ):  # fmt: skip
        with pytest.raises(ValueError):
            call()
    assert store.text_ids == list(TEXTS) and store.verify() == [] and 3 not in store


def test_every_block_of_the_page_runs_on_a_starter(tmp_path, monkeypatch):
    root = Path(__file__).parent.parent
    blocks = re.findall(r"```python\n(.*?)```", (root / "docs" / "memory_store.md").read_text(), re.S)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model_cards").symlink_to(root / "model_cards")
    scope: dict = {}
    assert len(blocks) == 3
    for block in blocks:
        exec(block, scope)
    assert scope["passage"].text_id == "first" and scope["copy"].text_ids == ["first"]
