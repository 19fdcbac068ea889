import inspect
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoProcessor

from modeling_memory.processing_memory import MemoryProcessor
from tests.conftest import _ALPHABET, build_tiny_encoder_tokenizer, build_tiny_tokenizer
from tests.memory_models import build_model

SLOT = 96
TEXTS = st.text(alphabet=_ALPHABET.replace("<", "").replace(">", ""), min_size=1, max_size=60)


@pytest.fixture
def one(tokenizer):
    return MemoryProcessor(tokenizer, chunk_length=4, window_length=8, memories_per_chunk=2)


@pytest.fixture
def two(tokenizer, encoder_tokenizer):
    return MemoryProcessor(tokenizer, encoder_tokenizer, chunk_length=4)


def test_plain_text_is_the_decoder_tokenizer_with_padding(one, tokenizer):
    batch = one(text=["abcde", "ab"], return_tensors="pt")
    assert set(batch) == {"input_ids", "attention_mask"}
    assert batch["input_ids"][0].tolist() == tokenizer("abcde").input_ids
    assert batch["input_ids"][1].tolist() == [*tokenizer("ab").input_ids, 0, 0, 0]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]


def test_context_becomes_chunks_and_the_text_gets_slots_in_front(one, tokenizer):
    batch = one(text="xyz", context="abcdefghijk", return_tensors="pt")
    ids = tokenizer("abcdefghijk").input_ids
    assert batch["context_input_ids"].tolist() == [[ids[:4], ids[4:8], [*ids[8:], 0]]]
    assert batch["context_attention_mask"].tolist() == [[[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 0]]]
    assert batch["input_ids"].tolist() == [[SLOT] * 6 + tokenizer("xyz").input_ids]
    assert batch["input_ids"].dtype == batch["context_input_ids"].dtype == torch.int64


def test_slots_stand_where_the_memory_token_stands(one, tokenizer):
    batch = one(text="ab<memory>c", context="abcdef")
    assert batch["input_ids"] == [[*tokenizer("ab").input_ids, *[SLOT] * 4, *tokenizer("c").input_ids]]
    assert one(text="<memory>", context="abcdef")["input_ids"] == [[SLOT] * 4]


def test_rows_of_unequal_contexts_equal_single_rows(one):
    texts, contexts = ["xy", "z", "uvw"], ["abcdefghijkl", "abc", None]
    batch = one(text=texts, context=contexts, padding_side="left", return_tensors="pt")
    assert batch["context_input_ids"].shape == (3, 3, 4)
    assert batch["context_attention_mask"].sum(-1).tolist() == [[4, 4, 4], [3, 0, 0], [0, 0, 0]]
    for row, (text, context) in enumerate(zip(texts, contexts, strict=True)):
        single = one(text=text, context=context, return_tensors="pt")
        kept = batch["attention_mask"][row].bool()
        assert batch["input_ids"][row][kept].tolist() == single["input_ids"][0].tolist()
        num_slots = int((batch["input_ids"][row] == SLOT).sum())
        assert num_slots == 2 * int(batch["context_attention_mask"][row].any(-1).sum())
        if context is not None:
            chunks = single["context_input_ids"][0]
            assert torch.equal(batch["context_input_ids"][row, : len(chunks)], chunks)


@pytest.mark.parametrize("side", ["left", "right", None])
def test_padding_side_defaults_to_the_tokenizers(one, side):
    batch = one(text=["abc", "a"], context=["abcd", "abcd"], padding_side=side)
    expected = [0, 0, 1, 1, 1] if side == "left" else [1, 1, 1, 0, 0]
    assert batch["attention_mask"] == [[1] * 5, expected]


def test_padding_to_a_length_and_without(one):
    padded = one(text=["abc", "a"], padding="max_length", max_length=6)
    assert [sum(row) for row in padded["attention_mask"]] == [3, 1]
    assert {len(row) for row in padded["input_ids"]} == {6}
    assert [len(row) for row in one(text=["abc", "a"], padding=False)["input_ids"]] == [3, 1]


