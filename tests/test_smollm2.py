"""SmolLM2's recipe, made questions and benchmark, on a tiny pair that comes as a package like the real one."""

import json
import random
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from modeling_memory import MemoryEncoderDecoderForCausalLM, MemoryProcessor
from tests.processes import write_metadata
from training.data import making
from training.data.making import cloze, make_cloze, passages, write_questions
from training.data.questions import read_questions
from training.data.texts import load_texts
from training.data.tokenizer import special_tokens_of
from training.places import REPOSITORY
from training.questions import main as make_questions
from training.recipes.recipe import load_recipe
from training.records.record import read_json
from training.run import main

TEXT = REPOSITORY / "training" / "corpora" / "wikinews" / "validation.parquet"
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<file_sep>", "<jupyter_start>"]
TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A place of installed packages with `tiny_chat`: a random Llama and a tokenizer with a chat template."""
    place = tmp_path_factory.mktemp("site")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIALS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(load_texts([TEXT])[:20], trainer=trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(place / "tiny_chat")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, tie_word_embeddings=True, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(place / "tiny_chat")
    (place / "tiny_chat" / "__init__.py").touch()
    write_metadata(place, "tiny_chat", "1.0")
    return place


@pytest.fixture
def installed(site: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.syspath_prepend(str(site))
    return "package:tiny_chat"


def tiny(folder: Path, base: str) -> list[str]:
    """Overrides by which SmolLM2's recipe runs in seconds."""
    overrides = [
        "stages.four.warm_start.fitted_rows=24", "stages.four.model.encoder_layers=1",
        f"output_dir={folder}", f"tokenizer.path={base}", "tokenizer.gguf_file=null", "threads=1",
        f"pretrained.smollm2.path={base}", "pretrained.smollm2.gguf_file=null", "pretrained.smollm2.config={}",
        "data.max_train_tokens=20000",
        "data.train=[training/corpora/books/validation.parquet]", f"data.validation=[{TEXT}]",
        "data.test=[training/corpora/wikinews/test.parquet]", "evaluation.num_rows=2",
        "evaluation.num_generated_rows=1", "publish.verify=false",
        "stages.questions.data.questions=['cloze:12']", "stages.questions.data.validation_questions=['cloze:4']",
    ]  # fmt: skip
    for stage in load_recipe("smollm2").stages:
        key = f"stages.{stage.name}.training"
        overrides += [f"{key}.max_steps=2", f"{key}.eval_steps=2", f"{key}.eval_rows=4", f"{key}.save_steps=1"]
    return overrides


def test_the_recipe_trains_all_its_stages_and_publishes_by_reference(installed: str, tmp_path: Path):
    folder = tmp_path / "run"
    assert main(["smollm2", *tiny(folder, installed)]) == 0
    record = read_json(folder / "record.json")
    assert record is not None and record["run"]["status"] == "success"
    assert set(record["stages"]) == {"four", "questions"}
    keys = {key for log in record["stages"]["four"]["series"] for key in log}
    assert {f"{name}_loss" for name in ("copy", "recall", "causal", "distillation")} <= keys
    assert any("eval_qa_loss" in log for log in record["stages"]["questions"]["series"])
    questions = read_questions([folder / "stages" / "questions" / "questions_0.jsonl"])
    assert len(questions) == 12 and all(one.answer in one.context for one in questions)
    check_small_folder(folder / "hub", installed)
    # What came out is what training goes on from: the bases keep their names, and only what is trained is cast.
    more = ["pretrained.starter.path=" + str(folder / "hub"), *(one for one in tiny(tmp_path / "more", installed)
            if not one.startswith(("stages.", "pretrained.")))]  # fmt: skip
    training = {"max_steps": 2, "eval_steps": 2, "eval_rows": 4, "save_steps": 1, "warmup": 0}
    more += [f"stages.more.training.{name}={value}" for name, value in training.items()]
    more += ["stages.more.data.questions=['cloze:12']", "stages.more.data.validation_questions=['cloze:4']"]
    assert main(["starter_smollm2", *more]) == 0
    check_small_folder(tmp_path / "more" / "hub", installed)
    one, other = (load_file(tmp_path / name / "hub" / "trained.safetensors") for name in ("run", "more"))
    assert one.keys() == other.keys() and any(not torch.equal(one[name], other[name]) for name in one)


