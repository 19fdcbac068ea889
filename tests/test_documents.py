"""Rows that are documents: whole, never across a border, grouped or not the same; padding has no effect."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import VOCAB_SIZE
from tests.memory_models import CHUNK, WINDOW, assert_same_gradients, build_model, gradients_of
from tests.test_launch import ALL, SPECIAL
from tests.test_run import recipe, short_recipe  # noqa: F401  (fixtures)
from tests.test_trainer import trainer
from training.data.documents import DocumentRows, cut_documents
from training.data.objectives import IGNORED, BatchSpec, targets_of
from training.data.rows import ObjectiveCollator
from training.run import main
from training.train.trainer import run_objective

EOS = 2


def documents(num: int, longest: int = 40, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for _ in range(num):
        length = int(torch.randint(1, longest, (), generator=generator))
        parts += [torch.randint(5, VOCAB_SIZE, (length,), generator=generator), torch.tensor([EOS])]
    return torch.cat(parts)


def rows_of(tokens: torch.Tensor, **options: Any) -> DocumentRows:
    options = {"row_length": 24, "shortest": WINDOW + 1, "num_items": 1000, "step_rows": 4, "seed": 1, **options}
    return DocumentRows(tokens, eos_token_id=EOS, **options)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 9), max_size=12), st.booleans(), st.integers(1, 6))
def test_pieces_are_the_stream_cut_at_every_end_and_every_row_length(lengths: list[int], ended: bool, longest: int):
    stream: list[int] = []
    expected = []
    for number, length in enumerate(lengths):
        document = [5] * length + ([EOS] if ended or number + 1 < len(lengths) else [])
        stream += document
        expected += [document[i : i + longest] for i in range(0, len(document), longest)]
    if not stream:
        return
    starts, sizes = cut_documents(torch.tensor(stream), EOS, longest)
    assert [stream[i : i + n] for i, n in zip(starts.tolist(), sizes.tolist(), strict=True)] == expected


@pytest.mark.parametrize("grouped", [False, True])
def test_a_pass_has_each_row_once_and_grouping_changes_only_which_stand_together(grouped: bool):
    rows = rows_of(documents(90), group_by_length=grouped)
    plain = rows_of(documents(90))
    per_pass = rows.per_pass
    assert per_pass % 4 == 0 and len(rows.starts) - per_pass < 4
    for passed in range(2):
        span = range(passed * per_pass, (passed + 1) * per_pass)
        numbers = [rows[i][0] for i in span]
        assert len(set(numbers)) == per_pass and set(numbers) == {plain[i][0] for i in span}
    assert [rows[i][0] for i in range(8)] != [rows[i + per_pass][0] for i in range(8)]
    # Reading in another order, as after an interruption, gives the same rows; so do their numbers of tokens.
    again = rows_of(documents(90), group_by_length=grouped, num_items=2 * per_pass - 3)
    assert torch.equal(again[per_pass + 5][1], rows[per_pass + 5][1])
    assert again.num_tokens() == sum(len(rows[i][1]) for i in range(2 * per_pass - 3))


def test_grouped_steps_have_rows_of_about_one_length():
    def padding(rows: DocumentRows) -> float:
        steps = [[len(rows[i + j][1]) for j in range(4)] for i in range(0, rows.per_pass, 4)]
        return 1 - sum(sum(step) for step in steps) / sum(4 * max(step) for step in steps)

    plain, grouped = (padding(rows_of(documents(400), group_by_length=flag)) for flag in (False, True))
    assert grouped < 0.03 and plain > 5 * grouped


def test_texts_without_a_row_that_is_long_enough_are_refused():
    with pytest.raises(ValueError, match="no document has 50 tokens"):
        rows_of(documents(9), shortest=50)


@pytest.mark.parametrize("layout", ["self", "slots"])
def test_padding_has_no_effect_on_losses_and_gradients(layout: str):
    """A batch of rows of different lengths against each row by itself, whose text needs no padding."""
    model = build_model(freeze_encoder=True).train()
    collate = ObjectiveCollator(
        list(ALL),
        BatchSpec(SPECIAL, chunk_length=CHUNK, window_length=WINDOW, source_length=16, layout=layout, documents=True),
    )
    rows = rows_of(documents(60))
    items = [rows[i] for i in range(6)]

    joined = collate(items)
    alone = [collate([item]) for item in items]
    lengths = [len(item[1]) for item in items]
    # Of a copy the whole windows of each row, at most 16 tokens.
    asked = dict.fromkeys(ALL, sum(min(length // WINDOW * WINDOW, 16) for length in lengths))
    if layout == "self":
        asked["causal"] = sum(length - 1 for length in lengths)
    else:
        del asked["causal"]
    assert len(set(lengths)) > 3 and int(joined["num_tokens"]) == sum(lengths)
    for name in ALL:
        counts = [int((targets_of(batch[name]) != IGNORED).sum()) for batch in (joined, *alone)]
        assert counts[0] == sum(counts[1:]) == asked.get(name, counts[0])
        loss = run_objective(model, joined[name])[0]
        expected = sum(run_objective(model, batch[name])[0] for batch in alone)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        assert_same_gradients(gradients_of(model, loss), gradients_of(model, expected), least=1e-3)


def test_tokens_per_second_count_no_padding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    collate = ObjectiveCollator(
        ["causal", "copy"],
        BatchSpec(SPECIAL, chunk_length=CHUNK, window_length=WINDOW, source_length=16, documents=True),
    )
    run = trainer(tmp_path, network=build_model(freeze_encoder=True), collate=collate, max_steps=2)
    run.train_dataset = rows_of(documents(60), num_items=16)
    counted, plain = [], run.log
    monkeypatch.setattr(run, "log", lambda *args: (counted.append(run._tokens_since[0]), plain(*args)))
    run.train()
    assert counted[0] == sum(len(run.train_dataset[i][1]) for i in range(8))


def test_a_run_of_documents_watches_its_memories_and_counts_its_tokens(short_recipe: Path):  # noqa: F811
    out = short_recipe.parent / "out"
    options = ["stages.blank_copy.training.watch_steps=2", "stages.blank_copy.data.vary_source=false"]
    for stage in ("autoencoder", "decoder", "blank_copy"):
        options += [f"stages.{stage}.data.documents=true", f"stages.{stage}.training.group_by_length=true"]
    assert main([str(short_recipe), *options]) == 0
    record = json.loads((out / "record.json").read_text())
    for stage in record["stages"].values():
        assert 0 < stage["text_tokens"] <= stage["rows"] * 64 and stage["targets"] is None
    looked = [log for log in record["stages"]["blank_copy"]["series"] if "memory_effective_rank" in log]
    assert [log["step"] for log in looked] == [2, 4] and all(0 < log["memory_attention_share"] < 1 for log in looked)
    assert "memory effective rank" in (out / "summary.html").read_text()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.decoder.training.group_by_length=true", "needs rows of different lengths; set data.documents: true"),
        ("stages.blank_copy.data.documents=true", "does not go together with data.vary_source"),
        ("stages.autoencoder.data.shortened=1.5", "it is a share: expected 0 to 1"),
        ("stages.decoder.data.shortened=0.5", "is for autoencoder stages and for copies with a marker"),
        ("stages.autoencoder.data={row_length: 16, shortened: 0.5, documents: true}", "together with data.documents"),
        ("stages.blank_copy.data.shortened=0.5", "is for autoencoder stages and for copies with a marker"),
        ("stages.decoder.training.watch_steps=5", "which a causal_lm stage has none of"),
    ],
)
def test_what_does_not_go_together_is_refused_in_one_line(
    override: str, message: str, capsys: pytest.CaptureFixture[str]
):
    assert main(["debug_cpu", override]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: stages.") and message in error and error.count("\n") == 1