def test_chunks_of_a_second_tokenizer_carry_its_special_tokens_beside_the_text(two, encoder_tokenizer):
    batch = two(text="xyz", context="abcdefghij", return_tensors="pt")
    ids = encoder_tokenizer("abcdefghij", add_special_tokens=False).input_ids
    cls, sep, pad = 1, 2, 0
    assert batch["context_input_ids"].tolist() == [
        [[cls, *ids[:4], sep], [cls, *ids[4:8], sep], [cls, *ids[8:], sep, pad, pad]]
    ]
    assert batch["context_attention_mask"][0].sum(-1).tolist() == [6, 6, 4]
    assert (batch["input_ids"] == SLOT).sum() == 3


def test_a_second_tokenizer_may_read_the_memory_token_as_text(two):
    assert two(context="a<memory>b")["context_input_ids"]


@settings(max_examples=40, deadline=None)
@given(text=TEXTS, chunk_length=st.integers(1, 9), shared=st.booleans())
def test_no_character_is_lost_or_counted_twice(text, chunk_length, shared):
    tokenizer = build_tiny_tokenizer()
    other = None if shared else build_tiny_encoder_tokenizer()
    processor = MemoryProcessor(tokenizer, other, chunk_length=chunk_length)
    chunks = processor.split_context(text)
    reader = other or tokenizer
    assert "".join(reader.decode(chunk, skip_special_tokens=True) for chunk in chunks) == text
    frame = 0 if shared else 2
    assert all(len(chunk) == chunk_length + frame for chunk in chunks[:-1])
    assert 1 <= len(chunks[-1]) - frame <= chunk_length


def test_saved_truncation_of_a_tokenizer_cuts_nothing(tokenizer):
    tokenizer("abcdefgh", truncation=True, max_length=3, padding="max_length")  # leaves its settings behind
    processor = MemoryProcessor(tokenizer, chunk_length=4)
    assert len(processor.split_context("abcdefghijklmnop")) == 4
    assert len(processor(text="abcdefgh")["input_ids"][0]) == 8


def test_context_alone_is_what_encode_memories_takes(one):
    batch = one(context=["abcdef", "ab"], return_tensors="pt")
    assert set(batch) == {"context_input_ids", "context_attention_mask"}
    assert batch["context_input_ids"].shape == (2, 2, 4)


def test_ready_memories_get_their_slots(one):
    batch = one(text=["ab<memory>", "c"], num_memories=[3, 1])
    assert [row.count(SLOT) for row in batch["input_ids"]] == [3, 1]
    assert set(batch) == {"input_ids", "attention_mask"}
    assert one(text="c", num_memories=0)["input_ids"] == one(text="c")["input_ids"]


def test_a_tokenizer_without_pad_token_serves(tokenizer):
    tokenizer.pad_token = None
    batch = MemoryProcessor(tokenizer, chunk_length=4)(text=["abc", "a"], context=["abcdef", "a"])
    assert batch["attention_mask"][1] == [1, 1, 0, 0, 0]


def test_decoding_leaves_slots_and_foreign_ids_out(one, tokenizer):
    ids = one(text="the sand", context="abcdef", return_tensors="pt")["input_ids"]
    assert one.decode(ids[0]) == "the sand"
    assert one.batch_decode(ids) == one.decode(ids) == ["the sand"]
    assert one.decode([SLOT, -100, *tokenizer("ab").input_ids, 5000]) == "ab"
    assert one.decode([SLOT]) == ""
    assert one.decode([], skip_special_tokens=True) == ""
    with_eos = [*tokenizer("ab").input_ids, 2]
    assert one.batch_decode([with_eos], skip_special_tokens=True) == ["ab"]
    assert one.batch_decode([with_eos]) == ["ab<eos>"]


@pytest.mark.parametrize("wrong", ["a", 1.5, [1, "a"], ["a"], [[1], "a"], None, {"a": 1}])
def test_what_are_no_ids_is_not_decoded(one, wrong):
    with pytest.raises(ValueError, match="expected integers"):
        one.decode(wrong)


