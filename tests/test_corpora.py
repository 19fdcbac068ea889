"""The text that ships with the project: what its README says is what the files hold, and the splits are apart."""

import hashlib
import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest

FOLDER = Path(__file__).parents[1] / "training" / "corpora"
CORPORA = sorted(path.name for path in FOLDER.iterdir() if path.is_dir() and not path.name.startswith("_"))
SPLITS = ("train", "validation", "test")
ROW = re.compile(r"^\| (\w+)\.parquet \| ([\d,]+) \| ([\d,]+) \| ([\d,]+) \| `([0-9a-f]{64})` \|$", re.MULTILINE)


def test_there_is_a_corpus():
    assert CORPORA


@pytest.fixture(scope="module", params=CORPORA)
def corpus(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def tables(corpus) -> dict[str, dict[str, list[str]]]:
    return {split: pq.read_table(FOLDER / corpus / f"{split}.parquet").to_pydict() for split in SPLITS}


def test_the_readme_states_counts_and_checksums(corpus, tables):
    stated = {row[0]: row[1:] for row in ROW.findall((FOLDER / corpus / "README.md").read_text("utf-8"))}
    assert set(stated) == set(SPLITS)
    for split, (documents, words, size, checksum) in stated.items():
        content = (FOLDER / corpus / f"{split}.parquet").read_bytes()
        assert hashlib.sha256(content).hexdigest() == checksum
        texts = tables[split]["text"]
        counted = (len(texts), sum(len(text.split()) for text in texts), sum(len(text.encode()) for text in texts))
        assert counted == tuple(int(number.replace(",", "")) for number in (documents, words, size))


def test_splits_share_no_document(tables):
    for column in ("doc_id", "text"):
        for first, second in (("train", "validation"), ("train", "test"), ("validation", "test")):
            assert not set(tables[first][column]) & set(tables[second][column])
    for split in SPLITS:
        assert len(set(tables[split]["doc_id"])) == len(tables[split]["doc_id"])


def test_splits_share_no_long_line(tables):
    lines = {
        split: {line for text in tables[split]["text"] for line in text.splitlines() if len(line) >= 100}
        for split in SPLITS
    }
    assert not lines["train"] & lines["validation"]
    assert not lines["train"] & lines["test"]
    assert not lines["validation"] & lines["test"]


def test_every_row_holds_text(tables):
    for split in SPLITS:
        assert set(tables[split]) == {"text", "source", "doc_id"}
        assert all(text.strip() for text in tables[split]["text"])


def test_licence_and_attribution_lie_beside_the_text(corpus):
    licence = (FOLDER / corpus / "LICENSE").read_text("utf-8")
    readme = (FOLDER / corpus / "README.md").read_text("utf-8")
    assert "creativecommons.org" in licence
    assert "## Source and licence" in readme and "https://github.com/" in readme


def test_books_of_one_author_stand_in_one_split():
    sources = {
        split: set(pq.read_table(FOLDER / "books" / f"{split}.parquet")["source"].to_pylist()) for split in SPLITS
    }
    authors = {split: {name.split(" — ")[1] for name in names} for split, names in sources.items()}
    assert not authors["train"] & (authors["validation"] | authors["test"])
    assert not authors["validation"] & authors["test"]


def test_the_shipped_text_stays_small():
    assert sum(path.stat().st_size for path in FOLDER.rglob("*.parquet")) < 8_000_000
