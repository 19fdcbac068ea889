"""Domains are compared by equally many tokens; a pretrained decoder is measured before and after, on the same rows."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.claims import foreign
from benchmarks.claims.cells import read_cells
from benchmarks.claims.foreign import Domain, measure_domain, measure_foreign, measure_pretrained, tokens_of
from benchmarks.claims.source import Source
from tests.claims_run import tiny_run

CORPORA = "training/corpora"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    torch.set_num_threads(1)
    return tiny_run(tmp_path_factory.mktemp("claims") / "study", ("ae",))


@pytest.fixture
def news() -> Domain:
    return Domain.parse(f"news={CORPORA}/wikinews/validation.parquet,{CORPORA}/wikinews/test.parquet")


@pytest.mark.parametrize("given", ["news", "news=a.parquet", "=a,b", "news=a,"])
def test_a_domain_names_its_two_files(given: str):
    with pytest.raises(ValueError, match="expected NAME=TRAIN,TEST"):
        Domain.parse(given)


def test_a_domain_is_read_up_to_the_limit(source: Source, news: Domain, tmp_path: Path, monkeypatch: Any):
    read = []
    monkeypatch.setattr(foreign, "SCORED_TOKENS", 512)
    monkeypatch.setattr(foreign, "PROBED", replace(foreign.PROBED, steps=2, batch_tokens=256))
    monkeypatch.setattr(foreign, "SENTENCES", str(source.model_folder("ae")))
    rows = foreign.TokenRows
    monkeypatch.setattr(foreign, "TokenRows", lambda tokens, **given: read.append(tokens) or rows(tokens, **given))
    cell = measure_domain(source, tmp_path, news, limit=4000)
    assert torch.equal(read[0], tokens_of(source.inputs.tokenizer, news.train)[:4000])
    found = cell["metrics"]
    assert found["autoencoder"]["num_tokens"] == 512 and 0 <= found["embedding"]["token_accuracy"] <= 1
    assert cell["text_tokens"] == cell["steps"] * source.budget("ae", 0).batch_tokens
    measure_domain(source, tmp_path, news, limit=4000)
    assert len(read) == 1  # found, not trained


def test_copy_training_leaves_the_base_as_it_was(source: Source, news: Domain, tmp_path: Path, monkeypatch: Any):
    monkeypatch.setattr(foreign, "SCORED_TOKENS", 1024)
    config = LlamaConfig(vocab_size=source.vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                         num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=256)  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "decoder")
    source.inputs.tokenizer.save_pretrained(tmp_path / "decoder")
    measure_pretrained(tmp_path, str(tmp_path / "decoder"), news, steps={"brief": 1, "long": 6})
    cells = read_cells(tmp_path)
    assert [cells[f"pretrained_{name}"]["steps"] for name in ("base", "brief", "long")] == [0, 1, 6]
    losses = [cells[f"pretrained_{name}"]["metrics"]["clm"]["loss"] for name in ("base", "brief", "long")]
    assert len(set(losses)) == 3
    assert {cell["metrics"]["copy"]["memory"]["num_tokens"] for cell in cells.values()} == {1024}
    measure_pretrained(tmp_path / "one", str(tmp_path / "decoder"), news, only=["pretrained_base"])
    assert list(read_cells(tmp_path / "one")) == ["pretrained_base"]
    before = {name: json.dumps(cell) for name, cell in cells.items()}
    measure_pretrained(tmp_path, str(tmp_path / "decoder"), news, steps={"brief": 1, "long": 6})
    assert before == {name: json.dumps(cell) for name, cell in read_cells(tmp_path).items()}


def test_an_unknown_measurement_is_named(news: Domain, tmp_path: Path):
    with pytest.raises(ValueError, match="domain_olds: no such measurement; known: domain_news, pretrained_base"):
        measure_foreign(tmp_path, tmp_path, [news], "decoder", ["domain_olds"])
    with pytest.raises(ValueError, match="known: domain_news$"):
        measure_foreign(tmp_path, tmp_path, [news], None, ["pretrained_base"])