def test_ids_come_as_the_user_has_them(one, tokenizer):
    ids = tokenizer("ab").input_ids
    for row in (np.array(ids), torch.tensor(ids), tuple(ids), list(np.array(ids))):
        assert one.decode(row) == "ab"
    assert one.batch_decode(np.array([ids, ids])) == ["ab", "ab"] and one.decode(ids[0]) == "a"


def test_several_contexts_stand_at_their_places(one):
    contexts = ["abcdefghi", "the", "abcd"]
    batch = one(text="x<memory>y<memory><memory>z", context=[contexts], return_tensors="pt")
    x, y, z = (one.tokenizer(letter).input_ids for letter in "xyz")
    assert batch["input_ids"][0].tolist() == [*x, *[SLOT] * 6, *y, *[SLOT] * 4, *z]
    chunks = [chunk for context in contexts for chunk in one.split_context(context)]
    assert batch["context_input_ids"].shape == (1, 5, 4)
    seen = batch["context_attention_mask"][0].bool()
    assert [row[m].tolist() for row, m in zip(batch["context_input_ids"][0], seen, strict=True)] == chunks
    in_front = one(text="xyz", context=[contexts])["input_ids"]
    assert in_front == [[SLOT] * 10 + one.tokenizer("xyz").input_ids]
    # One context in a list of its own is one context, and an empty list is none.
    assert dict(one(text=["x", "y"], context=[["abc"], []])) == dict(one(text=["x", "y"], context=["abc", None]))
    ready = one(text="x<memory>y<memory><memory>z", num_memories=[[6, 2, 2]])
    assert ready["input_ids"] == batch["input_ids"].tolist()


def test_unequal_numbers_of_contexts_equal_single_rows(one):
    texts = ["a<memory>b<memory>", "c", "<memory>d", "<memory>e<memory>f<memory>"]
    contexts = [["abcdefgh", "abc"], None, "abcdefghijklm", ["a", "abcde", "ab"]]
    batch = one(text=texts, context=contexts, padding_side="left", return_tensors="pt")
    assert batch["context_input_ids"].shape == (4, 4, 4)
    assert batch["context_attention_mask"].any(-1).sum(1).tolist() == [3, 0, 4, 4]
    for row, (text, context) in enumerate(zip(texts, contexts, strict=True)):
        single = one(text=[text], context=[context], return_tensors="pt")
        kept = batch["attention_mask"][row].bool()
        assert batch["input_ids"][row][kept].tolist() == single["input_ids"][0].tolist()


def test_fewer_memories_of_each_chunk(one):
    model = build_model("llama", "llama", memories_per_chunk=2)
    texts, contexts = ["a<memory>b<memory>", "<memory>c"], [["the house", "on"], "the river"]
    given = {"text": texts, "context": contexts, "return_tensors": "pt", "padding_side": "left"}
    batch = one(**given, context_num_memories=1)
    counts = batch["context_num_memories"]
    assert counts.tolist() == batch["context_attention_mask"].any(-1).long().tolist()
    assert (batch["input_ids"] == SLOT).sum(1).tolist() == counts.sum(1).tolist()
    chosen = counts.clone()
    chosen[0, 0] = 2
    mixed = one(**given, context_num_memories=chosen.tolist())
    assert (mixed["input_ids"] == SLOT).sum(1).tolist() == chosen.sum(1).tolist()
    assert torch.equal(mixed["context_num_memories"], chosen)
    with torch.no_grad():
        for inputs in (batch, mixed, one(**given)):
            logits = model(**inputs).logits
            alone = one(text=texts[0], context=contexts[:1], return_tensors="pt")
            if "context_num_memories" in inputs:
                present = int(alone["context_attention_mask"].any(-1).sum())
                own = inputs["context_num_memories"][:1, :present].tolist()
                alone = one(text=texts[0], context=contexts[:1], context_num_memories=own, return_tensors="pt")
            torch.testing.assert_close(model(**alone).logits[0, -1], logits[0, -1])


