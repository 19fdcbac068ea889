"""The benchmark of merging compares policies on equal texts, and its record can be rendered."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import merging
from benchmarks.rolling_quality import cut_documents, read_rolling, token_losses
from tests.conftest import build_tiny_tokenizer
from tests.memory_models import WINDOW, build_model, random_ids

TOKENS = 6 * WINDOW


@pytest.fixture(scope="module")
def measured():
    model = build_model("llama", memories_per_chunk=2)
    documents = random_ids(3, TOKENS)
    return model, documents, merging.measure_policies(model, documents, (20, 6), 3 * WINDOW)


@torch.no_grad()
def test_losses_are_those_of_the_readings_and_differences_of_equal_tokens(measured):
    model, documents, result = measured
    assert set(result) == {"all", "none"} | {f"{policy} {room}" for policy in merging.POLICIES for room in (20, 6)}
    for policy in merging.POLICIES:  # room for all
        assert result[f"{policy} 20"]["more"] == pytest.approx(0, abs=1e-6)
    losses = [token_losses(read_rolling(model, text), text)[3 * WINDOW - 1 :].mean() for text in documents]
    assert result["all"]["loss"] == pytest.approx(torch.stack(losses).mean().item(), abs=1e-6)
    decoder = [
        token_losses(torch.cat([model.decoder(part[None]).logits[0] for part in text.split(WINDOW)]), text)
        for text in documents
    ]
    assert result["none"]["loss"] == pytest.approx(torch.stack(decoder)[:, 3 * WINDOW - 1 :].mean().item(), abs=1e-5)
    for found in result.values():
        assert found["more"] == pytest.approx(found["loss"] - result["all"]["loss"], abs=1e-9)
        assert found["more_interval"][0] <= found["more"] + 1e-9 <= found["more_interval"][1] + 2e-9
    assert len({round(result[f"{policy} 6"]["loss"], 6) for policy in merging.POLICIES}) == 3
    merged, newest = result["merge 6"], result["drop_oldest 6"]
    assert merged["beside_newest"] == pytest.approx(merged["loss"] - newest["loss"], abs=1e-9)
    assert (model.config.max_memories, model.config.memory_policy) == (None, "error")


def test_stretches_are_spread_over_the_text(tmp_path: Path):
    path = tmp_path / "text.txt"
    path.write_text("abcdefghij" * 5)
    tokenizer = build_tiny_tokenizer()
    documents = cut_documents(tokenizer, str(path), 3, 10)
    assert [tokenizer.decode(row) for row in documents] == ["abcdefghij"] * 3


def test_the_record_can_be_rendered_and_a_missing_run_is_named(measured, capsys: pytest.CaptureFixture[str]):
    given = {"rooms": [20, 6], "most_memories": 20, "first": 24, "tokens": 48, "documents": 3, "trained_room": 4}
    given |= {"memories_per_chunk": 2, "chunk_length": 4, "window_length": 8}
    record = json.loads(json.dumps({"given": given, "metrics": dict.fromkeys(merging.STAGES, measured[2])}))
    lines = merging.merging_lines(record, "x.json")
    assert "| 6, merged | [" in "\n".join(lines) and lines[2].startswith("| all, up to 20 | [")
    assert len(lines) == 2 + 8 + 4 and "Merged against as many of the newest: learnt with all" in lines[11]
    assert merging.main(["--run", "runs/nowhere"]) == 2
    assert "python -m training.run merging" in capsys.readouterr().err
