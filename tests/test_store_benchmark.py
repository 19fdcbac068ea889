"""The store's benchmark on a toy: whole records, equal memories, the numbers of blank copy and next tokens."""

import pytest
import torch

from benchmarks import store, store_tables
from modeling_memory import MemoryProcessor
from modeling_memory.memory_codec import DTYPES
from tests.conftest import build_tiny_tokenizer
from tests.memory_models import CHUNK, WINDOW, build_model, random_ids
from training.data.objectives import IGNORED, BatchSpec, build_batch
from training.data.tokenizer import special_tokens_of
from training.records.record import read_json

TEXT = "the cat sat on the mat, and in the end the ring was there. " * 40


@pytest.fixture(scope="module")
def model():
    return build_model()


@pytest.mark.parametrize("objective", ["blank_copy", "causal"])
def test_stored_memories_are_asked_what_the_model_is_asked(model, objective):
    """Window by window behind ready memories: the logits and targets of the objective in the model's own layout."""
    rows, special = random_ids(3, 3 * WINDOW), special_tokens_of(build_tiny_tokenizer())
    source = rows[:, : 2 * WINDOW] if objective == "blank_copy" else rows
    batch = build_batch(objective, source, BatchSpec(special, window_length=WINDOW, chunk_length=CHUNK))
    targets = batch.pop("shift_labels")
    with torch.no_grad():
        whole = model(**batch).logits
        parts = (store.copy_inputs if objective == "blank_copy" else store.causal_inputs)(model, special, source)
        for place, part in enumerate(reversed(parts)):
            own = part.pop("shift_labels")[:, -WINDOW:]
            end = whole.shape[1] - place * WINDOW
            logits = model(**part).logits[:, -WINDOW:]
            torch.testing.assert_close(logits, whole[:, end - WINDOW : end], rtol=1e-4, atol=1e-4)
            wanted = own != IGNORED
            assert torch.equal(own[wanted], targets[:, end - WINDOW : end][wanted]) and wanted.sum() >= 3 * (
                WINDOW - 1
            )


def test_the_record_is_whole_and_can_be_shown(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    processor = MemoryProcessor(build_tiny_tokenizer(), chunk_length=CHUNK, window_length=WINDOW)
    processor.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT)
    arguments = ["--model", str(tmp_path / "model"), "--text", str(tmp_path / "text.txt"), "--texts", "1"]
    arguments += ["--rows", "4", "--row-length", "24", "--source-length", "16", "--repetitions", "1"]
    assert store.main([*arguments, "--out", str(tmp_path / "store.json")]) == 0
    record = read_json(tmp_path / "store.json")
    formats = record["metrics"]["formats"]["formats"]
    assert set(formats) == set(DTYPES)
    assert formats["float32"]["blank_copy"]["loss_increase"] == 0 and formats["int8"]["causal"]["num_tokens"] == 4 * 7
    assert formats["float32"]["bytes"] > formats["float16"]["bytes"] > formats["int8"]["bytes"]
    assert record["metrics"]["speed"]["equality"]["largest_difference"] <= store.TOLERANCE
    lines = store_tables.store_lines(record, "x") + store_tables.store_search_lines(record, "x")
    assert any(line.startswith("| int8 | ") and "(at most 1%" in line for line in lines)
