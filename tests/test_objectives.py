from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_memory.configuration_memory import MemoryEncoderDecoderConfig
from modeling_memory.modeling_memory import MemoryEncoderDecoderForCausalLM
from tests.conftest import tiny_decoder_config, tiny_encoder_config
from training.data.objectives import (
    IGNORED,
    LAYOUTS,
    MARKERS,
    BatchSpec,
    ReadyContext,
    SpecialTokens,
    build_batch,
    combine_losses,
    targets_of,
)

IDS = SpecialTokens(pad=0, bos=1, eos=2, memory=96, copy=3, blank=4)
CHUNK = 4
WINDOW = 8
COPIES = ("copy", "blank_copy")


def rows_of(lengths: list[int], *, pad_left: bool = False, width: int | None = None) -> dict[str, torch.Tensor]:
    """Rows of distinct tokens, padded to one width; a pad column holds a token, so that only the mask hides it."""
    width = width or max(lengths)
    generator = torch.Generator().manual_seed(sum(lengths))
    tokens = torch.randint(5, 96, (len(lengths), width), generator=generator)
    columns = torch.arange(width)
    counts = torch.tensor(lengths)[:, None]
    present = columns >= width - counts if pad_left else columns < counts
    return {"tokens": tokens, "attention_mask": present.long()}


def build(objective: str, tokens: torch.Tensor, **options: Any) -> dict[str, torch.Tensor]:
    own = {name: options.pop(name) for name in ("attention_mask", "context", "end") if name in options}
    spec = BatchSpec(**{"special_tokens": IDS, "window_length": WINDOW, "chunk_length": CHUNK, **options})
    return build_batch(objective, tokens, spec, **own)


def one_row(
    objective: str, x: list[int], *, layout: str, marker: str, mixed: bool, memories_per_chunk: int
) -> tuple[list[int], list[int], list[list[int]]]:
    """The definitions written down for a single row: input, target of each position, context chunks."""
    context: list[int] = []
    if objective == "causal":
        if layout == "slots":
            cut = (len(x) - 1) // WINDOW * WINDOW
            context, x = x[:cut], x[cut:]
        shown, targets = list(x), [*x[1:], IGNORED]
    else:
        context = list(x)
        if marker == "token":
            shown = [IDS.copy, *x[:-1]] if objective == "copy" else [IDS.blank] * len(x)
            targets = list(x)
        else:
            shown = list(x) if objective == "copy" else [IDS.blank] * len(x)
            targets = [*x[1:], IGNORED]
        if layout == "self":
            first = x[0] if marker == "none" and not mixed else IGNORED
            shown, targets = x + shown, [IGNORED] * (len(x) - 1) + [first] + targets
    chunks = [context[start : start + CHUNK] for start in range(0, len(context), CHUNK)]
    if layout == "slots":
        slots = len(chunks) * memories_per_chunk
        shown, targets = [IDS.memory] * slots + shown, [IGNORED] * slots + targets
    return shown, targets, chunks


@settings(max_examples=60, deadline=None)
@given(
    objective=st.sampled_from(("causal", *COPIES)),
    windows=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    extra=st.integers(0, WINDOW - 1),
    pad_left=st.booleans(),
    layout=st.sampled_from(LAYOUTS),
    marker=st.sampled_from(MARKERS),
    mixed=st.booleans(),
    memories_per_chunk=st.integers(1, 2),
)
def test_batch_equals_the_definition_row_by_row(
    objective: str,
    windows: list[int],
    extra: int,
    pad_left: bool,
    layout: str,
    marker: str,
    mixed: bool,
    memories_per_chunk: int,
) -> None:
    lengths = [count * WINDOW + (extra if objective == "causal" else 0) for count in windows]
    rows = rows_of(lengths, pad_left=pad_left, width=3 * WINDOW + extra)
    batch = build(
        objective,
        **rows,
        layout=layout,
        marker=marker,
        mixed_with_causal=mixed,
        memories_per_chunk=memories_per_chunk,
    )
    longest = 0
    for row in range(len(lengths)):
        x = rows["tokens"][row][rows["attention_mask"][row].bool()].tolist()
        shown, targets, chunks = one_row(
            objective, x, layout=layout, marker=marker, mixed=mixed, memories_per_chunk=memories_per_chunk
        )
        longest = max(longest, len(shown))
        length = len(shown)
        assert batch["attention_mask"][row].tolist() == [1] * length + [0] * (batch["input_ids"].shape[1] - length)
        assert batch["input_ids"][row, :length].tolist() == shown
        assert batch["shift_labels"][row, :length].tolist() == targets
        assert (batch["input_ids"][row, length:] == IDS.pad).all()
        assert (batch["shift_labels"][row, length:] == IGNORED).all()
        if layout == "slots":
            context, mask = batch["context_input_ids"][row], batch["context_attention_mask"][row]
            assert context[: len(chunks)].tolist() == chunks
            assert mask[: len(chunks)].all() and not mask[len(chunks) :].any()
    assert batch["input_ids"].shape[1] == longest
    assert ("context_input_ids" in batch) == (layout == "slots")


