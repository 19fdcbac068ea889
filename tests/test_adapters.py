"""LoRA in any family, and saving by reference: small folders, nothing lost, nothing of another base."""

import copy
import json

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from modeling_memory import MemoryEncoderDecoderForCausalLM
from modeling_memory.memory_adapters import adapter_targets, adapters_on
from tests.memory_models import SLOT, random_ids
from tests.test_families import DECODERS, ENCODERS, join, slot_inputs, tiny_decoder, tiny_encoder


def step(model, rate: float = 0.1) -> None:
    """One step of plain gradient descent on all that trains."""
    inputs = slot_inputs()
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == SLOT, -100)
    model.train()
    for _ in range(2):  # the first moves LoRA's B alone
        model(**inputs, labels=labels).loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= rate * parameter.grad
        model.zero_grad()
    model.eval()


def logits_of(model) -> torch.Tensor:
    with torch.no_grad():
        return model(**slot_inputs()).logits


PAIRS = [*(("bert", d) for d in DECODERS), *((e, "llama") for e in ENCODERS)]


def is_new(name: str) -> bool:
    """Whether a weight is an adapter's or the projector's."""
    return ".lora_" in name or name.startswith("projector.")


def trainable(model) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize(("encoder", "decoder"), PAIRS)
def test_adapters_train_and_nothing_else_does(encoder, decoder):
    model = join(encoder, decoder)
    plain = logits_of(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.add_adapters(parts=["encoder", "decoder"], r=2, lora_alpha=8)
    assert torch.equal(logits_of(model), plain), "a fresh adapter changes nothing"
    trains = trainable(model)
    assert all(map(is_new, trains))
    assert {name.split(".")[0] for name in trains} == {"encoder", "decoder", "projector"}
    step(model)
    assert (logits_of(model) - plain).abs().max() > 1e-3
    for name, value in model.state_dict().items():
        old = before.get(name.replace(".base_layer.", "."))
        assert is_new(name) or torch.equal(value, old), f"{name} is frozen and moved"
        if ".lora_B" in name and "wo.lora" not in name:
            assert value.abs().sum() > 0, f"{name} has not trained"


@pytest.mark.parametrize(("encoder", "decoder"), PAIRS)
def test_adapters_save_load_and_merge(encoder, decoder, tmp_path):
    model = join(encoder, decoder)
    names = set(model.state_dict())
    model.add_adapters(parts=["encoder", "decoder"], r=2, lora_alpha=8)
    trains = trainable(model)
    step(model)
    trained = logits_of(model)
    model.save_pretrained(tmp_path)
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert torch.equal(logits_of(loaded), trained)
    assert trainable(loaded) == trains

    with model.adapters_off():
        off = logits_of(model)
    assert not torch.equal(off, trained) and trainable(model) == trains
    with pytest.raises(ValueError, match="act in every row"):
        model.merge_adapters()
    model.merge_adapters(all_rows=True)
    torch.testing.assert_close(logits_of(model), trained, atol=5e-4, rtol=1e-3)
    with pytest.raises(ValueError, match="merged but still there"):
        model.save_pretrained(tmp_path)
    model.unmerge_adapters()
    torch.testing.assert_close(logits_of(model), trained, atol=5e-4, rtol=1e-3)
    model.merge_adapters(unload=True, all_rows=True)
    assert set(model.state_dict()) == names
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(
        logits_of(AutoModelForCausalLM.from_pretrained(tmp_path)), trained, atol=5e-4, rtol=1e-3
    )


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's own
def test_peft_itself_trains_and_saves_a_memory_model(tmp_path):
    model = join()
    targets = adapter_targets(model, ["encoder", "decoder"])
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=targets, modules_to_save=["projector"], task_type="CAUSAL_LM")
    )
    step(wrapped)
    assert all(value.abs().sum() > 0 for name, value in wrapped.state_dict().items() if "lora_B" in name)
    wrapped.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(join(), tmp_path).eval()
    assert torch.equal(logits_of(again), logits_of(wrapped))
    inputs = slot_inputs()
    assert again.generate(**inputs, max_new_tokens=2, min_new_tokens=2).shape[1] == inputs["input_ids"].shape[1] + 2


