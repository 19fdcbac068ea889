"""A streamed text: nothing lost, one order whoever reads, exact going on, what is cached found again."""

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
import yaml
from torch.utils.data import DataLoader

from tests.test_run import assert_same_weights, recipe, short_recipe  # noqa: F401  (fixtures)
from training.data.sources import Documents, HubDataset
from training.data.texts import tokenise_documents
from training.data.token_stream import StreamedRows, TokenStream
from training.data.tokenizer import train_tokenizer
from training.recipes.recipe import load_recipe, resolve_documents
from training.run import main

TEXTS = [f"document {n} says " + "la " * (n % 7 + 1) + f"and ends at {n * n}." for n in range(40)]
TOKENIZER = train_tokenizer(TEXTS, vocab_size=290)


def write(folder: Path, name: str, texts: list[str] = TEXTS) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    if name.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=7)
    elif name.endswith(".zst"):
        with pyarrow.CompressedOutputStream(str(path), "zstd") as stream:
            stream.write(lines)
    else:
        path.write_bytes(gzip.compress(lines) if name.endswith(".gz") else lines)
    return path


def stream(folder: Path, *files: Path, **options: Any) -> TokenStream:
    options = {"segment_bytes": 300, **options}
    return TokenStream(Documents(files), TOKENIZER, folder / "cache", **options)


def everything(tokens: TokenStream) -> torch.Tensor:
    while not tokens.total:
        tokens.reach(tokens._segments[-1].end + 1 if tokens._segments else 1)
    return tokens[0 : tokens.total]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_stream_is_every_token_of_every_document_with_borders(tmp_path: Path, name: str):
    tokens = stream(tmp_path, write(tmp_path, name))
    expected = tokenise_documents(TOKENIZER, TEXTS).tokens
    assert torch.equal(everything(tokens), expected)
    assert len(tokens._segments) > 3  # and nothing is lost where they meet
    assert (expected == TOKENIZER.eos_token_id).sum() == len(TEXTS)


def test_text_is_tokenised_only_as_far_as_it_is_read(tmp_path: Path):
    tokens = stream(tmp_path, write(tmp_path, "a.jsonl"))
    tokens[0:10]
    assert len(list(tokens.folder.glob("segment-*"))) == 1 and tokens.total is None


@pytest.mark.parametrize("seed", [0, 1])
def test_rows_of_a_pass_are_all_rows_of_the_stream_in_an_order_of_the_seed(tmp_path: Path, seed: int):
    tokens = stream(tmp_path, write(tmp_path, "a.jsonl"))
    rows = StreamedRows(tokens, row_length=16, num_items=10_000, seed=seed, shuffle_rows=8)
    whole = everything(stream(tmp_path / "other", write(tmp_path, "b.jsonl")))
    per_pass = whole.numel() // 16
    numbers = [rows[i][0] for i in range(2 * per_pass)]
    assert sorted(numbers[:per_pass]) == sorted(numbers[per_pass:]) == list(range(per_pass))
    assert numbers[:per_pass] != numbers[per_pass:] and numbers[:8] != list(range(8))
    assert sorted(numbers[:8]) == list(range(8))  # within blocks
    for i in range(per_pass):
        number, row = rows[i]
        assert torch.equal(row, whole[number * 16 : number * 16 + 16])


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_order_does_not_depend_on_workers(tmp_path: Path, workers: int):
    path = write(tmp_path, "a.jsonl")
    loaded = DataLoader(
        StreamedRows(stream(tmp_path, path), row_length=16, num_items=60, seed=3, shuffle_rows=8),
        batch_size=4,
        num_workers=workers,
    )
    rows = StreamedRows(stream(tmp_path / "new", path), row_length=16, num_items=60, seed=3, shuffle_rows=8)
    got = torch.cat([batch for _, batch in loaded])
    assert torch.equal(got, torch.stack([rows[i][1] for i in range(60)]))


def test_going_on_in_the_middle_tokenises_nothing_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = write(tmp_path, "a.jsonl")
    options: dict[str, Any] = {"row_length": 16, "num_items": 100, "seed": 3, "shuffle_rows": 8}
    rows = StreamedRows(stream(tmp_path, path), **options)
    order = [rows[i][1] for i in range(100)]
    again = StreamedRows(stream(tmp_path, path), **options)
    monkeypatch.setattr(TokenStream, "_write", lambda *a: pytest.fail("tokenised again"))
    for i in (57, 99, 0):
        assert torch.equal(again[i][1], order[i])