@pytest.mark.parametrize("objective", COPIES)
def test_copy_window_outputs_the_tokens_of_its_source_window(objective: str) -> None:
    tokens = rows_of([3 * WINDOW, 3 * WINDOW])["tokens"]
    targets = build(objective, tokens)["shift_labels"].view(2, 6, WINDOW)
    assert (targets[:, :3] == IGNORED).all()
    assert (targets[:, 3:] == tokens.view(2, 3, WINDOW)).all()


@pytest.mark.parametrize("objective", ["causal", *COPIES, "reconstruction"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_arguments_are_not_changed_and_outputs_are_fresh(objective: str, layout: str) -> None:
    rows = rows_of([WINDOW, 3 * WINDOW], pad_left=True)
    before = {name: tensor.clone() for name, tensor in rows.items()}
    batch = build(objective, **rows, layout=layout)
    for tensor in batch.values():
        tensor.fill_(7)
    assert all((rows[name] == before[name]).all() for name in rows)


def test_full_rows_give_the_same_batch_with_and_without_a_mask() -> None:
    tokens = rows_of([2 * WINDOW, 2 * WINDOW])["tokens"]
    for objective in ("causal", *COPIES, "reconstruction"):
        plain = build(objective, tokens)
        masked = build(objective, tokens, attention_mask=torch.ones_like(tokens).bool())
        assert plain.keys() == masked.keys()
        assert all((plain[name] == masked[name]).all() for name in plain)


def test_source_length_takes_the_start_of_a_row() -> None:
    tokens = rows_of([3 * WINDOW])["tokens"]
    for layout in LAYOUTS:
        cut = build("copy", tokens, source_length=WINDOW, layout=layout)
        short = build("copy", tokens[:, :WINDOW], layout=layout)
        assert all((cut[name] == short[name]).all() for name in short)
    slots = build("causal", tokens, source_length=WINDOW, layout="slots")
    assert slots["context_input_ids"].flatten().tolist() == tokens[0, :WINDOW].tolist()
    assert slots["input_ids"][0, 2:].tolist() == tokens[0, WINDOW:].tolist()


def test_reconstruction_gives_chunks_and_unshifted_labels() -> None:
    rows = rows_of([2 * CHUNK, CHUNK + 1], width=2 * CHUNK)
    batch = build("reconstruction", **rows)
    assert batch["input_ids"].shape == (4, CHUNK)
    assert batch["attention_mask"].sum(1).tolist() == [CHUNK, CHUNK, CHUNK, 1]
    present = batch["attention_mask"].bool()
    assert (batch["labels"][present] == batch["input_ids"][present]).all()
    assert (batch["labels"][~present] == IGNORED).all()
    assert (batch["input_ids"][~present] == IDS.pad).all()
    short = build("reconstruction", **rows_of([CHUNK, 2 * CHUNK], width=2 * CHUNK))
    assert short["input_ids"].shape == (3, CHUNK)  # a chunk of padding only is left out


def test_ready_context_of_another_tokenizer_takes_any_text_length() -> None:
    context = torch.randint(5, 500, (2, 3, 6))
    context_mask = torch.ones_like(context)
    context_mask[1, 1:] = 0  # the second text has one chunk
    rows = rows_of([5, 3])
    for objective in ("causal", *COPIES):
        batch = build(
            objective,
            **rows,
            layout="slots",
            memories_per_chunk=2,
            context=ReadyContext(context, context_mask),
        )
        assert (batch["context_input_ids"] == context).all()
        assert (batch["input_ids"] == IDS.memory).sum(1).tolist() == [6, 2]
        assert batch["attention_mask"].sum(1).tolist() == [11, 5]
        targets = batch["shift_labels"][1]
        x = rows["tokens"][1, :3].tolist()
        wanted = x[1:] if objective == "causal" else x
        assert targets[targets != IGNORED].tolist() == wanted


def test_targets_of_finds_shifted_and_unshifted_targets() -> None:
    tokens = rows_of([WINDOW])["tokens"]
    batch = build("copy", tokens)
    assert targets_of(batch) is batch["shift_labels"]
    assert (targets_of(build("reconstruction", tokens)).flatten() == tokens[0]).all()


def test_combined_loss_is_the_weighted_sum_of_true_means() -> None:
    losses = {"causal": torch.rand(7, requires_grad=True), "copy": torch.rand(3, requires_grad=True)}
    weights = {"causal": 1.0, "copy": 0.5}
    sums = {name: loss.sum() for name, loss in losses.items()}
    combined = combine_losses(sums, {"causal": 7, "copy": torch.tensor(3)}, weights)
    torch.testing.assert_close(combined, losses["causal"].mean() + 0.5 * losses["copy"].mean())
    combined.backward()
    torch.testing.assert_close(losses["copy"].grad, torch.full((3,), 0.5 / 3))
    nothing = combine_losses({"copy": torch.zeros(())}, {"copy": 0}, {"copy": 1.0})
    assert nothing == 0
    with pytest.raises(ValueError, match="same objectives"):
        combine_losses(sums, {"causal": 7}, weights)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"objective": "coppy"}, "'coppy' is unknown; known: causal, copy, blank_copy, recall"),
        ({"layout": "slot"}, "known: self, slots"),
        ({"marker": "tokens"}, "known: token, none"),
        ({"window_length": 6}, "6 is no multiple of chunk_length 4"),
        ({"memories_per_chunk": 0}, "counts of 1 or more"),
        ({"tokens": torch.ones(2, 12).long()}, "row 0 has a source of 12 tokens.*windows of 8"),
        ({"tokens": torch.ones(2, 16)}, "expected torch.int64"),
        ({"tokens": torch.ones(0, 16).long()}, r"shape \(0, 16\)"),
        ({"tokens": torch.ones(16).long()}, r"expected torch.int64 of shape \(rows, tokens\)"),
        ({"source_length": 24}, "source_length is 24, but rows have 16 tokens"),
        ({"source_length": 4}, "source of 4 tokens.*windows of 8"),
        ({"attention_mask": torch.ones(2, 15).long()}, r"\(2, 15\).*\(2, 16\)"),
        ({"attention_mask": torch.tensor([[1] * 16, [0] * 16])}, "row 1 is padding only"),
        ({"attention_mask": torch.tensor([[1] * 16, [1] * 9 + [0] * 7])}, "row 1 has a source of 9 tokens"),
        ({"special_tokens": SpecialTokens(pad=0)}, "copy needs a copy token"),
        ({"objective": "blank_copy", "special_tokens": SpecialTokens(pad=0)}, "blank_copy needs a blank token"),
        ({"layout": "slots", "special_tokens": SpecialTokens(pad=0, copy=3)}, "slots layout needs a memory token"),
        ({"context": ReadyContext(torch.ones(2, 1, 4).long())}, "only the slots layout"),
        (
            {"layout": "slots", "context": ReadyContext(torch.ones(3, 1, 4).long())},
            r"\(3, 1, 4\); expected \(2, chunks",
        ),
        (
            {
                "layout": "slots",
                "context": ReadyContext(torch.ones(2, 1, 4).long(), torch.ones(2, 4).long()),
            },
            r"context.attention_mask has shape \(2, 4\)",
        ),
        ({"objective": "reconstruction", "tokens": torch.ones(2, 6).long()}, "6 columns.*chunks of 4"),
        ({"end": True}, "end=True was given for copy in the layout 'self'"),
        ({"end": True, "layout": "slots", "objective": "causal"}, "end=True was given for causal"),
        ({"end": True, "layout": "slots", "marker": "none"}, "with marker 'none'; only copies with a marker"),
        (
            {"end": True, "layout": "slots", "special_tokens": SpecialTokens(pad=0, copy=3, memory=9)},
            "needs a eos token",
        ),
        ({"objective": "causal", "layout": "slots", "source_length": 16}, "8 to 8 tokens"),
        ({"objective": "causal", "layout": "slots", "tokens": torch.ones(2, 8).long()}, "more than one window of 8"),
    ],
)
def test_bad_input_is_refused_with_what_was_given(change: dict[str, Any], message: str) -> None:
    arguments = {"objective": "copy", "tokens": torch.full((2, 16), 5), **change}
    with pytest.raises(ValueError, match=message):
        build(**arguments)