def check_small_folder(hub: Path, base: str) -> None:
    """The published folder holds what was trained, rounded, and names its base for the rest."""
    model = AutoModelForCausalLM.from_pretrained(hub)
    config = model.config
    assert (config.memories_per_chunk, config.lookback, config.copy_token_id) == (16, 1, SPECIALS.index("<file_sep>"))
    assert config.adapters["default"]["memory_modules"] == ["k_proj", "v_proj"]
    assert model.dtype == torch.bfloat16
    kept = (hub / "trained.safetensors").stat().st_size
    assert kept < 2 * 2 * sum(p.numel() for p in model.parameters() if p.requires_grad), "what was trained, rounded"
    references = json.loads((hub / "config.json").read_text())["references"]
    assert {one["id"] for one in references.values()} == {base}
    # The markers that training used are those of the published model, though its tokenizer calls them otherwise.
    processor = MemoryProcessor.from_pretrained(hub)
    ids = special_tokens_of(processor.tokenizer, config.copy_token_id, config.blank_token_id)
    assert (ids.copy, ids.blank) == (3, 4)


def test_what_the_recipe_cannot_refer_to_or_make_is_named(site: Path, tmp_path: Path):
    raw = yaml.safe_load((REPOSITORY / "configuration" / "recipes" / "smollm2.yaml").read_text())
    raw["pretrained"]["smollm2"] |= {"path": str(site / "tiny_chat"), "gguf_file": None, "config": {}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(raw))
    with pytest.raises(ValueError, match="stages.four takes its encoder and decoder from no package"):
        load_recipe(tmp_path / "recipe.yaml")


def test_a_marker_that_the_tokenizer_lacks_is_named(site: Path):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(site / "tiny_chat")
    assert special_tokens_of(tokenizer, "<file_sep>", "<jupyter_start>").copy == 3
    with pytest.raises(ValueError, match="no token '<nowhere>'"):
        special_tokens_of(tokenizer, "<nowhere>")


def memories_by_hand(model: MemoryEncoderDecoderForCausalLM, source: torch.Tensor, tokens: int) -> torch.Tensor:
    """Memories `(m, D)` of a source `(S,)`, one for so many tokens: a matrix for each place, the last token's last."""
    table, weight = model.encoder.get_input_embeddings().weight, model.projector.out.weight
    places = weight.view(weight.shape[0], -1, table.shape[1])  # (D, 16, E)
    groups = []
    for start in range(0, len(source), tokens):
        memory = model.projector.out.bias.clone()
        for place, token in enumerate(source[start : start + tokens].tolist(), start=places.shape[1] - tokens):
            memory += places[:, place] @ table[token]
        groups.append(memory)
    return torch.stack(groups)


