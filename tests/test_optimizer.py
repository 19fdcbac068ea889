"""The combined optimizer equals its two parts, follows one schedule and survives a checkpoint bit by bit."""

import copy

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.optimization import get_wsd_schedule

from modeling_memory import MaskedMixerModel
from tests.conftest import tiny_encoder_config
from training.train.optimizer import MuonAdamW, build_optimizer, hidden_matrix_names


class TinyModel(nn.Module):
    """A table, a hidden matrix, a stacked mixing weight, a norm, a bias and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 6)
        self.mixing = nn.Parameter(torch.randn(2, 3, 3) / 3)
        self.hidden = nn.Linear(6, 6)
        self.norm = nn.LayerNorm(6)
        self.lm_head = nn.Linear(6, 11, bias=False)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        mixed = torch.einsum("hst,btd->bsd", self.mixing, self.table(ids))
        return self.lm_head(self.norm(self.hidden(mixed)))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: object, steps: range) -> None:
    for step in steps:
        ids = torch.randint(0, 11, (4, 3), generator=torch.Generator().manual_seed(step))
        nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()


def build(model: nn.Module, **kwargs: object) -> MuonAdamW:
    return build_optimizer(model, **{"learning_rate": 1e-2, "muon_learning_rate": 2e-2, **kwargs})


def schedule(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
    return get_wsd_schedule(optimizer, num_warmup_steps=2, num_decay_steps=3, num_training_steps=8)


def names_of(model: nn.Module, optimizer: MuonAdamW, algorithm: str) -> set[str]:
    ids = {id(p) for g in optimizer.param_groups if g["algorithm"] == algorithm for p in g["params"]}
    return {name for name, parameter in model.named_parameters() if id(parameter) in ids}


def test_only_hidden_matrices_go_to_muon():
    model = TinyModel()
    optimizer = build(model)
    assert names_of(model, optimizer, "muon") == {"hidden.weight"}
    assert names_of(model, optimizer, "adamw") == {
        "table.weight",
        "mixing",
        "hidden.bias",
        "norm.weight",
        "norm.bias",
        "lm_head.weight",
    }


@pytest.mark.parametrize("tied", [False, True])
def test_llama_tables_and_head_are_no_hidden_matrices(tied: bool):
    config = LlamaConfig(
        vocab_size=20, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=tied,
    )  # fmt: skip
    names = hidden_matrix_names(LlamaForCausalLM(config))
    assert len(names) == 7 and all("proj" in name for name in names)


def test_a_mixers_stacked_weights_and_biases_are_no_hidden_matrices():
    names = hidden_matrix_names(MaskedMixerModel(tiny_encoder_config("masked_mixer")))
    assert names and all(name.endswith("proj.weight") for name in names)


def test_steps_equal_torch_muon_and_adamw_side_by_side():
    model = TinyModel()
    twin = copy.deepcopy(model)
    optimizer = build(model, weight_decay=0.1)
    muon = torch.optim.Muon([twin.hidden.weight], lr=2e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    decayed = [twin.table.weight, twin.mixing, twin.lm_head.weight]
    plain = [twin.hidden.bias, twin.norm.weight, twin.norm.bias]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), fused=True)
    pair = [(muon, schedule(muon)), (adamw, schedule(adamw))]

    train(model, optimizer, schedule(optimizer), range(5))
    for step in range(5):
        ids = torch.randint(0, 11, (4, 3), generator=torch.Generator().manual_seed(step))
        nn.functional.cross_entropy(twin(ids).flatten(0, 1), ids.flatten()).backward()
        for part, part_schedule in pair:
            part.step()
            part_schedule.step()
            part.zero_grad()
    for (name, parameter), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(parameter, other), name


def test_one_schedule_drives_both_parts():
    optimizer = build(TinyModel())
    scheduler = schedule(optimizer)
    rates = []
    for _ in range(8):
        rates.append({group["algorithm"]: group["lr"] for group in optimizer.param_groups})
        optimizer.step()
        scheduler.step()
    assert [rate["muon"] for rate in rates] == pytest.approx([2 * rate["adamw"] for rate in rates])
    assert rates[0]["adamw"] == 0 and rates[3]["adamw"] == pytest.approx(1e-2)
    for inner in optimizer._inner.values():
        assert all(any(group is shared for shared in optimizer.param_groups) for group in inner.param_groups)


def test_resumed_training_is_bit_equal(tmp_path):
    torch.manual_seed(0)
    model = TinyModel()
    twin = copy.deepcopy(model)
    straight = build(model)
    train(model, straight, schedule(straight), range(6))

    first = build(twin)
    first_schedule = schedule(first)
    train(twin, first, first_schedule, range(3))
    torch.save({"m": twin.state_dict(), "o": first.state_dict(), "s": first_schedule.state_dict()}, tmp_path / "c")
    saved = torch.load(tmp_path / "c", weights_only=True)
    resumed_model = TinyModel()
    resumed_model.load_state_dict(saved["m"])
    resumed = build(resumed_model)
    resumed_schedule = schedule(resumed)
    resumed.load_state_dict(saved["o"])
    resumed_schedule.load_state_dict(saved["s"])
    train(resumed_model, resumed, resumed_schedule, range(3, 6))

    for (name, parameter), other in zip(model.named_parameters(), resumed_model.parameters(), strict=True):
        assert torch.equal(parameter, other), name
    assert [group["lr"] for group in straight.param_groups] == [group["lr"] for group in resumed.param_groups]


def test_frozen_parameters_get_no_state_and_do_not_move():
    model = TinyModel()
    model.table.requires_grad_(False)
    before = model.table.weight.clone()
    optimizer = build(model)
    train(model, optimizer, schedule(optimizer), range(3))
    assert torch.equal(model.table.weight, before)
    assert all(parameter.requires_grad for parameter in optimizer.state)
    assert len(optimizer.state) == sum(parameter.requires_grad for parameter in model.parameters())
    assert model.table.weight not in optimizer.state


def test_multipliers_scale_the_learning_rate_of_matching_names():
    optimizer = build(TinyModel(), lr_multipliers={"^table": 0.5, "hidden.weight": 3.0})
    rates = {(group["algorithm"], group["lr"]) for group in optimizer.param_groups}
    assert rates == {("adamw", 0.5e-2), ("adamw", 1e-2), ("muon", 3 * 2e-2)}


def test_adamw_alone_puts_everything_into_adamw():
    model = TinyModel()
    optimizer = build(model, optimizer="adamw")
    assert names_of(model, optimizer, "muon") == set()
    assert len(names_of(model, optimizer, "adamw")) == len(list(model.parameters()))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"optimizer": "sgd"}, "sgd.*expected muon or adamw"),
        ({"lr_multipliers": {"projector": 2.0}}, "'projector' matches no trainable parameter"),
    ],
)
def test_wrong_settings_are_refused(kwargs: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        build(TinyModel(), **kwargs)


def test_model_without_trainable_parameters_is_refused():
    with pytest.raises(ValueError, match="no trainable parameter"):
        build(TinyModel().requires_grad_(False))


def test_unknown_algorithm_is_refused():
    with pytest.raises(ValueError, match="algorithm None"):
        MuonAdamW([{"params": [nn.Parameter(torch.ones(2, 2))]}])
