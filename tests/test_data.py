import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from tests.conftest import build_tiny_tokenizer
from training.data import texts as data
from training.data.sources import read_file
from training.data.texts import (
    check_splits,
    count_bytes,
    file_checksums,
    load_texts,
    tokenise_documents,
)
from training.data.tokenizer import token_byte_lengths, train_tokenizer

TEXTS = ["The first text.\r\nIt has two lines.", "Überall 東京 🙂", "The third\u2028one."]
UNICODE = st.text(st.characters(codec="utf-8"), max_size=40)


@pytest.fixture(scope="module")
def trained() -> PreTrainedTokenizerFast:
    return train_tokenizer(TEXTS, 270)


def write(folder: Path, name: str, texts: list[str], column: str = "text") -> Path:
    file = folder / name
    if name.endswith(".parquet"):
        table = pyarrow.table({column: texts, "source": ["here"] * len(texts)})
        pyarrow.parquet.write_table(table, file, compression="zstd")
        return file
    if ".jsonl" in name:
        content = "".join(json.dumps({column: text}, ensure_ascii=False) + "\n" for text in texts).encode()
    else:
        content = "".join(texts).encode()
    file.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return file


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.jsonl.gz"])
@pytest.mark.parametrize("column", ["text", "body"])
def test_documents_come_back_exactly(tmp_path: Path, name: str, column: str) -> None:
    file = write(tmp_path, name, TEXTS, column)
    assert load_texts([file], column) == TEXTS
    assert load_texts([str(file), file], column) == TEXTS * 2


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_a_plain_file_is_one_document(tmp_path: Path, name: str) -> None:
    assert load_texts([write(tmp_path, name, TEXTS)]) == ["".join(TEXTS)]


def test_empty_documents_are_left_out(tmp_path: Path) -> None:
    file = write(tmp_path, "a.parquet", ["", TEXTS[0], " \n"])
    assert load_texts([file]) == TEXTS[:1]