@settings(max_examples=60, deadline=None)
@given(
    objective=st.sampled_from(COPIES),
    lengths=st.lists(st.integers(1, 3 * WINDOW), min_size=1, max_size=4),
    pad_left=st.booleans(),
    memories_per_chunk=st.integers(1, 2),
)
def test_copies_that_end_anywhere_end_with_the_end_token(
    objective: str, lengths: list[int], pad_left: bool, memories_per_chunk: int
) -> None:
    width = 3 * WINDOW - 1  # no whole chunk
    lengths = [min(length, width) for length in lengths]
    rows = rows_of(lengths, pad_left=pad_left, width=width)
    batch = build(objective, **rows, layout="slots", memories_per_chunk=memories_per_chunk, end=True)
    for row, length in enumerate(lengths):
        x = rows["tokens"][row][rows["attention_mask"][row].bool()].tolist()
        chunks = [x[start : start + CHUNK] for start in range(0, length, CHUNK)]
        targets = [*x, IDS.eos] if length < width else x
        shown = [IDS.copy, *targets[:-1]] if objective == "copy" else [IDS.blank] * len(targets)
        slots = len(chunks) * memories_per_chunk
        real = batch["attention_mask"][row].bool()
        assert batch["input_ids"][row][real].tolist() == [IDS.memory] * slots + shown
        assert batch["shift_labels"][row][real].tolist() == [IGNORED] * slots + targets
        assert (batch["shift_labels"][row][~real] == IGNORED).all()
        mask = batch["context_attention_mask"][row].bool()
        context = batch["context_input_ids"][row]
        assert [chunk[keep].tolist() for chunk, keep in zip(context, mask, strict=True) if keep.any()] == chunks
        assert (context[~mask] == IDS.pad).all()


