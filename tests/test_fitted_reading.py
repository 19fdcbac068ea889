"""A decoder that reads memories before any training: what is fitted, and that it is read."""

import pytest
import torch
from torch.nn.functional import kl_div
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from modeling_memory import MemoryEncoderDecoderForCausalLM
from training.recipes.recipe import WarmStartRecipe
from training.train.fitted_reading import copying, fit_reading
from training.train.warm_start import start_projector

SIZES = dict(
    vocab_size=60, hidden_size=32, intermediate_size=48, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, bos_token_id=1, eos_token_id=2, initializer_range=0.25,
)  # fmt: skip
ADAPTERS = {"memory_modules": ["k_proj", "v_proj"], "r": 16, "lora_alpha": 16}


def pair(
    group: int, kind=(LlamaConfig, LlamaForCausalLM), adapters=ADAPTERS, layers=2, **fields
) -> MemoryEncoderDecoderForCausalLM:
    torch.manual_seed(0)
    decoder = kind[1](kind[0](**SIZES, num_hidden_layers=layers, head_dim=8)).eval()
    fields = {
        "chunk_length": 8, "memories_per_chunk": 8 // group, "window_length": 8, "pooling": "concat", "lookback": 1,
        "memory_positions": "source", "projector_norm": True, "freeze_decoder": True, "copy_token_id": 3, **fields,
    }  # fmt: skip
    model = MemoryEncoderDecoderForCausalLM.from_encoder_decoder_pretrained(
        decoder, decoder, encoder_layers=0, **fields
    )
    if adapters:
        model.add_adapters(parts=["decoder"], **adapters)
    return model


