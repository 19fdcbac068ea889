"""Stages of a run are scored once, on the same rows, each as it was trained to read."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.claims import scoring, stages
from benchmarks.claims.gather import gather_cells, slim
from benchmarks.claims.scoring import ClaimsText, paired_difference, paired_share, score_rows, summarise
from benchmarks.claims.stages import describe_stages, score_stages, sizes_of
from modeling_memory import MemoryAutoencoder, MemoryAutoencoderConfig, MemoryProcessor
from tests.conftest import tiny_decoder_config, tiny_encoder_config
from tests.memory_models import CHUNK, WINDOW, build_model
from training.records.record import write_json

LENGTH = 32


@pytest.fixture
def text(tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> ClaimsText:
    """Little text of ordinary ids, and rows that are short."""
    for name, value in {"COPIED": 16, "ROW_LENGTH": LENGTH, "AUTOENCODED": 16, "COPIED_TOKENS": 64}.items():
        monkeypatch.setattr(stages, name, value)
    monkeypatch.setattr(scoring, "byte_lengths_of", lambda tokenizer: None)
    generator = torch.Generator().manual_seed(0)
    tokens = {domain: torch.randint(5, 60, (256,), generator=generator) for domain in ("books", "news")}
    return ClaimsText(tokenizer, tokens, {"files": {}, "tokenizer": "tiny"})


def save_stage(run: Path, name: str, model: Any, tokenizer: Any, kind: str, **asked: Any) -> None:
    folder = run / "stages" / name
    model.save_pretrained(folder / "model")
    if kind == "memory":
        tokenizer = MemoryProcessor(tokenizer, chunk_length=CHUNK, window_length=WINDOW)
    tokenizer.save_pretrained(folder / "model")
    data = {"window_length": None, "marker": "token", **asked.pop("data", {})}
    stage = {"name": name, "kind": kind, "data": data, "from": {}, "model": {}, "objectives": {}, **asked}
    write_json(folder / "started.json", {"stage": stage})
    log = {"step": 3, "copy_loss": 2.0, "copy_token_accuracy": 0.25, "grad_norm": 4.0, "learning_rate": 0.1}
    done = {"kind": kind, "objectives": {"copy": 1.0}, "seed": 7, "parameters": {"total": 1}, "steps": 4,
            "text_tokens": 512, "seconds": 1.5, "series": [{**log, "step": 1, "grad_norm": 1.0}, log]}  # fmt: skip
    write_json(folder / "stage.json", done)


def test_each_kind_of_stage_is_scored_as_it_reads(
    tmp_path: Path, text: ClaimsText, tokenizer: PreTrainedTokenizerFast
):
    run, folder = tmp_path / "run", tmp_path / "cells"
    torch.manual_seed(0)
    decoder = LlamaForCausalLM(tiny_decoder_config()).eval()
    body = tiny_encoder_config("masked_mixer")
    autoencoder = MemoryAutoencoder(MemoryAutoencoderConfig(encoder=body, decoder=body, chunk_length=CHUNK))
    memory = build_model()
    save_stage(run, "plain", decoder, tokenizer, "causal_lm")
    save_stage(run, "windows", decoder, tokenizer, "causal_lm", data={"window_length": WINDOW})
    save_stage(run, "ae", autoencoder, tokenizer, "autoencoder")
    save_stage(run, "memory", memory, tokenizer, "memory", objectives={"causal": 1.0})
    save_stage(run, "copies", memory, tokenizer, "memory", objectives={"copy": 1.0})
    (run / "stages" / "unfinished").mkdir()

    cells = score_stages(run, text, folder)
    assert set(cells) == {f"stage_{name}" for name in ("plain", "windows", "ae", "memory", "copies")}
    rows = text.rows("books", LENGTH)
    with torch.no_grad():
        for name, inputs in (("plain", rows), ("windows", rows.reshape(-1, WINDOW))):
            logits = decoder(inputs).logits.reshape(*rows.shape, -1)[:, :-1]
            losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="none")
            found = cells[f"stage_{name}"]["metrics"]["clm"]["memory"]
            assert found["row_losses"] == pytest.approx(losses.view(len(rows), -1).mean(1).tolist(), abs=1e-5)
            assert found["loss_by_position"] == pytest.approx(losses.view(len(rows), -1).mean(0).tolist(), abs=1e-5)
    assert set(cells["stage_ae"]["metrics"]["retention"]) == {"memory", "wrong_memory", "no_memory", "news", "random"}
    assert set(cells["stage_memory"]["metrics"]) == {"copy", "blank_copy", "clm"}
    assert "wrong_memory" in cells["stage_memory"]["metrics"]["clm"]
    assert "wrong_memory" not in cells["stage_copies"]["metrics"]["clm"]  # not asked for there
    assert (
        cells["stage_copies"]["metrics"]["clm"]["memory"]["loss"]
        == (cells["stage_memory"]["metrics"]["clm"]["memory"]["loss"])
    )

    times = {file.name: file.stat().st_mtime_ns for file in (folder / "cells").iterdir()}
    save_stage(run, "windows", LlamaForCausalLM(tiny_decoder_config()), tokenizer, "causal_lm")
    score_stages(run, text, folder)
    again = {file.name for file in (folder / "cells").iterdir() if file.stat().st_mtime_ns != times[file.name]}
    assert again == {"stage_windows.json"}  # other weights; the rest is not scored twice


def test_a_stage_tells_what_it_cost_and_how_it_learnt(tmp_path: Path, tokenizer: PreTrainedTokenizerFast):
    save_stage(tmp_path, "copies", LlamaForCausalLM(tiny_decoder_config()), tokenizer, "causal_lm")
    found = describe_stages(tmp_path)["copies"]
    assert found["curves"] == {"copy": [[1, 2.0, 0.25], [3, 2.0, 0.25]]}
    assert found["gradient_norms"] == {"median": 4.0, "largest": 4.0} and found["text_tokens"] == 512
    assert sizes_of({"chunk_length": 16, "encoder": {"hidden_size": 128}})["numbers_per_token"] == 8


def test_random_rows_have_the_shape_of_books_and_no_special_token(text: ClaimsText):
    rows = text.rows("random", 16)
    assert rows.shape == text.rows("books", 16).shape
    assert not set(rows.unique().tolist()) & set(text.tokenizer.all_special_ids)
    assert torch.equal(rows, text.rows("random", 16)) and not torch.equal(rows, text.rows("books", 16))
    with pytest.raises(ValueError, match="domain 'poems' is unknown"):
        text.rows("poems", 16)


def test_models_on_other_rows_cannot_be_paired(text: ClaimsText):
    scores = score_rows(text.evaluation(build_model()), "causal", text.rows("books", LENGTH))
    found = summarise(scores, 96, LENGTH)
    assert sum(found["row_losses"]) / len(found["row_losses"]) == pytest.approx(found["loss"])
    with pytest.raises(ValueError, match="compare models on the same rows"):
        paired_difference(found["row_losses"], found["row_losses"][1:])


def test_a_share_of_the_gap_is_that_of_all_rows_together():
    start, end = torch.linspace(3, 4, 50), torch.linspace(2, 4.1, 50)  # the last rows have a gap the other way
    found = paired_share(start.tolist(), (start + end).div(2).tolist(), end.tolist())
    assert found["mean"] == pytest.approx(0.5) and found["interval"] == pytest.approx([0.5, 0.5])
    here = start - torch.arange(50) % 2
    low, high = paired_share(start.tolist(), here.tolist(), (start - 1).tolist())["interval"]
    assert 0.3 < low < 0.45 and 0.55 < high < 0.7


def test_two_measurements_of_one_name_are_refused(tmp_path: Path):
    cell = {"asked": {}, "metrics": {}, "text_tokens": 0, "steps": 0, "seconds": 0.0}
    for folder, seconds in (("one", 1.0), ("two", 2.0)):
        write_json(tmp_path / folder / "cells" / "oracle.json", {"name": "oracle", **cell, "seconds": seconds})
        write_json(tmp_path / folder / "cells" / "stage_ae.json", {"name": "stage_ae", **cell, "seconds": seconds})
    assert set(gather_cells([tmp_path / "one"], {})) == {"oracle"}  # a stage's scores come from this run alone
    with pytest.raises(ValueError, match="another oracle"):
        gather_cells([tmp_path / "one", tmp_path / "two"], {})


def test_the_record_keeps_positions_only_where_they_are_drawn():
    found = {"clm": {"memory": {"loss_by_position": [1.0], "row_losses": [1.0]}, "news": {"loss_by_position": [1.0]}}}
    assert slim(found) == {"clm": {"memory": {"loss_by_position": [1.0]}, "news": {}}}
