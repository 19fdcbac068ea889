"""Presses beside memories: what is pruned, what is scored, and the table."""

import json
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import presses
from benchmarks.score_tables import presses as presses_table
from tests.conftest import build_tiny_tokenizer

TEXT = "once there was a small fox that lived in the red house near the river and sang. "


class EverySecond:
    """Keeps every second key and value of what is read while it is on, as a press does after a prefill."""

    @contextmanager
    def __call__(self, model: Any):
        yield_to = model.model.register_forward_hook(self._prune, with_kwargs=True)
        yield
        yield_to.remove()

    def _prune(self, module: Any, positional: tuple, named: dict, output: Any) -> None:
        for layer in named["past_key_values"].layers:
            layer.keys, layer.values = layer.keys[:, :, ::2], layer.values[:, :, ::2]


@pytest.fixture(scope="module")
def decoder() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=96, eos_token_id=2, pad_token_id=0, **sizes)).eval()


@torch.no_grad()
def test_the_full_cache_writes_what_generate_writes(decoder):
    tokenizer = build_tiny_tokenizer()
    ids = tokenizer(TEXT)["input_ids"]
    wanted = decoder.generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False)[0, len(ids) :]
    item = {"ids": ids, "new": 6, "line": False, "score": lambda text: float(text == tokenizer.decode(wanted))}
    whole = presses.read_item(decoder, tokenizer, item, None, 8)
    assert whole["score"] == 1
    assert presses.read_item(decoder, tokenizer, item, EverySecond(), 8)["cache_bytes"] < 0.52 * whole["cache_bytes"]


@torch.no_grad()
def test_a_continuation_is_scored_by_the_decoders_own_loss(decoder):
    ids = build_tiny_tokenizer()(TEXT * 3)["input_ids"]
    losses = torch.nn.functional.cross_entropy(
        decoder(torch.tensor([ids])).logits[0, -presses.TARGET : -1], torch.tensor(ids[1 - presses.TARGET :])
    )
    found = presses.read_item(decoder, build_tiny_tokenizer(), {"ids": ids}, None, 8)
    assert found["score"] == pytest.approx(float(losses), abs=1e-5)
    assert (
        presses.read_item(decoder, build_tiny_tokenizer(), {"ids": ids}, EverySecond(), 8)["score"] != found["score"]
    )


def test_the_command_measures_two_rows_of_each_task(decoder, tmp_path: Path, monkeypatch, capsys):
    given = [("full cache", 1, None), ("EverySecond", 2, EverySecond())]
    folder = tmp_path / "files"
    folder.mkdir()
    row = {"title": "The fox", "context": TEXT, "question": "who sang?", "answers": {"text": ["fox"]}}
    (folder / "xquad_en.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row) + "\n")
    (folder / "haystack_essays.jsonl").write_text(json.dumps({"text": TEXT * 20}) + "\n")
    (folder / "wikitext2_raw_test.txt").write_text(TEXT * 60)
    decoder.save_pretrained(tmp_path / "decoder")
    build_tiny_tokenizer().save_pretrained(tmp_path / "decoder")
    words = [str(folder), "--decoder", str(tmp_path / "decoder"), "--limit", "2", "--sizes", "1024"]
    words += ["--cells", str(tmp_path / "cells.json"), "--out", str(tmp_path / "record.json")]
    assert presses.main(words) == 2
    assert "kvpress is not installed here" in capsys.readouterr().err
    monkeypatch.setattr(presses, "presses_of", lambda ratios: given)
    assert presses.main(words) == 0
    record = json.loads((tmp_path / "record.json").read_text())
    assert list(record["metrics"]) == ["xquad", "needle_single, 1,024 tokens", "continuation"]
    for task, rows in record["metrics"].items():
        assert rows["EverySecond/2"]["cache_bytes"] < 0.6 * rows["full cache/1"]["cache_bytes"], task
        assert rows["full cache/1"]["num_items"] == 2
    table = presses_table(record)
    assert len(table.rows) == 1 + 3 * 2 and table.cell("continuation", "what is kept") == "full cache"