def broken(folder: Path, case: str) -> list[Path]:
    """Write what a user may point a recipe at by mistake."""
    file = folder / {"suffix": "a.csv", "parquet": "a.parquet"}.get(case, "a.jsonl")
    content = {
        "suffix": b"text\n",
        "parquet": b"PAR1 no more",
        "json": b'{"text": "a"}\n{"text": \n',
        "encoding": b'{"text": "\xff"}\n',
        "column": b'{"content": "a"}\n',
        "list": b"[1, 2]\n",
        "null": b'{"text": "a"}\n\n{"text": null}\n',
        "empty": b"",
    }
    if case in content:
        file.write_bytes(content[case])
    elif case == "gzip":
        file = write(folder, "a.txt.gz", TEXTS)
        file.write_bytes(file.read_bytes()[:-12])
    elif case == "parquet column":
        file = write(folder, "b.parquet", TEXTS, "content")
    return [] if case == "nothing" else [file]


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("missing", r"a.jsonl is no file. Correct the path"),
        ("suffix", r"a.csv has no known ending; known: .parquet, .jsonl"),
        ("parquet", "a.parquet cannot be read"),
        ("json", "a.jsonl, line 2 is no JSON"),
        ("encoding", "a.jsonl cannot be read as UTF-8"),
        ("column", "line 1 has content, but no 'text'"),
        ("parquet column", "b.parquet has the columns content, source, but no 'text'"),
        ("list", "line 1 has list, but no 'text'"),
        ("null", "line 3: 'text' is None, expected text"),
        ("gzip", "a.txt.gz cannot be read"),
        ("empty", "holds no text"),
        ("nothing", "at least one text file"),
    ],
)
def test_files_that_cannot_be_read_are_named(tmp_path: Path, case: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_texts(broken(tmp_path, case))


def test_checksums_have_short_names_that_differ(tmp_path: Path) -> None:
    first = write(tmp_path, "a.txt", ["abc"])
    assert file_checksums([first]) == {  # sha256 of "abc", FIPS 180-2 example
        "a.txt": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    }
    (tmp_path / "sub").mkdir()
    second = write(tmp_path / "sub", "a.txt", ["abd"])
    both = file_checksums([second, first, first])
    assert list(both) == [f"{tmp_path.name}/a.txt", "sub/a.txt"]
    assert len(set(both.values())) == 2
    with pytest.raises(ValueError, match="no.txt is no file"):
        file_checksums([tmp_path / "no.txt"])


LONG = "A long line, " * 20


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ((["one", "two"], ["three"], ["two"]), "train and test share a document of 3 characters .* 'two'"),
        ((["one"], ["two\n"], ["three", " two"]), "validation and test share a document"),
        ((["one"], ["two"], ["  one\n"]), "train and test"),
        (([f"one\n{LONG}"], [f"{LONG.strip()}\ntwo"], ["three"]), "train and validation share a line .* 'A long line"),
        (([f"one\n{LONG}"], ["two"], [LONG]), "train and test share a line"),
    ],
)
def test_splits_that_share_text_are_refused(splits: tuple[list[str], ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_splits(*splits)


def test_splits_may_share_short_lines_and_repeat_themselves() -> None:
    check_splits(["one\nsame line", LONG, LONG], ["two\nsame line"], ["three\nsame line"])
    with pytest.raises(ValueError, match="validation and test share a line of 9 characters"):
        check_splits(["one"], ["two\nsame line"], ["three\nsame line"], min_line_length=9)


def test_every_document_is_followed_by_one_end_token(trained: PreTrainedTokenizerFast) -> None:
    split = tokenise_documents(trained, TEXTS)
    expected = [token for text in TEXTS for token in [*trained(text).input_ids, trained.eos_token_id]]
    assert split.tokens.tolist() == expected
    assert split.tokens.dtype == torch.long
    assert (split.num_documents, split.num_tokens) == (3, len(expected))
    assert split.num_bytes == sum(len(text.encode("utf-8")) for text in TEXTS)


@settings(max_examples=40, deadline=None)
@given(texts=st.lists(UNICODE, min_size=1, max_size=5), batch=st.integers(1, 60))
def test_no_text_is_lost_whatever_the_batches(trained: PreTrainedTokenizerFast, texts: list[str], batch: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "BATCH_CHARACTERS", batch)
        split = tokenise_documents(trained, texts)
    ends = (split.tokens == trained.eos_token_id).nonzero()[:, 0].tolist()
    assert len(ends) == len(texts)
    starts = [0, *(end + 1 for end in ends)]
    parts = [split.tokens[start:end] for start, end in zip(starts, ends, strict=False)]
    assert [trained.decode(part) for part in parts] == texts
    assert int(token_byte_lengths(trained)[split.tokens].sum()) == split.num_bytes == count_bytes(texts)


def test_names_of_special_tokens_in_a_text_are_only_text(trained: PreTrainedTokenizerFast) -> None:
    split = tokenise_documents(trained, ["a<memory>b<eos>c"])
    assert (split.tokens == trained.eos_token_id).sum() == 1
    assert not torch.isin(split.tokens[:-1], torch.tensor(trained.all_special_ids)).any()
    assert trained.decode(split.tokens[:-1]) == "a<memory>b<eos>c"


def test_tokenizer_is_left_as_it_was(trained: PreTrainedTokenizerFast) -> None:
    trained(["a", "b c d"], padding=True, truncation=True, max_length=3)
    state = trained.backend_tokenizer.to_str()
    assert tokenise_documents(trained, TEXTS).num_tokens > 3 * len(TEXTS)  # that call's truncation does not apply
    assert trained.backend_tokenizer.to_str() == state
    assert trained("<eos>").input_ids == [trained.eos_token_id]


def test_cache_gives_the_same_split_and_is_keyed_by_texts_and_tokenizer(
    trained: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "cache"
    plain = tokenise_documents(trained, TEXTS)
    first = tokenise_documents(trained, TEXTS, cache_folder=folder)
    tokenise_documents(trained, ["".join(TEXTS)], cache_folder=folder)  # the same characters, another document
    tokenise_documents(train_tokenizer(TEXTS, 265), TEXTS, cache_folder=folder)
    assert len(list(folder.iterdir())) == 3  # and no temporary file is left
    monkeypatch.setattr(data, "_tokenise", lambda *_: pytest.fail("tokenised again"))
    again = tokenise_documents(trained, list(TEXTS), cache_folder=folder)
    for split in (first, again):
        assert (split.tokens == plain.tokens).all() and split.tokens.dtype == torch.long
        assert (split.num_documents, split.num_bytes) == (plain.num_documents, plain.num_bytes)


def test_damaged_cache_is_made_again(
    trained: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = tokenise_documents(trained, TEXTS, cache_folder=tmp_path).tokens
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-5])
    assert (tokenise_documents(trained, TEXTS, cache_folder=tmp_path).tokens == tokens).all()
    monkeypatch.setattr(data, "_tokenise", lambda *_: pytest.fail("was not made whole again"))
    assert (tokenise_documents(trained, TEXTS, cache_folder=tmp_path).tokens == tokens).all()


def no_end_token() -> PreTrainedTokenizerFast:
    tokenizer = build_tiny_tokenizer()
    tokenizer.eos_token = None
    return tokenizer


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tokenise_documents(no_end_token(), TEXTS), "has no end token"),
        (lambda: tokenise_documents(object(), TEXTS), "object is no fast tokenizer"),
        (lambda: tokenise_documents(build_tiny_tokenizer(), []), "at least one document"),
        (lambda: tokenise_documents(build_tiny_tokenizer(), "a text"), "'a text'; expected a list"),
    ],
)
def test_bad_input_is_refused_with_what_was_given(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_half_a_character_is_named_and_can_be_skipped(tmp_path: Path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "a"}\n{"text": "a\\ud800b"}\n{"text": 5}\n{"text": "c"}\n', encoding="utf-8")
    with pytest.raises(ValueError, match="line 2: 'text' holds half a character .* at 1.*Correct the row"):
        list(read_file(file))
    told: list[str] = []
    assert list(read_file(file, skip=told.append)) == ["a", "c"]
    assert len(told) == 2 and "line 2" in told[0] and "line 3: 'text' is 5" in told[1]
