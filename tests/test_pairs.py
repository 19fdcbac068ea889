"""Encoder and decoder with a tokenizer each: the same characters on both sides, and one run from text to folder."""

import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoModel, AutoModelForCausalLM, BertConfig, LlamaConfig, PreTrainedTokenizerFast

from modeling_memory import MemoryEncoderDecoderForCausalLM, MemoryProcessor
from tests.memory_models import assert_same_gradients, gradients_of
from training.data.objectives import IGNORED, BatchSpec, SpecialTokens
from training.data.pairs import PairCollator, PairedRows, encode_pairs, evaluate_pairs, pair_texts
from training.data.tokenizer import complete_tokenizer, train_tokenizer
from training.recipes.recipe import load_recipe
from training.records.record import read_json
from training.run import main
from training.train.trainer import run_objective

TEXT = "The old house stood by a river, where naïve boats went down to sea. People sang of wind & rain — ☃ 🙂!\n"
UNICODE = st.text(
    st.one_of(st.characters(codec="utf-8"), st.sampled_from("ab é\n\u0301🙂👩\u200d👧ﬁ　")), min_size=1, max_size=40
)
CPU = torch.device("cpu")


@cache
def byte_level() -> PreTrainedTokenizerFast:
    return train_tokenizer([TEXT * 3], vocab_size=300)


