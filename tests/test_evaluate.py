"""Suites score the same targets under every condition, and each control is what it says."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from modeling_memory import (
    MemoryAutoencoder,
    MemoryAutoencoderConfig,
    MemoryEncoderDecoderConfig,
    MemoryEncoderDecoderForCausalLM,
    MemoryProcessor,
)
from tests.conftest import tiny_decoder_config, tiny_encoder_config
from tests.memory_models import BLANK, CHUNK, COPY, SLOT, WINDOW, build_model, random_ids
from training.data.objectives import SpecialTokens
from training.data.tokenizer import train_tokenizer
from training.evaluate import main
from training.measure.metrics import wilson_interval
from training.measure.suites import (
    SUITES,
    Evaluation,
    Scores,
    copies_of_short_sources,
    evaluate_suite,
    free_running_copy,
    results_table,
    spread_rows,
    summarise,
    summarise_scores,
)
from training.records.record import check_record

SPECIAL = SpecialTokens(pad=0, bos=1, eos=2, copy=COPY, blank=BLANK, memory=SLOT)
ROWS = 6


def autoencoder() -> MemoryAutoencoder:
    torch.manual_seed(0)
    body = tiny_encoder_config("masked_mixer")
    return MemoryAutoencoder(MemoryAutoencoderConfig(encoder=body, decoder=body, chunk_length=CHUNK)).eval()


def evaluation(model: Any = None, **fields: Any) -> Evaluation:
    lengths = torch.arange(SLOT + 1) % 3 + 1
    return Evaluation(
        model or build_model(),
        SPECIAL,
        chunk_length=CHUNK,
        window_length=WINDOW,
        **{"byte_lengths": lengths, "batch_size": 4, "num_generated_rows": 3, **fields},
    )


def plain_scores(logits: torch.Tensor, targets: torch.Tensor) -> tuple[float, float]:
    """Loss and accuracy of all targets, the direct way."""
    losses = -torch.log_softmax(logits.double(), -1).gather(-1, targets[..., None])
    return losses.mean().item(), (logits.argmax(-1) == targets).double().mean().item()


def check(result: dict[str, Any], logits: torch.Tensor, targets: torch.Tensor) -> None:
    loss, accuracy = plain_scores(logits, targets)
    assert result["loss"] == pytest.approx(loss, abs=1e-5)
    assert result["token_accuracy"] == pytest.approx(accuracy)
    assert result["num_tokens"] == targets.numel()


@torch.no_grad()
@pytest.mark.parametrize("objective", ["copy", "blank_copy"])
def test_copy_conditions_are_what_they_say(objective: str):
    run, rows = evaluation(), random_ids(ROWS, 2 * WINDOW)
    result = evaluate_suite(run, objective, rows)
    model, others = run.model, rows.roll(ROWS // 2, 0)
    if objective == "copy":
        shown = torch.cat([torch.full((ROWS, 1), COPY), rows[:, :-1]], 1)
    else:
        shown = torch.full_like(rows, BLANK)
    own = model(torch.cat([rows, shown], 1)).logits[:, 2 * WINDOW :]
    wrong = model(torch.cat([others, shown], 1)).logits[:, 2 * WINDOW :]
    alone = model.decoder(shown.reshape(-1, WINDOW)).logits.reshape(ROWS, 2 * WINDOW, -1)
    check(result["memory"], own, rows)
    check(result["wrong_memory"], wrong, rows)
    check(result["no_memory"], alone, rows)
    assert len({result[name]["loss"] for name in ("memory", "wrong_memory", "no_memory")}) == 3


@torch.no_grad()
@pytest.mark.parametrize("objective", ["copy", "blank_copy"])
def test_copies_of_spread_memories_are_asked_in_slots(objective: str):
    model, rows = (
        build_model(memory_positions="spread", max_memories=2 * WINDOW // CHUNK),
        random_ids(ROWS, 2 * WINDOW),
    )
    result = evaluate_suite(evaluation(model), objective, rows)
    shown = torch.full_like(rows, BLANK)
    if objective == "copy":
        shown = torch.cat([torch.full((ROWS, 1), COPY), rows[:, :-1]], 1)
    for name, source in (("memory", rows), ("wrong_memory", rows.roll(ROWS // 2, 0))):
        chunks = source.view(ROWS, -1, CHUNK)
        prompt = torch.cat([torch.full((ROWS, chunks.shape[1]), SLOT), shown], 1)
        check(result[name], model(prompt, context_input_ids=chunks).logits[:, chunks.shape[1] :], rows)
    alone = model(shown.reshape(-1, WINDOW)).logits.reshape(ROWS, 2 * WINDOW, -1)
    check(result["no_memory"], alone, rows)
    clm = evaluate_suite(evaluation(model), "clm", rows)
    check(clm["memory"], model(rows).logits[:, :-1], rows[:, 1:])


@torch.no_grad()
def test_clm_scores_the_same_targets_under_every_condition():
    baselines = {name: LlamaForCausalLM(tiny_decoder_config()).eval() for name in ("no_memory", "full_context")}
    run, rows = evaluation(), random_ids(ROWS, 3 * WINDOW)
    result = evaluate_suite(run, "clm", rows, baselines)
    windows, targets = rows.reshape(-1, WINDOW), rows[:, 1:]
    assert set(result) - {"share_of_gap_recovered"} == {
        "memory", "wrong_memory", "no_memory", "no_memory_model", "full_context_model"
    }  # fmt: skip
    check(result["memory"], run.model(rows).logits[:, :-1], targets)
    alone = run.model.decoder(windows).logits.reshape(ROWS, 3 * WINDOW, -1)[:, :-1]
    check(result["no_memory"], alone, targets)
    window_only = baselines["no_memory"](windows).logits.reshape(ROWS, 3 * WINDOW, -1)[:, :-1]
    check(result["no_memory_model"], window_only, targets)
    check(result["full_context_model"], baselines["full_context"](rows).logits[:, :-1], targets)
    assert result["wrong_memory"]["num_tokens"] == targets.numel()
    assert result["wrong_memory"]["loss"] not in (result["memory"]["loss"], result["no_memory"]["loss"])


def test_another_text_that_is_the_same_text_changes_nothing():
    rows = random_ids(1, 3 * WINDOW).expand(4, -1)
    for suite in ("clm", "copy", "blank_copy", "retention"):
        result = evaluate_suite(evaluation(), suite, rows)
        assert result["wrong_memory"]["loss"] == pytest.approx(result["memory"]["loss"], abs=1e-5), suite


def test_slots_layout_has_the_same_conditions():
    model = build_model()
    with_slots = build_model(self_memory=False)
    with_slots.load_state_dict(model.state_dict())
    rows = random_ids(ROWS, WINDOW)  # one window: both layouts show the decoder the same
    left, right = (evaluate_suite(evaluation(m), "blank_copy", rows) for m in (model, with_slots))
    for condition in ("memory", "wrong_memory", "no_memory"):
        assert left[condition]["loss"] == pytest.approx(right[condition]["loss"], abs=1e-5), condition
    with pytest.raises(ValueError, match="self_memory=False"):
        evaluate_suite(evaluation(with_slots), "clm", rows)


@torch.no_grad()
def test_autoencoder_retention_has_both_controls():
    model, rows = autoencoder(), random_ids(ROWS, CHUNK)
    result = evaluate_suite(evaluation(model), "retention", rows)
    memories = model.encode(rows)
    check(result["memory"], model(input_ids=rows).logits, rows)
    check(result["wrong_memory"], model(memories=memories.roll(ROWS // 2, 0)).logits, rows)
    check(result["no_memory"], model(memories=torch.zeros_like(memories)).logits, rows)


def test_summary_has_counts_intervals_positions_and_bits():
    run, rows = evaluation(), random_ids(ROWS, 2 * WINDOW)
    result = evaluate_suite(run, "blank_copy", rows)["memory"]
    assert result["num_rows"] == ROWS and result["num_tokens"] == ROWS * 2 * WINDOW
    low, high = wilson_interval(result["num_correct"], result["num_tokens"])
    assert result["token_accuracy_interval"][0] <= low and high <= result["token_accuracy_interval"][1]
    assert result["loss_interval"][0] <= result["loss"] <= result["loss_interval"][1]
    assert len(result["token_accuracy_by_position"]) == CHUNK
    mean = sum(result["token_accuracy_by_position"]) / CHUNK
    assert mean == pytest.approx(result["token_accuracy"])
    num_bytes = int(run.byte_lengths[rows].sum())
    assert result["bits_per_byte"] == pytest.approx(result["loss"] * rows.numel() / math.log(2) / num_bytes)
    memory_bits = ROWS * (2 * WINDOW // CHUNK) * 32 * 32  # vectors of 32 numbers of 32 bits
    extra = result["bits_per_byte_with_memory"] - result["bits_per_byte"]
    assert extra == pytest.approx(memory_bits / num_bytes)


def test_accuracy_by_position_counts_modulo_the_chunk():
    correct = torch.tensor([[1, 0, 1, 1, 0, 1]]).bool()
    zeros = torch.zeros(1, 6)
    summary = summarise(evaluation(byte_lengths=None), Scores(zeros, correct, zeros.long()), period=2)
    assert summary["token_accuracy_by_position"] == [pytest.approx(2 / 3), pytest.approx(2 / 3)]
    assert "bits_per_byte" not in summary


def test_intervals_know_that_errors_cluster_in_rows():
    zeros, clustered = torch.zeros(10, 10), torch.ones(10, 10).bool()
    clustered[3] = False
    spread = clustered.T.clone()  # as many errors, one in each row
    low, high = summarise_scores(Scores(zeros, clustered, zeros.long()), 9, 2)["token_accuracy_interval"]
    assert [low, high] == pytest.approx([0.7, 1.0]) and high > wilson_interval(90, 100)[1]
    for correct in (spread, torch.ones(10, 10).bool()):
        interval = summarise_scores(Scores(zeros, correct, zeros.long()), 9, 2)["token_accuracy_interval"]
        assert interval == list(wilson_interval(int(correct.sum()), 100))


def test_free_running_copy_compares_what_generate_writes():
    model = build_model()
    run, rows = evaluation(model), random_ids(ROWS, WINDOW)
    rows[1, 3] = SPECIAL.eos  # passed over: generation would end there
    result = free_running_copy(run, rows)
    usable = rows[[0, 2, 3]]
    prompt = torch.cat([usable, torch.full((3, 1), COPY)], 1)
    written = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=WINDOW, do_sample=False)
    written = written[:, prompt.shape[1] :]
    same = torch.nn.functional.pad(written, (0, WINDOW - written.shape[1]), value=-1) == usable
    assert result["num_generated_rows"] == 3
    assert result["generated_token_accuracy"] == pytest.approx(same.double().mean().item())
    assert result["exact_match"] == same.all(1).double().mean().item()


def test_short_chunks_are_scored_as_the_model_alone_reads_them():
    model, rows = autoencoder(), random_ids(ROWS, 2 * CHUNK)
    found = evaluate_suite(evaluation(model), "retention", rows)["memory"]["short_chunks"]
    assert list(found) == sorted({str(max(1, CHUNK * quarters // 4)) for quarters in (1, 2, 3)})
    for length, result in found.items():
        chunks = rows.reshape(-1, CHUNK)[:, : int(length)]
        right = torch.cat([model(chunk[None]).logits.argmax(-1)[0] == chunk for chunk in chunks])
        assert result["token_accuracy"] == right.double().mean().item()
        assert result["num_tokens"] == right.numel()


def test_short_sources_count_only_with_their_end(monkeypatch: pytest.MonkeyPatch):
    model, rows = build_model(), random_ids(ROWS, 2 * CHUNK)
    asked = []

    def write(input_ids: torch.Tensor, context_input_ids: torch.Tensor, max_new_tokens: int, **kwargs: Any) -> Any:
        mask = kwargs["context_attention_mask"]
        assert (input_ids[:, -1] == COPY).all() and (input_ids[:, :-1] == SLOT).all()
        assert input_ids.shape[1] - 1 == int(mask.any(2).sum(1)[0])  # a slot for each chunk, the short one too
        written = torch.full((len(input_ids), max_new_tokens), SPECIAL.eos)
        for row in range(len(input_ids)):
            written[row, :-1] = context_input_ids[row][mask[row].bool()]
        written[1, -1] = 7  # all right but the end
        asked.append(max_new_tokens - 1)
        return torch.cat([input_ids, written], 1)

    monkeypatch.setattr(model, "generate", write)
    found = copies_of_short_sources(evaluation(model), torch.cat([rows, rows], 1))
    assert [int(length) for length in found] == asked == [CHUNK // 2, CHUNK + CHUNK // 2, 4 * CHUNK - CHUNK // 2]
    assert all(result["exact_match"] == pytest.approx(2 / 3) for result in found.values())
    assert all(result["num_generated_rows"] == 3 for result in found.values())


@pytest.mark.parametrize(
    ("fields", "measured"),
    [
        ({"max_memories": 1, "memory_policy": "drop_oldest"}, [CHUNK // 2]),
        ({"max_memories": 3, "memory_policy": "drop_oldest"}, [CHUNK // 2, CHUNK + CHUNK // 2]),
        ({"memory_token_id": None}, []),
    ],
)
def test_short_sources_that_do_not_fit_in_slots_are_left_out(fields: dict[str, Any], measured: list[int]):
    found = evaluate_suite(evaluation(build_model(**fields)), "copy", random_ids(ROWS, 4 * CHUNK))
    assert [int(length) for length in found["memory"]["short_sources"]] == measured


@pytest.mark.parametrize(
    ("decoder", "num_memories", "num_tokens", "fits"),
    [
        ({"max_position_embeddings": 20}, 3, 17, True),
        ({"max_position_embeddings": 20}, 3, 18, False),
        ({"sliding_window": 16}, 3, 13, True),
        ({"sliding_window": 16}, 3, 14, False),
    ],
)
def test_what_fits_is_what_the_decoder_sees(decoder: dict[str, Any], num_memories: int, num_tokens: int, fits: bool):
    config = MemoryEncoderDecoderConfig(
        encoder=tiny_encoder_config("masked_mixer"), decoder=tiny_decoder_config(**decoder), chunk_length=4
    )
    assert config.fits(num_memories, num_tokens) is fits


def test_free_running_copy_of_a_perfect_copier_is_exact(monkeypatch: pytest.MonkeyPatch):
    model = build_model()

    def copy_source(input_ids: torch.Tensor, max_new_tokens: int, **kwargs: Any) -> torch.Tensor:
        assert (input_ids[:, -1] == COPY).all() and input_ids.shape[1] == WINDOW + 1
        return torch.cat([input_ids, input_ids[:, :max_new_tokens]], 1)

    monkeypatch.setattr(model, "generate", copy_source)
    result = free_running_copy(evaluation(model), random_ids(ROWS, WINDOW))
    assert result["exact_match"] == 1.0 and result["generated_token_accuracy"] == 1.0
    assert result["exact_match_interval"][1] == 1.0


def test_evaluation_does_not_depend_on_the_batch_size():
    rows = random_ids(ROWS, 2 * WINDOW)
    small, large = (evaluate_suite(evaluation(batch_size=size), "blank_copy", rows) for size in (1, ROWS))
    for condition in ("memory", "wrong_memory", "no_memory"):
        assert small[condition]["loss"] == pytest.approx(large[condition]["loss"], abs=1e-5)


@pytest.mark.parametrize(
    ("suite", "rows", "model", "message"),
    [
        ("needle", 4, None, "'needle' is unknown; known: retention"),
        ("copy", 1, None, "another text's memories needs two"),
        ("copy", 4, autoencoder, "copy needs a memory model"),
    ],
)
def test_what_cannot_be_measured_is_refused(suite: str, rows: int, model: Any, message: str):
    run = evaluation(model() if model else None)
    with pytest.raises(ValueError, match=message):
        evaluate_suite(run, suite, random_ids(rows, WINDOW))
    with pytest.raises(ValueError, match="5 tokens, fewer than one row of 8"):
        spread_rows(torch.arange(5), row_length=8, limit=2)


def test_table_has_a_line_for_each_condition():
    table = results_table({"copy": evaluate_suite(evaluation(byte_lengths=None), "copy", random_ids(4, WINDOW))})
    lines = table.splitlines()
    assert len(lines) == 4 and all(line.startswith("copy") for line in lines[1:])
    assert "nan" not in table


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny memory model with its processor on disk, and a text."""
    folder = tmp_path_factory.mktemp("model")
    text = "the cat sat on the mat and the dog lay on the log; " * 40
    tokenizer: PreTrainedTokenizerFast = train_tokenizer([text], vocab_size=270)
    sizes = {"vocab_size": 270}
    torch.manual_seed(0)
    config = MemoryEncoderDecoderConfig(
        encoder=tiny_encoder_config("masked_mixer", **sizes),
        decoder=tiny_decoder_config("llama", **sizes),
        chunk_length=CHUNK,
        window_length=WINDOW,
        memory_token_id=270,
        copy_token_id=COPY,
        blank_token_id=BLANK,
    )
    MemoryEncoderDecoderForCausalLM(config).save_pretrained(folder)
    MemoryProcessor(tokenizer, chunk_length=CHUNK, window_length=WINDOW).save_pretrained(folder)
    (folder / "text.txt").write_text(text, encoding="utf-8")
    return folder, folder / "text.txt"


