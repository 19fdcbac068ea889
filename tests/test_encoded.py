"""Training from states that were encoded once is training with the encoder in every step."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.memory_models import CHUNK, WINDOW, assert_same_gradients, build_model, gradients_of
from tests.test_launch import ALL, ROW, ROWS, SOURCE, SPECIAL, stream
from training.data import encoded as encoded_module
from training.data.encoded import encode_once
from training.data.objectives import BatchSpec
from training.data.rows import ObjectiveCollator, TokenRows
from training.train.trainer import run_objective, run_objective_chunked

CPU = torch.device("cpu")


def rows_and_collator(model: Any, folder: Path) -> tuple[TokenRows, ObjectiveCollator]:
    tokens = stream(1000)
    chunks = encode_once(model, tokens, folder, bf16=False, device=CPU)
    rows = TokenRows(tokens, row_length=ROW, num_items=200, seed=1, encoded=chunks)
    collator = ObjectiveCollator(
        list(ALL), BatchSpec(SPECIAL, chunk_length=CHUNK, window_length=WINDOW, source_length=SOURCE, layout="slots")
    )
    return rows, collator


@pytest.mark.parametrize("fields", [{}, {"memories_per_chunk": 2, "pooling": "mean"}])
@pytest.mark.parametrize("first", [0, 90])  # in the second pass rows begin elsewhere, but on the grid
def test_losses_and_gradients_equal_those_of_live_memories(tmp_path: Path, fields: dict[str, Any], first: int):
    model = build_model("llama", "llama", freeze_encoder=True, **fields).train()
    rows, collator = rows_and_collator(model, tmp_path)
    collator.spec = replace(collator.spec, memories_per_chunk=model.config.memories_per_chunk)
    items = [rows[i] for i in range(first, first + ROWS)]
    ready, live = collator(items), collator([item[:2] for item in items])
    for name in ALL:
        assert "memory_states" in ready[name] and "context_input_ids" not in ready[name]
        loss, expected = (run_objective(model, batch[name])[0] for batch in (ready, live))
        assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
        found = gradients_of(model, loss)
        assert any("projector" in key for key in found)
        assert_same_gradients(found, gradients_of(model, expected))
        chunked, _, _ = run_objective_chunked(model, ready[name], 8)
        assert chunked.item() == pytest.approx(expected.item(), rel=1e-5)


def test_second_stage_finds_the_states_and_another_encoder_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model, tokens = build_model("llama", "llama", freeze_encoder=True), stream(100)
    one = encode_once(model, tokens, tmp_path, bf16=False, device=CPU)
    calls: list[int] = []
    plain = encoded_module.encode_chunks
    monkeypatch.setattr(encoded_module, "encode_chunks", lambda *a, **k: calls.append(1) or plain(*a, **k))
    again = encode_once(model, tokens, tmp_path, bf16=False, device=CPU)
    assert not calls and (one.states == again.states).all()
    with torch.no_grad():
        next(model.encoder.parameters()).add_(0.1)
    other = encode_once(model, tokens, tmp_path, bf16=False, device=CPU)
    assert calls and not (one.states == other.states).all()
    encode_once(model, tokens[4:], tmp_path, bf16=False, device=CPU)
    assert len(list(tmp_path.glob("states-*.npy"))) == 3 and not list(tmp_path.glob("*.part"))


def test_an_encoder_that_is_trained_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="needs a frozen encoder"):
        encode_once(build_model(freeze_encoder=False), stream(100), tmp_path, bf16=False, device=CPU)


def test_rows_that_are_no_whole_chunks_are_refused(tmp_path: Path):
    chunks = encode_once(build_model(freeze_encoder=True), stream(100), tmp_path, bf16=False, device=CPU)
    with pytest.raises(ValueError, match="row_length is 10, but with data.encode_once rows are whole chunks of 4"):
        TokenRows(stream(100), row_length=10, num_items=1, encoded=chunks)