@cache
def wordpiece() -> PreTrainedTokenizerFast:
    """As BERT's: lower case, no accents, white space is dropped, what is unknown is one token."""
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefghijklmnopqrstuvwxyz.,!", "the", "house", "river"]
    pieces += [f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    backend = Tokenizer(models.WordPiece(vocab=vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True, strip_accents=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(name, vocabulary[name]) for name in ("[CLS]", "[SEP]")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


@cache
def byte_fallback() -> PreTrainedTokenizerFast:
    """As Llama's: a mark for spaces, a token for each byte of an unknown character; no padding, no slot."""
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        *"abcdehinorstuvw",
        "th",
        "the",
    ]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    merges = [("t", "h"), ("th", "e")]
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def processor(
    decoder: PreTrainedTokenizerFast | None = None, encoder: PreTrainedTokenizerFast | None = None, **sizes: int
) -> MemoryProcessor:
    tokenizer = complete_tokenizer(byte_level() if decoder is None else decoder)
    return MemoryProcessor(tokenizer, encoder or wordpiece(), **{"chunk_length": 4, **sizes})


@settings(max_examples=150, deadline=None)
@given(text=UNICODE, chunk_length=st.integers(1, 6), decoder=st.sampled_from([byte_level, byte_fallback]),
       encoder=st.sampled_from([wordpiece, byte_fallback, byte_level]))  # fmt: skip
def test_no_character_is_lost_and_none_is_counted_twice(text: str, chunk_length: int, decoder: Any, encoder: Any):
    both = processor(decoder(), encoder(), chunk_length=chunk_length)
    try:
        chunks = both.split_context(text)
    except ValueError as error:  # white space alone is no text to a BERT
        assert "empty" in str(error) and encoder is wordpiece
        return
    spans = both.chunk_spans(text)
    assert len(spans) == len(chunks)
    assert "".join(text[start:end] for start, end in spans) == text
    paired = pair_texts(both, [text, text])
    alone = decoder()(text, add_special_tokens=False, return_offsets_mapping=True)
    assert paired.tokens.tolist() == [*alone["input_ids"], decoder().eos_token_id] * 2
    assert paired.bounds[[0, -1]].tolist() == [0, len(paired.tokens)] and (paired.bounds.diff() >= 0).all()
    ids, mask = paired.encoder_side(torch.arange(paired.num_chunks))
    assert [row[seen.bool()].tolist() for row, seen in zip(ids, mask, strict=True)] == chunks * 2
    check_beginnings(text, spans, paired.bounds.tolist(), alone["offset_mapping"])


def check_beginnings(text: str, spans: list, bounds: list[int], offsets: list) -> None:
    """A chunk's tokens begin within its characters."""
    for chunk, (start, end) in enumerate(spans):
        own = offsets[bounds[chunk] : min(bounds[chunk + 1], len(offsets))]
        assert all(start <= begin < max(end, start + 1) or end == len(text) for begin, _ in own)


def test_the_chunks_of_both_sides_say_the_same():
    both = processor(chunk_length=4)
    paired = pair_texts(both, [TEXT])
    spans = both.chunk_spans(TEXT)
    for chunk, (start, end) in enumerate(spans[:4]):
        tokens, _ = paired.decoder_side(torch.tensor([[chunk]]), 0)
        assert both.tokenizer.decode(tokens[0]) == TEXT[start:end]
    assert TEXT[slice(*spans[1])] == " house sto"  # white space goes with the word after it


def tiny_pair(**fields: Any) -> MemoryEncoderDecoderForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    encoder = AutoModel.from_config(BertConfig(vocab_size=len(wordpiece()), **sizes, max_position_embeddings=32))
    decoder = AutoModelForCausalLM.from_config(
        LlamaConfig(vocab_size=300, **sizes, num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.2)
    )
    fields = {"chunk_length": 4, "memories_per_chunk": 3, "pooling": "mean", "self_memory": False, **fields}
    fields = {"memory_token_id": 300, "copy_token_id": 3, "blank_token_id": 4, **fields}
    return MemoryEncoderDecoderForCausalLM.from_encoder_decoder_pretrained(encoder, decoder, **fields)


IDS = SpecialTokens(pad=0, bos=1, eos=2, memory=300, copy=3, blank=4)


def collator(*objectives: str, **options: Any) -> PairCollator:
    encoded = options.pop("encoded", None)
    spec = BatchSpec(IDS, chunk_length=1, window_length=1, memories_per_chunk=3, **options)
    return PairCollator(list(objectives), spec, source_chunks=2, encoded=encoded)


def test_batches_are_what_the_processor_gives():
    both = processor(memories_per_chunk=3)
    paired = pair_texts(both, [TEXT])
    batch = collator("copy").collate("copy", paired, torch.tensor([[1, 2, 3], [0, 1, 2]]))
    spans = both.chunk_spans(TEXT)
    for row, first in enumerate((1, 0)):
        source = TEXT[spans[first][0] : spans[first + 1][1]]
        expected = both(text="<memory><copy>" + source, context=source.strip(), add_special_tokens=False)
        own = batch["attention_mask"][row].bool()
        assert batch["context_input_ids"][row].tolist() == expected["context_input_ids"][0]
        assert batch["input_ids"][row, own].tolist() == expected["input_ids"][0][:-1]
        asked = batch["shift_labels"][row]
        assert both.tokenizer.decode(asked[asked != IGNORED]) == source


@pytest.mark.parametrize("pooling", ["mean", "queries"])
@pytest.mark.parametrize("budget", [(), (1, 2, 3)])
def test_states_that_were_encoded_once_train_like_live_ones(tmp_path: Path, pooling: str, budget: tuple[int, ...]):
    model = tiny_pair(pooling=pooling).train()
    paired = pair_texts(processor(), [TEXT * 4])
    rows = PairedRows(paired, chunks_per_row=3, num_items=40, seed=1)
    states = encode_pairs(model, paired, tmp_path, bf16=False, device=CPU)
    names = ("causal", "copy", "distillation")
    live, ready = (collator(*names, num_memories=budget, encoded=e) for e in (None, (paired, states)))
    sizes = set()
    for first in range(0, 40, 5):
        items = [rows[i] for i in range(first, first + 3)]
        batches = live(items), ready(items)
        for name in names:
            sizes |= {int((batch[name]["input_ids"] == 300).sum(1)[0]) // 2 for batch in batches}
            expected, loss = (run_objective(model, batch[name])[0] for batch in batches)
            assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
            assert_same_gradients(gradients_of(model, loss), gradients_of(model, expected), least=1e-3)
    assert sizes == set(budget or (3,)), "every budget is drawn"


def test_a_text_is_encoded_once_and_by_a_frozen_encoder_only(tmp_path: Path):
    model, paired = tiny_pair(), pair_texts(processor(), [TEXT * 4])
    states = encode_pairs(model, paired, tmp_path, bf16=False, device=CPU)
    again = encode_pairs(model, paired, tmp_path, bf16=False, device=CPU)
    assert (again == states).all() and len(list(tmp_path.iterdir())) == 1
    model.add_adapters(parts=["encoder"], r=2)
    with pytest.raises(ValueError, match="without adapters"):
        encode_pairs(model, paired, tmp_path, bf16=False, device=CPU)


FIVE_ROWS = {"chunks_per_row": 3, "num_rows": 5}


def adapted_pair() -> Any:
    """A pair whose adapters do something."""
    model = tiny_pair()
    model.add_adapters(r=2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    return model


@pytest.mark.parametrize("objective", ["causal", "copy"])
def test_evaluation_equals_one_row_at_a_time_without_padding(objective: str):
    model, paired = adapted_pair(), pair_texts(processor(), [TEXT * 4])
    given = {"objective": objective, **FIVE_ROWS}
    found, fewer = evaluate_pairs(model, collator("causal", "copy"), paired, budgets=(3, 1), **given)
    assert fewer["no_memory"]["loss"] == found["no_memory"]["loss"] and fewer["memory"] != found["memory"]
    assert set(found) == {"memory", "wrong_memory", "no_memory", "plain_no_memory", "plain_full_context"}
    (single,) = evaluate_pairs(model, collator("causal", "copy"), paired, batch_size=1, **given)
    for name, metrics in found.items():
        assert metrics["loss"] == pytest.approx(single[name]["loss"], rel=1e-4), name
        assert metrics["num_tokens"] == found["memory"]["num_tokens"]
        low, high = metrics["loss_interval"]
        assert low <= metrics["loss"] <= high
        gain = metrics["loss"] - found["memory"]["loss"]
        assert name == "memory" or metrics["gain_of_memory"] == pytest.approx(gain, abs=1e-9)
    assert found["plain_no_memory"]["loss"] != found["no_memory"]["loss"], "plain means without adapters"


def test_the_full_context_is_source_and_text_read_by_the_decoder_as_it_was():
    """Written down, token by token."""
    model, paired = adapted_pair(), pair_texts(processor(), [TEXT * 4])
    rows = torch.linspace(0, paired.num_chunks // 3 - 1, 5).round().long()
    total = count = 0.0
    with torch.no_grad(), model.adapters_off():
        for row in rows.tolist():
            first, middle, end = (int(paired.bounds[3 * row + i]) for i in (0, 2, 3))
            logits = model.decoder(paired.tokens[None, first:end].long()).logits[0].log_softmax(-1)
            for place in range(middle, end - 1):
                total -= logits[place - first, paired.tokens[place + 1]].item()
                count += 1
    (found,) = evaluate_pairs(model, collator("causal", "copy"), paired, objective="causal", **FIVE_ROWS)
    assert found["plain_full_context"]["loss"] == pytest.approx(total / count, rel=1e-4)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    model = tiny_pair()
    model.encoder.save_pretrained(tmp_path / "encoder")
    wordpiece().save_pretrained(tmp_path / "encoder")
    model.decoder.save_pretrained(tmp_path / "decoder")
    byte_level().save_pretrained(tmp_path / "decoder")
    data: dict[str, Any] = {"cache_dir": str(tmp_path / "cache")}
    for number, split in enumerate(("train", "validation", "test")):
        (tmp_path / f"{split}.txt").write_text(f"number {number}. " + TEXT.replace("old", f"o{number}d") * 9, "utf-8")
        data[split] = [str(tmp_path / f"{split}.txt")]
    training = {"max_steps": 4, "batch_size": 2, "logging_steps": 1, "save_steps": 2, "eval_steps": 4, "eval_rows": 3}
    memory = {
        "name": "memory", "kind": "memory", "from": {"encoder": "bert", "decoder": "llama"},
        "model": {"chunk_length": 4, "memories_per_chunk": 3, "pooling": "mean", "freeze_decoder": True,
                  "self_memory": False},
        "objectives": {"causal": 1.0, "copy": 0.5, "distillation": 0.5},
        "data": {"row_length": 16, "source_length": 8, "layout": "slots", "encode_once": True, "num_memories": [1, 3]},
        "adapters": {"parts": ["decoder"], "r": 2},
        "training": {**training, "optimizer": "adamw", "lr_multipliers": {"lora_": 2.0},
                     "distillation_temperature": 2.0},
    }  # fmt: skip
    thaw = {
        "name": "thaw", "kind": "memory", "from": {"model": "memory"}, "model": {"encoder_trained_from": 1},
        "objectives": {"causal": 1.0}, "data": {"row_length": 16, "layout": "slots"}, "training": training,
    }  # fmt: skip
    raw = {
        "name": "pair", "output_dir": str(tmp_path / "out"), "use_cpu": True, "data": data,
        "tokenizer": {"path": str(tmp_path / "decoder")},
        "pretrained": {"bert": {"path": str(tmp_path / "encoder"), "config": {"hidden_size": 16}},
                       "llama": {"path": str(tmp_path / "decoder")}},
        "stages": [memory, thaw],
        "evaluation": {"suites": ["clm", "copy"], "num_rows": 3, "batch_size": 2},
        "publish": {"stage": "memory", "verify": True},
    }  # fmt: skip
    path = tmp_path / "pair.yaml"
    path.write_text(yaml.safe_dump(raw), encoding="utf-8")
    return path


def test_a_recipe_joins_two_pretrained_models(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main([str(recipe)]) == 0
    printed = capsys.readouterr().out
    assert printed.index("decoder adapters") < printed.index("memory 1/4"), "what trains is said before the first step"
    record = read_json(tmp_path / "out" / "record.json")
    assert set(record["metrics"]) == {f"{s}, {k} memories a chunk" for s in ("clm", "copy") for k in (1, 3)}
    assert str(tmp_path) not in (tmp_path / "out" / "record.json").read_text()
    parts = record["stages"]["memory"]["parameters_by_part"]
    assert parts["encoder"]["trainable"] == parts["decoder"]["trainable"] == 0 < parts["decoder adapters"]["trainable"]
    assert parts["all"]["total"] == parts["all"]["trainable"] + parts["all"]["frozen"]
    norms = [log["projector_norm"] for log in record["stages"]["memory"]["series"] if "projector_norm" in log]
    assert len(norms) >= 4 and len(set(norms)) > 1
    thawed = record["stages"]["thaw"]["parameters_by_part"]["encoder"]
    assert 0 < thawed["trainable"] < thawed["total"]
    assert len(list((tmp_path / "cache").glob("token-states-*"))) == 1
    check_hub_folder(tmp_path / "out" / "hub")


def check_hub_folder(folder: Path) -> None:
    """The folder of the stage is a whole model: its own processor makes what it reads."""
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    both = MemoryProcessor.from_pretrained(folder)
    assert both.encoder_tokenizer is not None
    inputs = both(text="The", context=TEXT.strip(), return_tensors="pt", padding_side="left")
    assert model.generate(**inputs, max_new_tokens=3, min_new_tokens=3).shape[1] == inputs["input_ids"].shape[1] + 3


def test_a_stopped_run_of_a_pair_goes_on_to_the_same_weights(recipe: Path, tmp_path: Path, monkeypatch: Any):
    short = ["publish.verify=false", "evaluation.suites=[]"]
    assert main([str(recipe), *short]) == 0
    stopped = tmp_path / "stopped"

    def stop(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("training.train.stages.StageRunner._save", stop)
        assert main([str(recipe), *short, f"output_dir={stopped}"]) == 130
    kept = stopped / "stages" / "memory" / "checkpoints"
    for checkpoint in kept.glob("checkpoint-4"):
        checkpoint.rename(tmp_path / "gone")
    assert main([str(recipe), *short, f"output_dir={stopped}"]) == 0
    one, two = (
        MemoryEncoderDecoderForCausalLM.from_pretrained(out / "stages" / "memory" / "model").state_dict()
        for out in (tmp_path / "out", stopped)
    )
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.memory.data.layout=self", "layout: slots"),
        ("stages.memory.data.row_length=18", "whole chunks of 4"),
        ("stages.memory.data.source_length=16", "source shorter than the row"),
        ("stages.memory.adapters={parts: [projector]}", "stages.memory.adapters: The part 'projector'"),
        ("stages.memory.adapters={rank: 2}", "stages.memory.adapters:.*LoraConfig"),
        ("pretrained.bert.path=package:no_such_package_here/model", "pip install no-such-package-here"),
        ("pretrained.bert.config={hidden_size: 24}", "pretrained.bert.config.hidden_size is 24.*has 16"),
        ("stages.memory.model.encoder_trained_from=9", "has 2 layers"),
        ("stages.memory.data.num_memories=[1, 4]", "num_memories is 4.*expected 1 to 3"),
        ("stages.memory.data.num_memories=[0]", "num_memories is 0"),
        ("stages.memory.training.distillation_temperature=0", "distillation_temperature is 0"),
        ("evaluation.suites=[retention]", "retention reads text that encoder and decoder share"),
        ("data.streaming=true", "streaming"),
    ],
)
def test_mistakes_are_refused(recipe: Path, override: str, message: str, capsys: pytest.CaptureFixture[str]):
    fast = [f"stages.{stage}.training.max_steps=1" for stage in ("memory", "thaw")]
    assert main([str(recipe), *fast, override]) == 2
    printed = capsys.readouterr().err
    assert re.search(message, printed), printed


def test_the_name_of_a_stage_is_no_name_of_a_pretrained_model(recipe: Path):
    raw = yaml.safe_load(recipe.read_text())
    raw["pretrained"]["memory"] = raw["pretrained"]["bert"]
    recipe.write_text(yaml.safe_dump(raw))
    with pytest.raises(ValueError, match=r"pretrained\.memory has the name of a stage"):
        load_recipe(recipe)
