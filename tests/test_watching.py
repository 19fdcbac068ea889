"""What is said of memories while a model trains is what a plain computation says, and saying it changes nothing."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.memory_models import CHUNK, WINDOW, build_model, random_ids
from tests.test_trainer import SPECIAL, trainer
from training.data.objectives import BatchSpec
from training.data.rows import ObjectiveCollator
from training.train.watching import WatchMemories, effective_rank, memory_statistics

FIELDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "two memories a chunk": {"memories_per_chunk": 2},
    "fixed positions": {"memory_positions": "fixed", "max_memories": 12},
    "spread positions": {"memory_positions": "spread", "max_memories": 12},
}


def by_hand(model: Any, tokens: torch.Tensor) -> dict[str, float]:
    """Row by row: the decoder itself on memories and text side by side, one number of attention after the other."""
    memories, shares, norms, token_norms = [], [], [], []
    border = tokens.shape[1] // WINDOW * WINDOW - WINDOW
    fixed, span = model.config.text_start, model.config.memory_span
    for row in tokens:
        chunks = row[:border].view(1, -1, CHUNK)
        own = model.encode_memories(chunks)[0][0]
        embeds = model.get_input_embeddings()(row[border : border + WINDOW])
        count = len(own)
        start = count if fixed is None else fixed
        positions = torch.cat([span * torch.arange(count), start + torch.arange(WINDOW)])
        joined = torch.cat([own, embeds])[None]
        model.decoder.set_attn_implementation("eager")
        attentions = model.decoder(
            inputs_embeds=joined,
            attention_mask=torch.ones_like(positions[None]),  # without it the library takes a gap for a new text
            position_ids=positions[None],
            output_attentions=True,
            use_cache=False,
        ).attentions
        model.decoder.set_attn_implementation("sdpa")
        for layer, attention in enumerate(attentions):
            for head in attention[0]:
                for query in range(count, count + WINDOW):
                    shares.append((layer, sum(head[query, column].item() for column in range(count))))
        memories += list(own)
        norms += [vector.pow(2).sum().sqrt().item() for vector in own]
        token_norms += [vector.pow(2).sum().sqrt().item() for vector in embeds]
    norm = sum(norms) / len(norms)
    result = {
        "memory_norm": norm,
        "memory_norm_to_tokens": norm / (sum(token_norms) / len(token_norms)),
        "memory_effective_rank": rank_by_hand(memories),
        "memory_attention_share": sum(share for _, share in shares) / len(shares),
        "memory_column_share": sum(count / (count + i + 1) for i in range(WINDOW)) / WINDOW,
    }
    for layer in sorted({layer for layer, _ in shares}):
        own_shares = [share for index, share in shares if index == layer]
        result[f"memory_attention_share_{layer}"] = sum(own_shares) / len(own_shares)
    return result


def rank_by_hand(memories: list[torch.Tensor]) -> float:
    """The exponential of the entropy of the singular values, as shares of their sum."""
    centred = torch.stack(memories) - torch.stack(memories).mean(0)
    values = torch.linalg.eigvalsh(centred.double().T @ centred.double()).clamp(min=0).sqrt()
    weights = [value / values.sum().item() for value in values.tolist()]
    entropy = -sum(weight * torch.tensor(weight).log().item() for weight in weights if weight > 1e-7)
    return torch.tensor(entropy).exp().item()


@pytest.mark.parametrize("case", FIELDS)
@torch.no_grad()
def test_statistics_equal_those_computed_by_hand(case: str):
    model = build_model(freeze_encoder=True, **FIELDS[case]).train()
    model.decoder.set_attn_implementation("sdpa")
    tokens = random_ids(3, 3 * WINDOW + 3, seed=4)
    found = memory_statistics(model, tokens)
    assert model.training and not model.encoder.training and model.decoder.config._attn_implementation == "sdpa"
    expected = by_hand(model.eval(), tokens)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-3), name


def test_equal_memories_have_rank_0_and_independent_ones_all_directions():
    assert effective_rank(torch.ones(5, 3)) == 0.0
    assert effective_rank(torch.randn(4000, 6, generator=torch.Generator().manual_seed(0))) > 5.9


def test_texts_of_one_window_are_refused():
    with pytest.raises(ValueError, match="texts have 15 tokens, but two windows of 8 are needed"):
        memory_statistics(build_model(), random_ids(2, 15))


def watched(folder: Path, *, watch: bool, **settings: Any) -> Any:
    collate = ObjectiveCollator(
        ["causal", "copy"], BatchSpec(SPECIAL, chunk_length=CHUNK, window_length=WINDOW, source_length=WINDOW)
    )
    network = build_model(freeze_encoder=True)
    run = trainer(folder, network=network, collate=collate, max_steps=4, logging_steps=4, **settings)
    if watch:
        run.add_callback(WatchMemories(run, random_ids(2, 2 * WINDOW), 3))
    run.train()
    return run


def test_watching_changes_neither_weights_nor_other_logs(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    plain, seen = watched(tmp_path / "plain", watch=False), watched(tmp_path / "seen", watch=True)
    for (name, one), other in zip(plain.model.named_parameters(), seen.model.parameters(), strict=True):
        assert torch.equal(one, other), name
    looked = [log for log in seen.state.log_history if "memory_norm" in log]
    assert [log["step"] for log in looked] == [3]
    others = [log for log in seen.state.log_history if log not in looked]
    for one, other in zip(plain.state.log_history, others, strict=True):
        assert all(one[key] == other[key] for key in one if key.endswith(("loss", "accuracy")) and key != "train_loss")
    assert "test 3/4 memories | " in capsys.readouterr().out


def test_a_tracker_gets_losses_speed_and_memories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """TensorBoard through the Trainer: the numbers in its files are those of the log."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    run = watched(tmp_path / "run", watch=True, report_to=["tensorboard"])
    events = accumulator.EventAccumulator(str(tmp_path / "board"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    for name in ("copy_loss", "causal_token_accuracy", "text_tokens_per_second", "memory_effective_rank"):
        assert f"train/{name}" in tags
        logged = {log["step"]: log[name] for log in run.state.log_history if name in log}
        written = {event.step: event.value for event in events.Scalars(f"train/{name}")}
        assert written == pytest.approx(logged, rel=1e-5)
