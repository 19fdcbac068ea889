"""The probe reads what it says it reads, counts exactly, controls are what they say, and nothing is done twice."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModel, BertModel, LlamaForCausalLM, LlamaModel

from modeling_memory import MemoryAutoencoder, MemoryAutoencoderConfig
from tests.conftest import (
    VOCAB_SIZE,
    build_tiny_encoder_tokenizer,
    build_tiny_tokenizer,
    tiny_decoder_config,
    tiny_encoder_config,
)
from training import probe as probe_module
from training.measure.frozen import FrozenEncoder, TextRows, cut_rows, load_encoder
from training.measure.inversion import DecoderSize, VectorDecoder, invert
from training.probe import Probe, main, probe
from training.train.fit import Budget, Order, fit

TEXT = "the cat sat on the mat and the dog ran to the inn; " * 12
SIZE = DecoderSize(hidden_size=16, num_hidden_layers=1, num_heads=2)
BUDGET = Budget(steps=3, batch_tokens=32, bf16=False)


def save(folder: Path, model: Any, tokenizer: Any) -> str:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def llama(tmp_path: Path) -> str:
    torch.manual_seed(5)  # not the seed of untrained twins
    return save(tmp_path / "tiny-llama", LlamaForCausalLM(tiny_decoder_config()), build_tiny_tokenizer())


@pytest.fixture
def bert(tmp_path: Path) -> str:
    return save(tmp_path / "tiny-bert", BertModel(tiny_encoder_config("bert")), build_tiny_encoder_tokenizer())


@pytest.fixture
def text(tmp_path: Path) -> str:
    file = tmp_path / "text.txt"
    file.write_text(TEXT + "\n" + TEXT, encoding="utf-8")
    return str(file)


@torch.no_grad()
@pytest.mark.parametrize("position", ["last", "second_to_last", "mean", "cls"])
def test_each_position_is_read_where_it_says_with_special_tokens_around(bert: str, position: str):
    encoder = load_encoder(f"{bert}@{position}")
    tokenizer, body = encoder.tokenizer, AutoModel.from_pretrained(bert).eval()
    rows = cut_rows(tokenizer, [TEXT], 6, limit=3)
    read = encoder.read(rows.tokens)
    assert read.shape == (3, 1, body.config.hidden_size)
    for number, tokens in enumerate(rows.tokens):  # one text at a time, as the tokenizer itself would lay it out
        laid = tokenizer(tokenizer.decode(tokens), return_tensors="pt")
        states = body(**laid).last_hidden_state[0]  # [CLS] and 6 tokens and [SEP]
        assert len(states) == 8
        wanted = {"last": states[6], "second_to_last": states[5], "mean": states.mean(0), "cls": states[0]}[position]
        torch.testing.assert_close(read[number, 0], wanted, atol=1e-6, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("memories, pooling", [(1, "last"), (2, "mean"), (2, "last")])
def test_our_autoencoder_is_read_as_it_reads_itself_chunk_by_chunk(tmp_path: Path, memories: int, pooling: str):
    body = tiny_encoder_config("masked_mixer", max_position_embeddings=4)
    config = MemoryAutoencoderConfig(
        encoder=body, decoder=body, chunk_length=4, memories_per_chunk=memories, pooling=pooling, bottleneck_size=8
    )
    model = MemoryAutoencoder(config).eval()
    encoder = load_encoder(save(tmp_path / "ae", model, build_tiny_tokenizer()))
    tokens = cut_rows(encoder.tokenizer, [TEXT], 12, limit=2).tokens
    alone = [torch.cat([model.encode(chunk[None])[0] for chunk in row.split(4)]) for row in tokens]
    assert encoder.num_vectors(12) == 3 * memories
    torch.testing.assert_close(encoder.read(tokens), torch.stack(alone), atol=1e-6, rtol=1e-5)


def test_a_fresh_table_is_all_that_is_trained_and_the_model_itself_stays(llama: str):
    encoder = load_encoder(llama)
    before = {name: tensor.clone() for name, tensor in encoder.body.state_dict().items()}
    fresh = encoder.with_fresh_table()
    rows = cut_rows(encoder.tokenizer, [TEXT], 6)
    trained = fresh.body.get_input_embeddings().weight.clone()
    invert(fresh, rows, rows, SIZE, BUDGET)
    assert not torch.equal(fresh.body.get_input_embeddings().weight, trained)
    for name, tensor in encoder.body.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    frozen = {name for name, parameter in fresh.body.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name, _ in fresh.body.named_parameters()} - {"embed_tokens.weight"}
    for name in frozen:
        assert torch.equal(fresh.body.state_dict()[name], before[name]), name


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 9), st.integers(0, 5))
def test_the_shared_row_is_a_distribution_over_all_ids(num_known: int, seed: int):
    vocab_size, torch_seed = 10, torch.Generator().manual_seed(seed)
    known = torch.randperm(vocab_size, generator=torch_seed)[:num_known]
    decoder = VectorDecoder(SIZE, num_vectors=1, width=8, length=3, vocab_size=vocab_size, known_ids=known)
    logits = decoder(torch.randn(1, 1, 8, generator=torch_seed))[0, 0]
    every = torch.arange(vocab_size)
    correct, nats = decoder.token_results(logits.expand(vocab_size, -1), every)
    assert (-nats.double()).exp().sum().item() == pytest.approx(1.0, abs=1e-5)
    slow = torch.log_softmax(logits, 0)
    for token in range(vocab_size):
        if token in known.tolist():
            row = sorted(known.tolist()).index(token)
            assert nats[token].item() == pytest.approx(-slow[row].item(), abs=1e-5)
            assert correct[token] == (logits.argmax() == row)
        else:
            assert nats[token].item() == pytest.approx(math.log(vocab_size - num_known) - slow[-1].item(), abs=1e-5)


def test_a_decoder_learns_what_vectors_hold_and_the_shuffled_control_does_not():
    """Vectors that are the tokens themselves come back; another text's do not."""

    class Reader(FrozenEncoder):
        vocab_size = VOCAB_SIZE  # type: ignore[assignment]
        width = 4  # type: ignore[assignment]

        def num_vectors(self, length: int) -> int:
            return length

    tokens = torch.randint(5, 9, (64, 4), generator=torch.Generator().manual_seed(0))
    rows = TextRows(tokens, torch.full((64,), 8))
    encoder = Reader("one-hot", LlamaModel(tiny_decoder_config()).requires_grad_(False), None)  # type: ignore[arg-type]
    budget = Budget(steps=80, batch_tokens=256, bf16=False, learning_rate=1e-2)
    read = {"vectors": lambda rows: torch.nn.functional.one_hot(rows.tokens - 5, 4).float()}
    held = invert(encoder, rows, rows, SIZE, budget, **read)
    guessed = invert(encoder, rows, rows, SIZE, budget, shuffled=True, **read)
    assert held["token_accuracy"] == 1.0 and held["num_tokens"] == 256
    # Fresh texts are needed for the control: these 64 pairs of texts can be learnt by heart.
    other = TextRows(tokens[torch.randperm(64, generator=torch.Generator().manual_seed(1))], rows.num_bytes)
    guessed = invert(encoder, rows, other, SIZE, budget, shuffled=True, **read)
    assert guessed["token_accuracy"] < 0.5
    bits = held["loss"] * 256 / math.log(2) / (64 * 8)
    assert held["bits_per_byte"] == pytest.approx(bits)
    assert held["bits_per_byte_with_memory"] == pytest.approx(bits + 4 * 4 * 32 / 8)


