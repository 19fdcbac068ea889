"""Fidelity counts what it says, on our models and on pairs from elsewhere."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_memory import MemoryAutoencoder, MemoryAutoencoderConfig, MemoryProcessor
from tests.conftest import build_tiny_tokenizer, tiny_encoder_config
from tests.memory_models import BLANK, CHUNK, COPY, SLOT, WINDOW, build_model, random_ids
from training.data.objectives import SpecialTokens
from training.evaluate import main as evaluate_main
from training.fidelity import (
    accuracy_by_part,
    details_of,
    evaluate_fidelity,
    matching_characters,
    random_rows,
    text_fidelity,
)
from training.measure.suites import Evaluation

pytest.importorskip("sacrebleu")
SPECIAL = SpecialTokens(pad=0, bos=1, eos=2, copy=COPY, blank=BLANK, memory=SLOT)


def test_a_perfect_copy_is_perfect_and_a_wrong_one_loses_what_it_lost():
    texts = ["On 4 March 1765 the ship left Bristol with 1,200 men.", "The captain, called Trelawney, stayed there."]
    perfect = text_fidelity(texts, texts)
    for key in ("exact_match", "character_precision", "character_recall", "digits_kept", "dates_kept", "names_kept"):
        assert perfect[key] == 1.0, key
    assert perfect["bleu"] == pytest.approx(100)
    wrong = text_fidelity(texts, [texts[0].replace("1,200", "1,300").replace("Bristol", "London"), texts[1]])
    assert wrong["exact_match"] == 0.5 and wrong["dates_kept"] == 1.0
    assert wrong["digits_kept"] == pytest.approx(2 / 3) and wrong["num_digits"] == 3  # 4, 1765 and 1,200
    assert wrong["names_kept"] == pytest.approx(2 / 3)  # March and Trelawney, without Bristol
    assert wrong["bleu"] < 100 > wrong["character_precision"] * 100
    assert text_fidelity(["abc"], [""])["character_precision"] == 0.0
    assert text_fidelity(["no details here"], ["x"])["digits_kept"] is None
    with pytest.raises(ValueError, match="reference 0 is empty"):
        text_fidelity([""], ["a"])


@pytest.mark.parametrize(
    "text, kind, wanted",
    [
        ("born 12 May 1820, died 1910", "dates", ["12 May 1820", "1910"]),
        ("on 2001-02-03 and in July 1999", "dates", ["2001-02-03", "July 1999"]),
        ("paid 3.50 at 10:30 for 7", "digits", ["3.50", "10:30", "7"]),
        ("He met Mary. Then John, and Anne too", "names", ["Mary", "John", "Anne"]),
    ],
)
def test_details_by_rule(text: str, kind: str, wanted: list[str]):
    assert sorted(details_of(text, kind)) == sorted(wanted)


@settings(max_examples=60, deadline=None)
@given(st.text("abc ", max_size=12), st.text("abc ", max_size=12))
def test_matching_characters_are_a_common_subsequence(left: str, right: str):
    table = [[0] * (len(right) + 1) for _ in range(len(left) + 1)]  # longest common subsequence: never fewer
    for i, a in enumerate(left, start=1):
        for j, b in enumerate(right, start=1):
            table[i][j] = table[i - 1][j - 1] + 1 if a == b else max(table[i - 1][j], table[i][j - 1])
    found = matching_characters(left, right)
    assert found <= table[-1][-1] and (found > 0) == (table[-1][-1] > 0)
    assert matching_characters(left, left) == len(left)


def test_parts_are_thirds_and_chunk_ends():
    values = torch.rand(12, dtype=torch.double).tolist()
    parts = accuracy_by_part(values, 4)
    assert parts["start"] == pytest.approx(sum(values[:4]) / 4) and parts["end"] == pytest.approx(sum(values[8:]) / 4)
    assert parts["boundary"] == pytest.approx(sum(values[i] for i in (0, 3, 4, 7, 8, 11)) / 6)
    with pytest.raises(ValueError, match="a multiple of 5"):
        accuracy_by_part(values, 5)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["memory", "autoencoder"])
def test_models_of_both_kinds_with_the_random_control(kind: str):
    body = tiny_encoder_config("masked_mixer")
    autoencoder = MemoryAutoencoder(MemoryAutoencoderConfig(encoder=body, decoder=body, chunk_length=CHUNK)).eval()
    model = build_model() if kind == "memory" else autoencoder
    length = WINDOW if kind == "memory" else CHUNK
    evaluation = Evaluation(model, SPECIAL, chunk_length=CHUNK, window_length=length, num_generated_rows=2)
    rows, tokenizer = random_ids(4, length, seed=3), build_tiny_tokenizer()
    result = evaluate_fidelity(evaluation, tokenizer, rows)
    memory = result["memory"]
    assert memory["text"]["num_texts"] == 2 and len(memory["token_accuracy_by_position"]) == length
    assert set(memory["by_part"]) == {"start", "middle", "end", "boundary"}
    assert result["random_tokens"]["num_tokens"] == rows.numel()
    assert result["random_tokens"]["loss"] != memory["loss"]
    if kind == "autoencoder":  # written in one pass: what the text metrics saw is what reconstruct gives
        written = tokenizer.batch_decode(model.reconstruct(rows[:2]), skip_special_tokens=True)
        wanted = tokenizer.batch_decode(rows[:2], skip_special_tokens=True)
        assert memory["text"] == text_fidelity(wanted, written)


def test_random_tokens_are_ordinary_ones():
    rows = random_rows(torch.zeros(50, 20, dtype=torch.long), 10, special=[0, 3])
    assert rows.unique().tolist() == [1, 2, 4, 5, 6, 7, 8, 9]


def test_evaluate_command_with_another_domain(tmp_path: Path, capsys: Any):
    build_model().save_pretrained(tmp_path / "model")
    MemoryProcessor(build_tiny_tokenizer(), chunk_length=CHUNK).save_pretrained(tmp_path / "model")
    text, other = tmp_path / "text.txt", tmp_path / "other.txt"
    text.write_text("the cat sat on the mat and the dog ran; " * 4, encoding="utf-8")
    other.write_text("3 ships left in 1765 and 2 came home; " * 4, encoding="utf-8")
    record = tmp_path / "record.json"
    given_words = [str(tmp_path / "model"), "--text", str(text), "--limit", "3", "--record", str(record)]
    assert evaluate_main([*given_words, "--suite", "fidelity", "--domain", f"sea={other}"]) == 0
    printed = capsys.readouterr().out
    assert "fidelity, sea:" in printed and "BLEU" in printed
    assert set(json.loads(record.read_text())["metrics"]) == {"fidelity", "fidelity, sea"}
    assert evaluate_main([*given_words, "--suite", "copy", "--domain", f"sea={other}"]) == 2
    assert "--domain is for" in capsys.readouterr().err