def test_options_come_as_they_are_or_in_groups(one):
    flat = one(text=["abc", "a"], padding="max_length", max_length=6, return_tensors="pt", padding_side="left")
    groups = {"text_kwargs": {"padding": "max_length", "max_length": 6, "padding_side": "left"}}
    grouped = one(text=["abc", "a"], **groups, common_kwargs={"return_tensors": "pt"})
    assert all(torch.equal(flat[name], grouped[name]) for name in flat) and set(flat) == set(grouped)
    assert {len(row) for row in one(text=["abc", "a"], pad_to_multiple_of=8)["input_ids"]} == {8}
    # What the library's pipelines pass along and what changes nothing is taken.
    assert (
        one(text="abc", truncation=False, stride=0, images=None, verbose=False)["input_ids"]
        == one(text="abc")["input_ids"]
    )
    assert set(one(text="abc", return_attention_mask=False)) == {"input_ids"}
    assert MemoryProcessor.valid_processor_kwargs.__name__ == "MemoryProcessorKwargs"


@pytest.mark.parametrize("shared", [True, False])
def test_round_trip_through_a_folder(one, two, shared, tmp_path):
    processor = one if shared else two
    processor.save_pretrained(tmp_path)
    assert (tmp_path / "encoder_tokenizer").exists() is not shared
    settings = json.loads((tmp_path / "processor_config.json").read_text())
    assert settings["chunk_length"] == 4 and str(tmp_path) not in json.dumps(settings)
    again = MemoryProcessor.from_pretrained(tmp_path)
    assert again.to_dict() == processor.to_dict()
    assert (again.encoder_tokenizer is None) is shared
    given = {"text": ["ab<memory>c", "d"], "context": ["abcdefghijk", "the"], "padding_side": "left"}
    assert dict(again(**given)) == dict(processor(**given))
    again.save_pretrained(tmp_path / "second")
    assert MemoryProcessor.from_pretrained(tmp_path / "second").to_dict() == processor.to_dict()


def test_chat_template_survives_a_round_trip(tokenizer, tmp_path):
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    MemoryProcessor(tokenizer, chunk_length=4, chat_template=template).save_pretrained(tmp_path)
    assert MemoryProcessor.from_pretrained(tmp_path).chat_template == template


def test_settings_can_be_overridden_on_loading(one, tmp_path):
    one.save_pretrained(tmp_path)
    again = MemoryProcessor.from_pretrained(tmp_path, chunk_length=2)
    assert (again.chunk_length, again.window_length) == (2, 8)
    assert "chunk_length" not in again.tokenizer.init_kwargs


