"""Without gradients a long text is read in groups of windows: same results, bounded memory."""

import pytest
import torch

from modeling_memory import modeling_memory
from tests.memory_models import CHUNK, COPY, SLOT, WINDOW, build_model, ragged_batch, random_ids

ATOL = 5e-6  # largest difference of logits seen: 1.2e-6, of values up to 2.8: products are cut elsewhere


@pytest.fixture
def in_groups(monkeypatch: pytest.MonkeyPatch):
    """Set the bound on tokens of a group."""

    def bound(tokens: int) -> None:
        monkeypatch.setitem(modeling_memory.TOKENS_PER_GROUP, "cpu", tokens)
        monkeypatch.setattr(modeling_memory, "FEW_TOKENS", 0)

    return bound


def counted(model) -> list[tuple[int, int]]:
    """Rows and columns of every call of the decoder's body from now on."""
    sizes: list[tuple[int, int]] = []

    def note(_module, args, kwargs):
        given = [*args, kwargs.get("input_ids"), kwargs.get("inputs_embeds")]
        sizes.append(next(tuple(tokens.shape[:2]) for tokens in given if tokens is not None))

    model.decoder.base_model.register_forward_pre_hook(note, with_kwargs=True)
    return sizes


@pytest.mark.parametrize("decoder", ["llama", "gpt_neox"])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"window_positions": True, "memories_per_chunk": 2},
        {"memory_positions": "fixed", "absent_memories": "ones", "max_memories": 14},
        {"memory_positions": "spread", "max_memories": 14},
        {"max_memories": 3, "memory_policy": "drop_oldest"},
    ],
    ids=["plain", "two_memories", "fixed", "spread", "drop_oldest"],
)
@torch.no_grad()
def test_groups_change_nothing(in_groups, decoder, fields):
    model = build_model(decoder=decoder, **fields)
    input_ids, mask = ragged_batch(7 * WINDOW + 3)
    input_ids[0, 4] = COPY
    labels = input_ids.masked_fill(mask == 0, -100)
    more = random_ids(4, 3, seed=5)
    runs = []
    for bound in (10**6, 3 * WINDOW, 1):
        in_groups(bound)
        sizes = counted(model)
        out = model(input_ids, attention_mask=mask, labels=labels, use_cache=True, output_hidden_states=True)
        runs.append(
            {
                "logits": out.logits[mask.bool()],
                "loss": out.loss,
                "states": torch.stack(out.hidden_states)[:, mask.bool()],
                "memories": out.memory_embeds,
                "last": model(input_ids, attention_mask=mask, logits_to_keep=2).logits,
                "some": model(input_ids, attention_mask=mask, logits_to_keep=torch.tensor([9, 30, 31])).logits,
                "dense": model(input_ids).logits,
                "following": model(more, past_key_values=out.past_key_values).logits,
            }
        )
        most = max(rows for rows, _ in sizes)
        assert most >= 20 if bound > 100 else most <= 4, bound
        assert out.past_key_values.get_seq_length() == input_ids.shape[1] + 3
    for run in runs[1:]:
        for name, expected in runs[0].items():
            torch.testing.assert_close(
                run[name], expected, atol=ATOL, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
            )


@torch.no_grad()
def test_a_context_in_slots_and_generation_too(in_groups):
    model = build_model()
    prompt = torch.cat([torch.full((2, 2), SLOT), random_ids(2, 4 * WINDOW + 3)], 1)
    options = {"context_input_ids": random_ids(2, 2, CHUNK), "rolling_memory": True, "do_sample": False}
    whole, logits = model.generate(prompt, max_new_tokens=20, eos_token_id=None, **options), []
    options.pop("do_sample")
    for bound in (10**6, 2 * WINDOW):
        in_groups(bound)
        logits.append(model(prompt, **options).logits)
    torch.testing.assert_close(*logits, atol=ATOL, rtol=0)
    assert torch.equal(model.generate(prompt, max_new_tokens=20, eos_token_id=None, do_sample=False, **options), whole)


def test_with_gradients_all_windows_are_one_batch(in_groups):
    in_groups(1)
    model, text = build_model(freeze_decoder=True, freeze_encoder=True), random_ids(1, 5 * WINDOW)
    sizes = counted(model)
    model(text)
    assert (5, WINDOW) in sizes


@torch.no_grad()
def test_an_encoder_reads_so_many_tokens_at_a_time(in_groups):
    model, chunks = build_model("bert"), random_ids(3, 5, CHUNK)
    mask = torch.ones_like(chunks)
    mask[1, 2, 1:] = 0
    whole = model.encode_memories(chunks, mask)[0]
    in_groups(3 * CHUNK)
    rows: list[int] = []
    model.encoder.register_forward_pre_hook(
        lambda _module, _args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    torch.testing.assert_close(model.encode_memories(chunks, mask)[0], whole, atol=ATOL, rtol=0)
    assert rows == [3] * 5
