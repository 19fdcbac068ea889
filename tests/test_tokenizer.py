import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tests.conftest import build_tiny_tokenizer
from training.data.tokenizer import _evenly, special_tokens_of, token_byte_lengths, tokenizer_checksum, train_tokenizer

TEXTS = [
    "In the beginning the words were few, and the memory of them was long.",
    "The longer the text, the fewer the words that one remembers: 1912, 1945, 2026.",
    "Naïve façades, 東京 and Ελλάδα; a smile 🙂 and\ta tab.\n\n  Two spaces, and the end.",
] * 4
VOCAB_SIZE = 300
SPECIALS = ["<pad>", "<bos>", "<eos>", "<copy>", "<blank>", "<memory>"]
UNICODE = st.text(st.characters(codec="utf-8"), max_size=60)


@pytest.fixture(scope="module")
def trained() -> PreTrainedTokenizerFast:
    return train_tokenizer(TEXTS, VOCAB_SIZE)


def test_ids_are_fixed_and_the_slot_lies_after_the_tables(trained: PreTrainedTokenizerFast) -> None:
    assert trained.convert_tokens_to_ids(SPECIALS) == [0, 1, 2, 3, 4, VOCAB_SIZE]
    assert len(trained) == VOCAB_SIZE + 1
    assert sorted(trained.get_vocab().values()) == list(range(VOCAB_SIZE + 1))
    assert set(trained.all_special_ids) == {0, 1, 2, 3, 4, VOCAB_SIZE}


def test_no_special_token_is_added_by_itself_and_padding_is_left(trained: PreTrainedTokenizerFast) -> None:
    batch = trained(["the words", "the"], padding=True, return_tensors="pt")
    assert not torch.isin(batch.input_ids[0], torch.tensor(trained.all_special_ids)).any()
    assert trained.decode(batch.input_ids[0]) == "the words"
    assert batch.attention_mask[1, 0] == 0 and batch.attention_mask[1, -1] == 1
    assert batch.input_ids[1, 0] == trained.pad_token_id


def check_round_trip(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    for split_special_tokens in (False, True):
        ids = tokenizer(text, split_special_tokens=split_special_tokens).input_ids
        assert tokenizer.decode(ids) == text
        assert tokenizer.unk_token_id is None or tokenizer.unk_token_id not in ids


@settings(max_examples=200, deadline=None)
@given(UNICODE)
def test_any_text_comes_back_exactly(trained: PreTrainedTokenizerFast, text: str) -> None:
    check_round_trip(trained, text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "  a  b  ",
        " the",
        "\r\n\t\x00",
        "don 't",
        "a , b .",
        "e\u0301 \ufb01 \u00a0",
        "\U0001f469\u200d\U0001f680",
    ]
    + ["<eos>", "a<memory> <copy>b ", "< pad >"],
)
def test_awkward_texts_come_back_exactly(trained: PreTrainedTokenizerFast, text: str) -> None:
    check_round_trip(trained, text)


@settings(max_examples=100, deadline=None)
@given(UNICODE)
def test_bytes_of_the_tokens_are_the_bytes_of_the_text(trained: PreTrainedTokenizerFast, text: str) -> None:
    lengths = token_byte_lengths(trained)
    ids = trained(text, split_special_tokens=True).input_ids
    assert int(lengths[torch.tensor(ids, dtype=torch.long)].sum()) == len(text.encode())
    assert lengths.shape == (VOCAB_SIZE + 1,)
    assert (lengths[trained.all_special_ids] == 0).all()
    assert (lengths > 0).sum() == VOCAB_SIZE - 5


def test_saved_tokenizer_is_loaded_by_autotokenizer(trained: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    trained.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=False)
    assert tokenizer_checksum(loaded) == tokenizer_checksum(trained)
    assert special_tokens_of(loaded) == special_tokens_of(trained)
    assert loaded.padding_side == "left"
    assert loaded.all_special_tokens == trained.all_special_tokens
    for text in (*TEXTS, "a<memory>b", "a , b ."):
        ids = loaded(text).input_ids
        assert ids == trained(text).input_ids
        assert loaded.decode(ids) == text
    skipped = loaded.decode(loaded("<bos>the<memory><eos>").input_ids, skip_special_tokens=True)
    assert skipped == "the"


def test_training_is_deterministic_across_processes(trained: PreTrainedTokenizerFast) -> None:
    code = (
        "import json, sys\n"
        "from training.data.tokenizer import tokenizer_checksum, train_tokenizer\n"
        "print(tokenizer_checksum(train_tokenizer(*json.load(sys.stdin))))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps([TEXTS, VOCAB_SIZE]),
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() == tokenizer_checksum(trained)


def test_checksum_ignores_the_last_calls_padding_and_sees_other_merges(trained: PreTrainedTokenizerFast) -> None:
    before = tokenizer_checksum(trained)
    trained(["a", "the words"], padding=True, truncation=True, max_length=2)
    assert tokenizer_checksum(trained) == before
    assert tokenizer_checksum(train_tokenizer(TEXTS[:1], 280)) != before
    assert tokenizer_checksum(train_tokenizer(iter(TEXTS), VOCAB_SIZE)) == before


def test_a_foreign_tokenizer_has_no_markers_until_they_are_added() -> None:
    foreign = build_tiny_tokenizer()
    found = special_tokens_of(foreign)
    assert (found.pad, found.eos, found.copy, found.blank, found.memory) == (0, 2, 3, 4, 96)
    plain = train_tokenizer(TEXTS, VOCAB_SIZE)
    plain = PreTrainedTokenizerFast(tokenizer_object=plain.backend_tokenizer.__class__(plain.backend_tokenizer.model))
    with pytest.raises(ValueError, match="no padding token"):
        special_tokens_of(plain)
    plain.add_special_tokens({"pad_token": "<|pad|>"})
    assert special_tokens_of(plain).copy is None
    plain.add_special_tokens({"additional_special_tokens": ["<copy>"]})
    assert special_tokens_of(plain).copy == plain.convert_tokens_to_ids("<copy>")


def test_bad_input_is_refused_with_what_was_given() -> None:
    with pytest.raises(ValueError, match="vocab_size is 260.*at least 261"):
        train_tokenizer(TEXTS, 260)
    with pytest.raises(ValueError, match="for 26. tokens only"):
        train_tokenizer(["abcab"], 300)
    with pytest.raises(ValueError, match="single string"):
        train_tokenizer("the words", 300)
    with pytest.raises(ValueError, match="byte-level"):
        token_byte_lengths(build_tiny_tokenizer())


@settings(deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(1, 400))
def test_sample_of_texts_is_as_large_as_asked_and_spread(sizes: list[int], max_bytes: int) -> None:
    texts = [f"{number:02d}" + "x" * size for number, size in enumerate(sizes)]
    chosen = list(_evenly(texts, max_bytes))
    assert chosen == [text for text in texts if text in set(chosen)]
    total, taken = (sum(map(len, some)) for some in (texts, chosen))
    assert len(chosen) >= 1
    assert taken <= max(max_bytes, len(chosen[-1]))
    if max_bytes >= total:
        assert chosen == texts
    else:
        assert taken > max_bytes - 2 * max(map(len, texts))