def test_torn_segment_is_written_again(tmp_path: Path):
    path = write(tmp_path, "a.jsonl")
    first = stream(tmp_path, path)
    whole = everything(first)
    os.truncate(first._file(2), 20)
    assert torch.equal(everything(stream(tmp_path, path)), whole)


def test_other_data_or_another_tokenizer_is_another_stream(tmp_path: Path):
    path = write(tmp_path, "a.jsonl")
    one = stream(tmp_path, path).identity
    assert stream(tmp_path, path).identity == one
    other = TokenStream(Documents((path,)), train_tokenizer(TEXTS, 291), tmp_path, segment_bytes=300)
    assert other.identity != one
    write(tmp_path, "a.jsonl", TEXTS[:-1])
    assert stream(tmp_path, path).identity != one


def test_documents_of_other_splits_are_left_out(tmp_path: Path):
    tokens = stream(tmp_path, write(tmp_path, "a.jsonl"), held_out=[TEXTS[5], TEXTS[30] + "\n"])
    expected = tokenise_documents(TOKENIZER, [text for n, text in enumerate(TEXTS) if n not in (5, 30)]).tokens
    assert torch.equal(everything(tokens), expected) and tokens.left_out == 2


def test_limit_ends_the_stream(tmp_path: Path):
    tokens = stream(tmp_path, write(tmp_path, "a.jsonl"), limit=100)
    assert tokens.reach(100) and not tokens.reach(101) and tokens.total == 100


def test_hub_dataset_streams_from_any_document(tmp_path: Path):
    write(tmp_path / "set", "train.jsonl")
    source = HubDataset(str(tmp_path / "set"), revision="main")
    assert list(source.documents("text")) == TEXTS and list(source.documents("text", start=33)) == TEXTS[33:]
    with pytest.raises(ValueError, match="no 'body'. Set text_column"):
        next(source.documents("body"))
    tokens = TokenStream(Documents((source,)), TOKENIZER, tmp_path, segment_bytes=300)
    assert torch.equal(everything(tokens), tokenise_documents(TOKENIZER, TEXTS).tokens)


def test_sources_of_a_recipe_mix_files_and_datasets(tmp_path: Path):
    path = write(tmp_path, "a.jsonl")
    documents = resolve_documents([str(path), "hub:me/set@abc:en:train"], "text")
    assert documents.parts == (path, HubDataset("me/set", "abc", "en", "train"))
    assert list(Documents((path, path)).read(start=70)) == TEXTS[30:]


def test_streaming_needs_to_know_how_much_text_the_tokenizer_sees(recipe: Path):  # noqa: F811
    raw = yaml.safe_load(recipe.read_text())
    raw["tokenizer"].pop("max_train_bytes", None)
    raw["data"]["streaming"] = True
    recipe.write_text(yaml.safe_dump(raw))
    with pytest.raises(ValueError, match="tokenizer.max_train_bytes must say"):
        load_recipe(recipe)


def test_streamed_run_stopped_in_the_middle_ends_with_the_weights_of_a_straight_one(
    short_recipe: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    command = [str(short_recipe), "data.streaming=true", "data.shuffle_rows=8", "tokenizer.max_train_bytes=5000"]
    assert main([*command, f"output_dir={tmp_path / 'straight'}"]) == 0
    plain, calls = StreamedRows.__getitem__, [0]

    def stop(self: StreamedRows, index: int) -> Any:
        calls[0] += 1
        if calls[0] == 14:
            raise KeyboardInterrupt
        return plain(self, index)

    with monkeypatch.context() as patch:
        patch.setattr(StreamedRows, "__getitem__", stop)
        assert main([*command, f"output_dir={tmp_path / 'stopped'}"]) == 130
    assert main([*command, f"output_dir={tmp_path / 'stopped'}", "stages.decoder.training.num_workers=2"]) == 0
    assert_same_weights(tmp_path / "straight", tmp_path / "stopped", ["autoencoder", "decoder", "blank_copy"])