@pytest.fixture
def folders(tmp_path):
    tiny_encoder("bert").save_pretrained(tmp_path / "bases" / "encoder")
    tiny_decoder("qwen3").save_pretrained(tmp_path / "bases" / "decoder")  # tied tables
    return {part: str(tmp_path / "bases" / part) for part in ("encoder", "decoder")}


def as_bases(folders):
    return {f"{part}_base": place for part, place in folders.items()}


def joined(folders, **fields):
    fields = {"chunk_length": 4, "memories_per_chunk": 2, "memory_token_id": SLOT, **fields}
    return MemoryEncoderDecoderForCausalLM.from_encoder_decoder_pretrained(**folders, **fields)


def check_same_model(loaded, model):
    """Weights and buffers are equal, and the same of them train."""
    for (name, value), (other, saved) in zip(
        sorted(model.state_dict().items()), sorted(loaded.state_dict().items()), strict=True
    ):
        assert name == other and torch.equal(value, saved), name
    assert trainable(loaded) == trainable(model)
    buffers = dict(loaded.named_buffers())
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())


@pytest.mark.parametrize("trained", ["projector", "lora", "decoder"])
def test_saving_by_reference(trained, folders, tmp_path):
    bases = as_bases(folders)
    model = joined(folders, freeze_decoder=trained != "decoder", pooling="queries")
    if trained == "lora":
        model.add_adapters(parts=["encoder", "decoder"], r=2)
    step(model)
    expected = logits_of(model)
    place = tmp_path / "saved"
    model.save_pretrained(place)  # an earlier save by value leaves nothing behind
    model.save_pretrained(place, by_reference=True)
    files = {file.name for file in place.iterdir()}
    assert "trained.safetensors" in files and not any(name.startswith("model") and "safe" in name for name in files)
    assert str(tmp_path) not in (place / "config.json").read_text()
    if trained != "decoder":
        whole = sum(p.numel() * 4 for p in model.parameters())
        assert (place / "trained.safetensors").stat().st_size < whole / 2
    loaded = AutoModelForCausalLM.from_pretrained(place, **bases)
    assert torch.equal(logits_of(loaded), expected)
    check_same_model(loaded, model)
    # From reference to value, and back to reference.
    loaded.save_pretrained(tmp_path / "value")
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "value")), expected)
    loaded.save_pretrained(place, by_reference=True)
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(place, **bases)), expected)


def test_a_base_that_has_changed_or_is_not_named_is_refused(folders, tmp_path):
    joined(folders).save_pretrained(tmp_path / "saved", by_reference=True)
    with pytest.raises(ValueError, match="decoder_base=folder_or_id"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    torch.manual_seed(5)
    other = tiny_decoder("qwen3")
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight[3, 4] += 1e-3
    with pytest.raises(ValueError, match="base of the decoder.*other weights.*trained on"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "saved", **as_bases({**folders, "decoder": other}))
    model = joined(folders)
    model.save_pretrained(tmp_path / "value")
    with pytest.raises(ValueError, match="holds all its weights"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "value", decoder_base=other)
    loose = join()
    with pytest.raises(ValueError, match="given as models.*by_reference="):
        loose.save_pretrained(tmp_path / "loose", by_reference=True)
    stranger = tiny_decoder("qwen3")  # its norms are ones, as those of any new model
    with torch.no_grad():
        for parameter in stranger.parameters():
            if parameter.ndim > 1:
                parameter.add_(1e-3)
    with pytest.raises(ValueError, match="is not its base"):
        loose.save_pretrained(tmp_path / "loose", by_reference={"decoder": stranger})


def test_options_of_loading_by_reference(folders, tmp_path):
    model = joined(folders)
    model.generation_config.repetition_penalty = 1.3  # generation settings of its own
    model.save_pretrained(tmp_path / "saved", by_reference=True)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.bfloat16, **as_bases(folders))
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert loaded.generation_config.repetition_penalty == 1.3
    with pytest.raises(ValueError, match="takes no chunk_lenght on loading; expected some of"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "saved", chunk_lenght=4, **as_bases(folders))
    with pytest.raises(ValueError, match="uploads no model by reference"):
        model.save_pretrained(tmp_path / "pushed", by_reference=True, push_to_hub=True)
    assert not (tmp_path / "pushed").exists()