def text(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(4, 60, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def distances(model: MemoryEncoderDecoderForCausalLM) -> tuple[float, float, float]:
    """How far the next tokens' distributions are from the full text's: own memories, another text's, none."""
    source, after = text(64, 16, seed=1), text(64, 4, seed=2)
    begin = torch.ones_like(source[:, :1])
    slots = torch.full((len(source), 16 // model.config.memory_span), model.config.memory_token_id)

    def log_probs(ids: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        chunks = {} if context is None else {"context_input_ids": context.unflatten(1, (-1, 8))}
        return model(torch.cat([begin, *ids, after], 1), **chunks).logits[:, -4:].log_softmax(-1)

    read = [log_probs([slots], source), log_probs([slots], source.roll(1, 0))]
    with model.adapters_off():
        full = model.decoder(torch.cat([begin, source, after], 1)).logits[:, -4:].log_softmax(-1)
        none = model.decoder(torch.cat([begin, after], 1), position_ids=torch.tensor([[0, 17, 18, 19, 20]]))
    return tuple(
        kl_div(one, full, log_target=True, reduction="batchmean").item()
        for one in (*read, none.logits[:, -4:].log_softmax(-1))
    )


@pytest.mark.parametrize(("group", "share"), [(1, 0.1), (2, 0.75)])
def test_own_memories_are_read_before_any_training(group, share):
    model = pair(group, layers=1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    explained = fit_reading(model, text(400, 32))
    own, other, none = distances(model)
    assert own < share * min(other, none), (own, other, none)
    assert min(explained.values()) > 0.3, explained
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert all(name.startswith("projector.out.") or ("lora_" in name and "_proj" in name) for name in moved)
    fitted = {name.split(".")[-4] for name in moved if "lora_B" in name}
    assert fitted == {"k_proj", "v_proj"}, "text keeps its own maps"


def test_a_fitted_model_saves_and_loads(tmp_path):
    model = pair(2)
    rows = [(number, row) for number, row in enumerate(text(400, 36))]
    told = start_projector(model, WarmStartRecipe(projector="fitted"), rows, "here")
    assert set(told) == {"keys", "values"}
    model.save_pretrained(tmp_path)
    assert distances(AutoModelForCausalLM.from_pretrained(tmp_path).eval()) == distances(model)


def test_copying_is_the_attention_to_what_comes_next():
    model = pair(2)
    tokens = text(16, 8)
    scores = copying(model, tokens)
    assert scores.shape == (2, 2) and ((scores > 0) & (scores < 2)).all()  # two queries share a head
    model.decoder.set_attn_implementation("eager")
    rows = torch.cat([torch.full((16, 1), 1), tokens, torch.full((16, 1), 3), tokens[:, :-1]], 1)
    with torch.no_grad():
        weights = model.decoder(rows, output_attentions=True).attentions
    expected = torch.stack([
        torch.stack([one[:, :, 9 + j, 1 + j] for j in range(8)]).mean((0, 1)).unflatten(0, (2, 2)).sum(1)
        for one in weights
    ])  # fmt: skip
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"memory_positions": "contiguous"}, "pooling concat, a linear projector and memory_positions source"),
        ({"kind": (Qwen3Config, Qwen3ForCausalLM)}, "a decoder of the Llama family"),
        ({"memories_per_chunk": 3}, "chunks that their memories divide"),
        ({"adapters": {"r": 4}}, "adapters with memory_modules k_proj and v_proj"),
        ({"copy_token_id": None}, "a begin and a COPY token"),
    ],
)
def test_models_that_cannot_be_fitted_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        fit_reading(pair(2, **fields), text(400, 32))


def test_wrong_text_is_refused():
    with pytest.raises(ValueError, match="rows of whole chunks of 8 tokens"):
        fit_reading(pair(2), text(400, 33))
    with pytest.raises(ValueError, match="192 memories of text, not 16"):
        fit_reading(pair(2), text(1, 32))


def reference(model: MemoryEncoderDecoderForCausalLM, ids: torch.Tensor, chunks: torch.Tensor) -> torch.Tensor:
    """The plain way: memories in their slots, and at each adapted map the adapter added column by column."""
    memories, _ = model.encode_memories(chunks)
    slots = ids == model.config.memory_token_id
    embeds = model.get_input_embeddings()(ids.masked_fill(slots, 0))
    embeds[slots] = memories.flatten(0, 1)
    takes = torch.where(slots, model.config.memory_span, 1)
    hooks = []
    for name, module in model.decoder.named_modules():
        if not hasattr(module, "lora_A"):
            continue
        at_memories = name.rpartition(".")[2] in ("k_proj", "v_proj")

        def add(base, inputs, output, module=module, at_memories=at_memories):
            low = module.lora_B["default"](module.lora_A["default"](inputs[0])) * module.scaling["default"]
            for row in range(output.shape[0]):
                for column in range(output.shape[1]):
                    if not at_memories or slots[row, column]:
                        output[row, column] += low[row, column]
            return output

        hooks.append(module.base_layer.register_forward_hook(add))
    with model.adapters_off():
        logits = model.decoder(inputs_embeds=embeds, position_ids=takes.cumsum(1) - 1).logits
    for hook in hooks:
        hook.remove()
    return logits


@torch.no_grad()
def test_adapters_of_memory_modules_act_at_memories_alone():
    model = pair(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    chunks, slot = text(3, 2, 8), model.config.memory_token_id
    ids = torch.cat([text(3, 2), torch.full((3, 8), slot), text(3, 5, seed=1)], 1)
    found = model(ids, context_input_ids=chunks).logits
    torch.testing.assert_close(found, reference(model, ids, chunks), atol=1e-5, rtol=1e-4)

    step = model(ids[:, :-2], context_input_ids=chunks, use_cache=True)
    rest = model(ids[:, -2:], past_key_values=step.past_key_values).logits
    torch.testing.assert_close(torch.cat([step.logits, rest], 1), found, atol=1e-5, rtol=1e-4)

    # Windows after a shared prefix, with a text token in it, read what the slots hold.
    plain = torch.cat([chunks.flatten(1), text(3, 5, seed=1)], 1)
    windows = model(plain).logits[:, 16:]
    slots = model(torch.cat([ids[:, 2:10], ids[:, -5:]], 1), context_input_ids=chunks).logits[:, 8:]
    torch.testing.assert_close(windows, slots, atol=1e-5, rtol=1e-4)
    model.generation_config.eos_token_id, options = None, {"max_new_tokens": 12, "pad_token_id": 0, "do_sample": False}
    whole = torch.ones_like(ids)
    written = model.generate(ids, attention_mask=whole, context_input_ids=chunks, rolling_memory=True, **options)
    again = model(written[:, :-1], context_input_ids=chunks, rolling_memory=True).logits[:, ids.shape[1] - 1 :]
    assert torch.equal(again.argmax(-1), written[:, ids.shape[1] :]), "rolled over, slots and all"

    with pytest.raises(ValueError, match="`memory_modules` names what; expected some of down_proj, gate_proj"):
        pair(2, adapters={**ADAPTERS, "memory_modules": ["what"]})
