"""A store gives back what was put in: memories, texts, places; of one model only, whatever is done in between."""

import json
import logging
import os
import sqlite3
import sys
import types

import pytest
import torch

from modeling_memory import Chunk, MemoryProcessor, MemoryStore, MemoryStoreError, StoredText, quantization_report
from modeling_memory.store.codec import DTYPES, decode_vectors, encode_vectors
from modeling_memory.store.database import FILE
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


def test_a_prompt_from_the_store_is_the_prompt_from_the_context(store, model, processor):
    text = "<memory>in the end"
    with torch.no_grad():
        direct = model(**processor(text=text, context=TEXTS["cat"], return_tensors="pt")).logits
        stored = model(**store.prepare(text, "cat")).logits
    torch.testing.assert_close(stored, direct, rtol=1e-4, atol=1e-4)
    written = model.generate(**store.prepare(text, "cat"), max_new_tokens=4, do_sample=False)
    expected = processor(text=text, context=TEXTS["cat"], return_tensors="pt")
    assert torch.equal(written, model.generate(**expected, max_new_tokens=4, do_sample=False))


def test_expanded_chunks_stand_in_clear_in_their_place(store, processor):
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


def test_faiss_finds_what_torch_finds(store, monkeypatch):
    """Against a stand-in with the calls of `faiss.IndexFlatIP` that are used: the library is no test dependency."""

    class IndexFlatIP:
        def __init__(self, width):
            self.vectors = torch.empty(0, width)

        ntotal = property(lambda self: len(self.vectors))

        def add(self, vectors):
            self.vectors = torch.cat([self.vectors, torch.from_numpy(vectors)])

        def search(self, queries, k):
            best = (torch.from_numpy(queries) @ self.vectors.T).topk(k)
            return best.values.numpy(), best.indices.numpy()

    queries = torch.randn(4, 32)
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ValueError, match=r"modeling-memory\[faiss\]"):
        store.nearest(queries, 3, backend="faiss")
    monkeypatch.setitem(sys.modules, "faiss", types.SimpleNamespace(IndexFlatIP=IndexFlatIP))
    for row, other in zip(store.nearest(queries, 4), store.nearest(queries, 4, backend="faiss"), strict=True):
        assert [score for _, score in row] == pytest.approx([score for _, score in other], abs=1e-5)
        assert {chunk for chunk, score in row if score > row[-1][1] + 1e-5} <= {chunk for chunk, _ in other}


def test_append_replace_skip_delete_merge_and_vacuum(store, model, processor, tmp_path):
    with pytest.raises(MemoryStoreError, match="already holds the text 'dog'"):
        store.append({"dog": "another dog"})
    assert store.append({"dog": "another dog", "new": "in"}, on_duplicate="skip") == 1
    assert store.text("dog") == "a dog" and store.text_ids == [*TEXTS, "new"]
    assert store.append({"dog": "another dog"}, on_duplicate="replace") == 1
    assert store.text("dog") == "another dog" and store.digest("dog") == text_digest("another dog")
    assert store.delete(["cat", "new"]) == 2 and store.text_ids == ["sea", "dog"]
    with pytest.raises(MemoryStoreError, match="no text 'cat'"):
        store.chunks("cat")
    before = {text_id: store.memories(store.chunks(text_id)) for text_id in store.text_ids}
    assert any(b"cat sat" in path.read_bytes() for path in store.folder.iterdir())
    assert store.vacuum() > 0 and store.verify() == []
    for word in (b"cat sat", b"stay"):  # neither the text nor its words in the index
        assert not any(word in path.read_bytes() for path in store.folder.iterdir())
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
    with pytest.raises(ValueError, match="as a context it is empty"):
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
