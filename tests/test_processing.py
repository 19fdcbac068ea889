import inspect
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoProcessor

from modeling_memory.processing_memory import MemoryProcessor
from tests.conftest import _ALPHABET, build_tiny_encoder_tokenizer, build_tiny_tokenizer

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


def test_chat_template_keeps_the_place_of_the_slots(one, tokenizer):
    one.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    chat = [{"role": "user", "content": "read <memory> now"}]
    assert one.apply_chat_template(chat) == "user: read <memory> now\n"
    batch = one.apply_chat_template(chat, context="abcdef", tokenize=True)
    before = tokenizer("user: read ").input_ids
    assert batch["input_ids"][0][: len(before) + 4] == [*before, *[SLOT] * 4]
    assert "context_input_ids" in batch
    chats = [chat, [{"role": "user", "content": "b"}]]
    rows = one.apply_chat_template(chats, num_memories=[2, 1], tokenize=True, return_dict=False)
    assert [row.count(SLOT) for row in rows] == [2, 1]


@pytest.mark.parametrize("shared", [True, False])
def test_round_trip_through_a_folder(one, two, shared, tmp_path):
    processor = one if shared else two
    processor.save_pretrained(tmp_path)
    assert (tmp_path / "encoder_tokenizer").exists() is not shared
    settings = json.loads((tmp_path / "processor_config.json").read_text())
    assert settings["chunk_length"] == 4 and str(tmp_path) not in json.dumps(settings)
    again = MemoryProcessor.from_pretrained(tmp_path)
    kept = {name: value for name, value in processor.to_dict().items() if name != "auto_map"}
    assert again.to_dict() == kept
    assert (again.encoder_tokenizer is None) is shared
    given = {"text": ["ab<memory>c", "d"], "context": ["abcdefghijk", "the"], "padding_side": "left"}
    assert dict(again(**given)) == dict(processor(**given))
    again.save_pretrained(tmp_path / "second")
    assert MemoryProcessor.from_pretrained(tmp_path / "second").to_dict() == kept


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
        ({"text": "a", "context": "b<memory>"}, "contains '<memory>'"),
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