@pytest.mark.parametrize("tokens", [4, 8, 16])
def test_the_pair_is_a_linear_map_of_token_embeddings_where_their_last_token_stood(tokens: int, installed: str):
    """Concat, source positions and adapters against what they mean, with the plain library's Llama."""
    model = MemoryEncoderDecoderForCausalLM.from_encoder_decoder_pretrained(
        installed, installed, encoder_layers=0, pooling="concat", chunk_length=16, memories_per_chunk=4, max_group=16,
        window_length=64, projector_start="identity_on_last", memory_positions="source", freeze_decoder=True,
        copy_token_id=3, blank_token_id=4,
    )  # fmt: skip
    model.add_adapters(parts=["decoder"], r=3, lora_alpha=3)
    plain = AutoModelForCausalLM.from_pretrained(model_folder(installed))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or name == "projector.out.weight":
                parameter.add_(0.1 * torch.randn_like(parameter))
        for name, module in plain.named_modules():
            if name.startswith("model.layers") and isinstance(module, torch.nn.Linear):
                own = model.decoder.get_submodule(name)
                module.weight += own.lora_B["default"].weight @ own.lora_A["default"].weight
        source, text = torch.randint(5, 400, (64,)), torch.randint(5, 400, (20,))
        slots = torch.full((64 // tokens,), model.config.memory_token_id)
        found = model(
            torch.cat([slots, text])[None], context_input_ids=source.view(1, 4, 16),
            context_num_memories=torch.full((1, 4), 16 // tokens), use_cache=False,
        ).logits[0, len(slots) :]  # fmt: skip
        embeds = torch.cat([memories_by_hand(model, source, tokens), plain.get_input_embeddings()(text)])
        positions = torch.cat([torch.arange(tokens - 1, 64, tokens), 64 + torch.arange(20)])
        expected = plain(inputs_embeds=embeds[None], position_ids=positions[None]).logits[0, len(slots) :]
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        alone = AutoModelForCausalLM.from_pretrained(model_folder(installed))(text[None]).logits
        assert torch.equal(model(text[None]).logits, alone), "without memories it is the plain decoder"


def model_folder(package: str) -> str:
    from modeling_memory.memory_parts import locate

    return locate(package)


def test_cloze_questions_have_their_answer_in_the_passage_and_not_in_the_question():
    texts = load_texts([TEXT])
    found = make_cloze(texts, 200, seed=3)
    assert found == make_cloze(texts, 200, seed=3) != make_cloze(texts, 200, seed=4)
    assert len({one.context for one in found}) > 150
    for one in found:
        assert one.answer in one.context and one.question.count("____") in (1, 2) and len(one.context) <= 600
        before, after = one.question.split("____")[:2]
        gap = before.rpartition('"')[2].strip()[-20:]
        assert f"{gap} {one.answer}" in " ".join(one.context.split()) or gap in one.context, (before, after)
    assert sum(any(char.isdigit() for char in one.answer) for one in found) > 20
    assert cloze("nothing here has a name, nor is there any number in it at all.", random.Random(0)) is None
    with pytest.raises(ValueError, match="no passage of whole sentences"):
        next(passages(["too short."]))


def test_written_questions_keep_what_the_passage_answers(monkeypatch: pytest.MonkeyPatch):
    replies = iter([
        ["Question: Who built the bridge?", "I do not know.", "When was it opened?"],
        ["John Bradfield.", "in the year of our Lord"],
    ])  # fmt: skip
    asked: list[list[str]] = []
    monkeypatch.setattr(making, "_replies", lambda m, t, prompts, x: asked.append(prompts) or next(replies))
    given = ["The bridge was built by John Bradfield.", "Nothing.", "It was opened in 1932."]
    first, *others = write_questions(None, None, given)  # type: ignore[arg-type]
    assert first is not None and (first.question, first.answer) == ("Who built the bridge?", "John Bradfield")
    assert others == [None, None]
    assert [given[0] in asked[1][0], given[2] in asked[1][1]] == [True, True], "answers are asked with the passage"


def test_questions_are_made_by_a_command_that_goes_on(installed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "made.jsonl"
    assert make_questions([str(TEXT), "--to", str(file), "--count", "7"]) == 0
    assert len(read_questions([file])) == 7
    written = tmp_path / "written.jsonl"
    command = [str(TEXT), "--to", str(written), "--kind", "written", "--model", installed, "--count"]
    assert make_questions([str(TEXT), "--to", str(written), "--kind", "written"]) == 2, "no decoder"

    def stand_in(model, tokenizer, batch, temperature):
        reply = making._replies(model, tokenizer, [making.ASK.format(batch[0])], temperature)
        assert isinstance(reply[0], str), "the decoder does write"
        return [making.Question(one, "What begins it?", one.split()[0]) if place % 2 else None
                for place, one in enumerate(batch)]  # fmt: skip

    monkeypatch.setattr("training.questions.write_questions", stand_in)
    assert make_questions([*command, "3"]) == 0
    before = read_questions([written])
    with written.open("a") as stream:
        stream.write('{"context": "cut o')  # killed while it wrote
    assert make_questions([*command, "9"]) == 0
    after = read_questions([written])
    assert len(after) == 9 and after[:3] == before and len({one.context for one in after}) == 9
