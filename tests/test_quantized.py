"""Quantised bases: trained on, saved by reference and loaded again.

A stand-in for torchao, which the suite does without: a tensor class of its own that holds 8-bit values and scales and,
as torchao's, knows neither `equal` nor how to be written to a file. (Int8WeightOnlyConfig of torchao 0.18 was tried by
hand with the same steps.)
"""

import json

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM, LlamaModel

from modeling_memory import MemoryEncoderDecoderForCausalLM as Model
from modeling_memory.memory_saving import state_hash
from tests.conftest import tiny_decoder_config, tiny_encoder_config
from tests.memory_models import random_ids

KEPT = (torch.ops.aten.detach.default, torch.ops.aten.alias.default, torch.ops.aten.clone.default)


class Packed(torch.Tensor):
    """A matrix of 8-bit values with one scale a row."""

    values: torch.Tensor
    scales: torch.Tensor

    @staticmethod
    def __new__(cls, values: torch.Tensor, scales: torch.Tensor) -> "Packed":
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=scales.dtype, device=values.device)

    def __init__(self, values: torch.Tensor, scales: torch.Tensor) -> None:
        self.values, self.scales = values, scales

    def __tensor_flatten__(self):
        return ["values", "scales"], None

    @classmethod
    def __tensor_unflatten__(cls, inner, *_):
        return cls(inner["values"], inner["scales"])

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.equal.default:
            raise NotImplementedError("Packed: aten.equal")
        if function in KEPT:
            return cls(args[0].values, args[0].scales)
        plain = torch.utils._pytree.tree_map_only(cls, lambda t: t.values * t.scales, args)
        return function(*plain, **(kwargs or {}))


def pack(model):
    for module in model.model.layers.modules():
        if isinstance(module, nn.Linear):
            scales = module.weight.detach().abs().amax(1, keepdim=True) / 127
            values = (module.weight.detach() / scales).round().to(torch.int8)
            module.weight = nn.Parameter(Packed(values, scales), requires_grad=False)
    model.config.quantization_config = {"quant_method": "stand-in"}
    return model


@pytest.fixture
def folders(tmp_path, monkeypatch):
    torch.manual_seed(0)
    LlamaModel(tiny_encoder_config("llama")).save_pretrained(tmp_path / "encoder")
    LlamaForCausalLM(tiny_decoder_config()).save_pretrained(tmp_path / "decoder")
    from_pretrained = AutoModelForCausalLM.from_pretrained

    def load(*args, quantization_config=None, **kwargs):
        model = from_pretrained(*args, **kwargs)
        return model if quantization_config is None else pack(model)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)
    return {part: str(tmp_path / part) for part in ("encoder", "decoder")}


def logits_of(model):
    with torch.no_grad():
        return model(random_ids(2, 13)).logits


def test_projector_and_adapters_of_a_quantised_decoder_are_saved(folders, tmp_path):
    options = {"quantization_config": {"quant_method": "stand-in"}}
    model = Model.from_encoder_decoder_pretrained(**folders, decoder_kwargs=options, chunk_length=4)
    model.add_adapters(r=2)
    before = logits_of(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(3):
        model.train()(random_ids(2, 13), labels=random_ids(2, 13)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    expected = logits_of(model.eval())
    assert not torch.equal(expected, before)
    with pytest.raises(ValueError, match="weights of the decoder are quantised.*by_reference=True"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    bases = {f"{part}_base": place for part, place in folders.items()}
    for _ in range(2):
        model.save_pretrained(tmp_path / "saved", by_reference=True)
        reference = json.loads((tmp_path / "saved" / "config.json").read_text())["references"]["decoder"]
        assert reference["quantization"] == options["quantization_config"]
        model = Model.from_pretrained(tmp_path / "saved", **bases)
        assert isinstance(model.decoder.model.layers[0].mlp.up_proj.base_layer.weight.data, Packed)
        assert torch.equal(logits_of(model), expected)
    # Packed weights that are no base's cannot be saved by themselves.
    weight = model.decoder.model.layers[0].mlp.up_proj.base_layer.weight
    weight.values.add_(1)
    with pytest.raises(ValueError, match=r"quantised weights decoder.*up_proj.*Name the base"):
        model.save_pretrained(tmp_path / "saved", by_reference=True)
    assert torch.equal(logits_of(Model.from_pretrained(tmp_path / "saved", **bases)), expected)


def test_the_hash_of_packed_weights_is_of_all_that_they_hold():
    values, scales = torch.arange(6, dtype=torch.int8).reshape(2, 3), torch.ones(2, 1)
    known = state_hash({"w": Packed(values, scales)})
    assert known == state_hash({"w": Packed(values.clone(), scales.clone())})
    assert known != state_hash({"w": Packed(values, 2 * scales)}) != state_hash({"w": Packed(values + 1, scales)})