def test_bytes_of_texts_add_up_to_the_document(llama: str):
    tokenizer = load_encoder(llama).tokenizer
    document = "abcdefgh" * 4
    rows = cut_rows(tokenizer, [document], 4)
    assert int(rows.num_bytes.sum()) == len(document) and rows.tokens.numel() == len(document)
    assert tokenizer.decode(rows.tokens.flatten()) == document


def test_a_run_that_was_interrupted_ends_like_one_that_was_not(tmp_path: Path):
    def run(stop: int | None) -> tuple[list[float], torch.Tensor]:
        torch.manual_seed(0)
        module = torch.nn.Linear(4, 4)

        def loss(step: int) -> torch.Tensor:
            if step == stop:
                raise KeyboardInterrupt
            rows = Order(8, 2).rows(step)
            return module(torch.eye(8, 4)[rows]).square().mean()

        losses = fit(module, loss, Budget(steps=9, bf16=False), checkpoint=tmp_path / "state", save_steps=2)
        return losses, module.weight.detach().clone()

    with pytest.raises(KeyboardInterrupt):
        run(stop=5)
    resumed_losses, resumed = run(stop=None)
    (tmp_path / "state").unlink()
    losses, straight = run(stop=None)
    assert losses == resumed_losses and torch.equal(straight, resumed)