def test_weights_that_were_trained_and_then_frozen_are_not_lost(folders, tmp_path):
    model = joined(folders, freeze_decoder=False)
    step(model)
    model.config.freeze_decoder = True
    model.apply_freezing()
    model.save_pretrained(tmp_path / "saved", by_reference=True)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", **as_bases(folders))
    assert torch.equal(logits_of(loaded), logits_of(model))


def test_one_part_by_reference_the_other_by_value(folders, tmp_path):
    model = joined(folders)
    model.save_pretrained(tmp_path / "saved", by_reference={"decoder": folders["decoder"]})
    references = json.loads((tmp_path / "saved" / "config.json").read_text())["references"]
    assert list(references) == ["decoder"] and references["decoder"]["id"] is None
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", decoder_base=folders["decoder"])
    assert torch.equal(logits_of(loaded), logits_of(model))


def test_wrong_adapters_are_refused():
    model = join()
    with pytest.raises(ValueError, match="'projector' is unknown; expected one of 'encoder', 'decoder'"):
        model.add_adapters(parts=["projector"])
    with pytest.raises(ValueError, match="LoraConfig"):
        model.add_adapters(rank=3)
    model.add_adapters(r=2)
    with pytest.raises(ValueError, match="already"):
        model.add_adapters(r=2)
    assert model.encode_memories(random_ids(1, 1, 4))[0].shape == (1, 2, 32)


def adapted(decoder: str = "llama", **fields):
    """A model whose decoder has a trained adapter, and three rows of ids."""
    model = join("bert", decoder)
    model.add_adapters(r=2, lora_alpha=8, **fields)
    step(model)
    return model, random_ids(3, 7)


def decoder_logits(model, input_ids, rows=None):
    with torch.no_grad(), adapters_on(model.decoder, True if rows is None else rows):
        return model.decoder(input_ids).logits


@pytest.mark.parametrize("decoder", DECODERS)
def test_adapters_act_only_in_rows_that_see_memories(decoder):
    model, input_ids = adapted(decoder)
    with model.adapters_off(), torch.no_grad():
        plain = model.decoder(input_ids).logits
    tuned = decoder_logits(model, input_ids)
    assert (tuned - plain).abs().amax((1, 2)).min() > 1e-4
    for rows in ([True, False, True], [False, False, False], [True, True, True]):
        open_rows = torch.tensor(rows)
        expected = torch.where(open_rows[:, None, None], tuned, plain)
        assert torch.equal(decoder_logits(model, input_ids, open_rows), expected)
    assert torch.equal(decoder_logits(model, input_ids, False), plain)
    with model.adapters_off():
        assert torch.equal(decoder_logits(model, input_ids, torch.tensor([True, False, True])), plain)
    assert torch.equal(decoder_logits(model, input_ids), tuned), "nothing is left of an earlier context"


def test_memories_of_an_earlier_turn_keep_the_adapters_on():
    (model, _), tokens, context = adapted(), random_ids(2, 8), random_ids(2, 1, 4, seed=1)
    first, second = tokens[:, :4].clone(), tokens[:, 4:].clone()
    first[0, :2] = second[1, :2] = SLOT  # row 0 has its memories in the first turn, row 1 in the second
    whole = torch.cat([first, second], 1)[:1]
    mask = torch.zeros_like(context)
    mask[0] = 1
    with torch.no_grad():
        expected = model(whole, context_input_ids=context[:1]).logits[0, 4:]
        cache = model(first, context_input_ids=context, context_attention_mask=mask, use_cache=True).past_key_values
        told = {"context_input_ids": context, "context_attention_mask": 1 - mask}
        found = model(second, past_key_values=cache, **told).logits[0]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_kinds_of_adapters_leave_rows_without_memories_alone_too(dtype):
    model, input_ids = adapted(use_dora=True)
    model.to(dtype)
    with model.adapters_off(), torch.no_grad():
        plain = model.decoder(input_ids).logits
    logits = decoder_logits(model, input_ids, torch.tensor([False, True, False]))
    assert torch.equal(logits[[0, 2]], plain[[0, 2]]) and not torch.equal(logits[1], plain[1])


