"""Other domains are measured as the test split is, and end up in the card's limits."""

import json

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import LlamaForCausalLM

from modeling_memory import MemoryProcessor
from tests.conftest import build_tiny_tokenizer, tiny_decoder_config
from tests.memory_models import CHUNK, WINDOW, build_model
from training import domains, publish
from training.data.texts import tokenise_documents
from training.domains import DESCRIPTIONS, LETTERS, made_up_texts
from training.measure.suites import Scores, spread_rows


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "checkpoint"
    build_model().save_pretrained(folder)
    MemoryProcessor(build_tiny_tokenizer(), chunk_length=CHUNK, window_length=WINDOW).save_pretrained(folder)
    return folder


def test_made_up_texts_are_what_they_say_and_repeatable():
    for name, letters in (("digits", "0123456789"), ("random_strings", LETTERS)):
        texts = made_up_texts(name, 3)
        assert [len(text) for text in texts] == [2000] * 3 and len(set(texts)) == 3
        assert set("".join(texts)) == set(letters)
        assert texts == made_up_texts(name, 3) != made_up_texts(name, 3, seed=1)


def test_measured_domains_reach_the_card(checkpoint, tmp_path, monkeypatch, capsys):
    text = tmp_path / "sea.txt"
    text.write_text("a man in the sand and the sea " * 40)
    record = tmp_path / "domains.json"
    arguments = [str(checkpoint), "--to", str(record), "--text", f"sea={text}", "--limit", "4", "--batch-size", "4"]
    assert domains.main(arguments) == 0
    saved = json.loads(record.read_text())
    assert list(saved["domains"]) == [*DESCRIPTIONS, "sea", "every_token"] and str(tmp_path) not in record.read_text()
    every = saved["domains"].pop("every_token")
    for domain in saved["domains"].values():
        conditions = domain["metrics"]["blank_copy"]
        assert {"memory", "wrong_memory", "no_memory"} <= set(conditions)
        assert conditions["memory"]["num_tokens"] == 4 * 2 * WINDOW
        assert "generated_token_accuracy" in domain["metrics"]["copy"]["memory"]
    monkeypatch.setattr(
        publish, "verify_hub_folder", lambda folder, model, **bases: {"hub": {"loaded": ["AutoModel"]}}
    )
    assert publish.main([str(checkpoint), "--to", str(tmp_path / "hub"), "--domains", str(record)]) == 0
    card = ModelCard.load(tmp_path / "hub" / "README.md").text
    copied = saved["domains"]["sea"]["metrics"]["copy"]["memory"]["token_accuracy"]
    assert f"| sea | {100 * copied:.2f} ±" in card and "| random digits | " in card
    assert f"{len(every['lost_tokens'])} of the {every['num_tokens']} tokens of its vocabulary never came back" in card


@pytest.mark.parametrize("lost", [set(), {7, 11, 60}])
def test_every_token_is_tried_and_those_that_never_come_back_are_named(lost, monkeypatch):
    """Of a model that gives back all tokens but some, whatever its vocabulary is."""
    model, tokenizer = build_model(), build_tiny_tokenizer()
    asked = []

    def perfect(_, batch, num_rows):
        targets = batch["shift_labels"][batch["shift_labels"] != -100].reshape(num_rows, -1)
        asked.append(targets)
        wrong = torch.isin(targets, torch.tensor(sorted(lost), dtype=torch.long))
        return Scores(torch.zeros(targets.shape), ~wrong, targets)

    monkeypatch.setattr(domains, "score", perfect)
    found = domains.every_token(model, tokenizer, "blank_copy")
    ordinary = set(range(len(tokenizer))) - set(tokenizer.all_special_ids)
    counts = torch.cat([part.flatten() for part in asked]).bincount(minlength=len(tokenizer))
    assert {i for i, n in enumerate(counts.tolist()) if n} == ordinary and found["num_tokens"] == len(ordinary)
    assert all(counts[i] >= found["tries"] for i in ordinary)
    assert found["lost_tokens"] == [tokenizer.decode([i]) for i in sorted(lost)]


def test_a_causal_lm_is_asked_for_the_next_token(tmp_path):
    tokenizer, model = build_tiny_tokenizer(), LlamaForCausalLM(tiny_decoder_config()).eval()
    model.save_pretrained(tmp_path / "decoder")
    tokenizer.save_pretrained(tmp_path / "decoder")
    text = tmp_path / "sea.txt"
    text.write_text("a man in the sand and the sea " * 40)
    arguments = ["--to", str(tmp_path / "domains.json"), "--text", f"sea={text}", "--limit", "4", "--length", "16"]
    assert domains.main([str(tmp_path / "decoder"), *arguments]) == 0
    found = json.loads((tmp_path / "domains.json").read_text())["domains"]["sea"]["metrics"]["clm"]["this_model"]
    rows = spread_rows(tokenise_documents(tokenizer, [text.read_text()]).tokens, row_length=16, limit=4)
    with torch.no_grad():
        logits = model(rows).logits[:, :-1].double()
    losses = -torch.log_softmax(logits, -1).gather(-1, rows[:, 1:, None])
    assert found["loss"] == pytest.approx(losses.mean().item(), abs=1e-5) and found["num_tokens"] == 4 * 15
    assert found["token_accuracy"] == (logits.argmax(-1) == rows[:, 1:]).double().mean().item()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", "sea"], "expected NAME=FILE"),
        (["--text", "sea=nowhere.txt"], "no file matches 'nowhere.txt'"),
        (["--limit", "0"], "expected a whole number of 2 or more"),
    ],
)
def test_mistakes_are_named(checkpoint, tmp_path, capsys, arguments, message):
    assert domains.main([str(checkpoint), "--to", str(tmp_path / "domains.json"), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "domains.json").exists()