@pytest.mark.parametrize("shared", [True, False])
def test_auto_processor_loads_it_with_its_code(one, two, shared, tmp_path, monkeypatch):
    processor = one if shared else two
    monkeypatch.setattr(MemoryProcessor, "_auto_class", "AutoProcessor")
    processor.save_pretrained(tmp_path)
    assert (tmp_path / "processing_memory.py").exists()
    saved = json.loads((tmp_path / "processor_config.json").read_text())
    assert saved["auto_map"]["AutoProcessor"] == "processing_memory.MemoryProcessor"
    again = AutoProcessor.from_pretrained(tmp_path, trust_remote_code=True)
    given = {"text": "ab<memory>c", "context": "abcdefghijk"}
    assert dict(again(**given)) == dict(processor(**given))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "Neither `text` nor `context`"),
        ({"text": ""}, r"`text\[0\]` is empty"),
        ({"text": []}, "`text` is an empty list"),
        ({"text": ["a", 3]}, r"`text\[1\]` is a int"),
        ({"text": 7}, "`text` is a int"),
        ({"text": "a", "context": ""}, r"`context\[0\]` is empty"),
        ({"text": "a", "context": ["b", "c"]}, "1 texts and 2 contexts"),
        ({"text": ["a", "b"], "context": "c"}, "2 texts and 1 contexts"),
        ({"text": "<memory>a<memory>", "context": "b"}, "2 times"),
        ({"text": "<memory>a"}, "nothing to remember"),
        ({"text": "<memory>", "context": [None]}, "no tokens and no memories"),
        ({"context": [None]}, "nothing is left to prepare"),
        ({"text": "a", "context": [["b", ""]]}, r"`context\[0\]\[1\]` is empty"),
        ({"text": ["a"] * 4, "context": ["b"] * 3 + [3]}, r"`context\[3\]` is a int"),
        ({"text": ["a"], "context": [["b", None]]}, r"`context\[0\]\[1\]` is a NoneType"),
        ({"text": "a<memory>", "context": [["b", "c"]]}, "1 times .row 0., but has 2 contexts"),
        ({"text": ["a", "<memory><memory>"], "context": ["b", "c"]}, "2 times .row 1., but has 1 contexts"),
        ({"text": ["a", "<memory>"]}, "row 1.*nothing to remember"),
        ({"text": [["a", True]]}, r"`text\[0\]\[1\]` is True; expected a string"),
        ({"text": [["a", -1]]}, r"`text\[0\]\[1\]` is -1"),
        ({"text": [[]]}, r"`text\[0\]` is empty"),
        ({"text": "a", "context": "b", "context_num_memories": 3}, "is 3 for a chunk of row 0; expected 1 to 2"),
        ({"text": "a", "context": "b", "context_num_memories": 0}, "is 0 for a chunk"),
        ({"text": "a", "context": "abcdef", "context_num_memories": [[1]]}, "has 1 numbers for row 0.* 2 chunks"),
        ({"text": "a", "context_num_memories": 1}, "no `context` was given"),
        ({"text": "a<memory><memory>", "num_memories": [[1, -2]]}, "is -2; expected"),
        ({"text": "a", "truncation": True}, "`truncation=True` cannot be had: nothing is cut off"),
        ({"text": "a", "stride": 2}, "`stride=2` cannot be had"),
        ({"text": "a", "images": [1]}, "reads text alone"),
        ({"text": "a", "text_kwargs": {"return_offsets_mapping": True}}, "a call returns what the model takes"),
        ({"text": "a", "paddding": True}, "Unexpected keyword argument `paddding`"),
        ({"text": "a", "padding": True, "text_kwargs": {"padding": False}}, "`padding` was given twice"),
        ({"text": "a", "padding": "max_length", "max_length": 0}, "`max_length` is 0"),
        ({"text": "a", "pad_to_multiple_of": 1.5}, "`pad_to_multiple_of` is 1.5"),
        ({"text": "a", "context": "b", "num_memories": 1}, "both given"),
        ({"num_memories": 1}, "no `text`|Neither"),
        ({"text": "a", "num_memories": [1, 2]}, "1 texts and 2 numbers"),
        ({"text": "a", "num_memories": -1}, "is -1; expected"),
        ({"text": "a", "padding": "widest"}, "'widest'"),
        ({"text": "a", "padding_side": "middle"}, "'middle'"),
        ({"text": "abc", "padding": "max_length", "max_length": 2}, "longest row has 3"),
    ],
)
def test_bad_input_is_refused_with_a_remedy(one, arguments, message):
    with pytest.raises(ValueError, match=message):
        one(**arguments)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"chunk_length": 0}, "`chunk_length` is 0"),
        ({"chunk_length": 2.5}, "`chunk_length` is 2.5"),
        ({"memories_per_chunk": True}, "`memories_per_chunk` is True"),
        ({"chunk_length": 4, "window_length": 6}, "whole chunks"),
        ({"memory_token": "<slot>"}, "does not know the memory token '<slot>'"),
        ({"encoder_tokenizer": "bert"}, "`encoder_tokenizer` is a str"),
    ],
)
def test_bad_settings_are_refused(tokenizer, settings, message):
    with pytest.raises(ValueError, match=message):
        MemoryProcessor(tokenizer, **settings)


def test_no_argument_is_changed(one):
    texts, contexts = ["a", "b"], ["abcdef", None]
    one(text=texts, context=contexts)
    assert (texts, contexts) == (["a", "b"], ["abcdef", None])


def test_every_setting_is_saved(one):
    names = set(inspect.signature(MemoryProcessor.__init__).parameters) - {"self", "tokenizer"}
    assert names - {"encoder_tokenizer", "chat_template"} <= set(one.to_dict())
