"""Sharded parameters (torch's `fully_shard`, over gloo): frozen parts, tied tables and both optimizers.

accelerate ignores FSDP on a CPU, so what FSDP2 calls is called directly. Run as a module, this file is its own
two-process program.
"""

from pathlib import Path
from typing import Any

import torch
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from modeling_memory import MemoryEncoderDecoderForCausalLM
from tests.memory_models import BLANK, CHUNK, COPY, SLOT, WINDOW, build_model, random_ids
from tests.processes import be_one_of_two, run_two
from training.data.objectives import IGNORED, BatchSpec, SpecialTokens, combine_losses, targets_of
from training.data.rows import ObjectiveCollator
from training.train.optimizer import build_optimizer
from training.train.trainer import checkpoint_activations, run_objective

SPECIAL = SpecialTokens(pad=0, bos=1, eos=2, copy=COPY, blank=BLANK, memory=SLOT)
OBJECTIVES = {"causal": 1.0, "copy": 0.5, "blank_copy": 0.25}
CASES = {
    "adamw": {"optimizer": "adamw", "layout": "self", "checkpointing": True},
    "slots": {"optimizer": "adamw", "layout": "slots", "checkpointing": False},
    "muon": {"optimizer": "muon", "layout": "slots", "checkpointing": False},
}


def tied_model(checkpointing: bool) -> MemoryEncoderDecoderForCausalLM:
    model = build_model("llama", "llama", freeze_encoder=True)
    model.config.decoder.tie_word_embeddings = True
    model.decoder.tie_weights()
    assert model.decoder.lm_head.weight is model.decoder.get_input_embeddings().weight
    if checkpointing:  # the shared prefix is read through its cache, which the hooks of sharded layers do not see
        checkpoint_activations(model)
    return model.train()


def train(model: Any, case: str, rank: int, world_size: int) -> tuple[list[float], torch.optim.Optimizer]:
    """Two steps on this process's share of eight rows; gradients are averaged over processes."""
    optimizer = str(CASES[case]["optimizer"])
    chosen = build_optimizer(model, optimizer=optimizer, learning_rate=1e-2, muon_learning_rate=1e-2)
    collator = ObjectiveCollator(
        list(OBJECTIVES),
        BatchSpec(
            SPECIAL, chunk_length=CHUNK, window_length=WINDOW, source_length=2 * WINDOW, layout=CASES[case]["layout"]
        ),
    )
    losses = []
    for step in range(2):
        items = list(enumerate(random_ids(8, 3 * WINDOW, seed=step)))
        counts = {
            name: (targets_of(batch) != IGNORED).sum() for name, batch in collator(items).items() if name != "rows"
        }
        batch = collator(items[rank::world_size])
        sums = {name: run_objective(model, batch[name])[0] for name in OBJECTIVES}
        loss = combine_losses(sums, counts, OBJECTIVES)
        chosen.zero_grad()
        (loss * world_size).backward()
        chosen.step()
        losses.append(loss.item())
    return losses, chosen


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def test_sharded_training_equals_plain_training_with_frozen_and_tied_parameters(tmp_path: Path):
    run_two("tests.test_sharding", tmp_path)
    saved = torch.load(tmp_path / "sharded.pt", weights_only=True)
    assert saved["world_size"] == 2 and saved["sharded_parameters"] > 20
    for case in CASES:
        model = tied_model(bool(CASES[case]["checkpointing"]))
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        losses, _ = train(model, case, 0, 1)
        state, sharded = model.state_dict(), saved[case]
        assert sharded["state"].keys() == state.keys()
        assert abs(sum(sharded["losses"]) - sum(losses)) < 1e-4
        for name, tensor in state.items():
            moved = (tensor - before[name]).abs().max()
            difference = (sharded["state"][name] - tensor).abs().max()
            # Muon iterates in bfloat16; pieces of a matrix made orthogonal one by one would differ by all it moved.
            allowed = 0.1 * moved if case == "muon" else 1e-3 * tensor.abs().max()
            assert difference <= allowed, (case, name, difference, moved)
            if name.startswith("encoder."):
                assert torch.equal(sharded["state"][name], tensor), name
        assert sharded["frozen_with_gradient"] == sharded["frozen_with_state"] == []
        assert sharded["still_tied"]


def main(folder: Path) -> None:
    """Train sharded as one of two processes; the first saves what came out."""
    torch.distributed.init_process_group("gloo")
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    results: dict[str, Any] = {"world_size": world_size}
    for case in CASES:
        model = tied_model(bool(CASES[case]["checkpointing"]))
        for module in list(model.modules()):
            if type(module).__name__ == "LlamaDecoderLayer":
                fully_shard(module)
        fully_shard(model)
        losses, chosen = train(model, case, rank, world_size)
        total = torch.tensor(losses)
        torch.distributed.all_reduce(total)
        frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
        results["sharded_parameters"] = sum(isinstance(p, DTensor) for p in model.parameters())
        results[case] = {
            "losses": total.tolist(),
            "state": {name: whole(tensor) for name, tensor in model.state_dict().items()},
            "frozen_with_gradient": [name for name, p in frozen.items() if p.grad is not None],
            "frozen_with_state": [name for name, p in frozen.items() if p in chosen.state],
            "still_tied": model.decoder.lm_head.weight is model.decoder.get_input_embeddings().weight,
        }
    if rank == 0:
        torch.save(results, folder / "sharded.pt")


if __name__ == "__main__":
    be_one_of_two(main)
