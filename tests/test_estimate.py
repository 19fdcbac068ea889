"""Recipes of real pairs: what they say they need is what is computed, and tiny models of the same classes run them."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from tests.test_pairs import TEXT, byte_level, wordpiece
from training.estimate import build_on_meta, estimate_recipe, estimate_stage, main
from training.recipes.recipe import REPOSITORY, load_recipe
from training.records.record import read_json
from training.run import main as run

PAIRS = ("llama_3_2_1b", "qwen3_0_6b", "smollm2_135m_minilm")
RECIPES = REPOSITORY / "configuration" / "recipes"
PUBLISHED = {"llama": 1_235_814_400, "qwen3": 596_049_920, "smollm2": 134_515_008, "embedding": 595_776_512}
"""Parameters that the model cards of the decoders and encoders give."""


@pytest.mark.parametrize("name", [*PAIRS, "paper_scale"])
def test_what_a_recipe_says_it_needs_is_what_is_computed(name: str):
    header = (RECIPES / f"{name}.yaml").read_text()
    for found in estimate_recipe(load_recipe(name)):
        assert f"#           {found.line().split(', at ')[0]}\n" in header


@pytest.mark.parametrize("name", PAIRS)
def test_the_architectures_are_those_of_the_published_models(name: str):
    recipe = load_recipe(name)
    models = build_on_meta(recipe)
    last = models[recipe.stages[-1].name]
    for part, key in (("decoder", "decoder"), ("encoder", "encoder")):
        source = next(stage.from_[key] for stage in recipe.stages if key in stage.from_)
        if source in PUBLISHED:
            body = getattr(last, part)
            assert sum(p.numel() for n, p in body.named_parameters() if ".lora_" not in n) == PUBLISHED[source]


def tiny_pair(recipe: dict[str, Any], folder: Path) -> None:
    """Put tiny models of the same classes in the place of the pretrained ones."""
    encoders = {stage.get("from", {}).get("encoder") for stage in recipe["stages"]}
    for name, source in recipe["pretrained"].items():
        is_encoder = name in encoders
        tokenizer = wordpiece() if source["config"]["model_type"] == "bert" else byte_level()
        vocab_size = 300 if tokenizer is byte_level() else len(wordpiece())
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 6, "num_attention_heads": 2}
        config = {**source["config"], **sizes, "vocab_size": vocab_size}
        config |= {key: 2 for key in ("num_key_value_heads",) if key in config}
        config |= {key: 8 for key in ("head_dim",) if key in config}
        source["config"], source["path"] = config, str(folder / name)
        made = AutoConfig.for_model(**config)
        (AutoModel if is_encoder else AutoModelForCausalLM).from_config(made).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        if not is_encoder:
            recipe["tokenizer"]["path"] = str(folder / name)


def test_a_base_that_is_encoder_and_decoder_is_built_for_both():
    models = build_on_meta(load_recipe("smollm2"))
    assert list(models) == ["four", "questions"]
    for model in models.values():
        assert sum(p.numel() for n, p in model.decoder.named_parameters() if ".lora_" not in n) == PUBLISHED["smollm2"]
        layers = 4 * (2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536 + 2 * 576)
        assert sum(p.numel() for p in model.encoder.parameters()) == 49152 * 576 + layers + 576, "its own copy"
        assert model.projector.out.weight.shape == (576, 5 * 576)


@pytest.mark.parametrize("name", PAIRS)
def test_tiny_models_of_the_same_classes_take_a_step(name: str, tmp_path: Path):
    recipe = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
    tiny_pair(recipe, tmp_path)
    recipe |= {"output_dir": str(tmp_path / "out"), "use_cpu": True}
    for number, split in enumerate(("train", "validation", "test")):
        (tmp_path / f"{split}.txt").write_text(f"{number}. " + TEXT.replace("old", f"o{number}d") * 60, "utf-8")
        recipe["data"][split] = [str(tmp_path / f"{split}.txt")]
    for stage in recipe["stages"]:
        stage["training"].update(max_steps=1, batch_size=2)
        for part in ("encoder", "decoder"):
            if part in stage.get("model", {}):
                stage["model"][part] |= {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    recipe["evaluation"].update(num_rows=2, batch_size=2)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe), "utf-8")
    assert run([str(tmp_path / "recipe.yaml")]) == 0
    record = read_json(tmp_path / "out" / "record.json")
    assert record["hub"]["verified"] and any(key.startswith("clm") for key in record["metrics"])


def test_counts_by_hand(tmp_path: Path):
    """A decoder without memories: what two layers of it cost, written down."""
    path = tmp_path / "recipe.yaml"
    raw = yaml.safe_load((RECIPES / "quickstart.yaml").read_text())
    raw["stages"], raw["publish"] = raw["stages"][:2], {"stage": "autoencoder"}
    decoder = raw["stages"][1]
    del decoder["warm_start"], raw["evaluation"]
    decoder["model"] |= {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
                         "num_key_value_heads": 2, "vocab_size": 50}  # fmt: skip
    decoder["training"] |= {"optimizer": "adamw", "batch_size": 3, "bf16": False}
    path.write_text(yaml.safe_dump(raw), "utf-8")
    recipe = load_recipe(path)
    found = estimate_stage(recipe.stages[1], build_on_meta(recipe)["decoder"])
    layer = 4 * 8 * 8 + 3 * 8 * 16 + 2 * 8
    weights = 2 * layer + 8 + 50 * 8  # two layers, the last norm, the head; the token table costs no operations
    tokens = 3 * 128
    assert found.parameters == found.trainable == weights + 50 * 8
    assert found.operations == 2 * tokens * 3 * weights
    assert found.state_bytes == found.parameters * (4 + 4 + 8)
    assert found.activation_bytes == 2 * 34 * tokens * 8 * 2 + 10 * tokens * 50


def test_checkpointing_and_chunks_of_the_loss_take_less_memory():
    plain, saving = (
        estimate_recipe(load_recipe("llama_3_2_1b", [f"stages.memory.training.{key}" for key in overrides]))[-1]
        for overrides in (
            ["gradient_checkpointing=false", "loss_chunk=null"],
            ["gradient_checkpointing=true", "loss_chunk=512"],
        )
    )
    assert saving.activation_bytes < plain.activation_bytes / 5 and saving.state_bytes == plain.state_bytes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["qwen3_0_6b", "--rate", "0"], "expected a number above 0"),
     (["qwen3_0_6b", "pretrained.qwen3.config={}"], "has no model_type"),
     (["nothing"], "was not found")],
)  # fmt: skip
def test_mistakes_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_the_command_prints_a_line_for_each_stage(capsys: pytest.CaptureFixture[str]):
    assert main(["smollm2_135m_minilm", "--rate", "2.0e14"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert "not measured" in printed[0] and len(printed) == 3 and "2.0e+14" in printed[1]
