"""Contrast equals its definition, vectors are read at real tokens, queries are pieces of texts, ranks are exact."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaForCausalLM, LlamaModel

from modeling_memory import MemoryAutoencoder, MemoryAutoencoderConfig
from tests.conftest import build_tiny_tokenizer, tiny_decoder_config, tiny_encoder_config
from tests.memory_models import random_ids
from training.retrieval import (
    QueryRule,
    RetrievalEncoder,
    evaluate_retrieval,
    info_nce,
    main,
    rank_of_own,
    train_retrieval,
)
from training.train.fit import Budget


def bodies() -> dict[str, Any]:
    """The two starts of the paper: a causal LM's body and an autoencoder's encoder."""
    torch.manual_seed(0)
    mixer = tiny_encoder_config("masked_mixer")
    autoencoder = MemoryAutoencoder(MemoryAutoencoderConfig(encoder=mixer, decoder=mixer, chunk_length=16))
    return {"causal": LlamaForCausalLM(tiny_decoder_config()).model.eval(), "autoencoder": autoencoder.encoder.eval()}


def slow_info_nce(queries: torch.Tensor, texts: torch.Tensor, temperature: float) -> torch.Tensor:
    losses = []
    for number, query in enumerate(queries):
        cosines = [torch.cosine_similarity(query, text, dim=0) / temperature for text in texts]
        negatives = sum(torch.exp(c) for n, c in enumerate(cosines) if n != number)
        positive = torch.exp(cosines[number])
        losses.append(-torch.log(positive / (positive + negatives)))
    return torch.stack(losses).mean()


def test_info_nce_equals_its_definition_with_gradients():
    queries, texts = (torch.randn(5, 8, dtype=torch.double, requires_grad=True) for _ in range(2))
    fast = info_nce(torch.nn.functional.normalize(queries, dim=1), torch.nn.functional.normalize(texts, dim=1), 0.1)
    slow = slow_info_nce(queries, texts, 0.1)
    torch.testing.assert_close(fast, slow)
    for left, right in zip(*(torch.autograd.grad(loss, (queries, texts)) for loss in (fast, slow)), strict=True):
        torch.testing.assert_close(left, right)
    same = torch.ones(4, 2) / math.sqrt(2)
    assert info_nce(same, same).item() == pytest.approx(math.log(4))
    with pytest.raises(ValueError, match="there is a negative"):
        info_nce(same[:1], same[:1])


@torch.no_grad()
@pytest.mark.parametrize("kind", ["causal", "autoencoder"])
def test_vectors_are_read_at_the_last_real_token(kind: str):
    body = bodies()[kind]
    model, tokens = RetrievalEncoder(body), random_ids(3, 6)
    alone = torch.nn.functional.normalize(body(tokens).last_hidden_state[:, -1], dim=1)
    torch.testing.assert_close(model(tokens), alone, atol=1e-6, rtol=1e-5)
    padding = torch.zeros(3, 4, dtype=torch.long)
    mask = torch.cat([torch.ones_like(tokens), padding], 1)
    torch.testing.assert_close(model(torch.cat([tokens, padding], 1), mask), alone, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(model(torch.cat([padding, tokens], 1), mask.flip(1)), alone, atol=1e-5, rtol=1e-4)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(0, 99))
def test_queries_are_pieces_of_their_texts(size: int, seed: int):
    texts = torch.arange(4 * 9).reshape(4, 9)
    ngrams, bags = (QueryRule(kind, size).make(texts, seed) for kind in ("ngram", "bag"))  # type: ignore[arg-type]
    for text, ngram, bag in zip(texts.tolist(), ngrams.tolist(), bags.tolist(), strict=True):
        assert ngram in [text[start : start + size] for start in range(10 - size)]
        assert len(set(bag)) == size and set(bag) <= set(text)
    assert torch.equal(ngrams, QueryRule("ngram", size).make(texts, seed))


def test_ranks_equal_a_plain_count_and_a_constant_encoder_finds_nothing():
    queries, texts = (torch.nn.functional.normalize(torch.randn(20, 3), dim=1) for _ in range(2))
    for number, rank in enumerate(rank_of_own(queries, texts).tolist()):
        order = sorted(range(20), key=lambda j: -float(queries[number] @ texts[j]))
        assert rank == order.index(number)
    same = torch.ones(9, 2) / math.sqrt(2)
    assert rank_of_own(same, same).tolist() == [4] * 9


@pytest.mark.parametrize("kind", ["causal", "autoencoder"])
def test_training_finds_more_texts_and_leaves_the_start_alone(kind: str):
    body = bodies()[kind].requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in body.state_dict().items()}
    texts, rule = random_ids(64, 12), QueryRule("ngram", 4)
    budget = Budget(steps=120, batch_tokens=32 * 12, optimizer="adamw", learning_rate=3e-3, bf16=False)
    model = train_retrieval(body, texts, rule, budget)
    assert all(torch.equal(tensor, before[name]) for name, tensor in body.state_dict().items())
    rules = [rule, QueryRule("bag", 4)]
    first, last = (evaluate_retrieval(m, texts, rules) for m in (RetrievalEncoder(body), model))
    assert last["ngram_4"]["top_1"] > max(0.25, 3 * first["ngram_4"]["top_1"])
    for found in last.values():
        assert found["top_1"] <= found["recall_at_10"] and found["chance"] == 1 / 64
        assert found["top_1_interval"][0] <= found["top_1"] <= found["top_1_interval"][1]


def test_command_measures_before_and_after(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(7)
    model = LlamaForCausalLM(tiny_decoder_config())
    model.save_pretrained(tmp_path / "llama")
    build_tiny_tokenizer().save_pretrained(tmp_path / "llama")
    text = tmp_path / "text.txt"
    lines = [f"{word} ran to the {place}" for word in ("cat", "dog", "fox") for place in ("inn", "sea", "mat", "end")]
    text.write_text("\n".join(lines * 5), encoding="utf-8")
    given = [f"a start={tmp_path / 'llama'}", f"fresh=untrained:{tmp_path / 'llama'}", "--text", str(text)]
    given += ["--length", "8", "--query-tokens", "3", "--batch-tokens", "64", "--to", str(tmp_path / "out")]
    assert main([*given, "--steps", "2"]) == 0
    record = json.loads((tmp_path / "out" / "record.json").read_text())
    first, fresh = record["metrics"]["models"]
    assert first["name"] == "a start" and first["before"] != first["after"] and first["weights"] != fresh["weights"]
    assert str(tmp_path) not in json.dumps(record)
    LlamaModel.from_pretrained(tmp_path / "out" / "a_start" / "model")
    assert "fresh, after" in capsys.readouterr().out
    monkeypatch.setattr("training.retrieval.train_retrieval", None)
    assert main([*given, "--steps", "2"]) == 0  # what is finished is not done again
    assert json.loads((tmp_path / "out" / "record.json").read_text())["metrics"] == record["metrics"]
    assert main([*given, "--length", "2"]) == 2
    assert "make queries shorter" in capsys.readouterr().err


def test_wrong_uses_are_refused():
    body, texts = bodies()["causal"], random_ids(4, 6)
    with pytest.raises(ValueError, match="repeat another"):
        evaluate_retrieval(RetrievalEncoder(body), texts[[0, 0]], [QueryRule()])
    with pytest.raises(ValueError, match="leaves no negative"):
        train_retrieval(body, texts, QueryRule(), Budget(batch_tokens=6))
    with pytest.raises(ValueError, match="of kind 'words'"):
        QueryRule("words")  # type: ignore[arg-type]