@pytest.mark.parametrize("clash", [{"copy": 0}, {"blank": 2}, {"copy": 9}, {"memory": 1}, {"blank": 5}])
def test_special_tokens_must_differ(clash: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="of its own"):
        SpecialTokens(**{"pad": 0, "bos": 1, "eos": 2, "memory": 9, "copy": 5, "blank": 6, **clash})


def test_padding_may_share_the_end_token_and_ids_are_not_negative() -> None:
    assert SpecialTokens(pad=2, eos=2, copy=3).pad == 2
    with pytest.raises(ValueError, match="copy is -1"):
        SpecialTokens(pad=0, copy=-1)


@pytest.fixture
def model() -> MemoryEncoderDecoderForCausalLM:
    config = MemoryEncoderDecoderConfig(
        encoder=tiny_encoder_config("llama"),
        decoder=tiny_decoder_config(),
        chunk_length=CHUNK,
        window_length=WINDOW,
        memories_per_chunk=2,
        memory_token_id=IDS.memory,
        copy_token_id=IDS.copy,
        blank_token_id=IDS.blank,
    )
    return MemoryEncoderDecoderForCausalLM(config).eval()


def run(model: MemoryEncoderDecoderForCausalLM, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Logits, targets and mask of the columns that are no slots, and the loss."""
    with torch.no_grad():
        outputs = model(**batch)
    text = (batch["input_ids"] != IDS.memory) & batch["attention_mask"].bool()
    return outputs.logits[text], batch["shift_labels"][text], outputs.loss


@pytest.mark.parametrize("objective", COPIES)
@pytest.mark.parametrize("windows", [1, 3])
def test_layouts_agree_on_the_first_copy_window(
    model: MemoryEncoderDecoderForCausalLM, objective: str, windows: int
) -> None:
    """The slots layout reads the whole copy as text; the self layout folds it, from its second window on."""
    tokens = rows_of([windows * WINDOW])["tokens"]
    source = windows * WINDOW
    ours, targets, loss = run(model, build(objective, tokens, memories_per_chunk=2))
    slots, slot_targets, slot_loss = run(model, build(objective, tokens, memories_per_chunk=2, layout="slots"))
    assert (targets[source:] == slot_targets).all()
    torch.testing.assert_close(ours[source : source + WINDOW], slots[:WINDOW], atol=1e-5, rtol=1e-5)
    if windows == 1:
        torch.testing.assert_close(loss, slot_loss)
    else:  # beyond the first window the two differ by design: what is folded is not read as text
        assert (ours[source + WINDOW :] - slots[WINDOW:]).abs().max() > 1e-3


def test_layouts_agree_on_the_text_after_a_context(model: MemoryEncoderDecoderForCausalLM) -> None:
    rows = rows_of([2 * WINDOW + 3, WINDOW + 5, 4])  # the last row has no context at all
    batch = build("causal", **rows, memories_per_chunk=2)
    slots = build("causal", **rows, memories_per_chunk=2, layout="slots")
    with torch.no_grad():
        ours, others = model(**batch).logits, model(**slots).logits
    for row, (start, length) in enumerate([(2 * WINDOW, 3), (WINDOW, 5), (0, 4)]):
        after = int((slots["input_ids"][row] == IDS.memory).sum())
        torch.testing.assert_close(
            ours[row, start : start + length], others[row, after : after + length], atol=1e-5, rtol=1e-5
        )
        wanted = batch["shift_labels"][row, start : start + length]
        assert (slots["shift_labels"][row, after : after + length] == wanted).all()


@pytest.mark.parametrize("objective", ["causal", *COPIES])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_ragged_rows_give_the_logits_of_each_row_alone(
    model: MemoryEncoderDecoderForCausalLM, objective: str, layout: str
) -> None:
    lengths = [3 * WINDOW, WINDOW, 2 * WINDOW]
    rows = rows_of(lengths, pad_left=True)
    together = build(objective, **rows, memories_per_chunk=2, layout=layout)
    with torch.no_grad():
        logits = model(**together).logits
        for row, length in enumerate(lengths):
            x = rows["tokens"][row : row + 1, -length:]
            if objective == "causal" and length <= WINDOW:
                alone = build(objective, x, memories_per_chunk=2)  # without a context the layouts are one
            else:
                alone = build(objective, x, memories_per_chunk=2, layout=layout)
            width = alone["input_ids"].shape[1]
            torch.testing.assert_close(logits[row, :width], model(**alone).logits[0], atol=1e-5, rtol=1e-5)


def test_model_takes_the_batch_as_it_is_and_loss_is_the_mean_over_targets(
    model: MemoryEncoderDecoderForCausalLM,
) -> None:
    for layout in LAYOUTS:
        logits, targets, loss = run(
            model, build("copy", rows_of([WINDOW, WINDOW])["tokens"], memories_per_chunk=2, layout=layout)
        )
        expected = torch.nn.functional.cross_entropy(logits, targets, ignore_index=IGNORED)
        torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("objective", ["copy", "causal", "distillation"])
def test_a_begin_token_stands_before_the_slots_and_is_no_target(objective):
    ids = SpecialTokens(pad=0, bos=1, eos=2, memory=99, copy=3, blank=4)
    spec = BatchSpec(ids, chunk_length=2, window_length=2, layout="slots", source_length=4)
    rows = torch.arange(10, 18).view(1, 8)
    without = build_batch(objective, rows, spec)
    batch = build_batch(objective, rows, replace(spec, begin=True))
    assert batch["input_ids"].tolist() == [[1, *without["input_ids"][0].tolist()]]
    assert batch["shift_labels"].tolist() == [[-100, *without["shift_labels"][0].tolist()]]
    assert torch.equal(batch["context_input_ids"], without["context_input_ids"])
    if objective == "distillation":
        assert batch["teacher_input_ids"].tolist() == [[1, *without["teacher_input_ids"][0].tolist()]]
    with pytest.raises(ValueError, match="`begin` needs a bos token"):
        build_batch(objective, rows, replace(spec, begin=True, special_tokens=replace(ids, bos=None)))