def test_cells_are_kept_by_what_decides_them(llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    calls = []
    real = probe_module.invert

    def counting(*args: Any, **kwargs: Any) -> dict[str, Any]:
        calls.append(kwargs["label"])
        return real(*args, **kwargs)

    monkeypatch.setattr(probe_module, "invert", counting)
    # One document: both lengths cut the same tokens, and are two cells all the same.
    setting = Probe(train=[TEXT], test=[TEXT], lengths=(2, 4), size=SIZE, budget=BUDGET, train_tokens=64)
    # Interrupted after the first length; what is finished is reported, nothing else is trained.
    probe({"m": llama}, replace(setting, lengths=(2,), conditions=("embedding",)), tmp_path)
    (found,) = probe({"m": llama}, replace(setting, only_finished=True), tmp_path)
    assert {length: set(cells) for length, cells in found["lengths"].items()} == {"2": {"embedding"}, "4": set()}
    assert len(calls) == 1
    first = probe({"m": llama}, setting, tmp_path)
    assert len(calls) == 6 and first[0]["lengths"]["2"]["embedding"] == found["lengths"]["2"]["embedding"]
    assert probe({"m": llama}, setting, tmp_path) == first and len(calls) == 6
    assert first[0]["lengths"]["4"]["embedding"] != first[0]["lengths"]["2"]["embedding"]
    again = probe({"m": llama}, Probe(**{**vars(setting), "table": "replaced", "lengths": (2,)}), tmp_path)
    assert len(calls) == 9 and again[0]["lengths"]["2"] != first[0]["lengths"]["2"]


def test_command_writes_record_and_figure(llama: str, bert: str, text: str, tmp_path: Path, capsys: Any):
    folder = tmp_path / "probe"
    common = ["--lengths", "4,8", "--steps", "2", "--batch-tokens", "32", "--width", "16", "--layers", "1"]
    given = [f"one={llama}", f"two={bert}@mean", "--text", text, "--to", str(folder), "--decoder", "llama", *common]
    assert main(given) == 0
    assert (folder / "record.json").is_file() and (folder / "accuracy.png").stat().st_size > 5000
    printed = capsys.readouterr().out
    assert "one, embedding" in printed and "two, shuffled" in printed


def test_output_names_its_budget_whether_the_loss_still_falls_and_what_others_reach(
    llama: str, text: str, tmp_path: Path, capsys: Any
):
    given = ["--lengths", "4", "--batch-tokens", "32", "--width", "16", "--layers", "1", "--controls", "none"]
    assert main([f"mine={llama}", "--text", text, "--steps", "40", "--to", str(tmp_path / "probe"), *given]) == 0
    printed = capsys.readouterr().out
    assert "budget: one pass of a masked_mixer of 1 layers and width 16, 40 steps of 32 tokens" in printed
    assert "mine, 4 tokens: its loss still fell by" in printed  # forty steps are the steep part
    assert "a lower bound" in printed and "2310.06816" in printed and "private" not in printed
    setting = Probe(train=[TEXT], test=[TEXT])
    cells = {"4": {"embedding": {"at_plateau": True, "fall": 0.001}}, "8": {"embedding": {"at_plateau": False}}}
    lines = probe_module.budget_lines([{"name": "mine", "lengths": cells}], setting)
    assert len(lines) == 3 and lines[1] == "mine, 8 tokens: too few texts to tell whether its loss still falls"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["{llama}", "--text", "{text}", "--lengths", "500"], "reads 127 tokens|reads 128 tokens"),
        (["{llama}", "--text", "{empty}"], "holds no text"),
        (["{llama}", "--text", "{short}"], "tokens in a row"),
        (["{nowhere}", "--text", "{text}"], "no folder or Hub id"),
        (["{llama}@middle", "--text", "{text}"], "position 'middle' is unknown"),
        (["{llama}", "--tokenizer", "{other}", "--text", "{text}"], "tokenizer of another model"),
        (["{llama}", "{llama}", "--text", "{text}"], "two models are called"),
        (["{llama}", "--test", "{text}"], "without --text"),
        (["{vision}", "--text", "{text}"], "no token table or hidden states"),
    ],
)
def test_wrong_use_gets_one_clear_line(
    arguments: list[str], message: str, llama: str, text: str, tmp_path: Path, capsys: Any
):
    from transformers import ViTConfig, ViTModel

    from training.data.tokenizer import train_tokenizer

    places = {"llama": llama, "text": text, "nowhere": str(tmp_path / "nowhere")}
    for name, content in (("empty", "  \n"), ("short", "the cat")):
        places[name] = str(tmp_path / f"{name}.txt")
        Path(places[name]).write_text(content, encoding="utf-8")
    if "{other}" in arguments:
        places["other"] = str(tmp_path / "other")
        train_tokenizer([TEXT], vocab_size=280).save_pretrained(places["other"])
    if "{vision}" in arguments:
        places["vision"] = str(tmp_path / "vision")
        config = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
        ViTModel(config).save_pretrained(places["vision"])
        build_tiny_tokenizer().save_pretrained(places["vision"])
    given = [word.format(**places) for word in arguments]
    assert main([*given, "--to", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    import re

    assert re.search(message, error), error