def test_command_prints_a_table_and_writes_a_record(
    saved: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder, text = saved
    record = tmp_path / "record.json"
    arguments = [str(folder), "--suite", "blank_copy", "--suite", "clm", "--limit", "4", "--text", str(text)]
    assert main([*arguments, "--record", str(record)]) == 0
    printed = capsys.readouterr().out
    assert "blank_copy" in printed and "wrong_memory" in printed
    content = json.loads(record.read_text())
    check_record(content)
    assert str(folder) not in record.read_text() and str(tmp_path) not in record.read_text()
    assert set(content["metrics"]) == {"blank_copy", "clm"}
    assert content["metrics"]["clm"]["memory"]["num_rows"] == 4
    assert content["inputs"]["files"].keys() == {"text.txt"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--limit", "0"], "argument --limit: '0': expected a whole number of 1 or more"),
        (["--text", "nowhere.txt"], "no file matches 'nowhere.txt'"),
        (["--length", "12"], "whole number of windows"),
        (["--length", "100000"], "fewer than one row of 100000"),
    ],
)
def test_mistakes_end_with_one_line_and_status_2(
    saved: tuple[Path, Path], capsys: pytest.CaptureFixture[str], change: list[str], message: str
):
    folder, text = saved
    arguments = [str(folder), "--suite", "copy", "--text", str(text), *change]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and "Traceback" not in error


def test_incomplete_model_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main([str(tmp_path), "--suite", "copy"]) == 2
    assert "config.json" in capsys.readouterr().err


def test_unknown_suite_lists_the_known_ones(capsys: pytest.CaptureFixture[str]):
    assert main(["model", "--suite", "needle"]) == 2
    error = capsys.readouterr().err
    assert all(suite in error for suite in SUITES)
