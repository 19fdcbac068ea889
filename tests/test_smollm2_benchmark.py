"""The benchmark of the real pair, on a tiny one: cells are what their names say, and are measured once."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from benchmarks import render, smollm2, smollm2_rows
from benchmarks.smollm2_rows import RATES, Reader, Selector, bm25, row_names
from modeling_memory import MemoryEncoderDecoderForCausalLM, MemoryProcessor
from modeling_memory.memory_parts import locate
from tests.test_smollm2 import TEXT, installed, site  # noqa: F401
from training.data.texts import load_texts
from training.data.tokenizer import complete_tokenizer
from training.train.stages import processor_for

CONTEXTS = (64, 128)


@pytest.fixture
def pair(installed: str, tmp_path: Path) -> Path:  # noqa: F811
    """A saved tiny pair whose adapters do something."""
    torch.manual_seed(1)
    model = MemoryEncoderDecoderForCausalLM.from_encoder_decoder_pretrained(
        installed, installed, encoder_layers=0, pooling="concat", chunk_length=16, memories_per_chunk=4, max_group=16,
        window_length=64, projector_start="identity_on_last", memory_positions="source", freeze_decoder=True,
        copy_token_id=3,
    )  # fmt: skip
    model.add_adapters(parts=["decoder"], r=3, lora_alpha=3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    folder = tmp_path / "pair"
    model.save_pretrained(folder, by_reference=True)
    tokenizer = complete_tokenizer(AutoTokenizer.from_pretrained(locate(installed)))
    processor_for(model, tokenizer).save_pretrained(folder)
    return folder


def questions(folder: Path) -> Path:
    rows = [
        {"context": text[:300], "question": f"What is it {number}?", "answers": {"text": [text[:8]]}}
        for text in load_texts([TEXT])[:2]
        for number in range(2)
    ]
    file = folder / "asked.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


@pytest.fixture
def command(pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(smollm2, "CONTEXTS", CONTEXTS)
    monkeypatch.setattr(smollm2, "COPIES", (32, 64, 128))
    monkeypatch.setattr(
        smollm2_rows.NearestByMiniLM, "__call__", lambda self, query, sentences: bm25(query, sentences)
    )
    return [
        str(pair), "--text", str(TEXT), "--questions", str(questions(tmp_path)), "--limit", "3",
        "--question-limit", "3", "--first-token", "64", "--cells", str(tmp_path / "cells.json"),
        "--out", str(tmp_path / "record.json"),
    ]  # fmt: skip


def losses_by_hand(pair: Path) -> dict[str, float]:
    """Loss of the first document after 64 tokens, row by row."""
    model = MemoryEncoderDecoderForCausalLM.from_pretrained(pair)
    processor = MemoryProcessor.from_pretrained(pair)
    ids = smollm2.documents(processor.tokenizer, load_texts([TEXT]), 3, max(CONTEXTS) + 64)[:, -128:]
    source, target, slot = ids[0, :64], ids[0, 64:], model.config.memory_token_id
    begin = torch.tensor([processor.tokenizer.bos_token_id])

    def text(*parts: torch.Tensor) -> torch.Tensor:
        return model.decoder(torch.cat([begin, *parts])[None]).logits[0]

    def loss(logits: torch.Tensor) -> float:
        return -logits[-64:-1].log_softmax(-1).gather(1, target[1:, None]).sum().item()

    def memories(own: torch.Tensor, rate: int) -> float:
        row = torch.cat([begin, torch.full((64 // rate,), slot), target])
        chunks, counts = own.view(1, 4, 16), torch.full((1, 4), 16 // rate)
        return loss(model(row[None], context_input_ids=chunks, context_num_memories=counts, use_cache=False).logits[0])

    with torch.no_grad(), model.adapters_off():
        plain = {
            "full": loss(text(ids[0])),
            "none": loss(text(target)),
            "last/8": loss(text(source[-8:], target)),
            "first/16": loss(text(source[:4], target)),
            "every/4": loss(text(source[3::4], target)),
        }
    with torch.no_grad():
        tuned = {"last/4, adapters on": loss(text(source[-16:], target))}
        own = {f"memories/{rate}": memories(source, rate) for rate in RATES}
        return {**plain, **tuned, **own, "another text's/4": memories(ids[-1, :64], 4)}


def test_every_part_is_measured_once_and_its_cells_are_what_they_say(
    command: list[str], pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    assert smollm2.main(command) == 0
    record = json.loads((tmp_path / "record.json").read_text())
    metrics = record["metrics"]
    check_cells(record, json.loads((tmp_path / "cells.json").read_text())["cells"], losses_by_hand(pair))
    # A second call reads nothing anew, and one with another limit measures again.
    for name in ("text", "memories", "write"):
        monkeypatch.setattr(Reader, name, lambda *args, **kwargs: pytest.fail("measured twice"))
    assert smollm2.main([*command, "--part", "continue", "--part", "copy"]) == 0
    again = json.loads((tmp_path / "record.json").read_text())
    assert again["metrics"]["continue"] == metrics["continue"] and again["missing"]["questions"] == "not asked for"
    check_tables(record, again)


def test_controls_are_read_with_their_own_adapters(command: list[str], pair: Path, tmp_path: Path):
    """A control whose adapters are those of the model reads as the model does with its adapters on."""
    wanted = ["--part", "continue", "--rates", "4", "--control", f"full={pair}", "--control", f"last/4={pair}"]
    assert smollm2.main([*command, *wanted]) == 0
    record = json.loads((tmp_path / "record.json").read_text())
    column = record["metrics"]["continue"]["64 tokens, 0 as text"]
    for row in ("full", "last/4"):
        assert column["loss"][f"{row}, trained on it"] == column["loss"][f"{row}, adapters on"]
        assert column["loss"][f"{row}, trained on it"] != column["loss"][row]
    assert "none, trained on it" not in column["loss"] and "control none" in record["missing"]
    assert "memories/8" not in column["loss"]
    with pytest.raises(SystemExit):
        smollm2.main([*command, "--control", "half=x"])


def check_cells(record: dict[str, Any], cells: dict[str, Any], by_hand: dict[str, float]) -> None:
    """Every part has its cells, and losses are those of the model called by hand."""
    metrics = record["metrics"]
    assert (metrics["num_documents"], metrics["num_questions"]) == (3, 3)
    assert "control full" in record["missing"]
    assert list(metrics["continue"]) == ["64 tokens, 0 as text", "128 tokens, 0 as text", "128 tokens, 64 as text"]
    first = metrics["continue"]["64 tokens, 0 as text"]
    assert not [name for name in first["loss"] if name.startswith(("MiniLM", "BM25"))], "nothing to be near to"
    assert set(row_names()) <= set(metrics["continue"]["128 tokens, 64 as text"]["loss"])
    for name, expected in by_hand.items():
        assert cells[f"continue 64 0 {name}"][0] == pytest.approx(expected, rel=1e-4), name
    assert set(metrics["copy"]["free_running"]) == {f"{n} tokens, memories/{r}" for n in (32, 64, 128) for r in RATES}
    assert all(0 <= one["f1"]["mean"] <= 1 for one in metrics["questions"].values())
    assert metrics["first_token"]["stored_bytes_per_source_token"] == 32 * 4 / 16


def check_tables(record: dict[str, Any], partial: dict[str, Any]) -> None:
    """The tables show every row, and say what is not there."""
    entries = {name: entry.make for name, entry in render.TABLES.items() if name.startswith("smollm2")}
    made = {name: make(record) for name, make in entries.items() if make is not None}
    assert len(made) == 5 and all(len(table.rows) > 2 for table in made.values())
    for table in made.values():
        assert all(len(row) == len(table.rows[0]) for row in table.rows)
        assert not any("None" in cell or "_" in cell for row in table.rows for cell in row)
    assert len(made["smollm2_continue"].rows) == 1 + len(
        record["metrics"]["continue"]["128 tokens, 64 as text"]["loss"]
    )
    assert entries["smollm2_questions"](partial).text[0].startswith("Not measured:")


def test_selected_sentences_fit_their_positions_and_keep_their_order(pair: Path):
    tokenizer = MemoryProcessor.from_pretrained(pair).tokenizer
    text = "The river is long. Anna built the bridge in May. Nobody knows why. It rained for a week after that day."
    ids = tokenizer(text)["input_ids"]
    selector = Selector(tokenizer, bm25)
    chosen = selector.choose(ids, "BM25", 2, "who built the bridge")
    assert len(chosen) <= len(ids) // 2 and "Anna built the bridge in May." in tokenizer.decode(chosen)
    assert (
        selector.choose(ids, "BM25", 16, "who built the bridge")
        and len(selector.choose(ids, "BM25", 16, "who built the bridge")) == len(ids) // 16
    )
    assert selector.choose(ids, "last", 4) == ids[-(len(ids) // 4) :]
    assert selector.choose(ids, "every", 4) == ids[3::4]


def test_answers_are_scored_as_squad_does():
    asked = [
        {"context": "a", "question": "?", "answers": ["Denver Broncos", "Broncos"]},
        {"context": "a", "question": "?", "answers": ["1985"]},
        {"context": "b", "question": "?", "answers": ["Carolina"]},
    ]
    found = smollm2.squad_scores(asked, ["The Broncos!", "It was in 1985", "Denver"])
    assert found["exact_match"]["mean"] == pytest.approx(1 / 3) and found["exact_match"]["num_documents"] == 2
    assert found["f1"]["mean"] == pytest.approx((1 + 2 * 1 / 5) / 3) and found["contained"]["mean"] == pytest.approx(
        2 / 3
    )
    chosen = smollm2.chosen_questions(asked, 2)
    assert [row["context"] for row in chosen] == ["a", "b"], "spread over paragraphs"
