"""What is saved is what is loaded: bit by bit, by every Auto class, with every buffer, and no path of a machine."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlamaForCausalLM

from modeling_memory import (
    MemoryAutoencoder,
    MemoryAutoencoderConfig,
    MemoryEncoderDecoderConfig,
    MemoryEncoderDecoderForCausalLM,
    MemoryEncoderDecoderModel,
)
from tests.conftest import tiny_decoder_config, tiny_encoder_config
from tests.memory_models import FAMILIES, SLOT, build_model, random_ids


@pytest.mark.parametrize(("encoder", "decoder"), FAMILIES)
def test_round_trip_is_bit_identical(encoder, decoder, tmp_path):
    model = build_model(encoder, decoder)
    model.save_pretrained(tmp_path)
    for auto_class, expected in (
        (AutoModelForCausalLM, MemoryEncoderDecoderForCausalLM),
        (AutoModel, MemoryEncoderDecoderModel),
    ):
        loaded, report = auto_class.from_pretrained(tmp_path, output_loading_info=True)
        assert type(loaded) is expected
        assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        states, buffers = model.state_dict(), dict(loaded.named_buffers())
        assert all(torch.equal(value, states[name]) for name, value in loaded.state_dict().items())
        for name, buffer in model.named_buffers():
            assert torch.equal(buffers[name], buffer), name
        assert not loaded.training
    input_ids = random_ids(2, 29)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(input_ids).logits, model(input_ids).logits)


def test_config_round_trip(tmp_path):
    model = build_model(memories_per_chunk=2, projector_type="mlp", max_memories=20)
    model.config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is MemoryEncoderDecoderConfig
    known = model.config.to_dict()
    assert {**loaded.to_dict(), "_name_or_path": ""} == {**known, "_name_or_path": ""}
    assert (loaded.encoder.model_type, loaded.decoder.model_type) == ("masked_mixer", "llama")
    overridden = AutoConfig.from_pretrained(tmp_path, freeze_encoder=False)
    assert overridden.freeze_encoder is False


def test_the_saved_config_names_every_auto_class_and_no_place_of_this_machine(tmp_path):
    parts = {}
    for name, config in (("encoder", tiny_encoder_config("llama")), ("decoder", tiny_decoder_config())):
        parts[name] = str(tmp_path / name)
        LlamaForCausalLM(config).save_pretrained(parts[name])
    model = MemoryEncoderDecoderForCausalLM.from_encoder_decoder_pretrained(
        **parts, chunk_length=4, memory_token_id=SLOT
    )
    model.save_pretrained(tmp_path / "joined")
    text = (tmp_path / "joined" / "config.json").read_text()
    assert str(tmp_path) not in text
    auto_map = json.loads(text)["auto_map"]
    assert set(auto_map) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoProcessor"}
    for value in auto_map.values():
        file = tmp_path / "joined" / (value.split(".")[0] + ".py")
        assert file.exists() or value.startswith("processing_memory"), value


def test_joining_keeps_the_parts(tmp_path):
    torch.manual_seed(0)
    encoder, decoder = LlamaForCausalLM(tiny_encoder_config("llama")), LlamaForCausalLM(tiny_decoder_config())
    encoder.save_pretrained(tmp_path / "encoder")
    decoder.save_pretrained(tmp_path / "decoder")
    for parts in ((encoder, decoder), (str(tmp_path / "encoder"), str(tmp_path / "decoder"))):
        model = MemoryEncoderDecoderForCausalLM.from_encoder_decoder_pretrained(
            *parts, chunk_length=4, memory_token_id=SLOT
        )
        assert type(model.encoder).__name__ == "LlamaModel"
        for name, value in encoder.model.state_dict().items():
            assert torch.equal(model.encoder.state_dict()[name], value), name
        for name, value in decoder.state_dict().items():
            assert torch.equal(model.decoder.state_dict()[name], value), name
        assert not any(p.requires_grad for p in model.encoder.parameters())
        scale = model.get_input_embeddings().weight.std()
        states = torch.randn(1000, 32)
        assert 0.5 < model.projector(states).std() / scale < 2


def test_joining_casts_to_one_dtype_and_loads_as_saved(tmp_path):
    encoder = LlamaForCausalLM(tiny_encoder_config("llama"))
    LlamaForCausalLM(tiny_decoder_config()).save_pretrained(tmp_path / "decoder")
    decoder = AutoModelForCausalLM.from_pretrained(tmp_path / "decoder", dtype=torch.bfloat16)
    model = MemoryEncoderDecoderForCausalLM.from_encoder_decoder_pretrained(encoder, decoder, chunk_length=4)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    model.save_pretrained(tmp_path / "joined")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "joined")
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    input_ids = random_ids(1, 9)
    assert torch.equal(loaded(input_ids).logits, model(input_ids).logits)


def test_slots_work_without_naming_an_id():
    encoder, decoder = LlamaForCausalLM(tiny_encoder_config("llama")), LlamaForCausalLM(tiny_decoder_config())
    model = MemoryEncoderDecoderForCausalLM.from_encoder_decoder_pretrained(encoder, decoder, chunk_length=4)
    assert model.config.memory_token_id == decoder.config.vocab_size
    prompt = torch.tensor([[model.config.memory_token_id, 7, 8]])
    assert model(prompt, context_input_ids=random_ids(1, 1, 4)).logits.shape == (1, 3, 96)


def test_a_decoder_with_another_vocabulary_turns_self_memory_off():
    encoder = LlamaForCausalLM(tiny_encoder_config("llama", vocab_size=50))
    decoder = LlamaForCausalLM(tiny_decoder_config())
    model = MemoryEncoderDecoderForCausalLM.from_encoder_decoder_pretrained(encoder, decoder, chunk_length=4)
    assert model.config.self_memory is False
    input_ids = random_ids(1, 20)
    assert torch.equal(model(input_ids).logits, model.decoder(input_ids).logits)


def test_tied_tables_stay_tied(tmp_path):
    config = MemoryEncoderDecoderConfig(
        encoder=tiny_encoder_config("llama"), decoder=tiny_decoder_config(tie_word_embeddings=True), chunk_length=4
    )
    model = MemoryEncoderDecoderForCausalLM(config).eval()
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight
    input_ids = random_ids(1, 9)
    assert torch.equal(loaded(input_ids).logits, model(input_ids).logits)
    loaded.resize_token_embeddings(99)
    assert loaded.get_output_embeddings().weight.shape[0] == 99
    assert loaded.config.vocab_size == loaded.config.decoder.vocab_size == 99


def test_parameter_names_are_pinned():
    """A renamed parameter breaks every saved model, so it must break a test."""
    names = {name for name, _ in build_model("llama").named_parameters()}
    assert {
        "encoder.embed_tokens.weight",
        "encoder.layers.0.self_attn.q_proj.weight",
        "projector.out.weight",
        "projector.out.bias",
        "decoder.model.embed_tokens.weight",
        "decoder.model.layers.1.mlp.down_proj.weight",
        "decoder.lm_head.weight",
    } <= names
    assert {name.split(".")[0] for name in names} == {"encoder", "projector", "decoder"}
    assert {n for n, _ in build_model(projector_type="mlp").projector.named_parameters()} == {
        "norm.weight", "hidden.0.weight", "hidden.0.bias", "out.weight", "out.bias"
    }  # fmt: skip


def test_a_fresh_model_has_no_meta_or_unset_tensor():
    with torch.device("meta"):
        config = build_model("llama").config
        model = MemoryEncoderDecoderForCausalLM(config)
    assert all(p.is_meta for p in model.parameters())
    tensors = [name for module in model.modules() for name, v in vars(module).items() if isinstance(v, torch.Tensor)]
    assert not tensors


def test_saving_in_shards_over_an_unsharded_model_leaves_no_stale_weights(tmp_path):
    build_model().save_pretrained(tmp_path)
    model = build_model()
    with torch.no_grad():
        model.get_output_embeddings().weight.add_(1)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    loaded = MemoryEncoderDecoderForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())
    model.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.glob("*.safetensors*")] == ["model.safetensors"]


def test_the_encoder_of_a_frozen_autoencoder_learns_if_the_joined_model_says_so():
    body = tiny_encoder_config("masked_mixer")
    autoencoder = MemoryAutoencoder(
        MemoryAutoencoderConfig(encoder=body, decoder=body, chunk_length=4, freeze_encoder=True)
    )
    for frozen in (True, False):
        model = MemoryEncoderDecoderForCausalLM.from_encoder_decoder_pretrained(
            autoencoder, build_model().decoder, freeze_encoder=frozen
        )
        assert {parameter.requires_grad for parameter in model.encoder.parameters()} == {not frozen}


def test_resizing_the_tables_keeps_self_memory_and_loads(tmp_path):
    model = build_model("llama")
    model.resize_token_embeddings(101, mean_resizing=False)
    assert (model.config.encoder.vocab_size, model.config.decoder.vocab_size) == (101, 101)
    model.save_pretrained(tmp_path)
    loaded = MemoryEncoderDecoderForCausalLM.from_pretrained(tmp_path)
    input_ids = torch.cat([random_ids(1, 20), torch.tensor([[99, 100]]), random_ids(1, 9)], 1)
    assert torch.equal(loaded(input_ids).logits, model(input_ids).logits)


def test_a_masked_mixer_decoder_loads_where_the_package_is_not_installed(tmp_path):
    mixer = tiny_encoder_config("masked_mixer")
    config = MemoryEncoderDecoderConfig(encoder=mixer, decoder=mixer, chunk_length=4)
    MemoryEncoderDecoderForCausalLM(config).save_pretrained(tmp_path / "model")
    code = "import sys; from transformers import AutoModelForCausalLM as Auto; "
    code += "print(type(Auto.from_pretrained(sys.argv[1], trust_remote_code=True).decoder).__name__)"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "model")],
        cwd=tmp_path, env={**environment, "HF_HOME": str(tmp_path / "cache")}, capture_output=True, text=True,
    )  # fmt: skip
    assert run.stdout.strip() == "MaskedMixerForCausalLM", run.stderr[-500:]


@pytest.mark.parametrize("kind", ["memory", "autoencoder"])
def test_a_folder_without_all_weights_is_refused_by_name(kind, tmp_path):
    if kind == "memory":
        model, name = build_model(), "projector.linear.weight"
    else:
        parts = {part: tiny_encoder_config("masked_mixer") for part in ("encoder", "decoder")}
        model = MemoryAutoencoder(MemoryAutoencoderConfig(**parts, chunk_length=4))
        name = next(key for key in model.state_dict() if key.startswith("encoder.layers"))
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    name = name if name in weights else next(key for key in weights if key.startswith("projector"))
    del weights[name]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"has no weights for {re.escape(name)}. Load a complete checkpoint"):
        type(model).from_pretrained(tmp_path)
    _, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert set(report["missing_keys"]) == {name}