def gradients(model, calls):
    """Gradients of the sum of several forwards, all of them run before one backward pass."""
    losses = []
    for input_ids, rows in calls:
        with adapters_on(model.decoder, rows):
            losses.append(model.decoder(input_ids, labels=input_ids).loss)
    model.zero_grad()
    sum(losses).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_computes_the_same_rows_again(reentrant):
    model, input_ids = adapted()
    model.decoder.train()  # a frozen decoder is in eval mode, in which nothing is checkpointed
    model.decoder.get_input_embeddings().weight.requires_grad_(True)  # what reentrant checkpointing hangs on
    calls = [(input_ids, torch.tensor([True, False, True])), (input_ids[:2], torch.tensor([False, True]))]
    calls += [(input_ids, False), (input_ids, True)]
    expected = gradients(model, calls)
    model.decoder.gradient_checkpointing_enable({"use_reentrant": reentrant})
    layers = [module for module in model.decoder.modules() if getattr(module, "gradient_checkpointing", False)]
    functions = [layer._gradient_checkpointing_func for layer in layers]
    found = gradients(model, calls)
    assert found.keys() == expected.keys() and any("lora_A" in name for name in found)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-5)
    assert layers and [layer._gradient_checkpointing_func for layer in layers] == functions


def test_rows_without_memories_give_adapters_no_gradient():
    model, input_ids = adapted()
    both = gradients(model, [(input_ids[:2], torch.tensor([True, False]))])
    alone = gradients(model, [(input_ids[:1], True)])
    for name in (name for name in alone if "lora_" in name):
        torch.testing.assert_close(2 * both[name], alone[name], atol=1e-6, rtol=1e-5)


def test_a_copied_model_has_rows_of_its_own():
    model, input_ids = adapted()
    twin = copy.deepcopy(model)
    tuned = decoder_logits(twin, input_ids)
    with adapters_on(model.decoder, False), torch.no_grad():
        assert torch.equal(twin.decoder(input_ids).logits, tuned)
    assert not torch.equal(decoder_logits(twin, input_ids, torch.tensor([False] * 3)), tuned)


def test_merged_adapters_are_weights_as_any_others():
    model, input_ids = adapted()
    tuned = decoder_logits(model, input_ids)
    model.merge_adapters(all_rows=True)
    torch.testing.assert_close(decoder_logits(model, input_ids, False), tuned, atol=5e-4, rtol=1e-3)
    model.merge_adapters(unload=True, all_rows=True)
    assert not any(module._forward_hooks for module in model.decoder.modules())
    torch.testing.assert_close(decoder_logits(model, input_ids, False), tuned, atol=5e-4, rtol=1e-3)
    encoder_only = join()
    encoder_only.add_adapters(parts=["encoder"], r=2)
    encoder_only.merge_adapters(unload=True)  # the encoder's act always, so nothing is broken


def test_an_adapter_of_a_fresh_model_begins_as_nothing():
    config = join().config
    config.adapters = {"default": {"parts": ["decoder"], "r": 2}}
    model = MemoryEncoderDecoderForCausalLM(config)
    names = [name for name, value in model.named_parameters() if ".lora_B" in name and value.any()]
    assert ".lora_B" in "".join(model.state_dict()) and not names


def test_wrong_rows_are_refused():
    model, input_ids = adapted()
    with pytest.raises(ValueError, match=r"is torch.int64 of shape \(3,\); expected one boolean a row"):
        decoder_logits(model, input_ids, torch.ones(3, dtype=torch.long))
    with pytest.raises(ValueError, match=r"gives \(3, 7, 32\) for 2 texts"):
        decoder_logits(model, input_ids, torch.tensor([True, False]))
    with pytest.raises(
        ValueError, match=r"`memories` is torch.bool of shape \(3,\); expected one boolean a row and col"
    ):
        adapters_on(model.decoder, True, torch.ones(3, dtype=torch.bool))
